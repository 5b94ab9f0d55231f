"""An archive that arrives: any asynchronous source of bytes, read as far as somebody looks.

Owns the buffer of what was read and not consumed, the limit on the whole, and the time that reading and
walking may take; the caller's own time between two calls does not count. Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from inspect import isawaitable
from typing import Final, Protocol, runtime_checkable

from indexer.errors import CarError, DriveError

_PIECE: Final = 256 << 10
_WRONG: Final = "not an asynchronous source of bytes: {}"
#: What stands for the piece behind the last.
_END: Final = object()


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


async def _pieces(source: Source) -> AsyncGenerator[bytes, None]:
    """The pieces of any source. ``read`` comes first: iterating over a stream reader gives lines."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        for at in range(0, len(source), _PIECE):
            yield bytes(source[at : at + _PIECE])
            await asyncio.sleep(0)  # others may run
    elif isinstance(source, Readable):
        while piece := await _read(source):
            yield piece
    elif isinstance(source, AsyncIterable):
        with _told():
            items = aiter(source)
        while (item := await _next(items)) is not _END:
            yield _checked(item)
    else:
        raise TypeError(_WRONG.format(type(source).__name__))


async def _read(source: Readable) -> bytes:
    with _told():
        waiting: object = source.read(_PIECE)
    if not isawaitable(waiting):  # a plain file
        raise TypeError(_WRONG.format(type(source).__name__))
    with _told():
        piece = await waiting
    return _checked(piece)


async def _next(items: AsyncIterator[bytes]) -> object:
    with _told():
        return await anext(items, _END)


def _checked(piece: object) -> bytes:
    if not isinstance(piece, (bytes, bytearray, memoryview)):
        raise TypeError(f"the source gave {type(piece).__name__}, not bytes")
    return bytes(piece)


@contextmanager
def _told() -> Iterator[None]:
    """Whatever the source raises is its failure; what it was handed to says so."""
    try:
        yield
    except Exception as error:
        raise DriveError(f"the source failed: {type(error).__name__}: {error}", kind="source") from error
