"""`indexer db` and `repo verify --data-dir`: on a data directory, beside a daemon, and its exit codes."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from indexer.cas import FsBlobStore
from indexer.cli import main
from indexer.commands import db as db_commands
from indexer.commands.db import size_text
from indexer.store.codecs import ArchiveRow, Mode, pack
from indexer.store.database import FORMAT, Database
from indexer.store.keyspaces import BLOCK_REFS, BLOCKS, COUNTS, CURSORS, KEYSPACES
from indexer.store.raw import RawRows
from indexer.store.upkeep import identity
from tests.migrations.rows import load
from tests.serve.node import ALICE, POST, fill, load_car, running
from tests.store.support import opened

Output = pytest.CaptureFixture[str]


def call(*arguments: str | Path) -> int:
    """Runs the command; its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with three records."""

    async def make() -> None:
        async with opened(tmp_path / "data") as store:
            for number in range(3):
                await store.put(ALICE, f"{POST}/{number}", str(number))
            await store.checkpoint.run_once()

    asyncio.run(make())
    return tmp_path / "data"


def damage(data: Path, change: Callable[[RawRows], None]) -> None:
    with Database.open(data / "db") as db:
        change(RawRows(db))


def test_stats_are_a_table_of_every_keyspace(data: Path, capsys: Output) -> None:
    assert call("db", "stats", "--data-dir", data) == 0
    exact, empty, *lines = capsys.readouterr().out.splitlines()
    assert exact.endswith("3 records, 3 events; the rows below are estimates")
    assert not empty
    assert [line.split()[0] for line in lines[1:]] == [*KEYSPACES, "total"]
    assert lines[0].startswith("keyspace            rows, about")
    assert all(line.split()[1].startswith("~") for line in lines[1:])
    assert call("db", "compact", "--data-dir", data) == 0
    assert capsys.readouterr().out.startswith("compacted: ")
    assert call("db", "stats", "--data-dir", data, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["counts"]["records"], figures["counts"]["events"]) == (3, 3)
    assert figures["data_dir"] == str(data)
    blocks = figures["keyspaces"]["blocks"]
    assert blocks["rows_estimated"] == 3
    assert blocks["raw_bytes"] > 3 * 36
    assert blocks["data_bytes"] > 0
    assert blocks["sst_bytes"] > 0


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (812, "812 B"), (1024, "1.0 KiB"), (3_565_158, "3.4 MiB"), (1 << 52, "4096.0 TiB")],
)  # fmt: skip
def test_sizes_are_for_people(size: int, text: str) -> None:
    assert size_text(size) == text


def test_a_check_of_a_sound_database_exits_0(data: Path, capsys: Output) -> None:
    assert call("db", "check", "--data-dir", data) == 0
    assert capsys.readouterr().out == "no problem in 1 repository, 3 records, 3 blocks, 3 events\n"


def test_a_check_that_finds_something_exits_1_and_repair_mends_it(data: Path, capsys: Output) -> None:
    def spoil(rows: RawRows) -> None:
        (key, _), *_ = rows.after(BLOCK_REFS.name, b"", 1)
        rows.commit([(BLOCK_REFS.name, key, None), (COUNTS.name, b"records", COUNTS.value.encode(7))])

    damage(data, spoil)
    assert call("db", "check", "--data-dir", data) == 1
    out = capsys.readouterr().out
    assert "references: block" in out
    assert out.endswith("2 problems in 1 repository, 3 records, 3 blocks, 3 events\n")
    assert call("db", "check", "--repair", "--data-dir", data, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["problems"], answer["repaired"]) == ([], {"references": 1, "totals": 1})
    assert call("db", "check", "--data-dir", data) == 0


def test_what_cannot_be_repaired_still_exits_1(data: Path, capsys: Output) -> None:
    damage(data, lambda rows: rows.commit([(BLOCKS.name, rows.after(BLOCKS.name, b"", 1)[0][0], None)]))
    assert call("db", "check", "--repair", "--repo", ALICE, "--data-dir", data) == 1
    out = capsys.readouterr().out
    assert "is missing" in out
    assert "repaired" not in out
    assert "there is nothing that a repair sets right" in out


def test_damaged_archives_alone_start_no_repair(
    data: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("repaired")

    monkeypatch.setattr(db_commands, "repair_store", refuse)
    stray = FsBlobStore(data / "cas").put(b"nobody's")
    assert call("db", "check", "--repair", "--data-dir", data) == 1
    assert f"archives: the file of sha256 {stray.hex()} belongs to no row" in capsys.readouterr().out


def test_a_check_of_an_unknown_repository_says_so(data: Path, capsys: Output) -> None:
    assert call("db", "check", "--repo", "did:web:nobody.test", "--data-dir", data) == 1
    assert "did:web:nobody.test is unknown here" in capsys.readouterr().out


def test_damaged_archives_are_found(data: Path, capsys: Output) -> None:
    async def archive() -> None:
        async with opened(data) as store:
            await store.do(lambda tx: tx.hold_archive(ALICE, b"d" * 32, ArchiveRow("3ka", 1, 9), 1))

    asyncio.run(archive())
    assert not (data / "cas").exists()  # lost as a whole
    assert call("db", "check", "--data-dir", data) == 1
    assert f"the CAR of {ALICE} at 3ka has no file" in capsys.readouterr().out
    (data / "cas").mkdir()
    assert call("db", "check", "--data-dir", data) == 1
    assert f"the CAR of {ALICE} at 3ka has no file" in capsys.readouterr().out


def test_backup_and_restore_of_a_data_directory(data: Path, tmp_path: Path, capsys: Output) -> None:
    assert call("db", "backup", tmp_path / "copy", "--data-dir", data) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'copy'}: ")
    assert call("db", "restore", tmp_path / "copy", "--data-dir", tmp_path / "again", "--json") == 0
    assert json.loads(capsys.readouterr().out)["next"] >= 4 + 2**32
    assert call("db", "check", "--data-dir", tmp_path / "again") == 0
    assert call("db", "restore", tmp_path / "copy", "--data-dir", tmp_path / "again") == 1
    assert call("db", "backup", tmp_path / "copy", "--data-dir", data) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "is not empty" in errors[0]
    assert "exists already" in errors[1]


def test_migrate_brings_an_old_database_over(tmp_path: Path, capsys: Output) -> None:
    data = tmp_path / "data"
    load(0, data / "db")
    assert call("db", "check", "--data-dir", data) == 1
    assert "indexer db migrate" in capsys.readouterr().err
    assert call("db", "backup", tmp_path / "before", "--data-dir", data, "--json") == 0
    assert json.loads(capsys.readouterr().out)["format"] == 0
    assert call("db", "migrate", "--data-dir", data) == 0
    assert "format 0 is 1 now" in capsys.readouterr().out
    assert call("db", "migrate", "--data-dir", data) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert call("db", "check", "--data-dir", data) == 0
    assert call("db", "restore", tmp_path / "before", "--data-dir", tmp_path / "again") == 0
    assert call("db", "migrate", "--data-dir", tmp_path / "again") == 0
    assert call("db", "check", "--data-dir", tmp_path / "again") == 0


def test_no_database_is_one_line(tmp_path: Path, capsys: Output) -> None:
    for command in ("stats", "check", "compact", "migrate"):
        assert call("db", command, "--data-dir", tmp_path) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "no database there" in error
        assert error.count("\n") == 1


async def test_beside_a_daemon_it_goes_through_the_listener(tmp_path: Path, capsys: Output) -> None:
    async with running(tmp_path / "data") as node:
        await fill(node, ALICE, [f"{POST}/a"])
        where: list[str | Path] = ["--data-dir", tmp_path / "data", "--management-url", node.management.url]

        async def beside(*arguments: str | Path) -> int:
            return await asyncio.to_thread(call, "db", *arguments, *where)

        assert await beside("stats", "--json") == 0
        assert json.loads(capsys.readouterr().out)["keyspaces"]["cursors"]["rows_estimated"] > 0
        assert await beside("stats") == 0
        assert await beside("compact") == 0
        assert await beside("backup", tmp_path / "copy") == 0
        assert "up to event 1" in capsys.readouterr().out
        assert await beside("backup", tmp_path / "copy") == 1
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'copy'} exists already")
        assert await beside("backup", tmp_path / "data" / "copy") == 1
        assert "lies in the data directory" in capsys.readouterr().err
        for command in ("check", "migrate"):
            assert await beside(command) == 1
            assert "another process holds the database; stop it first" in capsys.readouterr().err
    assert (
        await asyncio.to_thread(call, "db", "restore", tmp_path / "copy", "--data-dir", tmp_path / "b") == 0
    )
    assert await asyncio.to_thread(call, "db", "check", "--data-dir", tmp_path / "b") == 0


async def test_another_daemon_is_not_asked(tmp_path: Path, capsys: Output) -> None:
    async with running(tmp_path / "other") as node, opened(tmp_path / "data"):
        where: list[str | Path] = ["--data-dir", tmp_path / "data", "--management-url", node.management.url]
        commands: list[list[str | Path]] = [["stats"], ["compact"], ["backup", tmp_path / "copy"]]
        for command in commands:
            assert await asyncio.to_thread(call, "db", *command, *where) == 1
            error = capsys.readouterr().err
            assert (
                f"another process holds {tmp_path / 'data'}, not the daemon at {node.management.url}" in error
            )
            assert f"which holds {tmp_path / 'other'};" in error
        assert not (tmp_path / "copy").exists()


async def test_a_copy_of_a_database_is_another_one(tmp_path: Path) -> None:
    async with opened(tmp_path / "data"):
        pass
    shutil.copytree(tmp_path / "data", tmp_path / "copied")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    found = [identity(tmp_path / name / "db") for name in ("data", "copied", "link")]
    assert found[0] == found[2] != found[1]


def test_a_newer_format_that_can_be_read_is_left_as_it_is(data: Path, capsys: Output) -> None:
    damage(data, lambda rows: rows.commit([(CURSORS.name, b"format", pack([FORMAT + 2, FORMAT]))]))
    assert call("db", "migrate", "--data-dir", data) == 0
    said = capsys.readouterr().out
    assert f"format {FORMAT + 2} is newer than this program's {FORMAT}, which can read it" in said


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["db", "stats", "--data-dir", "{}/none"], "no database there"),
        (["db", "stats", "--data-dir", "{}/file"], "--data-dir: "),
        (["db", "stats", "--config", "{}"], "--config: "),
        (["db", "backup", "{}/file/new", "--data-dir", "{}/data"], "Not a directory"),
        (["db", "restore", "{}/none", "--data-dir", "{}/new"], "is no backup: there is no such folder"),
        (["db", "restore", "{}/file", "--data-dir", "{}/new"], "SRC: "),
        (["db", "restore", "{}/data", "--data-dir", "{}/new"], "is no backup: it has no backup.json"),
        (["db", "restore", "{}/data", "--data-dir", "{}/file"], "--data-dir: "),
        (["repo", "verify", ALICE, "--data-dir", "{}/none"], "no database there"),
        (["repo", "verify", ALICE, "--data-dir", "{}/file"], "--data-dir: "),
        (["car", "verify", "{}/none"], "FILE: "),
        (["run", "--config", "{}/none"], "cannot read the settings file"),
        (["demo", "--data-dir", "{}/file"], "--data-dir: "),
    ],
)
def test_a_wrong_path_is_one_line_and_exit_code_1(
    data: Path, capsys: Output, arguments: list[str], why: str
) -> None:
    (data.parent / "file").write_text("")
    assert call(*(argument.format(data.parent) for argument in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert why in error
    assert error.count("\n") == 1


def test_a_restore_that_was_broken_off_is_refused_by_name(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "restore.part" / "db").mkdir(parents=True)
    for command in (["db", "stats"], ["db", "check"], ["db", "migrate"], ["repo", "verify", ALICE]):
        assert call(*command, "--data-dir", tmp_path) == 1
        assert "a restore into it was broken off (restore.part is there)" in capsys.readouterr().err


def test_a_damaged_backup_is_refused_unless_asked_otherwise(
    data: Path, tmp_path: Path, capsys: Output
) -> None:
    copy, new = tmp_path / "copy", tmp_path / "new"
    assert call("db", "backup", copy, "--data-dir", data) == 0
    table = max((copy / "db").glob("*.sst"), key=lambda path: path.stat().st_size)
    content = table.read_bytes()
    table.unlink()
    table.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert call("db", "restore", copy, "--data-dir", new) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: the backup {copy} is damaged: ")
    assert str(table) in error
    assert "restore.part" not in error
    assert call("db", "restore", copy, "--data-dir", new, "--no-verify") == 0
    assert call("db", "check", "--data-dir", new) == 1


def test_a_held_database_without_a_daemon_that_answers_is_said(data: Path, capsys: Output) -> None:
    with socket.socket() as holder, Database.open(data / "db"):
        holder.bind(("127.0.0.1", 0))  # bound, never listening
        url = f"http://127.0.0.1:{holder.getsockname()[1]}"
        assert call("db", "stats", "--data-dir", data, "--management-url", url) == 1
    error = capsys.readouterr().err
    assert f"another process holds {data}, and no daemon answers at {url}; name the daemon" in error


async def test_another_listener_of_the_daemon_is_told_apart(tmp_path: Path, capsys: Output) -> None:
    async with running(tmp_path) as node:
        where: list[str | Path] = ["--data-dir", tmp_path, "--management-url", node.public.url]
        assert await asyncio.to_thread(call, "db", "stats", *where) == 1
    assert f"no management listener is at {node.public.url}" in capsys.readouterr().err


async def test_repo_verify_through_the_daemon_and_offline(tmp_path: Path, capsys: Output) -> None:
    async with running(tmp_path) as node:
        did = (await load_car(node, "ten"))["did"]
        command = ["repo", "verify", did, "--management-url", node.management.url]
        assert await asyncio.to_thread(call, *command) == 0
        assert capsys.readouterr().out.startswith(f"{did}: ok (10 records, rev 3")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "db").iterdir()}
    assert await asyncio.to_thread(call, "repo", "verify", did, "--data-dir", tmp_path, "--json") == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "db").iterdir()} == before
    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["signature"], found["data"]) == ("ok", "valid", found["rebuilt"])
    async with running(tmp_path) as node:
        path = node.services.db.records(did, limit=1)[0][0]
        await node.writer.run("test", lambda tx: tx.delete_record(did, path, "3ka", live=True))
        assert await asyncio.to_thread(call, *command[:3], "--management-url", node.management.url) == 1
        assert f"{did}: MISMATCH (9 records" in capsys.readouterr().out
        assert await asyncio.to_thread(call, "repo", "verify", did, "--data-dir", tmp_path) == 1
        assert "stop it first" in capsys.readouterr().err
    assert await asyncio.to_thread(call, "repo", "verify", did, "--data-dir", tmp_path) == 1
    assert "the index gives the root" in capsys.readouterr().out
    assert await asyncio.to_thread(call, "repo", "verify", ALICE, "--data-dir", tmp_path) == 1
    assert "is not indexed here" in capsys.readouterr().err


def test_an_ephemeral_database_has_nothing_to_verify(tmp_path: Path, capsys: Output) -> None:
    Database.open(tmp_path / "db", mode=Mode(ephemeral=True)).close()
    assert call("repo", "verify", ALICE, "--data-dir", tmp_path) == 1
    assert "keeps no records" in capsys.readouterr().err
