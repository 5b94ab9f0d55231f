"""A database that is looked at stays as it is, to the byte; while one writes it is refused."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from indexer.daemon import Daemon
from indexer.errors import StoreError, StoreLocked
from indexer.store import view
from indexer.store.backup import backup
from indexer.store.check import check
from indexer.store.database import Database
from indexer.store.keyspaces import KEYSPACES, REFUSED, STRANGERS
from indexer.store.restore import restore
from indexer.store.view import View
from tests.commands.test_db import call
from tests.store.support import ALICE, POST, opened, settings_of

Output = pytest.CaptureFixture[str]


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file and folder, with its bytes and the time of its last change."""
    return {
        str(path.relative_to(folder)): (
            path.read_bytes() if path.is_file() else b"",
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
    }


def written(folder: Path) -> Path:
    """A data directory with a record, a refused frame, and rows that are in the write-ahead log alone."""

    async def make() -> None:
        async with opened(folder) as store:
            await store.put(ALICE, POST, "one")
            await store.do(lambda tx: tx.quarantine("s", 1, ALICE, "why", "", b"frame"))

    asyncio.run(make())
    return folder


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A backup."""
    with Database.open(written(tmp_path / "data") / "db", create=False) as db:
        backup(db, tmp_path / "kept")
    return tmp_path / "kept"


LOOKS: list[tuple[str, ...]] = [
    ("db", "stats"), ("db", "check"), ("debug", "quarantine"), ("debug", "quarantine", "--show", "0"),
]  # fmt: skip


@pytest.mark.parametrize("what", ["kept", "data"])
def test_looking_changes_nothing(kept: Path, what: str, capsys: Output) -> None:
    folder = kept.parent / what
    before = tree(folder)
    for look in LOOKS:
        assert call(*look, "--data-dir", folder) == 0
    out = capsys.readouterr().out
    assert "1 record" in out
    assert "why" in out
    assert tree(folder) == before
    restore(kept, kept.parent / "again")


def test_a_backup_is_not_written_to(kept: Path, tmp_path: Path, capsys: Output) -> None:
    before = tree(kept)
    for command in (["compact"], ["check", "--repair"], ["migrate"], ["backup", tmp_path / "more"]):
        assert call("db", *command, "--data-dir", kept) == 1
        error = capsys.readouterr().err
        assert "kept is a backup (backup.json is there)" in error
        assert "indexer db restore" in error
    assert tree(kept) == before


async def test_no_daemon_runs_on_a_backup(tmp_path: Path) -> None:
    (tmp_path / "backup.json").write_text("{}")
    settings = settings_of(data_dir=tmp_path, upstreams=[], public={"bind": "127.0.0.1:0"},
                           management={"bind": "127.0.0.1:0"})  # fmt: skip
    with pytest.raises(StoreError, match="is a backup"):
        async with Daemon(settings):
            raise AssertionError("it runs")
    assert [path.name for path in tmp_path.iterdir()] == ["backup.json"]


def test_readers_keep_writers_out_and_writers_readers(tmp_path: Path) -> None:
    path = written(tmp_path) / "db"
    program = (
        "import sys; from pathlib import Path; from indexer.store.database import Database; "
        "Database.open(Path(sys.argv[1])).close()"
    )
    write = [sys.executable, "-c", program]
    with Database.open(path, read_only=True):
        beside = subprocess.run([*write, str(path)], capture_output=True, text=True, check=False)
        assert "StoreLocked" in beside.stderr
    assert subprocess.run([*write, str(path)], capture_output=True, check=False).returncode == 0
    with Database.open(path), pytest.raises(StoreLocked, match="another process holds"):
        Database.open(path, read_only=True)
    with Database.open(path, read_only=True) as db:
        assert db.count("records") == 1


def test_a_view_leaves_no_folder_behind_and_its_name_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "_MEMORY", tmp_path / "views")
    (tmp_path / "views").mkdir()
    path = written(tmp_path / "data") / "db"
    for table in path.glob("*.sst"):
        table.write_bytes(b"ruined")
    with pytest.raises(StoreError, match=str(path)) as told:
        Database.open(path, read_only=True)
    assert "indexer-view-" not in str(told.value)
    assert list((tmp_path / "views").iterdir()) == []


def test_without_a_place_in_memory_another_is_taken_or_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path) / "db"
    monkeypatch.setattr(view, "_MEMORY", tmp_path / "nowhere")
    View(path).close()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(StoreError, match="TMPDIR"):
        View(path)
    Database.open(path).close()  # the lock was given back


def test_a_check_sees_damage_in_every_table(tmp_path: Path, capsys: Output) -> None:
    written(tmp_path)
    with Database.open(tmp_path / "db") as db:
        for name in db.stats():
            db.family(name).flush(True)
    tables = sorted((tmp_path / "db").glob("*.sst"))
    assert len(tables) > 5
    for table in tables:
        whole = table.read_bytes()
        table.write_bytes(whole[:8] + bytes([whole[8] ^ 1]) + whole[9:])
        assert call("db", "check", "--data-dir", tmp_path) == 1, table
        told = "".join(capsys.readouterr())
        assert "reading " in told
        assert table.name in told
        table.write_bytes(whole)
    assert call("db", "check", "--data-dir", tmp_path) == 0


def test_the_database_of_a_program_that_had_fewer_keyspaces_is_looked_at_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        for keyspace in (REFUSED, STRANGERS):
            patch.delitem(KEYSPACES, keyspace.name)
        Database.open(tmp_path / "db").close()
    with Database.open(tmp_path / "db", read_only=True) as db:
        assert list(db.scan(STRANGERS)) == []
        assert check(db).clean
        assert db.stats()[REFUSED.name]["rows"] == 0
    with Database.open(tmp_path / "db") as db:  # whoever may write adds them
        assert STRANGERS.name in db.stats()
