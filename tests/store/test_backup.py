"""Backups taken while the writer works restore to sound databases whose logs go on."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from indexer.cas import FsBlobStore
from indexer.errors import StoreCorrupt, StoreError, StoreLocked, StoreVersion
from indexer.store import backup as module
from indexer.store.backup import MANIFEST, RESTORE_IDS, backup, restore
from indexer.store.check import check
from indexer.store.codecs import pack
from indexer.store.database import FORMAT, Database
from indexer.store.keyspaces import CURSORS, HOLE
from indexer.store.raw import RawRows
from tests.store.support import ALICE, POST, Store, ids, opened


async def made(tmp_path: Path, records: int = 3) -> Path:
    """A backup of a database with as many events."""
    async with opened(tmp_path / "data") as store:
        for number in range(records):
            await store.put(ALICE, f"a.b.c/{number}", str(number))
        await asyncio.to_thread(backup, store.db, tmp_path / "backup")
    return tmp_path / "backup"


async def test_a_backup_says_what_it_holds(tmp_path: Path) -> None:
    folder = await made(tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["format"], manifest["head"], manifest["cas_bytes"]) == (FORMAT, 4, 0)
    assert manifest["db_bytes"] == sum(path.stat().st_size for path in (folder / "db").iterdir())
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["db"]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.limit(60)
async def test_taken_while_everything_is_written_it_restores_to_a_sound_database(tmp_path: Path) -> None:
    async with opened(tmp_path / "data", writer={"group_ops": 20}, gc={"step_rows": 7}) as store:

        async def write() -> None:
            for number in range(1500):
                await store.put(ALICE, f"a.b.c/{number % 40}", str(number % 90))
                if number % 7 == 0:
                    await store.delete(ALICE, f"a.b.c/{number % 13}")
                if number % 100 == 0:
                    await store.checkpoint.run_once()
                    await store.gc.run_once()

        writing = asyncio.create_task(write())
        while store.writer.head < 200:
            await asyncio.sleep(0)
        await asyncio.to_thread(backup, store.db, tmp_path / "backup")
        assert not writing.done()
        await writing
    restored = await asyncio.to_thread(restore, tmp_path / "backup", tmp_path / "again")
    assert restored.head >= 200
    async with opened(tmp_path / "again", boot="another boot") as store:
        store.assert_clean()
        assert store.log.head == restored.next


async def test_event_ids_go_on_above_an_announced_hole(tmp_path: Path) -> None:
    folder = await made(tmp_path)
    async with opened(tmp_path / "data") as store:
        await store.put(ALICE, "a.b.c/lost", "given out after the backup")  # id 4
    restored = restore(folder, tmp_path / "again")
    assert restored.head == 4
    assert restored.next >= 4 + RESTORE_IDS
    async with opened(tmp_path / "again", boot="another boot") as store:
        await store.put(ALICE, POST, "new")
        assert ids(store.events()) == [1, 2, 3, restored.next]
        assert store.db.cursor(f"{HOLE}4") == restored.next
        assert store.log.read(4, 10)[0].id == restored.next
        assert store.log.read(store.log.at_time(store.events()[-1].time_us), 1) == store.events()[-1:]
        store.assert_clean()


async def test_two_restores_of_a_backup_give_out_different_ids(tmp_path: Path) -> None:
    folder = await made(tmp_path)
    made_us = json.loads((folder / MANIFEST).read_text())["time_us"]
    given: list[int] = []
    for minutes in (0, 1, 2, 60 * 24 * 365):
        target = tmp_path / str(minutes)
        restored = restore(folder, target, clock=lambda us=made_us + minutes * 60_000_000: us)  # type: ignore[misc]
        assert restored.next == 4 + RESTORE_IDS * (1 + minutes)
        async with opened(target) as store:
            await store.put(ALICE, POST, "new")
            given.append(store.events()[-1].id)
    assert len(set(given)) == 4


async def test_a_clock_that_gives_no_safe_ids_is_refused(tmp_path: Path) -> None:
    folder = await made(tmp_path)
    made_us = json.loads((folder / MANIFEST).read_text())["time_us"]
    with pytest.raises(StoreError, match="the clock is before the backup"):
        restore(folder, tmp_path / "again", clock=lambda: made_us - 1)
    with pytest.raises(StoreError, match="none may reach"):
        restore(folder, tmp_path / "again", clock=lambda: made_us + 2**21 * 60_000_000)
    assert not (tmp_path / "again" / "db").exists()


async def test_a_backup_can_be_restored_again_and_again(tmp_path: Path) -> None:
    folder = await made(tmp_path)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("one", "two"):
        restore(folder, tmp_path / name)
        async with opened(tmp_path / name) as store:
            await store.put(ALICE, POST, name)
            store.assert_clean()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


async def test_archived_files_come_along(tmp_path: Path) -> None:
    blobs = FsBlobStore(tmp_path / "data" / "cas", level=3)
    digest = blobs.put(b"a car" * 1000)
    (tmp_path / "data/cas/blobs/sha256/half.1-1.tmp").write_bytes(b"still being written")
    folder = await made(tmp_path)
    restored = restore(folder, tmp_path / "again")
    assert restored.cas_bytes == blobs.physical_bytes() > 0
    assert FsBlobStore(tmp_path / "again" / "cas").get(digest) == b"a car" * 1000
    assert not list((tmp_path / "again").rglob("*.tmp"))


async def test_over_the_border_of_file_systems_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse(self: Path, target: Any) -> Path:
        if self.name.startswith(".checkpoint-"):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    def unlinked(_self: Path, _target: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    FsBlobStore(tmp_path / "data" / "cas").put(b"a car")
    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(Path, "hardlink_to", unlinked)
    folder = await made(tmp_path)
    assert not list((tmp_path / "data").glob(".checkpoint-*"))
    restore(folder, tmp_path / "again")
    with Database.open(tmp_path / "again" / "db") as db:
        assert check(db).clean
        assert db.count("records") == 3


async def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = await made(tmp_path)
    async with opened(tmp_path / "data") as store:
        with pytest.raises(StoreError, match="exists already"):
            backup(store.db, folder)
        with pytest.raises(StoreLocked):
            Database.open(tmp_path / "data" / "db")
    with pytest.raises(StoreError, match="is not empty"):
        restore(folder, tmp_path / "data")
    with pytest.raises(StoreError, match=r"no backup: it has no backup\.json"):
        restore(tmp_path / "data", tmp_path / "again")
    assert not (tmp_path / "again").exists()


async def test_a_failed_backup_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path, _text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_write_synced", full)
    with pytest.raises(StoreError, match="the disk is full"):
        await made(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["db"]


async def test_leftovers_of_a_kill_are_no_obstacle(tmp_path: Path) -> None:
    for leftover in ("backup.part", "data/.checkpoint-1", "again/restore.part"):
        (tmp_path / leftover / "db").mkdir(parents=True)
    folder = await made(tmp_path)
    restore(folder, tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["cas", "db"][1:]
    assert not list((tmp_path / "data").glob(".checkpoint-*"))


async def test_a_backup_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = await made(tmp_path)
    with Database.open_unchecked(folder / "db") as db:
        RawRows(db).commit([(CURSORS.name, b"format", pack([FORMAT + 1, FORMAT + 1]))])
    with pytest.raises(StoreVersion):
        restore(folder, tmp_path / "again")
    assert not (tmp_path / "again" / "db").exists()


@pytest.mark.parametrize("name", ["format", "db_bytes", "cas_bytes"])
async def test_a_backup_that_is_not_what_its_manifest_says_is_refused(tmp_path: Path, name: str) -> None:
    FsBlobStore(tmp_path / "data" / "cas").put(b"a car")
    folder = await made(tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    if name == "cas_bytes":
        for file in (folder / "cas").rglob("*"):
            if file.is_file():
                file.unlink()
    else:
        (folder / MANIFEST).write_text(json.dumps({**manifest, name: manifest[name] + 1}))
    with pytest.raises(StoreCorrupt, match=f"damaged or was changed: {name} is"):
        restore(folder, tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["restore.part"]


@pytest.mark.parametrize("text", ["", "[]", "{}", "7"])
async def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    folder = await made(tmp_path)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(StoreCorrupt, match="manifest of a backup|cannot be read"):
        restore(folder, tmp_path / "again")


async def test_the_clock_of_the_log_goes_on(tmp_path: Path) -> None:
    folder = await made(tmp_path)
    restore(folder, tmp_path / "again")
    async with opened(tmp_path / "again", clock=lambda: 1) as store:
        await store.put(ALICE, POST, "new")
        await _strictly_later(store)


async def _strictly_later(store: Store) -> None:
    times = [event.time_us for event in store.events()]
    assert times == sorted(set(times))
