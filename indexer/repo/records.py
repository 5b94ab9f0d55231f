"""The records of a whole repository by their offsets: a sequence that takes some 50 bytes a record.

Owns the compact form (the paths of a run in one string, the offsets in arrays) and gives out the usual tuples
while it is iterated. A tuple, a string and a CID kept for every record take nearly six times as much memory,
and a walk then spends its time on fresh pages. Reads the buffer for the CIDs, which stand before the blocks.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from mmap import mmap
from typing import NamedTuple, TypeAlias, overload

from indexer.atproto.cid import CID_LENGTH
from indexer.atproto.types import Cid, Path

#: path, CID, start and end of the block in the buffer
Row: TypeAlias = tuple[Path, Cid, int, int]


class Run(NamedTuple):
    """Records that follow each other. ``paths`` are joined with newlines, which no path holds."""

    paths: str
    starts: array[int]
    ends: array[int]


class Records(Sequence[Row]):
    """(path, CID, start, end) of every record in key order; offsets into the buffer."""

    __slots__ = ("_buffer", "_firsts", "_runs", "_size")

    def __init__(self, buffer: bytes | mmap) -> None:
        self._buffer = buffer
        self._runs: list[Run] = []
        self._firsts: list[int] = []  # number of each run's first record
        self._size = 0

    def add(self, paths: str, starts: Iterable[int], ends: Iterable[int]) -> None:
        """The next records, in key order; newlines between the paths."""
        if paths:
            self._runs.append(Run(paths, array("Q", starts), array("Q", ends)))
            self._firsts.append(self._size)
            self._size += len(self._runs[-1].starts)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(map(self._rows, self._runs))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._size)
            if step < 0:
                return list(self)[index]
            return list(islice(self.after(start), 0, max(0, stop - start), step))
        if not -self._size <= index < self._size:
            raise IndexError(f"record {index} of {self._size}")
        return next(self.after(index % self._size))

    def after(self, number: int) -> Iterator[Row]:
        """The records from ``number`` on."""
        run = max(0, bisect_right(self._firsts, number) - 1)
        rows = chain.from_iterable(map(self._rows, islice(self._runs, run, None)))
        return islice(rows, number - self._firsts[run] if self._firsts else 0, None)

    def blocks(self) -> Iterator[tuple[Path, Cid, bytes]]:
        """(path, CID, block) of every record in key order."""
        return chain.from_iterable(map(self._blocks, self._runs))

    def place(self, path: Path) -> int:
        """The number of the first record whose path is not below ``path``."""
        low, high = 0, len(self._runs)
        while low < high:  # the first run that begins above the path
            middle = (low + high) // 2
            if self._runs[middle].paths.partition("\n")[0] > path:
                high = middle
            else:
                low = middle + 1
        if low == 0:
            return 0
        below = sum(1 for each in self._runs[low - 1].paths.split("\n") if each < path)
        return self._firsts[low - 1] + below

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(
            mine == theirs for mine, theirs in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def _rows(self, run: Run) -> Iterator[Row]:
        return zip(run.paths.split("\n"), self._cids(run), run.starts, run.ends, strict=True)

    def _blocks(self, run: Run) -> Iterator[tuple[Path, Cid, bytes]]:
        buffer = self._buffer
        blocks = [buffer[start:end] for start, end in zip(run.starts, run.ends, strict=True)]
        return zip(run.paths.split("\n"), self._cids(run), blocks, strict=True)

    def _cids(self, run: Run) -> list[Cid]:
        buffer = self._buffer
        return [buffer[start - CID_LENGTH : start] for start in run.starts]
