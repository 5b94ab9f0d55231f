"""The way back from a backup: a new data directory, checked before it is one.

A restored database gives out event ids above those of the backup, 2^32 and as much again for every minute
since, to the microsecond, because the ids in between may have been given out after it was made, also by an
earlier restore of it; readers are told of the hole. A folder into which a restore was broken off is refused
by name until `restore` has been run again. Everything blocks; any thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Final, NamedTuple

from indexer.atproto.types import EventId, Micros
from indexer.cas import FsBlobStore
from indexer.errors import BlobCorrupt, BlobMissing, StoreCorrupt, StoreError
from indexer.store import keyspaces
from indexer.store.backup import MANIFEST, Backup, Manifest, head_of, now_us, read_manifest
from indexer.store.codecs import pack
from indexer.store.database import Database, format_version
from indexer.store.folders import (
    PART,
    Progress,
    copy_tree,
    lies_in,
    remove,
    sha256_of,
    silent,
    sync_folder,
    sync_tree,
    translated,
)
from indexer.store.keyspaces import CURSORS
from indexer.store.raw import RawRows
from indexer.store.rocks import RESTORE_ADVICE
from indexer.store.upkeep import read_through

#: Ids left out by a restore, and again for every minute that the backup is old.
RESTORE_IDS: Final = 2**32
_MINUTE_US: Final = 60_000_000
_IDS: Final = 2**53  # readers in JavaScript know no more
_PART: Final = f"restore{PART}"
_LOST: Final = "lost+found"  # of a file system of its own
_MEMORY_MIB: Final = 32
_PIECE: Final = 1 << 20


class Restored(NamedTuple):
    """``head`` was the next event's id in the backup, ``next`` is what it is now."""

    head: EventId
    next: EventId
    db_bytes: int
    cas_bytes: int


def restore(
    source: FilePath,
    data_dir: FilePath,
    *,
    verify: bool = True,
    progress: Progress = silent,
    clock: Callable[[], Micros] = now_us,
) -> Restored:
    """Make ``data_dir`` of a backup, which stays as it is. ``verify``: read everything that was copied.

    Raises `StoreError` when the folder is not empty or the clock is before the backup, and `StoreCorrupt`
    when the backup is damaged or does not hold what its manifest says.
    """
    said = read_manifest(source)
    skipped = _skipped(source, clock() - said.made.time_us)
    part = data_dir / _PART
    with translated(f"restoring into {data_dir}"):
        _expect_apart(source, data_dir)
        data_dir.mkdir(parents=True, exist_ok=True)
        _clear(data_dir, part)
        part.mkdir()
        db_bytes = copy_tree(source / "db", part / "db", "database", progress)
        cas_bytes = copy_tree(source / "cas", part / "cas", "files", progress)
        _compare(source, said.made, said.made._replace(db_bytes=db_bytes, cas_bytes=cas_bytes))
        with _blamed_on(source, part):
            if verify:
                _verify(said, part, progress)
            head, following, written = _move_ids(part / "db", skipped)
        _compare(source, said.made, said.made._replace(format=written))
        _put_in_place(part, data_dir)
    return Restored(head, following, db_bytes, cas_bytes)


def expect_whole(data_dir: FilePath) -> None:
    """Raises `StoreError` when a restore into ``data_dir`` was broken off: what is there is not all of it."""
    part = data_dir / _PART
    if not part.exists():
        return
    if (data_dir / "db").exists() and not any(part.iterdir()):
        with contextlib.suppress(OSError):  # all was in place: nothing is lost when it stays
            part.rmdir()
        return
    raise StoreError(
        f"{data_dir}: a restore into it was broken off ({part.name} is there); run `indexer db restore` again"
    )


def expect_own(data_dir: FilePath) -> None:
    """Raises `StoreError` unless ``data_dir`` may be written to: it is no backup, which would be none any
    more, and whole."""
    if (data_dir / MANIFEST).exists():
        raise StoreError(
            f"{data_dir} is a backup ({MANIFEST} is there) and stays as it is; make a data_dir of it with "
            "`indexer db restore`"
        )
    expect_whole(data_dir)


def _expect_apart(source: FilePath, data_dir: FilePath) -> None:
    if lies_in(data_dir, source):
        raise StoreError(f"{data_dir} lies in the backup {source}; restore into another folder")
    if lies_in(source, data_dir):
        raise StoreError(f"the backup {source} lies in {data_dir}; restore into another folder")


