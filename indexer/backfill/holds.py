"""Repositories of hosts that are banned, or have too many accounts: put aside, and let go again.

Owns the mark that such a row carries (``error`` begins with the reason), the steps that set and lift it, and
the walk over the queue that lifts it once an operator changed his mind. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from indexer.atproto.types import Did, Micros
from indexer.backfill.hosts import HELD, Hosts
from indexer.backfill.rows import is_waiting, known_identity
from indexer.identity.resolver import Identity
from indexer.ingest.account import reason_of
from indexer.store.database import Database
from indexer.store.keyspaces import PENDING, REPOS
from indexer.store.transaction import Transaction
from indexer.store.writer import Writer

#: Rows of the queue that are looked at, and let go, at once.
_STEP: Final = 500


@dataclass(frozen=True, slots=True)
class HoldUnit:
    """Waiting repositories that ``host`` holds, from which nothing is fetched: looked at again at ``due``, or
    when it is let go. No attempt is counted."""

    dids: Sequence[Did]
    host: str
    reason: str
    due: Micros
    identities: Mapping[Did, Identity]  # those that are known

    def __call__(self, tx: Transaction) -> None:
        for did in self.dids:
            row = tx.repo(did)
            if row is None or not is_waiting(row):
                continue
            if did in self.identities:
                row = known_identity(tx, did, row, self.identities[did])
            why = "is banned" if self.reason == HELD[0] else "has more accounts than its limit"
            tx.set_repo(did, row._replace(due=self.due, error=f"{self.reason}: {self.host} {why}"))


def holder(error: str) -> str:
    """The host that holds a row, by the row's error."""
    return error.partition(": ")[2].partition(" ")[0]


@dataclass(frozen=True, slots=True)
class LetGoUnit:
    """Held repositories are due now."""

    dids: Sequence[Did]

    def __call__(self, tx: Transaction) -> None:
        for did in self.dids:
            row = tx.repo(did)
            if row is not None and is_waiting(row) and reason_of(row.error) in HELD:
                tx.set_repo(did, row._replace(due=tx.now_us, error=""))


class Releases:
    """Hosts to be let go, one walk over the queue for all that came in since the last one began.

    A kill on the way costs patience only: a held row falls due by itself.
    """

    def __init__(self, db: Database, writer: Writer, hosts: Hosts) -> None:
        self._db = db
        self._writer = writer
        self._hosts = hosts
        self._wanted: set[str] = set()
        self._work = asyncio.Event()

    def add(self, host: str) -> None:
        self._wanted.add(host)
        self._work.set()

    async def run(self) -> None:
        """Lets go until cancelled."""
        while True:
            await self._work.wait()
            self._work.clear()
            hosts, self._wanted = self._wanted, set()
            await self._walk(hosts)

    async def _walk(self, hosts: set[str]) -> None:
        start: bytes | None = None
        while True:
            keys = [key for key, _ in self._db.scan(PENDING, start, limit=_STEP)]
            dids = [did for _, did in keys]
            rows = self._db.multi_get(REPOS, dids)
            held = [
                did
                for did, row in zip(dids, rows, strict=True)
                if row is not None and reason_of(row.error) in HELD and holder(row.error) in hosts
            ]
            if held:
                await self._writer.run("backfill_let_go", LetGoUnit(held))
            if len(keys) < _STEP:
                return
            start = PENDING.key.encode(keys[-1]) + b"\0"
            await asyncio.sleep(0)
