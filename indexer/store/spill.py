"""The disk of a walk that memory does not hold: blocks one behind the other in a file, found by an index.

Implements `indexer.repo.blocks.BlockStore`. Nothing in it outlives the walk: its files are deleted as soon as
they are open, so that not even a killed process leaves anything but an empty folder. What an archive brought
in the order in which it is asked for is read in one piece. A folder that holds anything else is refused, and
so is one that another store has. Every call blocks; one thread at a time.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from itertools import accumulate, chain
from operator import sub
from pathlib import Path
from types import TracebackType
from typing import Final

from indexer.atproto.cid import CID_LENGTH
from indexer.atproto.types import Cid
from indexer.errors import DiskError
from indexer.store.spill_file import SpillFile
from indexer.store.spill_index import SpillIndex

_MIB: Final = 1 << 20
_MARK: Final = "SPILL"
#: A place is where a block's CID begins, shifted by these bits, and the length of both.
_LENGTH_BITS: Final = 24
_LONGEST: Final = (1 << _LENGTH_BITS) - 1
_LARGEST_MIB: Final = 1 << 20  # 40 bits of bytes
#: Blocks that lie within a few times their size are read at once, up to so many bytes.
_SPREAD: Final = 4
_PIECE: Final = 4 * _MIB


class DiskBuilder:
    """How disk stores are to be opened. ``cache_mb``: memory (MiB) for the index, of which a block takes some
    20 bytes; what is more goes to disk. ``max_stored_mb``: what a store may hold at most (MiB of blocks and
    their CIDs)."""

    def __init__(self, cache_mb: int = 32, max_stored_mb: float = 10240) -> None:
        if not (isinstance(cache_mb, int) and isinstance(max_stored_mb, (int, float))):
            raise TypeError(
                f"cache_mb is {cache_mb!r} and max_stored_mb {max_stored_mb!r}: a whole number and a number"
            )
        if cache_mb < 1 or not 0 <= max_stored_mb < _LARGEST_MIB:
            raise ValueError(
                f"cache_mb is {cache_mb} and max_stored_mb {max_stored_mb}: at least 1, and from 0 to below "
                f"{_LARGEST_MIB}"
            )
        self._cache = cache_mb * _MIB
        self._most = int(max_stored_mb * _MIB)

    def open(self, path: Path | str) -> SpillStore:
        """The empty store in the folder ``path``, made when it is not there; or `DiskError`."""
        return SpillStore(Path(path), self._cache, self._most)


class SpillStore:
    """Blocks by CID, on disk. A context manager: closing it deletes its folder."""

    blocking = True

    def __init__(self, path: Path, cache: int, most: int) -> None:
        """``cache`` and ``most``: bytes, as `DiskBuilder`'s."""
        self.path = path
        #: Bytes that were put since the last reset.
        self.stored = 0
        self._cache = cache
        self._most = most
        self._lock = _claim(path)
        try:
            self._open()
        except DiskError:
            os.close(self._lock)
            raise
        self._live = True

    def put_many(self, blocks: Sequence[tuple[Cid, bytes]]) -> None:
        """Keeps the blocks; `DiskError` when that is more than the store's maximum."""
        fresh = dict(blocks)
        ends = list(accumulate(CID_LENGTH + len(kept) for kept in fresh.values()))
        starts = [CID_LENGTH, *(end + CID_LENGTH for end in ends[:-1])]
        self.put_sections(b"".join(chain.from_iterable(fresh.items())), list(fresh), starts, ends)

    def put_sections(
        self, data: bytes, cids: Sequence[Cid], starts: Sequence[int], ends: Sequence[int]
    ) -> None:
        """Keeps the blocks in ``data``, each of which lies right behind its CID."""
        self._check()
        if not cids:
            return
        begin, end = starts[0] - CID_LENGTH, ends[-1]
        if self.stored + end - begin > self._most:
            raise DiskError(
                f"the disk store {self.path} is full: more than {self._most} bytes (max_stored_mb)",
                reason="spill_full",
            )
        if end - begin > _LONGEST and (longest := max(map(sub, ends, starts))) + CID_LENGTH > _LONGEST:
            raise DiskError(f"a block of {longest} bytes, more than the {_LONGEST} that a disk store takes")
        shift = self._file.size - begin - CID_LENGTH
        places = [
            (start + shift << _LENGTH_BITS) + stop - start + CID_LENGTH
            for start, stop in zip(starts, ends, strict=True)
        ]
        self._file.append(memoryview(data)[begin:end])
        self.stored = self._file.size
        self._index.add(cids, places)

    def get_many(self, cids: Sequence[Cid]) -> list[bytes | None]:
        """What was put under each, None for what was not."""
        self._check()
        places = self._index.first(cids)
        if not places or min(places) < 0:
            return [self._found(cid) for cid in cids]
        rows = self._rows(places)
        if not all(map(bytes.startswith, rows, cids)):  # eight bytes of two CIDs are the same
            return [self._found(cid) for cid in cids]
        return [row[CID_LENGTH:] for row in rows]

    def reset(self) -> None:
        """Empties the store for the next archive."""
        self._check()
        self._close_files()
        self._open()

    def close(self) -> None:
        """Closes the store and deletes its folder. May be called twice."""
        if self._live:
            self._live = False
            self._close_files()
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)

    def __enter__(self) -> SpillStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rows(self, places: list[int]) -> list[bytes]:
        """The CIDs and blocks at places, all at once where they lie close together."""
        sizes = [place & _LONGEST for place in places]
        starts = [place >> _LENGTH_BITS for place in places]
        begin, end = min(starts), min(max(starts) + max(sizes), self._file.size)
        if end - begin > min(_PIECE, _SPREAD * sum(sizes)):
            return self._file.read_many(starts, sizes)
        piece = self._file.read(begin, end - begin)
        return [
            piece[start - begin : start - begin + size] for start, size in zip(starts, sizes, strict=True)
        ]

    def _found(self, cid: Cid) -> bytes | None:
        for place in self._index.candidates(cid):
            row = self._file.read(place >> _LENGTH_BITS, place & _LONGEST)
            if row.startswith(cid):
                return row[CID_LENGTH:]
        return None

    def _check(self) -> None:
        if not self._live:
            raise DiskError(f"the disk store {self.path} is closed")

    def _open(self) -> None:
        self._file = SpillFile(self.path)
        self._rest = SpillFile(self.path)
        self._index = SpillIndex(self._rest, self._cache)
        self.stored = 0

    def _close_files(self) -> None:
        self._file.close()
        self._rest.close()
        self.stored = 0


def _claim(path: Path) -> int:
    """Makes the folder ours and empties it; refuses one with other content, or that is in use. The number of
    the open file that holds the lock."""
    mark = path / _MARK
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not mark.exists() and any(path.iterdir()):
            raise DiskError(f"{path} holds other files: name a folder of its own")
        lock = os.open(mark, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DiskError(f"the folder {path} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in path.iterdir():
            if left != mark:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    except OSError as error:
        os.close(lock)
        why = "another store has it" if isinstance(error, BlockingIOError) else error.strerror
        raise DiskError(f"the folder {path} cannot be used: {why}") from error
    return lock
