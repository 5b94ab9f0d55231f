"""Words on accounts by upstreams that are followed no longer: they stop to count.

Owns the sweep that drops them, in small steps of one batch each, and what the remaining words make of an
account then. A row of `cursors` for each upstream says how far the sweep is, from the batch of the removal
on, so that a kill leaves none behind. Event loop only.
"""

from __future__ import annotations

import asyncio
from typing import Final

from indexer.atproto.types import Did
from indexer.ingest.apply import Applier
from indexer.ingest.tools import IngestTools
from indexer.ingest.words import with_words
from indexer.store.codecs import after_prefix, encode_pair
from indexer.store.keyspaces import ACCOUNT_STATUS, CURSORS
from indexer.store.transaction import Transaction

#: Rows of `cursors`: this + the upstream's name; the key of the last word that was looked at.
ROWS: Final = "unheard/"
_STEP: Final = 500
_REST_S: Final = 0.01


def plan(tx: Transaction, upstream: str) -> None:
    """Has the words of ``upstream`` dropped."""
    tx.set_cursor(ROWS + upstream, ["", ""])


def cancel(tx: Transaction, upstream: str) -> None:
    """The upstream is followed again: what it said and is not swept yet counts."""
    tx.set_cursor(ROWS + upstream, None)


class WordSweep:
    """Works off the plans."""

    def __init__(self, tools: IngestTools, applier: Applier) -> None:
        self._tools = tools
        self._applier = applier
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Something was planned."""
        self._woken.set()

    async def run(self) -> None:
        """Until cancelled; a failure of our own store ends it and the daemon with it."""
        prefix = ROWS.encode()
        while True:
            self._woken.clear()
            for name, _ in list(self._tools.db.scan(CURSORS, prefix, after_prefix(prefix))):
                while await self._step(name.removeprefix(ROWS)):
                    await asyncio.sleep(_REST_S)
            await self._woken.wait()

    async def _step(self, name: str) -> bool:
        """Looks at some words; false when there are no more."""
        db = self._tools.db
        position = db.get(CURSORS, ROWS + name)
        if not isinstance(position, list):
            return False
        start = encode_pair((position[0], position[1])) + b"\0"
        keys = [key for key, _ in db.scan(ACCOUNT_STATUS, start if position[0] else None, limit=_STEP)]
        dids = [did for did, source in keys if source == name]
        last = list(keys[-1]) if len(keys) == _STEP else None

        def step(tx: Transaction) -> bool:
            if tx.position(ROWS + name) != position:
                return False  # followed again
            for did in dids:
                self._drop(tx, did, name)
            tx.set_cursor(ROWS + name, last)
            return last is not None

        return await self._tools.writer.run("unheard", step)

    def _drop(self, tx: Transaction, did: Did, name: str) -> None:
        tx.drop_account_word(did, name)
        row = tx.repo(did)
        if row is not None:
            words = tx.account_words(did)
            new = with_words(tx, did, row, words, ephemeral=self._applier.ephemeral)
            self._applier.store(tx, did, row, new)
