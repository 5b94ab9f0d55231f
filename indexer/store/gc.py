"""Collection of blocks that nothing refers to.

Goes through `gc_queue` in key order, in paced steps on the writer. A block is destroyed only when the
counts are whole and its effective count is exactly zero in the very turn that deletes it. Space
comes back when RocksDB compacts: the collectors see to it where dead blocks lie close together, and a
repository, or the keyspace, that lost much of what it had is compacted on request. On the writer's
loop; compaction in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from functools import partial
from typing import Final, Literal, NamedTuple

import structlog

from indexer.atproto.types import Cid, Did
from indexer.config import GcSettings
from indexer.store.codecs import decode_cid_key, did_range, encode_cid_key
from indexer.store.database import Database
from indexer.store.keyspaces import BLOCKS, GC_QUEUE
from indexer.store.transaction import Transaction
from indexer.store.worker import Worker
from indexer.store.writer import Writer

_DENSE: Final = 3  # a range is worth compacting when this much of it was destroyed: one in so many rows
_NOTED: Final = 4096  # repositories of which it is known how much they lost

log = structlog.get_logger(__name__)


def verdict(count: int, ready: bool) -> Literal["destroy", "keep", "fault", "wait"]:
    """What to do with a queued block of that effective count.

    ``wait``: counts are not whole yet; ``keep``: it is referred to again, the entry goes;
    ``fault``: a negative count is our own mistake: block and entry stay, loudly.
    """
    if not ready:
        return "wait"
    if count == 0:
        return "destroy"
    return "keep" if count > 0 else "fault"


class GcStep(NamedTuple):
    looked: int
    reclaimed: int
    reclaimed_bytes: int
    kept: int
    faults: int
    by_did: Counter[Did]  # blocks destroyed


class GcReport(NamedTuple):
    """A pass: entries looked at, blocks destroyed and their bytes, blocks kept, negative counts."""

    looked: int
    reclaimed: int
    reclaimed_bytes: int
    kept: int
    faults: int
    compacted: bool


class BlocksGcWorker(Worker):
    """Destroys the queued blocks whose count is zero."""

    name = "blocks_gc"

    def __init__(self, db: Database, writer: Writer, settings: GcSettings) -> None:
        super().__init__(db, writer, settings)
        self.last: GcReport | None = None
        self.reclaimed = 0
        self.reclaimed_bytes = 0
        self.compactions = 0
        self._emptied = 0  # blocks destroyed since the last compaction of the keyspace
        self._emptied_by: Counter[Did] = Counter()  # since the last one of the repository

    @property
    def interval(self) -> float:
        return self._settings.blocks_interval

    @property
    def stats(self) -> dict[str, int]:
        """Live and dead bytes are RocksDB's estimates for the files of `blocks`."""
        family = self._db.stats()[BLOCKS.name]
        return {
            "passes": self.passes,
            "failures": self.failures,
            "live_bytes": family["live_bytes"],
            "dead_bytes": max(0, family["sst_bytes"] - family["live_bytes"]),
            "reclaimed": self.reclaimed,
            "reclaimed_bytes": self.reclaimed_bytes,
            "compactions": self.compactions,
        }

    async def run_once(self) -> GcReport:
        """One walk through the queue."""
        async with self._turn:
            totals = [0] * 5
            position: bytes | None = b""
            while position is not None and self._writer.state.refs.ready:
                started = time.perf_counter()
                keys, position = self._queued(position)
                if keys:
                    step = await self._pace.step(self._writer, self.name, partial(collect, keys), started)
                    totals = [a + b for a, b in zip(totals, step[:5], strict=True)]
                    self._note(step)
                    await self._pace.rest(self._pace.took, len(keys))
            looked, reclaimed, size, kept, faults = totals
            report = GcReport(looked, reclaimed, size, kept, faults, await self._compact())
            self.last = report
            self.passes += 1
            if report.faults:
                log.error("negative_block_counts", blocks=report.faults, advice="run `indexer db check`")
            return report

    def _queued(self, position: bytes) -> tuple[list[tuple[Did, Cid]], bytes | None]:
        """The next entries, and where to go on (None at the end)."""
        rows = self._db.raw_scan(GC_QUEUE.name, position, None)
        keys: list[tuple[Did, Cid]] = []
        for raw, _ in rows:
            keys.append(decode_cid_key(raw))
            if len(keys) >= self._pace.rows:
                return keys, raw + b"\0"
        return keys, None

    def _note(self, step: GcStep) -> None:
        self.reclaimed += step.reclaimed
        self.reclaimed_bytes += step.reclaimed_bytes
        self._emptied += step.reclaimed
        self._emptied_by += step.by_did
        if len(self._emptied_by) > 2 * _NOTED:
            self._emptied_by = Counter(dict(self._emptied_by.most_common(_NOTED)))

    async def _compact(self) -> bool:
        """Compact what lost much of what it had; dead blocks among many living are left to the collectors."""
        if self._emptied < self._settings.compact_after:
            return False
        ranges: list[tuple[bytes | None, bytes | None]] = []
        if self._emptied * _DENSE >= self._emptied + self._db.stats()[BLOCKS.name]["rows"]:
            ranges.append((None, None))
            self._emptied = 0
            self._emptied_by.clear()
        else:
            for did in self._dense():
                ranges.append(did_range(did))
                self._emptied -= self._emptied_by.pop(did)
        for low, high in ranges:
            await asyncio.to_thread(self._db.compact, BLOCKS, low, high)
            self.compactions += 1
        return bool(ranges)

    def _dense(self) -> list[Did]:
        """Repositories that lost enough, and much beside the records that they have now."""
        least = self._settings.compact_after
        return [
            did
            for did, lost in self._emptied_by.items()
            if lost >= least and lost * _DENSE >= lost + sum(self._db.counts(f"did/{did}/").values())
        ]


def collect(keys: list[tuple[Did, Cid]], tx: Transaction) -> GcStep:
    """Judge queued blocks in the writer's turn; blocks and their entries go in one batch."""
    size = kept = faults = 0
    by_did: Counter[Did] = Counter()
    for key in keys:
        if tx.raw(GC_QUEUE.name, encode_cid_key(key)) is None:
            continue  # a wipe was faster
        match verdict(tx.block_count(*key), tx.counts_ready):
            case "destroy":
                block = tx.get(BLOCKS, key)
                if block is not None:
                    tx.delete(BLOCKS, key)
                    by_did[key[0]] += 1
                    size += len(block)
                tx.delete(GC_QUEUE, key)
            case "keep":
                tx.delete(GC_QUEUE, key)
                kept += 1
            case "fault":
                faults += 1
            case "wait":
                pass
    reclaimed = by_did.total()
    if reclaimed:
        tx.add_count("gc/blocks_reclaimed", reclaimed)
    return GcStep(len(keys), reclaimed, size, kept, faults, by_did)
