"""Format 0 → 1, on the stored database of format 0: what it gives, a kill anywhere, what it leaves alone."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from indexer.errors import StoreCorrupt, StoreVersion
from indexer.store.check import check
from indexer.store.codecs import Mode, pack
from indexer.store.database import FORMAT, Database
from indexer.store.keyspaces import BLOCK_REFS, BLOCKS, CURSORS, EVENTS, GC_QUEUE, RECORDS, UNDER_WAY
from indexer.store.migration import Migrated, migrate
from tests.migrations.make_v0 import CAROL
from tests.migrations.rows import dump, load
from tests.paths import ROOT
from tests.store.support import ALICE, BOB, LIKE, POST, block_of, cid_of, opened

STEP = importlib.import_module("indexer.migrations.s0001_references")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    load(0, tmp_path / "db")
    return tmp_path / "db"


def count(db: Database, did: str, text: str) -> int | None:
    return db.get(BLOCK_REFS, (did, cid_of(block_of(text))))


def test_an_older_format_is_refused_with_the_command_that_helps(old: Path) -> None:
    with pytest.raises(
        StoreVersion, match=r"format 0, this program needs 1; make a backup.*indexer db migrate"
    ):
        Database.open(old)


def test_every_reference_is_counted(old: Path) -> None:
    assert migrate(old)[:2] == (0, 1)
    with Database.open(old) as db:
        assert check(db).problems == []
        assert count(db, ALICE, "first") == 1  # its event
        assert count(db, ALICE, "second") == 4  # two records, two events
        assert count(db, ALICE, "wrong") == 1  # invalid: a row, no event
        assert count(db, ALICE, "huge") is None
        assert count(db, BOB, "before") == 2  # of the new life alone
        assert count(db, CAROL, "post 7") == 1


def test_blocks_that_nothing_holds_are_queued(old: Path) -> None:
    migrate(old)
    with Database.open(old) as db:
        assert [key for key, _ in db.scan(GC_QUEUE)] == [(ALICE, cid_of(block_of("pruned")))]


async def test_a_migrated_database_works_on(old: Path, tmp_path: Path) -> None:
    migrate(old)
    async with opened(tmp_path) as store:
        head = store.writer.head
        await store.put(ALICE, POST, "third")
        await store.delete(ALICE, LIKE)
        assert store.writer.head == head + 2
        await store.checkpoint.run_once()
        assert (await store.gc.run_once()).reclaimed == 1
        await store.retention.run_once()
        await store.checkpoint.run_once()
        store.assert_clean()


def test_only_references_and_the_version_change(old: Path) -> None:
    with Database.open_unchecked(old) as db:
        before = dump(db)
    migrate(old)
    with Database.open(old) as db:
        changed = {(name, key) for name, key, _ in set(dump(db)) ^ set(before)}
    assert {name for name, _ in changed} == {"block_refs", "gc_queue", "cursors"}
    assert {key for name, key in changed if name == "cursors"} == {b"format"}


def test_any_batch_size_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (1, 5, 2000):
        monkeypatch.setattr(STEP, "_BATCH_ROWS", size)
        folder = tmp_path / str(size)
        load(0, folder)
        migrate(folder)
        with Database.open(folder) as db:
            results.append(dump(db))
    assert results[0] == results[1] == results[2]


def test_progress_runs_to_the_end(old: Path) -> None:
    told: list[tuple[int, int]] = []
    handled = migrate(old, progress=lambda _title, done, total: told.append((done, total))).handled
    with Database.open(old) as db:
        assert handled == sum(len(list(db.raw_scan(ks.name, None, None))) for ks in (RECORDS, EVENTS, BLOCKS))
    assert told[0][0] == 0
    assert told[-1][0] == handled
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def _killed(folder: Path, point: str, passes: int) -> int:
    command = [sys.executable, "-m", "tests.migrations.crash_child", str(folder), point, str(passes)]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=30).returncode


@pytest.mark.parametrize(("point", "passes"), [("before migrate 1", 3), ("after migrate 1", 1)])
def test_killed_it_goes_on_where_it_was(old: Path, point: str, passes: int) -> None:
    assert _killed(old, point, passes) == -signal.SIGKILL
    with Database.open_unchecked(old) as db:
        position = db.get(CURSORS, UNDER_WAY)
        assert db.get(CURSORS, "format") == [0, 1]
    assert position is not None
    with pytest.raises(StoreVersion, match="under way; run `indexer db migrate`"):
        Database.open(old)
    resumed = migrate(old)
    assert resumed.handled + position[2] == _whole(old)
    with Database.open(old) as db:
        assert check(db).problems == []
        assert db.get(CURSORS, UNDER_WAY) is None


def _whole(folder: Path) -> int:
    with Database.open(folder) as db:
        return sum(
            len(list(db.raw_scan(keyspace.name, None, None))) for keyspace in (RECORDS, EVENTS, BLOCKS)
        )


@pytest.mark.slow
@pytest.mark.limit(120)
def test_killed_at_every_batch_it_goes_on(tmp_path: Path) -> None:
    load(0, tmp_path / "whole")
    migrate(tmp_path / "whole")
    with Database.open(tmp_path / "whole") as db:
        expected = dump(db)
    folder = tmp_path / "killed"
    load(0, folder)
    kills = 0
    while _killed(folder, ("before", "after")[kills % 2] + " migrate 1", 2) != 0:
        kills += 1
    assert kills > 5
    with Database.open(folder) as db:
        assert dump(db) == expected


def test_an_index_only_database_has_nothing_to_count(tmp_path: Path) -> None:
    folder = tmp_path / "db"
    load(0, folder, [("cursors", b"mode", pack([False, False]))])
    assert migrate(folder) == Migrated(0, 1, 0)
    with Database.open(folder, mode=Mode(blocks=False)) as db:
        assert list(db.scan(BLOCK_REFS)) == []


def test_a_database_of_this_format_is_left_alone(old: Path) -> None:
    migrate(old)
    assert migrate(old) == Migrated(FORMAT, FORMAT, 0)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "db"
    load(0, folder, [("cursors", b"format", pack([FORMAT + 1, FORMAT + 1]))])
    with pytest.raises(StoreVersion, match="use a newer program"):
        migrate(folder)


@pytest.mark.parametrize("row", [b"\xc1", pack([7, None, 0])])
def test_a_malformed_position_is_named(old: Path, row: bytes) -> None:
    with Database.open_unchecked(old) as db:
        db.family(CURSORS.name)[UNDER_WAY.encode()] = row
    with pytest.raises(StoreCorrupt, match="cursors: row 'migration'"):
        migrate(old)
