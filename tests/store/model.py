"""The store against a plain twin: any order of writes, wipes, folds, collections, prunes, restarts.

A Hypothesis state machine. Units and workers run at the same time, writes stall, callers give up, folds
stop half-way, in each of the three modes; after every step the store equals its twin, `check` is content,
and memory is what a restart would load. As a program: ``python -m tests.store.model --steps 50000``.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from indexer.errors import BadInput, StoreBusy
from indexer.store import sweep as sweep_module
from indexer.store import writer as writer_module
from indexer.store.check import check
from indexer.store.codecs import INVALID, OVERSIZE, AccountStatus, Mode
from indexer.store.keyspaces import BLOCKS, EVENTS, GC_QUEUE
from indexer.store.refcounts import fold
from indexer.store.state import State
from indexer.store.transaction import Transaction
from tests.store.support import SYNCED, Clock, Store, block_of, cid_of, founded, opened

DIDS = ("did:web:a.test", "did:web:ab.test", "did:web:b.test")
PATHS = ("a.b.c/1", "a.b.c/2", "a.b.d/1")
TEXTS = ("one", "two", "three")
FLAGS = (0, 0, 0, INVALID, OVERSIZE)
MODES = (Mode(), Mode(), Mode(), Mode(ephemeral=True), Mode(blocks=False))
RETENTION_S = 100
MARK_SPACING_US = RETENTION_S * 1_000_000 // 1024
STEPS_PER_EXAMPLE = 50


class Change(NamedTuple):
    did: str
    path: str
    text: str  # "" deletes
    flags: int


class Unit(NamedTuple):
    """One function on the writer, or a row of steps, one a change, of which every second may fail."""

    changes: list[Change]
    wipe_at: int  # before this change its repository is wiped
    wipes: int  # in a row
    fails: bool
    in_steps: bool
    in_bulk: bool  # what is put one after the other into a repository, in one call
    cancel_after: int | None  # turns of the loop


class Pass(NamedTuple):
    worker: str
    cancel_after: int | None


class Turns(NamedTuple):
    turns: int


class Forward(NamedTuple):
    seconds: int


Work = Unit | Pass | Turns | Forward


class TwinEvent(NamedTuple):
    id: int
    did: str
    path: str
    action: str
    cid: bytes | None
    time: int


class Twin:
    """What the store should hold, as plainly as can be."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.records: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.events: list[TwinEvent] = []
        self.dead: set[int] = set()  # ids of ended lives
        self.floor = 1
        self.head = 1

    def append(self, did: str, path: str, action: str, cid: bytes | None, now: int) -> None:
        self.events.append(TwinEvent(self.head, did, path, action, cid, now))
        self.head += 1

    def apply(self, change: Change, now: int) -> None:
        did, path, text, flags = change
        cid = cid_of(block_of(text)) if text else None
        if self.mode.ephemeral:
            if not flags or not text:
                self.append(did, path, "create" if text else "delete", cid, now)
            return
        old = self.records.get((did, path))
        served = old is not None and not old[1]
        if cid is None:
            if old is not None:
                del self.records[did, path]
                if served:
                    self.append(did, path, "delete", None, now)
            return
        if old == (cid, flags):
            return
        self.records[did, path] = (cid, flags)
        if not flags:
            self.append(did, path, "update" if served else "create", cid, now)
        elif served:
            self.append(did, path, "delete", None, now)

    def wipe(self, did: str, now: int) -> None:
        self.records = {key: value for key, value in self.records.items() if key[0] != did}
        self.dead |= {event.id for event in self.events if event.did == did}
        self.append(did, "", "account", None, now)

    def visible(self) -> list[TwinEvent]:
        return [event for event in self.events if event.id >= self.floor and event.id not in self.dead]

    def demanded(self) -> set[tuple[str, bytes]]:
        """The blocks that a record or a retained event refers to."""
        if not self.mode.blocks:
            return set()
        rows = {(key[0], cid) for key, (cid, flags) in self.records.items() if not flags & OVERSIZE}
        return rows | {(event.did, event.cid) for event in self.visible() if event.cid is not None}


