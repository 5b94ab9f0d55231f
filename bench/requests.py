"""An HTTP/1.1 client that costs little: GETs one after another over one connection.

A client library would take as much of the two cores as the daemon. Knows only what a benchmark's own server
sends: bodies with a Content-Length.
"""

from __future__ import annotations

import asyncio
import re
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class Client:
    """``async with Client(url) as client: await client.get(path)``."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._url.hostname, self._url.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    async def get(self, path: str) -> bytes:
        """The body of a 200; raises `ConnectionError` for any other answer."""
        assert self._writer is not None
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: {self._url.netloc}\r\n\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        match = _LENGTH.search(head)
        body = await self._reader.readexactly(int(match[1]) if match else 0)
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise ConnectionError(f"{path}: {head.decode(errors='replace')}{body.decode(errors='replace')}")
        return body
