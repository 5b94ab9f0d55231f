"""A `/stream` reader that costs little: counts record events, and notes when each commit's last one came.

Reads WebSocket frames off a plain socket, since a client library would take as much of the two cores as the
daemon. Knows only what a benchmark's own server sends: unfragmented frames.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import time
from urllib.parse import urlsplit

_REV = re.compile(rb'"did":"([^"]+)","rev":"([^"]+)"')
_READ = 1 << 20
_PING, _PONG = 0x9, 0xA


class Subscriber:
    """Counts until told to stop; ``events`` and ``last_at`` may be read at any time."""

    def __init__(self, url: str, *, note_revs: bool = False) -> None:
        self._url = urlsplit(url)
        self.events = 0
        self.last_at = 0.0
        #: (DID, rev) → when its last event came, on `time.perf_counter`; only with ``note_revs``.
        self.seen_at: dict[tuple[bytes, bytes], float] = {}
        self._note_revs = note_revs
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self) -> None:
        """Opens the stream at its head; raises `ConnectionError` when it is refused."""
        self._reader, self._writer = await asyncio.open_connection(
            self._url.hostname, self._url.port, limit=_READ
        )
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            "GET /stream HTTP/1.1",
            f"Host: {self._url.netloc}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
        )
        self._writer.write("\r\n".join((*request, "", "")).encode())
        answer = await self._reader.readuntil(b"\r\n\r\n")
        if b" 101 " not in answer.split(b"\r\n", 1)[0]:
            raise ConnectionError(answer.decode(errors="replace"))

    async def read(self) -> None:
        """Counts until cancelled; raises `ConnectionError` when the server ends the stream."""
        waiting = b""
        while chunk := await self._reader.read(_READ):
            waiting = self._take(waiting + chunk)
        raise ConnectionError("the stream ended")

    def close(self) -> None:
        """Drops the connection."""
        if self._writer is not None:
            self._writer.close()

    def _take(self, data: bytes) -> bytes:
        """Counts the whole frames in ``data``; returns what is left."""
        now = time.perf_counter()
        at, size = 0, len(data)
        while at + 2 <= size:
            length, start = data[at + 1], at + 2
            if length == 126:
                length, start = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
            elif length == 127:
                length, start = int.from_bytes(data[at + 2 : at + 10], "big"), at + 10
            if start > size or start + length > size:
                break
            self._frame(data[at] & 0xF, data[start : start + length], now)
            at = start + length
        return data[at:]

    def _frame(self, opcode: int, payload: bytes, now: float) -> None:
        if opcode == _PING and self._writer is not None:
            mask = b"\0\0\0\0"
            self._writer.write(bytes((0x80 | _PONG, 0x80 | len(payload))) + mask + payload)
        elif b'"type":"record"' in payload[:60]:
            self.events += 1
            self.last_at = now
            if self._note_revs and (match := _REV.search(payload, 0, 300)):
                self.seen_at[match[1], match[2]] = now
