"""Looking at a database without changing a byte of its folder: a read-only file system, a full one, a backup.

rocksdict writes a file of its own into the folder of every database that it opens, so a reader opens a folder
of links to the files instead, in memory where the system has such a place. A shared lock of the database's
LOCK keeps writers out meanwhile, and is refused while one is at work. Blocking; any thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final, TypeAlias

from indexer.errors import StoreError, StoreLocked

_LOCK: Final = "LOCK"
_OWN: Final = (_LOCK, "rocksdict-config.json")  # what RocksDB and rocksdict write, and readers do not need
_MEMORY: Final = Path("/dev/shm")

_FileId: TypeAlias = tuple[int, int]

#: LOCK files that this process holds for writing. Closing any file of that number gives such a lock back.
_written: set[_FileId] = set()
#: Folders of links, and what they stand for.
_views: dict[str, str] = {}


class View:
    """``folder`` is to be opened in the place of ``path``, read-only; `close` it afterwards.

    Raises `StoreLocked` while a writer has the database, `StoreError`.
    """

    def __init__(self, path: Path) -> None:
        self._lock = _shared_lock(path / _LOCK)
        try:
            self.folder = _folder_of_links(path)
        except BaseException:
            self._unlock()
            raise
        _views[str(self.folder)] = str(path)

    def close(self) -> None:
        _views.pop(str(self.folder), None)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def by_own_name(text: str) -> str:
    """``text`` of an error with the database's folder where a folder of links is named."""
    for folder, path in list(_views.items()):
        text = text.replace(folder, path)
    return text


def note_writer(path: Path) -> _FileId:
    """Notes that this process has the database in ``path`` open for writing; `forget_writer` it."""
    found = (path / _LOCK).stat()
    _written.add((found.st_dev, found.st_ino))
    return found.st_dev, found.st_ino


def forget_writer(file: _FileId) -> None:
    _written.discard(file)


def _shared_lock(path: Path) -> int | None:
    """The handle that holds it; None without such a file, as in a backup, which nobody may write to."""
    held = f"opening {path.parent}: another process holds the database; stop it first"
    try:
        found = path.stat()
        if (found.st_dev, found.st_ino) in _written:
            raise StoreLocked(held)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"opening {path}: {error.strerror}") from error
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise StoreLocked(held) from error
        raise StoreError(f"locking {path}: {error.strerror}") from error
    return handle


def _folder_of_links(path: Path) -> Path:
    folder = _new_folder()
    try:
        for file in path.resolve().iterdir():
            if file.name not in _OWN:
                (folder / file.name).symlink_to(file)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise StoreError(f"opening {path}: cannot link its files in {folder}: {error.strerror}") from error
    return folder


def _new_folder() -> Path:
    with contextlib.suppress(OSError):
        return Path(tempfile.mkdtemp(prefix="indexer-view-", dir=_MEMORY))
    try:
        return Path(tempfile.mkdtemp(prefix="indexer-view-"))
    except OSError as error:
        raise StoreError(
            f"no folder for temporary files can be written to ({error.strerror}); name one with TMPDIR"
        ) from error
