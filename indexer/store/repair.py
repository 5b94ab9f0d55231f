"""Puts counts and references right: what `check` finds wrong in them is set to the recount.

Records, events and blocks are what the rest is counted from, so they are never touched. A count that
comes to zero puts its block in `gc_queue`, as a fold does; a block that was neither counted nor queued
stays and is `check`'s to report. Offline: opens a writer of its own to fold the reference log first.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from indexer.atproto.types import Cid, Did
from indexer.config import Settings
from indexer.errors import StoreCorrupt
from indexer.store.codecs import encode_cid_key, encode_u64, pack
from indexer.store.database import Database
from indexer.store.findings import Findings
from indexer.store.keyspaces import BLOCK_REFS, COUNTS, GC_QUEUE, REFLOG
from indexer.store.raw import Change, RawRows
from indexer.store.recount import Recount
from indexer.store.refcounts import CheckpointWorker
from indexer.store.writer import Writer

_BATCH: Final = 2000


class Repaired(NamedTuple):
    references: int  # rows of counts and of the log that were set right
    totals: int


async def repair(db: Database, settings: Settings, did: Did | None = None) -> Repaired:
    """Set counts and references of everything, or of one repository, to a recount.

    Raises `StoreCorrupt` when a row that holds references does not decode: its blocks would be let go.
    """
    await _fold(db, settings)
    with db.snapshot() as snapshot:
        repairs = _Repairs(RawRows(db), everything=did is None)
        recount = Recount(snapshot, db.mode, did, repairs)
        recount.rows()
        if recount.undecodable:
            raise StoreCorrupt(
                f"{recount.undecodable} events do not decode, so what they refer to is unknown; "
                "restore a backup"
            )
        recount.references()
        recount.totals()
        repairs.flush()
    db.sync_wal()
    return Repaired(repairs.references_set, repairs.totals_set)


async def _fold(db: Database, settings: Settings) -> None:
    """Empty the reference log, so that the rows alone are the counts."""
    writer = Writer(db, settings)
    await writer.start()
    try:
        await CheckpointWorker(db, writer, settings.gc).run_once()
    finally:
        await writer.stop()


class _Repairs(Findings):
    """Writes the recount where it differs; reads go on from the snapshot."""

    wants_blocks = False

    def __init__(self, rows: RawRows, *, everything: bool) -> None:
        super().__init__()
        self.references_set = 0
        self.totals_set = 0
        self._rows = rows
        self._everything = everything
        self._changes: list[Change] = []

    def wrong_count(self, did: Did, cid: Cid, counted: int, referred: int) -> None:
        key = encode_cid_key((did, cid))
        if referred:
            self._put((BLOCK_REFS.name, key, pack(referred)))
        else:
            self._put((BLOCK_REFS.name, key, None), (GC_QUEUE.name, key, b""))
        self.references_set += 1

    def zero_row(self, did: Did, cid: Cid) -> None:
        # A row that belongs there after all is told as a wrong count, later.
        key = encode_cid_key((did, cid))
        self._put((BLOCK_REFS.name, key, None), (GC_QUEUE.name, key, b""))
        self.references_set += 1

    def folded_rows(self, first: int, last: int, position: int) -> None:
        if not self._everything:
            return  # the log is of all repositories
        for key, _ in self._rows.scan(REFLOG.name, encode_u64(first), encode_u64(position)):
            self._put((REFLOG.name, key, None))
        self.references_set += 1

    def wrong_total(self, name: str, stored: int, recounted: int) -> None:
        self._put((COUNTS.name, name.encode(), pack(recounted) if recounted else None))
        self.totals_set += 1

    def _put(self, *changes: Change) -> None:
        self._changes += changes
        if len(self._changes) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        if self._changes:
            self._rows.commit(self._changes)
            self._changes.clear()
