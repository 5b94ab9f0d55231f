"""SIGKILL around every chunk of a backfill: it goes on, tells nothing twice, and the store is exact."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from indexer.store.check import check
from indexer.store.codecs import SyncState
from indexer.store.database import Database
from tests.backfill.crash_child import one_with
from tests.backfill.world import Host, World, cids_of
from tests.paths import ROOT

RECORDS = 13  # three chunks of 5


def crash(folder: Path, point: str, count: int) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.backfill.crash_child",
        str(folder),
        str(RECORDS),
        point,
        str(count),
    ]
    child = subprocess.run(command, cwd=ROOT, check=False, timeout=25, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr


async def assert_goes_on(tmp_path: Path, point: str, count: int) -> None:
    crash(tmp_path, point, count)
    with Database.open(tmp_path / "db", memory_mib=32) as db:
        assert check(db).problems == []
    one = one_with(RECORDS)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.running(lambda: world.row(one).state is SyncState.SYNCED)
        assert world.records(one) == cids_of(one)
        assert world.events(one) == [("create", path, one.rev) for path in sorted(one.records)]
        assert check(world.db).problems == []


@pytest.mark.parametrize(("point", "count"), [("before backfill_apply", 2), ("after backfill_apply", 1)])
async def test_killed_around_a_chunk_it_goes_on(tmp_path: Path, point: str, count: int) -> None:
    await assert_goes_on(tmp_path, point, count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "counts"),
    [
        ("after backfill_request", 1), ("before backfill_claim", 1), ("after backfill_claim", 1),
        ("before backfill_apply", 3), ("after backfill_apply", 3),
    ],
)  # fmt: skip
@pytest.mark.limit(90)
async def test_killed_anywhere_it_goes_on(tmp_path: Path, point: str, counts: int) -> None:
    for count in range(1, counts + 1):
        await assert_goes_on(tmp_path / str(count), point, count)
