"""Folders that are copied, linked, made durable and removed as a whole, for backups and restores.

Every call blocks; any thread.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeAlias

from indexer.errors import StoreError, StoreFull

#: Called with what is being done, the bytes done and the bytes in all.
Progress: TypeAlias = Callable[[str, int, int], None]

#: What is not whole yet has a name that ends so.
PART: Final = ".part"
_TEMP: Final = ".tmp"  # files that a byte store is still writing


def silent(_what: str, _done: int, _total: int) -> None:
    """Nobody watches."""


def files(folder: Path) -> Iterator[Path]:
    """Every file below ``folder``, in the order of their names."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def copy_tree(
    source: Path,
    target: Path,
    what: str,
    progress: Progress,
    *,
    link: bool = False,
    only: Iterable[Path] | None = None,
) -> int:
    """Copy, or link where that is possible, every file, or ``only`` these, but temporary ones; returns their
    bytes. What ``progress`` raises ends it between two files."""
    found = [path for path in (files(source) if only is None else only) if path.suffix != _TEMP]
    total, done = sum(path.stat().st_size for path in found), 0
    for path in found:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not (link and _linked(path, place)):
            shutil.copy2(path, place)
            with place.open("rb+") as file:
                os.fsync(file.fileno())
        done += path.stat().st_size
        progress(what, done, total)
    return done


def _linked(path: Path, place: Path) -> bool:
    try:
        place.hardlink_to(path)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            return False
        raise
    return True


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync_folder` of every folder below, then of ``folder``. The files themselves are synced before."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def lies_in(path: Path, folder: Path) -> bool:
    """Whether ``path``, there or not, is ``folder`` or something below it, by whatever name."""
    return path.resolve().is_relative_to(folder.resolve())


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Every failure of the file system inside becomes a `StoreError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"{what}: the disk is full; free some space and try again") from error
        raise StoreError(f"{what}: {error.strerror or error}") from error
