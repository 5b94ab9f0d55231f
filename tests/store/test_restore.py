"""Restores: a database that goes on, or a refusal that names what is wrong with the backup."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from indexer.cas import FsBlobStore
from indexer.config import Settings
from indexer.daemon import Daemon
from indexer.errors import StoreCorrupt, StoreError, StoreVersion
from indexer.store import database
from indexer.store.backup import MANIFEST, backup
from indexer.store.database import FORMAT, Database
from indexer.store.keyspaces import HOLE
from indexer.store.restore import RESTORE_IDS, expect_whole, restore
from tests.store.support import ALICE, POST, Store, ids, opened
from tests.store.test_backup import made, watch_syncs


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
    for us in (0, 1, 1_000_000, 60_000_000, 60_000_000 * 60 * 24 * 365):
        target = tmp_path / str(us)
        restored = restore(folder, target, clock=lambda us=us: made_us + us)  # type: ignore[misc]
        assert restored.next == 4 + RESTORE_IDS + RESTORE_IDS * us // 60_000_000
        async with opened(target) as store:
            await store.put(ALICE, POST, "new")
            given.append(store.events()[-1].id)
    assert given[1] - given[0] > 70  # ids that the first may have given out in that microsecond
    assert given == sorted(set(given))


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


async def test_a_backup_of_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = await made(tmp_path)
    monkeypatch.setattr(database, "FORMAT", FORMAT - 1)
    with pytest.raises(StoreVersion, match=f"{folder}/db: the database has format {FORMAT}"):
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


# ---- damage


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _largest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("pattern", ["*.sst", "MANIFEST-*", "CURRENT", "OPTIONS-*"])
async def test_a_flipped_bit_in_the_database_is_found(tmp_path: Path, pattern: str) -> None:
    folder = await made(tmp_path)
    damaged = _largest(folder / "db", pattern)
    _flip(damaged, 10)
    with pytest.raises(StoreCorrupt) as caught:
        restore(folder, tmp_path / "again")
    message = str(caught.value)
    assert message.startswith(f"the backup {folder} is damaged: ")
    assert str(damaged) in message
    assert "restore.part" not in message
    assert not (tmp_path / "again" / "db").exists()


@pytest.mark.slow
async def test_every_bit_of_a_table_that_matters_is_found(tmp_path: Path) -> None:
    folder = await made(tmp_path, records=30)
    table = _largest(folder / "db", "*.sst")
    whole = table.read_bytes()
    with Database.open(folder / "db", read_only=True) as db:
        rows = list(db.raw_scan("blocks", None, None))
    for at in range(0, len(whole), max(1, len(whole) // 25)):
        _flip(table, at)
        try:
            restore(folder, tmp_path / "again")
        except StoreCorrupt:
            pass
        else:  # padding, or what RocksDB does without
            with Database.open(tmp_path / "again" / "db") as db:
                assert list(db.raw_scan("blocks", None, None)) == rows
        shutil.rmtree(tmp_path / "again")
        table.write_bytes(whole)


async def test_a_damaged_archive_is_found(tmp_path: Path) -> None:
    FsBlobStore(tmp_path / "data" / "cas").put(b"a car" * 1000)
    folder = await made(tmp_path)
    damaged = _largest(folder / "cas", "blobs/sha256/*/*")
    content = damaged.read_bytes()
    damaged.unlink()  # a link to the original
    damaged.write_bytes(content)
    _flip(damaged, len(content) // 2)
    with pytest.raises(StoreCorrupt, match=f"the backup {folder} is damaged: {damaged}: "):
        restore(folder, tmp_path / "again")


@pytest.mark.parametrize("name", ["MANIFEST-*", "CURRENT"])
async def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = await made(tmp_path)
    lost = _largest(folder / "db", name)
    size = lost.stat().st_size
    lost.unlink()
    (folder / "db" / "stray").write_bytes(b"x" * size)  # so that the bytes are those of the manifest
    with pytest.raises(StoreCorrupt, match=f"the backup {folder} is damaged: {lost} is missing"):
        restore(folder, tmp_path / "again")


async def test_verification_can_be_left_out(tmp_path: Path) -> None:
    folder = await made(tmp_path)
    _flip(_largest(folder / "db", "OPTIONS-*"), 10)  # a comment in it
    restore(folder, tmp_path / "again", verify=False)
    with Database.open(tmp_path / "again" / "db") as db:
        assert db.count("records") == 3


# ---- a restore that is broken off


class Killed(BaseException):
    """Ends the restore where it is."""


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Kills at the rename of that number, counted from 1."""
    when = {"rename": 0, "done": 0}
    rename = Path.rename

    def renamed(self: Path, target: Any) -> Path:
        if self.parent.name == "restore.part":
            when["done"] += 1
            if when["done"] == when["rename"]:
                raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", renamed)
        yield when


@pytest.mark.parametrize(("number", "left"), [(1, ["restore.part"]), (2, ["cas", "restore.part"])])
async def test_killed_before_its_end_it_is_refused_by_name_and_can_be_repeated(
    tmp_path: Path, killed_after: dict[str, int], number: int, left: list[str]
) -> None:
    digest = FsBlobStore(tmp_path / "data" / "cas").put(b"a car")
    folder = await made(tmp_path)
    killed_after["rename"] = number
    target = tmp_path / "again"
    with pytest.raises(Killed):
        restore(folder, target)
    assert sorted(path.name for path in target.iterdir()) == left
    with pytest.raises(StoreError, match="a restore into it was broken off"):
        async with Daemon(Settings.model_validate({"data_dir": target})):
            pass
    assert sorted(path.name for path in target.iterdir()) == left
    restore(folder, target)
    assert sorted(path.name for path in target.iterdir()) == ["cas", "db"]
    assert FsBlobStore(target / "cas").get(digest) == b"a car"
    expect_whole(target)


def test_killed_at_its_very_end_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "restore.part").mkdir()
    expect_whole(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["db"]


async def test_only_its_own_leftovers_are_replaced(tmp_path: Path) -> None:
    folder = await made(tmp_path)
    for names in (["cas"], ["restore.part", "db"], ["restore.part", "cas", "notes"]):
        target = tmp_path / "-".join(names)
        for name in names:
            (target / name).mkdir(parents=True)
        with pytest.raises(StoreError, match="is not empty"):
            restore(folder, target)
        assert sorted(path.name for path in target.iterdir()) == sorted(names)


async def test_what_is_restored_is_synced_before_it_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: dict[str, int]
) -> None:
    FsBlobStore(tmp_path / "data" / "cas").put(b"a car")
    folder = await made(tmp_path)
    synced = watch_syncs(monkeypatch)
    killed_after["rename"] = 1
    with pytest.raises(Killed):
        restore(folder, tmp_path / "again")
    part = tmp_path / "again" / "restore.part"
    assert {part, *(path for path in part.rglob("*") if path.is_dir())} <= synced
    copied = {part / path.relative_to(folder) for path in (folder / "cas").rglob("*") if path.is_file()}
    assert copied
    assert copied <= synced


async def test_backup_and_data_directory_lie_apart(tmp_path: Path) -> None:
    folder = await made(tmp_path)
    for target in (folder, folder / "again", folder / "db" / "again"):
        with pytest.raises(StoreError, match=f"{target} lies in the backup {folder}"):
            restore(folder, target)
    with pytest.raises(StoreError, match=f"the backup {folder} lies in {tmp_path}"):
        restore(folder, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "db"]
