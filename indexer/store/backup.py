"""Backups: a consistent copy of a database and the archived files that belong to it, and the way back.

A backup is a folder: ``db/`` (a RocksDB checkpoint), ``cas/`` (hard links or copies; files there never
change), ``backup.json`` (written last). It appears under its name whole or not at all. A restored database
gives out event ids above those of the backup, 2^32 and as much again for every minute since, because the
ids in between may have been given out after it was made, also by an earlier restore of it; readers are
told of the hole. Everything blocks; any thread, beside a running writer.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Final, NamedTuple, TypeAlias

from indexer.atproto.types import EventId, Micros
from indexer.errors import StoreCorrupt, StoreError, StoreFull
from indexer.store import keyspaces
from indexer.store.codecs import pack
from indexer.store.database import Database, format_version
from indexer.store.keyspaces import CURSORS
from indexer.store.raw import RawRows

#: Called with what is being copied, the bytes done and the bytes in all.
Progress: TypeAlias = Callable[[str, int, int], None]

#: Ids left out by a restore, and again for every minute that the backup is old.
RESTORE_IDS: Final = 2**32
_MINUTE_US: Final = 60_000_000
_IDS: Final = 2**53  # readers in JavaScript know no more
MANIFEST: Final = "backup.json"
_PART: Final = ".part"
_STAGING: Final = ".checkpoint-"
_TEMP: Final = ".tmp"  # files that a byte store is still writing


class Backup(NamedTuple):
    """What a backup holds. ``head`` is the id of the event that would have come next."""

    path: str
    time_us: int
    format: int
    head: EventId
    db_bytes: int
    cas_bytes: int


class Restored(NamedTuple):
    """``head`` was the next event's id in the backup, ``next`` is what it is now."""

    head: EventId
    next: EventId
    db_bytes: int
    cas_bytes: int


def _silent(_what: str, _done: int, _total: int) -> None:
    """Nobody watches."""


def backup(db: Database, target: FilePath, *, progress: Progress = _silent) -> Backup:
    """Back up an open database and the ``cas`` folder beside it into the new folder ``target``.

    Raises `StoreError` when the target exists or cannot be written, `StoreFull`.
    """
    if target.exists():
        raise StoreError(f"{target} exists already; name a folder that does not")
    part = target.with_name(target.name + _PART)
    with _translated(f"writing the backup {target}"):
        _remove(part)
        part.mkdir(parents=True)
        try:
            db_bytes = _copy_database(db, part / "db", progress)
            cas_bytes = _copy_tree(db.path.parent / "cas", part / "cas", "files", progress, link=True)
            made = _describe(part, target, db_bytes, cas_bytes)
            _write_synced(part / MANIFEST, json.dumps(made._asdict(), indent=2) + "\n")
            part.rename(target)
            _sync_folder(target.parent)
        except BaseException:
            _remove(part)
            raise
    return made


def _copy_database(db: Database, target: FilePath, progress: Progress) -> int:
    """A checkpoint, made beside the database, where it is but links, and moved or copied from there: a
    checkpoint over the border of file systems would copy within RocksDB, which holds the GIL."""
    for stale in db.path.parent.glob(f"{_STAGING}*"):
        _remove(stale)
    staging = db.path.parent / f"{_STAGING}{os.getpid()}"
    try:
        db.checkpoint(staging)
        try:
            staging.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return _copy_tree(staging, target, "database", progress)
        return sum(file.stat().st_size for file in _files(target))
    finally:
        _remove(staging)


def _describe(part: FilePath, target: FilePath, db_bytes: int, cas_bytes: int) -> Backup:
    """Opens the copy: a backup that cannot be opened is none."""
    with Database.open_unchecked(part / "db", read_only=True, memory_mib=32) as copy:
        version = format_version(copy)
        if version is None:
            raise StoreCorrupt(f"{part}: the database has no format version (cursors: format)")
        return Backup(str(target), _now_us(), version.written, _head(copy)[0], db_bytes, cas_bytes)


def _head(db: Database) -> tuple[EventId, int]:
    stored = db.get(CURSORS, keyspaces.HEAD)
    return (1, 0) if stored is None else (stored[0], stored[1])


def _now_us() -> Micros:
    return time.time_ns() // 1000


