"""What waits, and when it will be done."""

from __future__ import annotations

import random
from pathlib import Path

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
        assert progress.census == Census(302, 2, 1, now - HOUR, now + HOUR, 0)
        status = progress.status()
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
        assert status["repos_per_s"] > 0


def test_what_left_since_the_census_does_not_wait() -> None:
    clock = Clock()
    pace = Pace(clock)
    for left in (True, False, True):
        pace.begin()
        clock.now += 1
        pace.end(left=left)
    assert pace.left == 2
    assert pace.per_s() == pytest.approx(2 / 3)
    clock.now += 1000  # idle: the pace stays what it was
    assert pace.per_s() == pytest.approx(2 / 3)
    pace.begin()
    assert pace.per_s() == 0.0
    clock.now += 2
    pace.end(left=True)
    assert pace.per_s() == 0.5


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
