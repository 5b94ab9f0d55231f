"""Where the blocks of a disk store lie: 16 bytes a block, in memory up to a limit and then in a file. Hot.

A row is eight bytes of the CID and the place; rows lie in buckets that the interpreter's own, secret hash of
the CID chooses, so that nobody can make archives that fill one bucket. A place that a row gives is a
candidate: the block that lies there begins with its CID, and the store compares. One thread at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from struct import Struct
from typing import Final

from indexer.atproto.types import Cid
from indexer.store.spill_file import SpillFile

_BUCKETS: Final = 1 << 14
_MASK: Final = _BUCKETS - 1
_ROW: Final = 16
_PLACE: Final = Struct(">Q")
#: What rows in memory take beside themselves, as a share: room to grow, and the buckets.
_SLACK: Final = 1.25
#: Buckets that are written at once.
_RUN: Final = 256


class SpillIndex:
    """CID → places."""

    def __init__(self, file: SpillFile, most: int) -> None:
        """``file``: empty, for what is more than ``most`` bytes."""
        self._file = file
        self._most = int(most / _SLACK) // _ROW
        self._rows = 0
        self._buckets: list[bytearray] = []
        #: Of every time that memory was full: where each bucket begins in the file, and where the last ends.
        self._written: list[array[int]] = []
        self._clear()

    def add(self, cids: Sequence[Cid], places: Sequence[int]) -> None:
        """Blocks and their places, below 2 to the 64th."""
        buckets = self._buckets
        for cid, place in zip(cids, map(_PLACE.pack, places), strict=True):
            buckets[hash(cid) & _MASK] += cid[4:12] + place
        self._rows += len(cids)
        if self._rows > self._most:
            self._write()

    def first(self, cids: Sequence[Cid]) -> list[int]:
        """A candidate for each, -1 where there is none."""
        buckets, unpack = self._buckets, _PLACE.unpack_from
        out = []
        for cid in cids:
            rows = buckets[hash(cid) & _MASK]
            at = rows.find(cid[4:12])
            if at < 0 or at & (_ROW - 1):
                out.append(next(self.candidates(cid), -1))
            else:
                out.append(unpack(rows, at + 8)[0])
        return out

    def candidates(self, cid: Cid) -> Iterator[int]:
        """All places where the block may lie."""
        number, key = hash(cid) & _MASK, cid[4:12]
        yield from _matches(self._buckets[number], key)
        for starts in self._written:
            yield from _matches(self._file.read(starts[number], starts[number + 1] - starts[number]), key)

    def _write(self) -> None:
        """Moves the rows in memory to the file."""
        begin = self._file.size
        self._written.append(array("Q", accumulate(map(len, self._buckets), initial=begin)))
        for first in range(0, _BUCKETS, _RUN):
            self._file.append(b"".join(self._buckets[first : first + _RUN]))
        self._clear()

    def _clear(self) -> None:
        self._rows = 0
        self._buckets = [bytearray() for _ in range(_BUCKETS)]


def _matches(rows: bytes | bytearray, key: bytes) -> Iterator[int]:
    at = rows.find(key)
    while at >= 0:
        if at & (_ROW - 1) == 0:
            yield _PLACE.unpack_from(rows, at + 8)[0]
        at = rows.find(key, at + 1)
