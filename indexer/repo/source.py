"""An archive that arrives: any asynchronous source of bytes, read as far as somebody looks.

Owns the buffer of what was read and not consumed, the limit on the whole, and the time that reading and
walking may take; the caller's own time between two calls does not count. Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol, runtime_checkable

from indexer.errors import CarError, DriveError

_PIECE: Final = 256 << 10


@runtime_checkable
class Readable(Protocol):
    """What `asyncio.StreamReader`, aiohttp's bodies and asynchronous files have in common."""

    async def read(self, size: int, /) -> bytes: ...


#: Pieces of bytes in any sizes, an object with an asynchronous ``read(size)``, or the bytes themselves.
Source = AsyncIterable[bytes] | Readable | bytes | bytearray | memoryview


class Clock:
    """The seconds that are left for a walk."""

    def __init__(self, seconds: float) -> None:
        self._all = seconds
        self._left = seconds

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Counts the time inside; `DriveError` when it runs out."""
        start = time.monotonic()
        limit = asyncio.timeout(self._left)
        try:
            if self._left <= 0:
                raise self._over()
            async with limit:
                yield
        except TimeoutError as error:
            if limit.expired():
                raise self._over() from error
            raise
        finally:
            self._left -= time.monotonic() - start

    def _over(self) -> DriveError:
        return DriveError(f"the walk took longer than {self._all:g} seconds", kind="time")


class CarReader:
    """The bytes of an archive: ``data`` from ``at`` on was read and not consumed."""

    def __init__(self, source: Source, max_bytes: int) -> None:
        self._pieces = _pieces(source)
        self._max_bytes = max_bytes
        self._before = 0  # bytes of the archive in front of ``data``
        self.data = b""
        self.at = 0
        self.ended = False

    @property
    def offset(self) -> int:
        """Where ``at`` is within the archive."""
        return self._before + self.at

    @property
    def left(self) -> int:
        """Bytes that were read and not consumed."""
        return len(self.data) - self.at

    async def fill(self, least: int) -> None:
        """Reads until so many bytes are left to consume, or the source has ended."""
        if self.left >= least or self.ended:
            return
        parts = [self.data[self.at :]]
        size = len(parts[0])
        self._before += self.at
        self.data, self.at = b"", 0
        while size < least and not self.ended:
            piece = await anext(self._pieces, None)
            if piece is None:
                self.ended = True
                break
            parts.append(piece)
            size += len(piece)
            if self._before + size > self._max_bytes:
                raise CarError(f"CAR of more than {self._max_bytes} bytes", reason="car_size")
        self.data = b"".join(parts)

    async def grow(self, more: int) -> bool:
        """Reads up to so many bytes beside those that are left to consume; false when there are none."""
        had = self.left
        await self.fill(had + more)
        return self.left > had

    async def pieces(self) -> AsyncIterator[bytes]:
        """Everything that was not consumed, in pieces."""
        while True:
            while self.left:
                piece = self.data[self.at : self.at + _PIECE]
                self.at += len(piece)
                yield piece
            if self.ended:
                return
            await self.fill(_PIECE)

    async def close(self) -> None:
        """Tells the source that nothing more is wanted."""
        self.data, self.at, self.ended = b"", 0, True
        await self._pieces.aclose()


async def _pieces(source: Source) -> Any:
    """The pieces of any source. ``read`` comes first: iterating over a stream reader gives lines."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        for at in range(0, len(source), _PIECE):
            yield bytes(source[at : at + _PIECE])
            await asyncio.sleep(0)  # others may run
    elif isinstance(source, Readable):
        while piece := await source.read(_PIECE):
            yield piece
    elif isinstance(source, AsyncIterable):
        async for piece in source:
            if not isinstance(piece, (bytes, bytearray, memoryview)):
                raise TypeError(f"the source gave {type(piece).__name__}, not bytes")
            yield bytes(piece)
    else:
        raise TypeError(f"not an asynchronous source of bytes: {type(source).__name__}")
