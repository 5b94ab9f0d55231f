"""The writer under pressure: RocksDB stalls, the disk fills up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from indexer.errors import StoreFull, WriterPoisoned
from indexer.store.check import check
from indexer.store.database import Database
from indexer.store.transaction import Transaction
from tests.paths import ROOT
from tests.store.pressure_child import QUEUE
from tests.store.support import ALICE, REV, SYNCED, cid_of, opened

_FREEZE_S = 0.1
_TRIES = 3


def under_pressure(folder: Path, scenario: str) -> dict[str, Any]:
    """What the child saw. A busy machine freezes everybody at times: the calmest of a few tries counts."""
    calmest: dict[str, Any] = {}
    for attempt in range(_TRIES):
        done = subprocess.run(
            [sys.executable, "-m", "tests.store.pressure_child", str(folder / str(attempt)), scenario],
            cwd=ROOT, stdout=subprocess.PIPE, timeout=25, check=True,
        )  # fmt: skip
        result = json.loads(done.stdout)
        if not calmest or result["longest_s"] < calmest["longest_s"]:
            calmest = result
        if calmest["longest_s"] < _FREEZE_S:
            break
    return calmest


@pytest.mark.limit(90)
def test_stopped_writes_freeze_nobody_and_push_back_on_callers(tmp_path: Path) -> None:
    found = under_pressure(tmp_path, "stopped")
    assert found["stalls"] >= 5, "writes were stopped"
    assert found["done"] == 0
    assert found["head"] == 2, "nothing was committed meanwhile"
    assert found["handed_in"] == QUEUE, "what the queue does not hold waits at its caller"
    assert found["longest_s"] < _FREEZE_S
    assert found["ticks"] > 100
    assert found["events"] == QUEUE * 3, "then everything is written, in order"
    assert found["in_order"]
    assert found["problems"] == []


@pytest.mark.slow
@pytest.mark.limit(90)
def test_the_loop_goes_on_while_flushes_and_compactions_cannot_keep_up(tmp_path: Path) -> None:
    found = under_pressure(tmp_path, "loaded")
    assert found["stalls"] >= 10
    assert found["longest_s"] < _FREEZE_S
    assert found["events"] == 0, "every event of every step is there"
    assert found["problems"] == []


def _grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("a small file system needs Linux and root, to mount a tmpfs")
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def _unit(number: int, choice: Random, tx: Transaction) -> None:
    """Three records and the number, all or nothing."""
    tx.set_repo(ALICE, SYNCED)
    for at in range(3):
        block = b"\x59\x20\x00" + choice.randbytes(8192)
        tx.put_record(ALICE, f"a.b.c/{number}-{at}", cid_of(block), block, REV, live=True)
    tx.set_cursor("upstream", number)


@pytest.mark.slow
@pytest.mark.limit(90)
async def test_a_full_disk_is_one_named_error_and_leaves_nothing_half_applied(small_disk: Path) -> None:
    choice = Random(1)
    acknowledged: list[int] = []

    async def write_until_it_fails() -> None:
        for number in range(1, 5000):
            await store.writer.run("unit", partial(_unit, number, choice))
            acknowledged.append(number)

    async with opened(small_disk, clean=False) as store:
        with pytest.raises(WriterPoisoned, match="the disk is full; free some space") as caught:
            await write_until_it_fails()
        assert isinstance(caught.value.__cause__, StoreFull)
        assert isinstance(await store.writer.wait_closed(), StoreFull)
        assert store.writer.poisoned
        with pytest.raises(WriterPoisoned, match="the disk is full"):
            await store.put(ALICE, "a.b.c/after", "it is closed")
    assert len(acknowledged) > 100
    with suppress(StoreFull):
        Database.open(small_disk / "db").close()  # opening a full disk works, or fails by that name
    _grow(small_disk)
    async with opened(small_disk) as store:
        assert check(store.db).problems == []
        cursor = store.db.cursor("upstream") or 0
        assert cursor >= acknowledged[-1], "what was acknowledged is there"
        assert store.db.count("records") == cursor * 3 == len(store.events())
        await store.writer.run("unit", partial(_unit, cursor + 1, choice))
        store.assert_clean()