def write(change: Change, tx: Transaction) -> None:
    did, path, text, flags = change
    founded(tx, did)
    if text:
        block = block_of(text)
        tx.put_record(did, path, cid_of(block), block, "3ka", live=True, flags=flags, action="create")
    else:
        tx.delete_record(did, path, "3ka", live=True)


def write_together(changes: list[Change], tx: Transaction) -> None:
    """Records put into one repository."""
    did = changes[0].did
    founded(tx, did)
    blocks = [block_of(change.text) for change in changes]
    records = [
        (change.path, cid_of(block), block, change.flags)
        for change, block in zip(changes, blocks, strict=True)
    ]
    tx.put_records(did, "3ka", records, live=True)


def runs(changes: list[Change], wipe_at: int) -> list[tuple[int, list[Change]]]:
    """What is put into one repository together, by its place: no wipe lies within."""
    found: list[tuple[int, list[Change]]] = []
    for index, change in enumerate(changes):
        last = changes[index - 1] if index else None
        if last is not None and index != wipe_at and last.text and change.text and last.did == change.did:
            found[-1][1].append(change)
        else:
            found.append((index, [change]))
    return found


class Stalling:
    """The database as the writer sees it: some writes stall first."""

    def __init__(self, db: Any) -> None:
        self._db = db
        self.stalls: list[bool] = []

    def write(self, batch: Any, options: Any) -> None:
        if self.stalls and self.stalls.pop():
            raise StoreBusy("Write stall")
        self._db.write(batch, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


GIVE_UP = st.none() | st.integers(0, 6)
CHANGES = st.builds(
    Change,
    st.sampled_from(DIDS),
    st.sampled_from(PATHS),
    st.sampled_from(("", *TEXTS)),
    st.sampled_from(FLAGS),
)
UNITS = st.builds(
    Unit,
    st.lists(CHANGES, min_size=1, max_size=6),
    st.sampled_from((-1, -1, -1, 0, 2)),
    st.sampled_from((1, 1, 2)),
    st.sampled_from((False, False, True)),
    st.booleans(),
    st.booleans(),
    GIVE_UP,
)
PASSES = st.builds(Pass, st.sampled_from(("checkpoint", "gc", "retention")), GIVE_UP)
WORK = st.lists(
    UNITS | UNITS | PASSES | st.builds(Turns, st.integers(1, 8)) | st.builds(Forward, st.integers(1, 60)),
    min_size=1,
    max_size=8,
)


class StoreMachine(RuleBasedStateMachine):
    steps: ClassVar[int] = 0  # of all runs

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.loop = asyncio.new_event_loop()
        self.ran: list[tuple[int, list[Change], int, int]] = []  # time, changes, wipe_at, wipes; in order

    @initialize(mode=st.sampled_from(MODES))
    def first_open(self, mode: Mode) -> None:
        self.twin = Twin(mode)
        self.open(3, 2, 20)

    def open(self, point_rows: int, step_rows: int, group_ops: int) -> None:
        self.context = opened(
            self.folder,
            mode=self.twin.mode,
            clock=self.clock,
            clean=False,
            events={"retention": RETENTION_S},
            gc={"step_rows": step_rows, "wipe_point_rows": point_rows, "compact_after": 20},
            writer={"group_ops": group_ops, "queue_units": 6},
        )
        self.store: Store = self.do(self.context.__aenter__)
        self.stalling = Stalling(self.store.db)
        self.store.writer.db = self.stalling

    def do(self, call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        async def run() -> Any:
            return await call(*arguments)

        return self.loop.run_until_complete(run())

    # ---- at the same time

    @rule(work=WORK, stalls=st.lists(st.booleans(), max_size=6))
    def at_the_same_time(self, work: list[Work], stalls: list[bool]) -> None:
        self.stalling.stalls = stalls
        before = self.store.log.floor
        self.do(self.all_of, work)
        self.stalling.stalls = []
        self.tell_the_twin()
        self.moved(before)

    async def all_of(self, work: list[Work]) -> None:
        tasks: list[asyncio.Future[Any]] = []
        for item in work:
            if isinstance(item, Turns):
                await self.turns(item.turns)
            elif isinstance(item, Forward):
                self.clock.forward(item.seconds)
            else:
                task = asyncio.ensure_future(
                    self.run_pass(item) if isinstance(item, Pass) else self.run(item)
                )
                tasks.append(task)
                if item.cancel_after is not None:
                    await self.turns(item.cancel_after)
                    task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(
                result, (BadInput, asyncio.CancelledError)
            ):
                raise result
        # What was given up may be on its way still; nothing overtakes it.
        await self.store.writer.run("last", lambda tx: tx.set_cursor("last", tx.now_us))

    @staticmethod
    async def turns(count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def run_pass(self, item: Pass) -> None:
        report = await getattr(self.store, item.worker).run_once()
        assert getattr(report, "faults", 0) == 0

    async def run(self, unit: Unit) -> None:
        if not unit.in_steps:
            step = self.step(unit, unit.changes, unit.wipe_at, unit.fails)
            await self.store.writer.run("unit", step)
            return
        steps = [
            self.step(unit, [change], 0 if index == unit.wipe_at else -1, unit.fails and index % 2 == 1)
            for index, change in enumerate(unit.changes)
        ]
        await self.store.writer.run_ordered("steps", steps, lambda _index, _error: lambda _tx: None)

    def step(
        self, unit: Unit, changes: list[Change], wipe_at: int, fails: bool
    ) -> Callable[[Transaction], None]:
        together = runs(changes, wipe_at) if unit.in_bulk else [(n, [each]) for n, each in enumerate(changes)]

        def run(tx: Transaction) -> None:
            for index, part in together:
                for _ in range(unit.wipes if index == wipe_at else 0):
                    tx.wipe_repo(part[0].did, AccountStatus.DELETED)
                if unit.in_bulk and part[0].text:
                    write_together(part, tx)
                else:
                    write(part[0], tx)
            tx.buffer_frame(changes[0].did, f"3k{len(changes)}", "commit", "s", b"x")
            if fails:
                raise BadInput("no")
            self.ran.append((tx.now_us, changes, wipe_at, unit.wipes))

        return run

    def tell_the_twin(self) -> None:
        for now, changes, wipe_at, wipes in self.ran:
            for index, change in enumerate(changes):
                for _ in range(wipes if index == wipe_at else 0):
                    self.twin.wipe(change.did, now)
                self.twin.apply(change, now)
        self.ran.clear()

    def moved(self, before: int) -> None:
        """The floor may have moved: never back, and never past an event that is too young."""
        floor, twin = self.store.log.floor, self.twin
        assert floor >= before
        cutoff = self.clock.now - RETENTION_S * 1_000_000
        assert all(event.time <= cutoff for event in twin.events[twin.floor - 1 : floor - 1])
        twin.floor = floor

    # ---- one after another

    @rule(did=st.sampled_from(DIDS), due=st.integers(0, 3))
    def schedule(self, did: str, due: int) -> None:
        def run(tx: Transaction) -> None:
            tx.set_repo(did, (tx.repo(did) or SYNCED)._replace(due=due, tracked=True))

        self.do(self.store.writer.run, "schedule", run)

    @rule()
    def fold_one_step(self) -> None:
        worker, refs = self.store.checkpoint, self.store.writer.state.refs
        plan = worker._plan(refs.next_row)
        counts = worker._counts(plan)
        self.do(self.store.writer.run, "checkpoint", lambda tx: fold(plan, counts, tx))

    @rule()
    def collect(self) -> None:
        assert self.do(self.store.gc.run_once).faults == 0

    @rule(seconds=st.integers(0, 150))
    def prune_and_sweep(self, seconds: int) -> None:
        self.clock.forward(seconds)
        before, marks = self.store.log.floor, self.store.retention.watermarks()
        report = self.do(self.store.retention.run_once)
        self.moved(before)
        now = self.clock.now
        # The pass took its time a tick or two ago: no mark lies that close to the cutoff.
        old = [mark.next for mark in marks if mark.time <= now - RETENTION_S * 1_000_000]
        assert report.floor == max([before, *old])
        newest = self.store.retention.watermarks()[-1:] or marks[-1:]
        assert newest
        assert newest[0].next == self.twin.head or now - newest[0].time <= MARK_SPACING_US

    @rule()
    def settle_everything(self) -> None:
        """After a pass of each worker nothing is left of what is gone."""
        before = self.store.log.floor
        for worker in (self.store.checkpoint, self.store.retention, self.store.checkpoint, self.store.gc):
            self.do(worker.run_once)
        self.moved(before)
        db = self.store.db
        assert {key for key, _ in db.scan(BLOCKS)} == self.twin.demanded()
        assert [event_id for event_id, _ in db.scan(EVENTS)] == [event.id for event in self.twin.visible()]
        assert self.store.writer.state.wipes.by_did == {}
        assert self.store.writer.state.refs.overlay == {}
        assert list(db.scan(GC_QUEUE)) == []

    @rule(
        point_rows=st.sampled_from([0, 3, 1000]),
        step_rows=st.sampled_from([1, 2, 50]),
        group_ops=st.sampled_from([1, 20, 5000]),
    )
    def kill_and_reopen(self, point_rows: int, step_rows: int, group_ops: int) -> None:
        if self.twin.head <= 1:  # no precondition: what is drawn must not hang on how threads went
            return
        self.do(self.context.__aexit__, None, None, None)
        self.open(point_rows, step_rows, group_ops)
        known = [did for did in DIDS if self.store.db.repo(did) is not None]
        assert [check(self.store.db, did).problems for did in known] == [[] for _ in known]

    # ---- always

    @invariant()
    def the_store_equals_its_twin(self) -> None:
        type(self).steps += 1
        store, twin = self.store, self.twin
        rows = {(did, path): (row.cid, row.flags) for did in DIDS for path, row in store.db.records(did)}
        assert rows == twin.records
        events = store.events()
        told = [
            (e.id, e.did, f"{e.collection}/{e.rkey}".strip("/"), e.action or e.kind, e.cid) for e in events
        ]
        assert told == [event[:5] for event in twin.visible()]
        store.log.blocks(events)
        assert (store.log.head, store.log.floor) == (twin.head, twin.floor)
        for mark in store.retention.watermarks():
            assert all((event.id < mark.next) == (event.time <= mark.time) for event in twin.events)
        assert check(store.db).problems == []

    @invariant()
    def memory_is_what_a_restart_would_load(self) -> None:
        state, fresh = self.store.writer.state, State(self.store.db, "boot-1")
        assert state.refs.overlay == fresh.refs.overlay
        for name in ("_last_rows", "unfolded", "position", "next_row"):
            assert getattr(state.refs, name) == getattr(fresh.refs, name), name
        assert state.wipes.by_did == fresh.wipes.by_did
        for name in ("next_id", "last_time", "floor", "reserved"):
            assert getattr(state, name) == getattr(fresh, name), name

    def teardown(self) -> None:
        if hasattr(self, "context"):
            self.do(self.context.__aexit__, None, None, None)
        self.loop.close()
        shutil.rmtree(self.folder)


def run_model(steps: int) -> None:
    """At least so many steps; raises when the store and its twin differ."""
    until = StoreMachine.steps + steps
    waits, long_sweep = writer_module._STALL_WAIT_S, sweep_module._LONG_SWEEP_S
    writer_module._STALL_WAIT_S = (0.0001, 0.001)  # type: ignore[misc]
    sweep_module._LONG_SWEEP_S = math.inf  # type: ignore[misc]  # a busy machine puts no sweep off
    try:
        while (left := until - StoreMachine.steps) > 0:
            run_state_machine_as_test(
                StoreMachine,
                settings=settings(
                    max_examples=1 + left // STEPS_PER_EXAMPLE,
                    stateful_step_count=STEPS_PER_EXAMPLE,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                    database=None,
                ),
            )
    finally:
        writer_module._STALL_WAIT_S = waits  # type: ignore[misc]
        sweep_module._LONG_SWEEP_S = long_sweep  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000)
    started = time.monotonic()
    run_model(parser.parse_args().steps)
    print(f"{StoreMachine.steps} steps without a difference in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
