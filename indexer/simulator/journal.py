"""The append-only journal: what happened, row by row, with every frame that was sent.

Owns the files. A row is length, CRC-32, then a JSON head and the frames' bytes; it is handed to the
operating system before anybody sees its frames. A torn last row is dropped on opening. Without a state
folder the segments are unlinked temporary files and the oldest are given up beyond a limit. One thread.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

_HEAD = 12  # body length, CRC-32 of the body, JSON length; u32 big-endian each
SEGMENT_BYTES = 64 << 20


class JournalError(Exception):
    """The journal cannot be used: held by another process, damaged before its end, no room."""


class Place(NamedTuple):
    """Where bytes lie: segment number and offset."""

    segment: int
    offset: int


class Journal:
    """``keep_bytes`` bounds a journal without a folder; one with a folder keeps everything."""

    def __init__(self, folder: Path | None, *, keep_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = folder
        self._keep = max(2, keep_bytes // segment_bytes)
        self._segment_bytes = segment_bytes
        self._files: dict[int, BinaryIO] = {}
        self._lock: BinaryIO | None = None
        self._end = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._take(folder)
            for path in sorted(folder.glob("journal.*")):
                self._files[int(path.suffix[1:])] = path.open("r+b", buffering=0)

    @property
    def oldest_segment(self) -> int:
        return min(self._files, default=0)

    def rows(self) -> Iterator[tuple[dict[str, Any], Place]]:
        """Every row with the place of its frames' bytes; cuts a torn tail off the last segment."""
        for number, file in sorted(self._files.items()):
            size = os.fstat(file.fileno()).st_size
            data = os.pread(file.fileno(), size, 0)
            at = 0
            while (row := _row_at(data, at)) is not None:
                body, end = row
                yield body, Place(number, at + _HEAD + int.from_bytes(data[at + 8 : at + 12], "big"))
                at = end
            if at < size and number != max(self._files):
                raise JournalError(f"{file.name} is damaged at byte {at}; the state cannot be used")
            file.truncate(at)
            self._end = at

    def append(self, row: dict[str, Any], frames: Sequence[bytes]) -> Place:
        """Write one row; returns the place of the first frame's bytes."""
        body = orjson.dumps(row)
        number, file = self._segment()
        rest = b"".join((len(body).to_bytes(4, "big"), body, *frames))
        data = b"".join((len(rest).to_bytes(4, "big"), zlib.crc32(rest).to_bytes(4, "big"), rest))
        file.seek(self._end)
        if file.write(data) != len(data):
            raise JournalError("the journal could not be written; is the disk full?")
        place = Place(number, self._end + _HEAD + len(body))
        self._end += len(data)
        return place

    def read(self, segment: int, offset: int, size: int) -> bytes:
        return os.pread(self._files[segment].fileno(), size, offset)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._lock is not None:
            self._lock.close()

    def _take(self, folder: Path) -> None:
        self._lock = (folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise JournalError(f"{folder} is in use by another simulated network") from None

    def _segment(self) -> tuple[int, BinaryIO]:
        number = max(self._files, default=-1)
        if number >= 0 and self._end < self._segment_bytes:
            return number, self._files[number]
        number, self._end = number + 1, 0
        if self._folder is None:
            self._files[number] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            while len(self._files) > self._keep:
                self._files.pop(min(self._files)).close()
        else:
            self._files[number] = (self._folder / f"journal.{number:06d}").open("w+b", buffering=0)
        return number, self._files[number]


def _row_at(data: bytes, at: int) -> tuple[dict[str, Any], int] | None:
    """The row at ``at`` and its end, or None where no whole row is."""
    size = int.from_bytes(data[at : at + 4], "big")
    rest = data[at + 8 : at + 8 + size]
    if size < 4 or len(rest) < size or zlib.crc32(rest) != int.from_bytes(data[at + 4 : at + 8], "big"):
        return None
    row: dict[str, Any] = orjson.loads(rest[4 : 4 + int.from_bytes(rest[:4], "big")])
    return row, at + 8 + size
