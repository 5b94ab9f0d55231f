"""Backups: a consistent copy of a database and the archived files that belong to it.

A backup is a folder: ``db/`` (a RocksDB checkpoint), ``cas/`` (hard links or copies; files there never
change), ``backup.json`` (written last). It appears under its name whole or not at all; `restore` is the way
back. Everything blocks; any thread, beside a running writer.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Collection
from pathlib import Path as FilePath
from typing import Any, Final, NamedTuple

from indexer.atproto.types import EventId, Micros
from indexer.cas.filesystem import digest_in
from indexer.errors import StoreCorrupt, StoreError
from indexer.store import keyspaces
from indexer.store.codecs import decode_cid_key
from indexer.store.database import Database, format_version
from indexer.store.folders import (
    PART,
    Progress,
    copy_tree,
    files,
    lies_in,
    remove,
    sha256_of,
    silent,
    sync_folder,
    sync_tree,
    translated,
    write_synced,
)
from indexer.store.keyspaces import ARCHIVES, CURSORS

MANIFEST: Final = "backup.json"
_STAGING: Final = ".checkpoint-"
_TABLE: Final = ".sst"  # checksums of its own, block by block
_SHA256: Final = "sha256"
_TEXT: Final = "path"


class Backup(NamedTuple):
    """What a backup holds. ``head`` is the id of the event that would have come next."""

    path: str
    time_us: int
    format: int
    head: EventId
    db_bytes: int
    cas_bytes: int


class Manifest(NamedTuple):
    """What ``backup.json`` says. ``sha256`` is by path, of the files that carry no checksums themselves."""

    made: Backup
    sha256: dict[str, str]


def backup(db: Database, target: FilePath, *, progress: Progress = silent) -> Backup:
    """Back up an open database and the ``cas`` folder beside it into the new folder ``target``.

    Raises `StoreError` when the target exists, lies in the data directory or cannot be written, `StoreFull`.
    """
    part = target.parent / f"{target.name}{PART}"
    with translated(f"writing the backup {target}"):
        _expect_new(target, db.path.parent)
        _remove_leftover(part)
        part.mkdir(parents=True)
        try:
            cas = db.path.parent / "cas"
            before = frozenset(files(cas))
            db_bytes = _copy_database(db, part / "db", progress)
            kept = _of_that_moment(cas, before, part / "db")
            cas_bytes = copy_tree(cas, part / "cas", "files", progress, link=True, only=kept)
            made = _describe(part, target, db_bytes, cas_bytes)
            said = {**made._asdict(), _SHA256: _sums(part / "db")}
            write_synced(part / MANIFEST, json.dumps(said, indent=2) + "\n")
            sync_tree(part)
            part.rename(target)
            sync_folder(target.parent)
        except BaseException:
            remove(part)
            raise
    return made


def _expect_new(target: FilePath, data_dir: FilePath) -> None:
    if target.exists():
        raise StoreError(f"{target} exists already; name a folder that does not")
    if lies_in(target, data_dir):
        raise StoreError(f"{target} lies in the data directory {data_dir}; name a folder elsewhere")


def _remove_leftover(part: FilePath) -> None:
    """Removes what a killed backup left, and nothing else."""
    if not part.exists():
        return
    if not part.is_dir() or {entry.name for entry in part.iterdir()} - {"db", "cas", MANIFEST}:
        raise StoreError(
            f"{part} is in the way and is no leftover of a backup; move it, or name another folder"
        )
    remove(part)


def remove_staging(data_dir: FilePath) -> None:
    """Removes checkpoints that killed backups left beside the database, whose lock the caller holds."""
    for stale in data_dir.glob(f"{_STAGING}*"):
        with translated(f"removing {stale}"):
            remove(stale)


def _copy_database(db: Database, target: FilePath, progress: Progress) -> int:
    """A checkpoint, made beside the database, where it is but links, and moved or copied from there: a
    checkpoint over the border of file systems would copy within RocksDB, which holds the GIL."""
    remove_staging(db.path.parent)
    staging = db.path.parent / f"{_STAGING}{os.getpid()}"
    try:
        db.checkpoint(staging)
        try:
            staging.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return copy_tree(staging, target, "database", progress)
        return sum(file.stat().st_size for file in files(target))
    finally:
        remove(staging)


def _of_that_moment(cas: FilePath, before: Collection[FilePath], database: FilePath) -> list[FilePath]:
    """The archived files but those that came while the database was copied and that the copy does not hold:
    restored, nobody would know them. Files that were there ``before`` are not asked about."""
    found = list(files(cas))
    new = {digest_in(path.name): path for path in found if path not in before}
    if new:
        with Database.open_unchecked(database, read_only=True, memory_mib=32) as copy:
            for key, _ in copy.raw_scan(ARCHIVES.name, None, None):
                new.pop(decode_cid_key(key)[1], None)
    strange = frozenset(new.values())
    return [path for path in found if path not in strange]


def _describe(part: FilePath, target: FilePath, db_bytes: int, cas_bytes: int) -> Backup:
    """Opens the copy: a backup that cannot be opened is none."""
    with Database.open_unchecked(part / "db", read_only=True, memory_mib=32) as copy:
        version = format_version(copy)
        if version is None:
            raise StoreCorrupt(f"{part}: the database has no format version (cursors: format)")
        return Backup(str(target), now_us(), version.written, head_of(copy)[0], db_bytes, cas_bytes)


def _sums(database: FilePath) -> dict[str, str]:
    """The digests of the small files beside the tables: a flipped bit in the log or the manifest of RocksDB
    may pass for the end of it."""
    found = (path for path in files(database) if path.suffix != _TABLE)
    return {str(path.relative_to(database.parent)): sha256_of(path) for path in found}


def head_of(db: Database) -> tuple[EventId, Micros]:
    """The id of the next event and the time of the last one."""
    stored = db.get(CURSORS, keyspaces.HEAD)
    return (1, 0) if stored is None else (stored[0], stored[1])


def now_us() -> Micros:
    return time.time_ns() // 1000


def read_manifest(source: FilePath) -> Manifest:
    """What the backup ``source`` says of itself. Raises `StoreError` when it is none, `StoreCorrupt`."""
    path = source / MANIFEST
    try:
        fields = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        why = f"it has no {MANIFEST}" if source.is_dir() else "there is no such folder"
        raise StoreError(f"{source} is no backup: {why}") from error
    except (OSError, ValueError) as error:
        raise StoreCorrupt(f"{path} cannot be read: {error}") from error
    try:
        sums = fields.pop(_SHA256, {})
        made = Backup(**fields)
    except (TypeError, AttributeError) as error:
        raise StoreCorrupt(f"{path} is no manifest of a backup: {error}") from error
    for name, value in made._asdict().items():
        _expect(path, isinstance(value, str if name == _TEXT else int), f"{name} is {value!r}")
    _expect(path, _are_sums(sums), f"{_SHA256} is no table of digests")
    return Manifest(made, sums)


def _expect(path: FilePath, true: bool, why: str) -> None:
    if not true:
        raise StoreCorrupt(f"{path} is no manifest of a backup: {why}")


def _are_sums(sums: Any) -> bool:
    """Whether these are digests of files inside the backup's ``db``."""
    if not isinstance(sums, dict):
        return False
    return all(
        isinstance(digest, str) and name.startswith("db/") and ".." not in FilePath(name).parts
        for name, digest in sums.items()
    )