def restore(
    source: FilePath,
    data_dir: FilePath,
    *,
    progress: Progress = _silent,
    clock: Callable[[], Micros] = _now_us,
) -> Restored:
    """Make ``data_dir`` of a backup, which stays as it is. Raises `StoreError` when it is not empty or the
    clock is before the backup, and `StoreCorrupt` when the backup does not hold what its manifest says."""
    said = _manifest(source)
    skipped = _skipped(source, clock() - said.time_us)
    part = data_dir / f"restore{_PART}"
    with _translated(f"restoring into {data_dir}"):
        data_dir.mkdir(parents=True, exist_ok=True)
        if any(entry.name not in (part.name, "lost+found") for entry in data_dir.iterdir()):
            raise StoreError(f"{data_dir} is not empty; restore into a new data_dir")
        _remove(part)
        part.mkdir()
        db_bytes = _copy_tree(source / "db", part / "db", "database", progress)
        cas_bytes = _copy_tree(source / "cas", part / "cas", "files", progress)
        head, following, written = _move_ids(part / "db", skipped)
        _compare(source, said, said._replace(format=written, db_bytes=db_bytes, cas_bytes=cas_bytes))
        if (part / "cas").exists():
            (part / "cas").rename(data_dir / "cas")
        (part / "db").rename(data_dir / "db")
        part.rmdir()
        _sync_folder(data_dir)
    return Restored(head, following, db_bytes, cas_bytes)


def _manifest(source: FilePath) -> Backup:
    try:
        fields = json.loads((source / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise StoreError(f"{source} is no backup: it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise StoreCorrupt(f"{source / MANIFEST} cannot be read: {error}") from error
    try:
        said = Backup(**fields)
    except TypeError as error:
        raise StoreCorrupt(f"{source / MANIFEST} is no manifest of a backup: {error}") from error
    if not all(isinstance(value, int) for value in said[1:]):
        raise StoreCorrupt(f"{source / MANIFEST} is no manifest of a backup: a number is not one")
    return said


def _compare(source: FilePath, said: Backup, found: Backup) -> None:
    for name in ("format", "db_bytes", "cas_bytes"):
        theirs, ours = getattr(said, name), getattr(found, name)
        if theirs != ours:
            raise StoreCorrupt(
                f"{source}: the backup is damaged or was changed: {name} is {ours}, {MANIFEST} says {theirs}"
            )


def _skipped(source: FilePath, age_us: int) -> int:
    """The ids to leave out: others for every restore of the backup, as long as a minute lies between."""
    if age_us < 0:
        raise StoreError(f"{source}: the clock is before the backup's time; set the clock, then try again")
    return RESTORE_IDS * (1 + age_us // _MINUTE_US)


def _move_ids(path: FilePath, skipped: int) -> tuple[EventId, EventId, int]:
    """Lets event ids go on above all that may have been given out since, over an announced hole. Returns
    the next id, before and now, and the format."""
    with Database.open_unchecked(path, memory_mib=32) as db:
        version = format_version(db)
        if version is None:
            raise StoreCorrupt(f"{path}: the backup has no format version (cursors: format)")
        head, time_us = _head(db)
        following = head + skipped
        if following >= _IDS:
            raise StoreError(f"{path}: event ids would go on at {following}, and none may reach 2^53")
        rows = {
            keyspaces.HEAD: [following, time_us],
            f"{keyspaces.HOLE}{head}": following,
            keyspaces.RESERVE: following,
            keyspaces.CLEAN: 1,  # the hole above covers what a power cut would have taken
        }
        changes = [(CURSORS.name, name.encode(), pack(value)) for name, value in rows.items()]
        RawRows(db).commit(changes, sync=True)
        return head, following, version.written


# ---- files


def _files(folder: FilePath) -> Iterator[FilePath]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _copy_tree(
    source: FilePath, target: FilePath, what: str, progress: Progress, *, link: bool = False
) -> int:
    """Copy, or link where that is possible, every file but temporary ones; returns their bytes."""
    files = [path for path in _files(source) if path.suffix != _TEMP]
    total, done = sum(path.stat().st_size for path in files), 0
    for path in files:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not (link and _linked(path, place)):
            shutil.copy2(path, place)
            with place.open("rb+") as file:
                os.fsync(file.fileno())
        done += path.stat().st_size
        progress(what, done, total)
    return done


def _linked(path: FilePath, place: FilePath) -> bool:
    try:
        place.hardlink_to(path)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            return False
        raise
    return True


def _write_synced(path: FilePath, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: FilePath) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: FilePath) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"{what}: the disk is full; free some space and try again") from error
        raise StoreError(f"{what}: {error.strerror or error}") from error
