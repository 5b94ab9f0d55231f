"""The checkpoint: the reference log folded into `block_refs`, in atomic, resumable steps.

A step reads a range of the log, sums it, and writes the new counts, the zeros' queue entries, the
truncation and the new position in one batch; it leaves out lives that ended since it read. Beside steps
only wipes change `block_refs`, and new records of lives of which the log names nothing that is not folded.
On the writer's loop; stored counts are read in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import Final, NamedTuple

from indexer.atproto.types import Cid, Did
from indexer.config import GcSettings
from indexer.store.codecs import encode_u64
from indexer.store.database import Database
from indexer.store.keyspaces import BLOCK_REFS, CHECKPOINT, GC_QUEUE, REFLOG
from indexer.store.references import Life
from indexer.store.transaction import Transaction
from indexer.store.worker import Worker
from indexer.store.writer import Writer

_HURRY_MAX: Final = 4.0


class FoldPlan(NamedTuple):
    """A range of log rows, summed."""

    position: int  # the first row
    stop: int  # the row after the last
    changes: int
    sums: dict[Life, dict[Cid, int]]


class CheckpointReport(NamedTuple):
    position: int  # the first row that is not folded now
    rows: int
    changes: int
    zeroed: int  # blocks queued for collection
    steps: int


class CheckpointWorker(Worker):
    """Folds the reference log into `block_refs`, step by step."""

    name = "checkpoint"

    def __init__(self, db: Database, writer: Writer, settings: GcSettings) -> None:
        super().__init__(db, writer, settings)
        self.last: CheckpointReport | None = None
        self._totals = [0, 0, 0]

    @property
    def interval(self) -> float:
        return self._settings.checkpoint_interval

    def due_early(self) -> bool:
        return self._writer.state.refs.unfolded >= self._settings.checkpoint_rows

    @property
    def stats(self) -> dict[str, int]:
        refs = self._writer.state.refs
        rows, changes, zeroed = self._totals
        return {
            "passes": self.passes,
            "failures": self.failures,
            "position": refs.position,
            "unfolded": refs.unfolded,
            "rows": rows,
            "changes": changes,
            "zeroed": zeroed,
        }

    async def run_once(self) -> CheckpointReport:
        """Fold everything that is in the log now."""
        async with self._turn:
            refs = self._writer.state.refs
            target = refs.next_row
            start, changes, zeroed, steps = refs.position, 0, 0, 0
            while refs.position < target:
                started = time.perf_counter()
                plan = self._plan(target)
                planned = time.perf_counter() - started
                counts = await asyncio.to_thread(self._counts, plan)  # where they lie on disk, it takes long
                began = time.perf_counter() - planned
                zeros = await self._pace.step(self._writer, self.name, partial(fold, plan, counts), began)
                if zeros is not None:
                    zeroed += zeros
                    changes += plan.changes
                    steps += 1
                await self._pace.rest(self._pace.took, plan.changes, self._hurry())
            report = CheckpointReport(refs.position, refs.position - start, changes, zeroed, steps)
            if report.rows:
                await self._writer.run(self.name, lambda tx: tx.add_count("gc/checkpoints", 1), ahead=True)
            self._totals = [a + b for a, b in zip(self._totals, report[1:4], strict=True)]
            self.last = report
            self.passes += 1
            return report

    def _hurry(self) -> float:
        """How far the log has outgrown its bound: memory holds what is not folded, so writes must wait."""
        return min(_HURRY_MAX, self._writer.state.refs.unfolded / (2 * self._settings.checkpoint_rows))

    def _plan(self, target: int) -> FoldPlan:
        """Read rows from the position on, up to a step's worth of changes."""
        position = self._writer.state.refs.position
        sums: dict[Life, dict[Cid, int]] = {}
        changes, stop = 0, position
        for row, entries in self._db.scan(REFLOG, encode_u64(position), encode_u64(target)):
            for did, epoch, deltas in entries:
                cids = sums.setdefault((did, epoch), {})
                for cid, delta in deltas.items():
                    cids[cid] = cids.get(cid, 0) + delta
                changes += len(deltas)
            stop = row + 1
            if changes >= self._pace.rows:
                return FoldPlan(position, stop, changes, sums)
        return FoldPlan(position, target, changes, sums)

    def _counts(self, plan: FoldPlan) -> dict[tuple[Did, Cid], int]:
        """The stored counts; of what is to be folded only wipes change them, and are noticed by epoch."""
        keys = [(did, cid) for (did, _), cids in plan.sums.items() for cid in cids]
        counts = self._db.multi_get_apart(BLOCK_REFS, keys)
        return {key: count or 0 for key, count in zip(keys, counts, strict=True)}


def fold(plan: FoldPlan, counts: Mapping[tuple[Did, Cid], int], tx: Transaction) -> int | None:
    """Write the new counts, queue the zeros, truncate the log, move the position; returns the zeros.

    None, with nothing done, when the range is folded already: a pass that was given up while its step
    was on the way leaves that step to be committed after the next pass has read.
    """
    if plan.position != (tx.cursor(CHECKPOINT) or 0):
        return None
    zeroed = 0
    for life, cids in plan.sums.items():
        did, epoch = life
        if tx.stale(did, epoch):
            continue
        for cid, delta in cids.items():
            key = (did, cid)
            old = counts[key]
            if old + delta:
                if delta:
                    tx.put(BLOCK_REFS, key, old + delta)
            else:
                if old:
                    tx.delete(BLOCK_REFS, key)
                tx.put(GC_QUEUE, key, None)
                zeroed += 1
        tx.settle(life, cids)
    for row in range(plan.position, plan.stop):
        tx.delete(REFLOG, row)
    tx.settle_changes(plan.changes)
    tx.set_cursor(CHECKPOINT, plan.stop)
    return zeroed
