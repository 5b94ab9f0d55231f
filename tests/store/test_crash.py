"""Killed anywhere, the store comes back exact: nothing acknowledged is lost, ids stay consecutive."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from indexer.store import keyspaces
from indexer.store.check import check
from indexer.store.database import Database
from tests.paths import ROOT
from tests.store.support import opened

UNITS = (
    "put", "checkpoint fold", "blocks_gc collect", "retention _mark", "retention prune", "retention sweep",
    "retention finish",
)  # fmt: skip
POINTS = [f"{moment} {unit}" for unit in UNITS for moment in ("before", "after")]
#: Two of them on every run, all of them in the slow suite.
QUICK = (POINTS[0], "before checkpoint fold")


def _marked(point: str) -> Any:
    return pytest.param(point, marks=() if point in QUICK else pytest.mark.slow)


def child(folder: Path, point: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.store.crash_child", str(folder), point, str(count)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def crash(folder: Path, point: str, count: int) -> None:
    with child(folder, point, count) as process:
        try:
            _, errors = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL, errors


async def assert_exact(folder: Path) -> int:
    """Everything is in order; the cursor and its data came back together. Returns the cursor."""
    with Database.open(folder / "db", memory_mib=32) as db:
        assert check(db).problems == []
        cursor = db.cursor("upstream") or 0
        head, _ = db.get(keyspaces.CURSORS, keyspaces.HEAD) or (1, 0)
    async with opened(folder, boot="one boot", clean=False) as store:
        assert store.log.head == head
        assert store.writer.state.hole is None
        events = store.events()
        numbers = [event.fields["number"] for event in events if event.kind == "sync"]
        assert numbers == sorted(numbers)
        assert not numbers or numbers[-1] == cursor
        store.log.blocks(events)
        await store.checkpoint.run_once()
        await store.gc.run_once()
        await store.retention.run_once()
        store.assert_clean()
    return cursor


@pytest.mark.parametrize("point", [_marked(point) for point in POINTS])
@pytest.mark.limit(60)
async def test_killed_at_a_crash_point(tmp_path: Path, point: str) -> None:
    crash(tmp_path, point, 1)
    await assert_exact(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.limit(300)
async def test_killed_at_a_crash_point_again_and_again(tmp_path: Path, point: str) -> None:
    cursor = 0
    for count in (1, 2, 5, 9, 20):
        crash(tmp_path, point, count)
        after = await assert_exact(tmp_path)
        assert after >= cursor
        cursor = after


async def kill_under_load(folder: Path, units: int) -> None:
    with child(folder, "-", 0) as process:
        assert process.stdout is not None
        acknowledged, head = 0, 0
        for line in process.stdout:
            acknowledged, head = map(int, line.split())
            units -= 1
            if units <= 0:
                break
        process.kill()
        for line in process.stdout:
            if line.endswith("\n") and len(line.split()) == 2:
                acknowledged, head = map(int, line.split())
    assert await assert_exact(folder) >= acknowledged
    async with opened(folder, boot="one boot", clean=False) as store:
        assert store.log.head >= head


@pytest.mark.limit(60)
async def test_what_was_acknowledged_survives_a_kill_under_load(tmp_path: Path) -> None:
    await kill_under_load(tmp_path, 150)
    await kill_under_load(tmp_path, 60)


@pytest.mark.slow
@pytest.mark.limit(300)
async def test_what_was_acknowledged_survives_ten_kills_at_random_times(tmp_path: Path) -> None:
    choice = random.Random(7)
    for _ in range(10):
        await kill_under_load(tmp_path, choice.randrange(1, 600))
