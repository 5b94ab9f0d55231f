"""Backups: what they hold, where they may lie, and what a killed one leaves."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from indexer.cas import FsBlobStore, digest_of
from indexer.errors import StoreError, StoreLocked
from indexer.store import backup as module
from indexer.store.backup import MANIFEST, backup, read_manifest
from indexer.store.check import check
from indexer.store.codecs import ArchiveRow
from indexer.store.database import FORMAT, Database
from indexer.store.keyspaces import ARCHIVES
from indexer.store.raw import RawRows
from indexer.store.restore import restore
from tests.store.support import ALICE, opened


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
    assert set(manifest["sha256"]) == {
        f"db/{path.name}" for path in (folder / "db").iterdir() if path.suffix != ".sst"
    }
    assert read_manifest(folder).made.path == str(folder)
    assert (manifest["format"], manifest["head"], manifest["cas_bytes"]) == (FORMAT, 4, 0)
    assert manifest["db_bytes"] == sum(path.stat().st_size for path in (folder / "db").iterdir())
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["db"]
    assert not list(tmp_path.glob("*.part"))


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

    monkeypatch.setattr(module, "write_synced", full)
    with pytest.raises(StoreError, match="the disk is full"):
        await made(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["db"]


async def test_leftovers_of_a_kill_are_no_obstacle(tmp_path: Path) -> None:
    for leftover in ("backup.part", "data/.checkpoint-1"):
        (tmp_path / leftover / "db").mkdir(parents=True)
    await made(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "data"]
    assert not list((tmp_path / "data").glob(".checkpoint-*"))


async def test_a_folder_that_only_looks_like_a_leftover_is_left_alone(tmp_path: Path) -> None:
    for what in ("folder", "file"):
        (tmp_path / what).mkdir()
        other = tmp_path / what / "backup.part"
        if what == "folder":
            other.mkdir()
            (other / "photos").mkdir()
        else:
            other.write_text("mine")
        with pytest.raises(StoreError, match=r"backup\.part is in the way"):
            await made(tmp_path / what)
        assert other.exists()


@pytest.mark.parametrize("place", ["data/backup", "data/db/backup", "link/backup"])
async def test_a_backup_does_not_lie_in_what_it_copies(tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "data")
    async with opened(tmp_path / "data") as store:
        with pytest.raises(StoreError, match="lies in the data directory"):
            backup(store.db, tmp_path / place)
    assert not (tmp_path / place).exists()


async def test_every_folder_is_synced_before_the_backup_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FsBlobStore(tmp_path / "data" / "cas").put(b"a car")
    part = tmp_path / "backup.part"
    synced = watch_syncs(monkeypatch)
    missing: set[Path] = set()
    rename = Path.rename

    def renamed(self: Path, target: Any) -> Path:
        if self == part:
            missing.update({part, *(path for path in part.rglob("*") if path.is_dir())} - synced)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    await made(tmp_path)
    assert not missing
    assert {part / "db", part / "cas" / "blobs" / "sha256", tmp_path} <= synced


def watch_syncs(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """The files and folders that are synced from now on."""
    synced: set[Path] = set()
    fsync = os.fsync

    def noted(file: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    return synced


async def test_a_car_that_comes_meanwhile_is_not_of_that_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path / "data") as store:
        blobs = FsBlobStore(tmp_path / "data" / "cas", level=3)
        real = Database.checkpoint

        def meanwhile(db: Database, target: Path) -> None:
            kept = blobs.put(b"its row is in the copy")
            row = ARCHIVES.value.encode(ArchiveRow("3ka", 1, 22))
            RawRows(db).commit([(ARCHIVES.name, ARCHIVES.key.encode((ALICE, kept)), row)])
            real(db, target)
            blobs.put(b"its row is too late")

        before = blobs.put(b"there before")
        monkeypatch.setattr(Database, "checkpoint", meanwhile)
        backup(store.db, tmp_path / "copy")
    held = digest_of(b"its row is in the copy")
    assert set(FsBlobStore(tmp_path / "copy" / "cas").digests()) == {before, held}
