"""What waits, and when it will be done."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from indexer.backfill.outcome import BELOW_MIN_REV
from indexer.backfill.progress import Census, Pace, Progress
from indexer.backfill.queue import CLAIMED_DUE, explicit_due
from indexer.store.codecs import NEW_REPO, RepoRow, SyncState
from indexer.store.transaction import Transaction
from indexer.store.writer import clock_us
from tests.backfill.world import Host, World, account

HOUR = 3_600_000_000


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def store(world: World, found: dict[str, RepoRow]) -> None:
    def write(tx: Transaction) -> None:
        for name, row in found.items():
            tx.set_repo("did:plc:" + name.ljust(24, "a"), row)

    await world.writer.run("rows", write)


async def test_the_census_tells_who_waits_for_what(tmp_path: Path) -> None:
    now = clock_us()
    waiting = NEW_REPO._replace(tracked=True)
    async with Host() as host, World(tmp_path, host) as world:
        found = {f"due{number:03}": waiting._replace(due=now - number - 1) for number in range(300)}
        found |= {
            "asked": waiting._replace(due=explicit_due(now - HOUR)),
            "claimed": waiting._replace(due=CLAIMED_DUE, state=SyncState.BACKFILLING),
            "failed": waiting._replace(due=now + 2 * HOUR, attempt=1, error="slow: it was"),
            "failed2": waiting._replace(due=now + HOUR, attempt=1, error=f"{BELOW_MIN_REV}: it is"),
            "banned": waiting._replace(due=now + HOUR, error="host_banned: it is"),
            "synced": waiting._replace(due=now, state=SyncState.SYNCED),
            "left": waiting._replace(due=now, tracked=False),
        }
        await store(world, found)
        progress = Progress(world.db)
        await progress.take()
        assert progress.census == Census(302, 2, 1, now - HOUR, now + HOUR, 0, 0, 0)
        status = progress.status(paused=False)
        assert (status["due"], status["later"], status["held"], status["eta_s"]) == (302, 2, 1, None)
        assert (status["oldest_due_us"], status["next_due_us"]) == (now - HOUR, now + HOUR)


async def test_a_job_moves_the_figures(tmp_path: Path) -> None:
    one = account("one", {"app.bsky.feed.post/3k": "text"})
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.backfill.add([one.did])
        await world.running(lambda: world.row(one).state is SyncState.SYNCED)
        status = world.backfill.status()
        assert status["due"] == 0
        assert world.backfill._progress.pace.left == 1


def test_what_left_is_not_awaited_and_silence_between_busy_times_does_not_count() -> None:
    clock = Clock()
    pace = Pace(clock)
    for left in (True, False, True):
        pace.begin()
        clock.now += 1
        pace.end(left=left)
    assert pace.left == 2
    assert pace.per_s() == pytest.approx(2 / 3)
    pace.rest()
    clock.now += 1000  # idle: the pace stays what it was
    assert pace.per_s() == pytest.approx(2 / 3)
    pace.begin()
    pace.rest()  # something is worked on
    clock.now += 0.02
    pace.end(left=True)  # one says little of a new busy time
    assert pace.per_s() == pytest.approx(2 / 3)
    clock.now += 4.98
    assert pace.per_s() == pytest.approx(1 / 5)


def test_a_silence_while_something_waits_is_part_of_the_pace() -> None:
    """Ten repositories in a second, then a minute of patience for the host, again and again."""
    clock = Clock()
    pace = Pace(clock)
    for _ in range(20):
        left(pace, clock, 10, times=10)
        clock.now += 60
    assert pace.per_s() == pytest.approx(10 / 61, rel=0.1)


def test_a_long_stall_lowers_the_pace_and_does_not_take_it_away() -> None:
    clock = Clock()
    pace = Pace(clock)
    left(pace, clock, 1, times=100)
    assert pace.per_s() == pytest.approx(1)
    pace.begin()
    clock.now += 750
    assert pace.per_s() == pytest.approx(1 / 600, rel=0.05)


@pytest.mark.parametrize(
    ("rate", "waits", "soon", "last"),
    [
        (0.0, [1, 599, 700], 2, 599),
        (1.0, [1, 599, 700], 2, 599),
        (0.01, [1, 1050, 1150, 1301], 3, 1150),  # ten due: 1,000 s, and 100 more for each that comes in time
        (0.01, [1001, 1002], 0, 0),
    ],
)
def test_who_is_tried_again_before_the_end_or_soon_belongs_to_the_forecast(
    rate: float, waits: list[int], soon: int, last: int
) -> None:
    now = clock_us()
    row = NEW_REPO._replace(tracked=True, attempt=1, error="rate_limited: pds asks for patience")
    rows = [(now - 1, row)] * 10 + [(now + seconds * 1_000_000, row) for seconds in waits]
    census = Census()
    for first in range(0, len(rows), 4):
        census = census.with_rows(rows[first : first + 4], now, rate)
    assert (census.due, census.later, census.soon) == (10, len(waits), soon)
    assert census.last_soon == (now + last * 1_000_000 if last else 0)


@pytest.mark.parametrize(
    ("fields", "due_s", "left"),
    [
        ({"state": SyncState.SYNCED}, 0, True),
        ({"attempt": 1, "error": "rate_limited: wait"}, 1, False),
        ({"attempt": 9, "error": "slow: it was"}, 1200, True),
    ],
)
async def test_what_comes_back_soon_has_not_left(
    tmp_path: Path, fields: dict[str, Any], due_s: int, left: bool
) -> None:
    due = clock_us() + due_s * 1_000_000
    async with Host() as host, World(tmp_path, host) as world:
        await store(world, {"one": NEW_REPO._replace(tracked=True, due=due, **fields)})
        assert Progress(world.db).has_left("did:plc:" + "one".ljust(24, "a")) is left
        assert Progress(world.db).has_left("did:plc:" + "two".ljust(24, "a"))


def test_an_idle_queue_has_no_pace() -> None:
    clock = Clock()
    progress = Progress(None, clock)  # type: ignore[arg-type]
    progress.pace.begin()
    clock.now += 0.01
    progress.pace.end(left=True)
    assert progress.status(paused=False)["repos_per_s"] == 1  # not a hundred a second, by one of them
    progress.pace.rest()
    assert progress.status(paused=False)["repos_per_s"] == 0


async def test_the_last_tries_are_part_of_the_time_to_go(tmp_path: Path) -> None:
    clock, now = Clock(), clock_us()
    waiting = NEW_REPO._replace(tracked=True)
    async with Host() as host, World(tmp_path, host) as world:
        found = {f"due{number}": waiting._replace(due=now - 1) for number in range(4)}
        found |= {"soon": waiting._replace(due=now + 30_000_000, attempt=1, error="rate_limited: wait")}
        found |= {"late": waiting._replace(due=now + HOUR, attempt=1, error="slow: it was")}
        await store(world, found)
        progress = Progress(world.db, clock)
        await progress.take()
        assert progress.eta_s() is None  # no pace yet
        left(progress.pace, clock, 0.1)
        await progress.take()
        assert progress.eta_s() == pytest.approx(50)
        assert (progress.status(paused=False)["eta_s"], progress.status(paused=True)["eta_s"]) == (50, None)
        left(progress.pace, clock, 0.1, times=4)  # none is due any more
        assert progress.due() == 0
        assert progress.eta_s() == pytest.approx(30, abs=10)
        left(progress.pace, clock, 0.1)
        assert progress.eta_s() is None
        await store(world, dict.fromkeys([*found][:5], waiting))
        await progress.take()
        assert (progress.census.later, progress.eta_s()) == (1, None)  # when that will do nobody can know


def left(pace: Pace, clock: Clock, per_s: float, times: int = 1) -> None:
    """Repositories leave the queue at a pace."""
    for _ in range(times):
        pace.begin()
        clock.now += 1 / per_s
        pace.end(left=True)


def test_an_old_pace_is_forgotten() -> None:
    clock = Clock()
    pace = Pace(clock)
    for seconds in [0.1] * 1000 + [1.0] * 700:
        pace.begin()
        clock.now += seconds
        pace.end(left=True)
    assert pace.per_s() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_in_a_steady_run_the_eta_is_right_from_the_first_tenth_on(seed: int) -> None:
    clock, chance = Clock(), random.Random(seed)
    pace = Pace(clock)
    total = 5_000
    times = [chance.lognormvariate(-3, 1.3) for _ in range(total)]
    ends = clock.now + sum(times)
    for done, seconds in enumerate(times, 1):
        pace.begin()
        clock.now += seconds
        pace.end(left=True)
        if total // 10 <= done < total * 0.98:
            eta = (total - done) / pace.per_s()
            left = ends - clock.now
            assert abs(eta - left) <= max(0.25 * left, 0.04 * sum(times)), done  # the last few are by chance
