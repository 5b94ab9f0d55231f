"""Lives that ended: which events and log rows belong to a wiped life and are still on disk.

A wipe raises the repository's epoch and leaves a marker in `cursors` (``wipe/<did>``) until the
last trace of the old life is swept. Readers and the fold ask the markers, which are few and kept in
memory, instead of reading the repository's row for every event.
"""

from __future__ import annotations

from typing import NamedTuple

from indexer.atproto.types import Did, EventId
from indexer.errors import StoreCorrupt
from indexer.store.codecs import after_prefix
from indexer.store.database import Database
from indexer.store.keyspaces import CURSORS, WIPE


class Wipe(NamedTuple):
    """``epoch`` is the new life's; ``head``, ``row`` and ``refused`` are where events, log and
    quarantine stood."""

    epoch: int
    head: EventId
    row: int
    ranged: bool  # content went by range deletes: compact the range
    refused: int  # the next number of the quarantine


class Wipes:
    """The markers, by DID. ``generation`` moves with every wipe: what was made of events before is void."""

    __slots__ = ("by_did", "generation")

    def __init__(self) -> None:
        self.generation = 0
        self.by_did: dict[Did, Wipe] = {}

    def load(self, db: Database) -> None:
        start = WIPE.encode()
        for name, value in db.scan(CURSORS, start, after_prefix(start)):
            try:
                self.by_did[name.removeprefix(WIPE)] = Wipe(*value)
            except TypeError as error:
                raise StoreCorrupt(f"cursors: row {name!r} holds {value!r}, no marker of a wipe") from error

    def ended(self, did: Did, wipe: Wipe) -> None:
        """A wipe was committed."""
        self.by_did[did] = wipe
        self.generation += 1

    def stale(self, did: Did, epoch: int) -> bool:
        """Whether something of this epoch belongs to a life that ended."""
        wipe = self.by_did.get(did)
        return wipe is not None and epoch < wipe.epoch