def _clear(data_dir: FilePath, part: FilePath) -> None:
    """Takes away what a restore that was broken off left: the archived files, which are put in place first,
    and then the mark by which they are known to be its own."""
    names = {entry.name for entry in data_dir.iterdir()} - {_LOST}
    if names - ({part.name, "cas"} if part.name in names else set()):
        raise StoreError(f"{data_dir} is not empty; restore into a new data_dir")
    if part.name in names:
        remove(data_dir / "cas")
        remove(part)


def _put_in_place(part: FilePath, data_dir: FilePath) -> None:
    sync_tree(part)
    if (part / "cas").exists():
        (part / "cas").rename(data_dir / "cas")
    (part / "db").rename(data_dir / "db")
    sync_folder(data_dir)
    part.rmdir()
    sync_folder(data_dir)


def _compare(source: FilePath, said: Backup, found: Backup) -> None:
    for name in ("format", "db_bytes", "cas_bytes"):
        theirs, ours = getattr(said, name), getattr(found, name)
        if theirs != ours:
            raise StoreCorrupt(
                f"{source}: the backup is damaged or was changed: {name} is {ours}, {MANIFEST} says {theirs}"
            )


@contextmanager
def _blamed_on(source: FilePath, part: FilePath) -> Iterator[None]:
    """What is wrong with the copy is told of the backup, by the name that the operator knows."""
    try:
        yield
    except StoreError as error:
        why = str(error).replace(str(part), str(source))
        if isinstance(error, StoreCorrupt):
            why = f"the backup {source} is damaged: {why.removesuffix(RESTORE_ADVICE)}; use another one"
        error.args = (why,)
        raise


# ---- is it whole


def _verify(said: Manifest, part: FilePath, progress: Progress) -> None:
    """Reads every row and every archived file of the copy; both carry checksums."""
    for name, digest in said.sha256.items():
        if not (part / name).is_file():
            raise StoreCorrupt(f"{part / name} is missing")
        if sha256_of(part / name) != digest:
            raise StoreCorrupt(f"{part / name} is not what it was when the backup was made")
    with Database.open_unchecked(part / "db", memory_mib=_MEMORY_MIB) as db:
        read_through(db, progress)
    blobs = FsBlobStore(part / "cas")
    total = sum(1 for _ in blobs.files())
    for done, blob in enumerate(blobs.files()):
        progress("checking files", done, total)
        with _named(blob.path), blobs.open_read(blob.digest) as file:
            while file.read(_PIECE):
                pass


@contextmanager
def _named(path: FilePath) -> Iterator[None]:
    try:
        yield
    except (BlobCorrupt, BlobMissing) as error:
        raise StoreCorrupt(f"{path}: {error}") from error


# ---- the ids


def _skipped(source: FilePath, age_us: int) -> int:
    """The ids to leave out. They grow by 71 a microsecond, which is more than any database gives out, so
    that a later restore begins above all that an earlier one has given out until then."""
    if age_us < 0:
        raise StoreError(f"{source}: the clock is before the backup's time; set the clock, then try again")
    return RESTORE_IDS + RESTORE_IDS * age_us // _MINUTE_US


def _move_ids(path: FilePath, skipped: int) -> tuple[EventId, EventId, int]:
    """Lets event ids go on above all that may have been given out since, over an announced hole. Returns
    the next id, before and now, and the format."""
    with Database.open_unchecked(path, memory_mib=_MEMORY_MIB) as db:
        version = format_version(db)
        if version is None:
            raise StoreCorrupt(f"{path}: the backup has no format version (cursors: format)")
        head, time_us = head_of(db)
        following = head + skipped
        if following >= _IDS:
            raise StoreError(f"event ids would go on at {following}, and none may reach 2^53")
        rows = {
            keyspaces.HEAD: [following, time_us],
            f"{keyspaces.HOLE}{head}": following,
            keyspaces.RESERVE: following,
            keyspaces.CLEAN: 1,  # the hole above covers what a power cut would have taken
        }
        changes = [(CURSORS.name, name.encode(), pack(value)) for name, value in rows.items()]
        RawRows(db).commit(changes, sync=True)
        return head, following, version.written
