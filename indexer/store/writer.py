"""The one doorway for changes: a task that joins units of work into group commits.

A unit runs on the pending group, so it sees what the units before it wrote; the group is committed
as one batch, then callers are released and readers of the log woken. A stall is waited out and the
batch rebuilt; any other failed commit poisons the writer for good. Runs on the event loop: writing
holds the GIL anyway, syncing the log does not and happens in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, cast

import rocksdict

from indexer.atproto.types import EventId, Micros
from indexer.config import Settings
from indexer.errors import StoreBusy, StoreError, WriterPoisoned
from indexer.store import keyspaces
from indexer.store.codecs import pack
from indexer.store.database import Database
from indexer.store.group import Limits
from indexer.store.state import State
from indexer.store.transaction import Transaction
from indexer.store.units import Rescue, Step, Unit, WriterStats

__all__ = ["Rescue", "Step", "Writer", "WriterStats", "clock_us", "limits_of"]

T = TypeVar("T")
_STALL_WAIT_S: Final = (0.005, 0.2)  # first and longest wait while RocksDB asks for patience


def clock_us() -> Micros:
    return time.time_ns() // 1000


def limits_of(settings: Settings) -> Limits:
    ingest, store = settings.ingest, settings.store
    return Limits(
        ingest.buffer_frames_per_repo,
        ingest.buffer_kib_per_repo * 1024,
        ingest.buffer_mib * 1024 * 1024,
        ingest.unproven_frames_per_repo,
        ingest.unproven_mib * 1024 * 1024,
        store.quarantine_entries,
        store.quarantine_entry_kib * 1024,
        settings.gc.wipe_point_rows,
    )


class Writer:
    """Commits units of work in the order in which they were handed in."""

    def __init__(
        self,
        db: Database,
        settings: Settings | None = None,
        *,
        clock: Callable[[], Micros] = clock_us,
        boot: str | None = None,
        crash_point: Callable[[str], None] | None = None,
    ) -> None:
        settings = settings or Settings.model_validate({})  # the defaults, without the environment
        self.db = db
        self.state = State(db, boot)
        self._tx = Transaction(db, self.state, limits_of(settings), clock)
        self._settings = settings.writer
        self._group_bytes = settings.writer.group_kib * 1024
        self._group_s = settings.writer.group_ms / 1000
        self._flush_interval = settings.durability.flush_interval
        self._crash_point = crash_point
        self._queue: deque[Unit[Any]] = deque()
        self._waiting: deque[Unit[Any]] = deque()  # not admitted yet, in order
        self._queued = 0  # steps in the queue
        self._wake = asyncio.Event()
        self._head_moved: asyncio.Future[None] | None = None
        self._head = self.state.next_id
        self._closed = asyncio.Event()
        self._dirty = False  # committed since the last sync
        self._poison: BaseException | None = None
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._options = rocksdict.WriteOptions()
        self._options.no_slowdown = True
        self._groups = self._units = self._stalls = self._syncs = 0
        self._commit_s = 0.0
        self._names: Counter[str] = Counter()

    # ---- life

    async def start(self) -> None:
        """Mark the database as in use (synced), then take work."""
        await self._write_cursors(self.state.start_rows())
        self._tasks = [asyncio.create_task(self._run(), name="writer")]
        if self._flush_interval > 0:
            self._tasks.append(asyncio.create_task(self._flush(), name="writer-flush"))

    async def stop(self) -> None:
        """Commit what is queued, sync, leave the mark of a shutdown in good order."""
        if self._stopping or not self._tasks:
            self._stopping = True
            return
        self._stopping = True
        self._wake.set()
        run, *others = self._tasks
        await asyncio.gather(run, return_exceptions=True)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._poison is None:
            await self._write_cursors({keyspaces.CLEAN: 1})
        self._closed.set()
        self._wake_readers()

    async def abandon(self) -> None:
        """Stop at once, as a kill would: nothing queued is committed, no mark is left."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write_cursors(self, rows: dict[str, Any]) -> None:
        def build() -> Any:
            handle = self.db.handles[keyspaces.CURSORS.name]  # in a frame that ends: it holds the LOCK
            batch = rocksdict.WriteBatch(raw_mode=True)
            for name, value in rows.items():
                if value is None:
                    batch.delete(name.encode(), handle)
                else:
                    batch.put(name.encode(), pack(value), handle)
            return batch

        await self._write(build)
        await self._sync()

    # ---- the doorway

    async def run(self, name: str, fn: Callable[[Transaction], T], *, ahead: bool = False) -> T:
        """Run ``fn`` on the pending group; its result once the group is committed. ``ahead`` of what waits,
        whatever the queue's bound, goes the upkeep that bounds memory.

        What ``fn`` raises is raised here, after its writes are undone.
        """
        return cast(T, await (await self._submit(name, (fn,), None, ahead)))

    async def run_ordered(self, name: str, steps: Sequence[Step], rescue: Rescue) -> None:
        """Run steps one after another; returns once all are committed.

        A step that raises is undone and replaced by ``rescue(i, error)`` before the next one runs. A
        `StoreError`, or a rescue that raises, poisons the writer: the bad state is our own.
        The steps may be spread over several commits; each is whole in one.
        """
        if steps:
            await (await self._submit(name, steps, rescue))

    async def submit_ordered(self, name: str, steps: Sequence[Step], rescue: Rescue) -> asyncio.Future[None]:
        """As `run_ordered`, but returns once the steps are queued, with the future of their commit."""
        return await self._submit(name, steps, rescue)

    async def _submit(
        self,
        name: str,
        steps: Sequence[Callable[[Transaction], Any]],
        rescue: Rescue | None,
        ahead: bool = False,
    ) -> asyncio.Future[Any]:
        self._check()
        unit: Unit[Any] = Unit(name, steps, rescue, asyncio.get_running_loop().create_future())
        fits = not self._queue or self._queued + len(steps) <= self._settings.queue_units
        if ahead or (fits and not self._waiting):
            self._admit(unit, ahead)
        else:
            unit.admitted = asyncio.get_running_loop().create_future()
            self._waiting.append(unit)
            try:
                await unit.admitted
            except asyncio.CancelledError:
                unit.future.cancel()
                raise
        return unit.future

    def _admit(self, unit: Unit[Any], ahead: bool = False) -> None:
        (self._queue.appendleft if ahead else self._queue.append)(unit)
        self._queued += len(unit.steps)
        self._wake.set()

    def _admit_waiting(self) -> None:
        while self._waiting:
            unit = self._waiting[0]
            if self._queue and self._queued + len(unit.steps) > self._settings.queue_units:
                return
            self._waiting.popleft()
            if unit.future.cancelled():
                continue
            self._admit(unit)
            if unit.admitted is not None and not unit.admitted.done():
                unit.admitted.set_result(None)

    def _check(self) -> None:
        if self._poison is not None:
            raise WriterPoisoned(f"the writer is closed for good: {self._poison}") from self._poison
        if self._stopping:
            raise WriterPoisoned("the writer is stopped")

    # ---- what readers ask

    @property
    def head(self) -> EventId:
        """The id of the next event: every event below it is committed (and synced, when all are)."""
        return self._head

    @property
    def floor(self) -> EventId:
        """The first id that may still be read."""
        return self.state.floor

    @property
    def poisoned(self) -> bool:
        return self._poison is not None

    async def wait_head(self, beyond: EventId) -> EventId:
        """Wait until the head is above ``beyond``; raises `WriterPoisoned` when it cannot move any more."""
        while self._head <= beyond:
            self._check()
            if self._head_moved is None:
                self._head_moved = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._head_moved)
        return self._head

    async def wait_closed(self) -> BaseException | None:
        """Wait until nothing is written any more; what poisoned the writer, None after a stop."""
        await self._closed.wait()
        return self._poison

    @property
    def stats(self) -> WriterStats:
        return WriterStats(
            self._groups, self._units, self._stalls, self._syncs, self._queued, self._commit_s,
            dict(self._names),
        )  # fmt: skip

    # ---- the task

    async def _run(self) -> None:
        done: list[Unit[Any]] = []
        try:
            while self._poison is None:
                if not self._queue:
                    if self._stopping and not self._waiting:
                        return
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                done.clear()
                self._fill(done)
                await self._commit(done)
                self._release(done)
                self._admit_waiting()
                await asyncio.sleep(0)
        except BaseException as error:
            self._poisoned_by(error, done)
            if isinstance(error, (KeyboardInterrupt, SystemExit, asyncio.CancelledError)):
                raise

    def _fill(self, done: list[Unit[Any]]) -> None:
        """Run units on the group until it is full or the queue is empty; ``done`` gets the finished."""
        tx, queue = self._tx, self._queue
        max_ops, max_bytes = self._settings.group_ops, self._group_bytes
        deadline = time.monotonic() + self._group_s
        while queue:
            unit = queue[0]
            before = unit.index
            finished = unit.future.cancelled() or self._advance(unit, max_ops, max_bytes, deadline)
            self._queued -= unit.index - before
            if finished:
                queue.popleft()
                self._queued -= len(unit.steps) - unit.index  # of a unit that failed
                self._units += 1
                self._names[unit.name] += 1
                done.append(unit)
            if tx.ops >= max_ops or tx.size >= max_bytes or time.monotonic() > deadline:
                return

    def _advance(self, unit: Unit[Any], max_ops: int, max_bytes: int, deadline: float) -> bool:
        """Run a unit's steps; true when none is left, false when the group is full first."""
        tx, steps, monotonic = self._tx, unit.steps, time.monotonic
        for index in range(unit.index, len(steps)):
            point = tx.savepoint()
            try:
                unit.result = steps[index](tx)
            except Exception as error:
                tx.undo(point)
                if not self._rescue(unit, index, error):
                    return True
            unit.index = index + 1
            if tx.ops >= max_ops or tx.size >= max_bytes or monotonic() > deadline:
                return unit.index == len(steps)
        return True

    def _rescue(self, unit: Unit[Any], index: int, error: Exception) -> bool:
        """Put the rescue in a failed step's place; false when the unit has failed for its caller. Such steps
        must not be lost: when the store or the rescue is at fault, nothing more is committed."""
        if unit.rescue is None:
            unit.fail(error)
            return False
        if isinstance(error, StoreError):
            raise error
        try:
            unit.rescue(index, error)(self._tx)
        except Exception as worse:
            raise StoreError(f"{unit.name}: the rescue of a failed step failed: {worse}") from worse
        return True

    async def _commit(self, done: list[Unit[Any]]) -> None:
        tx = self._tx
        if not tx.pending:
            tx.clear()
            return
        must_sync = tx.finish()
        self._crash_points("before", done)
        await self._write(tx.batch)
        tx.absorb()  # at once: what memory mirrors must not lag behind what reads see
        if must_sync or self._flush_interval == 0:
            await self._sync()
        self._crash_points("after", done)
        self._groups += 1
        if self._head != self.state.next_id:
            self._head = self.state.next_id
            self._wake_readers()

    def _crash_points(self, moment: str, done: list[Unit[Any]]) -> None:
        if self._crash_point is not None:
            for unit in done:
                self._crash_point(f"{moment} {unit.name}")

    async def _write(self, build: Callable[[], Any]) -> None:
        """Write a batch; a stall consumes it, so it is built again after a wait."""
        wait, longest = _STALL_WAIT_S
        while True:
            if self._poison is not None:
                raise self._poison
            batch = build()
            started = time.perf_counter()
            try:
                self.db.write(batch, self._options)
            except StoreBusy:
                self._stalls += 1
                await asyncio.sleep(wait)
                wait = min(wait * 2, longest)
                continue
            finally:
                self._commit_s += time.perf_counter() - started
            self._dirty = True
            return

    def _release(self, done: list[Unit[Any]]) -> None:
        for unit in done:
            if not unit.future.done():
                unit.future.set_result(unit.result)

    def _wake_readers(self) -> None:
        moved, self._head_moved = self._head_moved, None
        if moved is not None and not moved.done():
            moved.set_result(None)

    def _poisoned_by(self, error: BaseException, done: list[Unit[Any]]) -> None:
        if self._poison is None:
            self._poison = error
        closed = WriterPoisoned(f"the writer is closed for good: {error}")
        closed.__cause__ = error
        for unit in (*done, *self._queue, *self._waiting):
            unit.fail(closed)
        self._queue.clear()
        self._waiting.clear()
        self._queued = 0
        self._wake.set()
        self._closed.set()
        self._wake_readers()

    # ---- durability

    async def _sync(self) -> None:
        self._dirty = False
        await asyncio.to_thread(self.db.sync_wal)
        self._syncs += 1

    async def _flush(self) -> None:
        """Bound what a power cut may take."""
        while True:
            await asyncio.sleep(self._flush_interval)
            if not self._dirty:
                continue
            try:
                await self._sync()
            except StoreError as error:
                self._poisoned_by(error, [])
                return
