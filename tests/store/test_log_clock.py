"""Events grow old by the time that passes: a clock that is set, or wrong at a start, prunes nothing young."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.errors import StoreCorrupt
from indexer.store.keyspaces import CURSORS, LOG_CLOCK
from indexer.store.log_clock import uptime_us
from indexer.store.retention import Watermark
from indexer.store.transaction import Transaction
from tests.store.support import ALICE, Clock, Store, opened

RETENTION_S = 100
SHORT = {"retention": RETENTION_S}
DAY = 86_400


@dataclass
class Machine:
    """A machine whose clock can be set, and its uptime."""

    wall: Clock = field(default_factory=Clock)
    up: int = 7_000_000
    boot: int = 1

    def uptime(self) -> int:
        return self.up

    def passes(self, seconds: float) -> None:
        self.wall.forward(seconds)
        self.up += int(seconds * 1_000_000)

    def starts_again(self, off: float, up: float) -> None:
        """It was off for a time; its clock may be set anew, too."""
        self.wall.forward(off)
        self.up, self.boot = int(up * 1_000_000), self.boot + 1


def opened_on(machine: Machine, path: Path) -> AbstractAsyncContextManager[Store]:
    boot = f"boot-{machine.boot}"
    return opened(path, clock=machine.wall, uptime=machine.uptime, boot=boot, events=SHORT)


async def event(store: Store) -> None:
    await store.do(lambda tx: tx.append_event("sync", ALICE, fields={}))


@pytest.mark.parametrize("jump", [-DAY, DAY, -50 * 365 * DAY])
async def test_a_clock_that_is_wrong_for_a_moment_prunes_nothing_young(tmp_path: Path, jump: int) -> None:
    machine = Machine()
    async with opened_on(machine, tmp_path) as store:
        for wrong in (0, jump, -jump):
            machine.wall.forward(wrong)
            for _ in range(3):
                await event(store)
                assert (await store.retention.run_once()).pruned == 0
                machine.passes(5)
        assert (await store.retention.run_once()).floor == 1
        machine.passes(RETENTION_S)
        assert (await store.retention.run_once()).floor == 10  # and what is old goes


async def test_a_machine_that_starts_in_1970_keeps_its_log(tmp_path: Path) -> None:
    machine = Machine()
    async with opened_on(machine, tmp_path) as store:
        await event(store)
        await store.retention.run_once()
    now = machine.wall.now
    machine.starts_again(off=3600, up=5)
    machine.wall.now = 1_000_000
    async with opened_on(machine, tmp_path) as store:
        await event(store)
        await store.retention.run_once()
        machine.passes(10)
        machine.wall.now = now + DAY * 1_000_000  # the time has come over the network
        assert (await store.retention.run_once()).pruned == 0
        machine.passes(RETENTION_S)
        assert (await store.retention.run_once()).floor == 3


async def test_time_between_two_runs_of_one_start_counts(tmp_path: Path) -> None:
    machine = Machine()
    for floor in (1, 2):
        async with opened_on(machine, tmp_path) as store:
            if floor == 1:
                await event(store)
            assert (await store.retention.run_once()).floor == floor
        machine.passes(RETENTION_S + 1)


async def test_marks_of_a_clock_that_could_be_set_are_dropped(tmp_path: Path) -> None:
    async with opened(tmp_path, clock=(clock := Clock()), events=SHORT) as store:
        await event(store)
        old = [Watermark(clock.now - DAY * 1_000_000, 2), Watermark(clock.now + DAY * 1_000_000, 2)]
        for mark in old:
            await store.do(partial(Transaction.set_cursor, name=mark.cursor, value=mark.next))
        assert (await store.retention.run_once()).pruned == 0
        assert [mark.next for mark in store.retention.watermarks()] == [2]
        assert store.retention.watermarks()[0] not in old


async def test_a_row_that_is_no_clock_is_named(tmp_path: Path) -> None:
    async with opened(tmp_path, events=SHORT) as store:
        await store.do(lambda tx: tx.put(CURSORS, LOG_CLOCK, ["noon"]))
        with pytest.raises(StoreCorrupt, match="'log_clock' holds \\['noon'\\]"):
            await store.retention.run_once()


def test_uptime_goes_on() -> None:
    assert 0 < uptime_us() <= uptime_us()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("passes"), st.floats(0, 150)),
        st.tuples(st.just("set"), st.floats(-3 * DAY, 3 * DAY)),
        st.tuples(st.just("restart"), st.just(0.0)),
        st.tuples(st.just("boot"), st.floats(0, 3 * DAY)),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.slow
@pytest.mark.limit(120)
@settings(max_examples=15, deadline=None)
@given(STEPS)
def test_under_any_clock_nothing_goes_before_its_time_and_all_goes_after(
    steps: list[tuple[str, float]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_history(Path(folder), steps))


async def _history(path: Path, steps: list[tuple[str, float]]) -> None:
    machine = Machine()
    lived = 0  # microseconds that really passed while the machine was on
    born: list[int] = []
    at = 0
    while at <= len(steps):
        async with opened_on(machine, path) as store:
            while True:
                await event(store)
                born.append(lived)
                floor = (await store.retention.run_once()).floor
                assert all(lived - time >= RETENTION_S * 1_000_000 for time in born[: floor - 1])
                what, amount = steps[at] if at < len(steps) else ("restart", 0.0)
                at += 1
                if what == "passes":
                    before = machine.up
                    machine.passes(amount)
                    lived += machine.up - before
                elif what == "set":
                    machine.wall.forward(amount)
                else:
                    break
        if what == "boot":
            machine.starts_again(amount, 3)
    async with opened_on(machine, path) as store:
        machine.passes(1)  # so that the last event has a mark
        await store.retention.run_once()
        machine.passes(RETENTION_S + 1)
        assert (await store.retention.run_once()).floor == store.log.head
