"""A file that nobody else sees and that ends with the process: deleted as soon as it is open.

Owns appending and reading at a place. Failures are `DiskError`. One thread at a time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path

from indexer.errors import DiskError


class SpillFile:
    """Bytes that were appended, by their place. They take space of the disk that ``folder`` is on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.size = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  closed by `close`
        except OSError as error:
            raise self._failed("opening", error) from error
        self._number = self._file.fileno()

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Adds ``data`` at the end, all of it or `DiskError`."""
        left = memoryview(data)
        try:
            while left:
                written = os.pwrite(self._number, left, self.size)
                self.size += written
                left = left[written:]
        except OSError as error:
            raise self._failed("writing to", error) from error

    def read(self, at: int, size: int) -> bytes:
        """The ``size`` bytes at ``at``, all of which were appended."""
        return self.read_many([at], [size])[0]

    def read_many(self, starts: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        """`read` of each."""
        try:
            found = list(map(os.pread, repeat(self._number), sizes, starts))
        except OSError as error:
            raise self._failed("reading from", error) from error
        if list(map(len, found)) != list(sizes):
            raise DiskError(f"the disk store {self.folder} gave less than was written to it")
        return found

    def close(self) -> None:
        """Gives the space back."""
        self._file.close()

    def _failed(self, what: str, error: OSError) -> DiskError:
        return DiskError(f"{what} the disk store {self.folder}: {error.strerror}")
