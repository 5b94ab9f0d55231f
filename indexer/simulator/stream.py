"""One subscriber of `subscribeRepos`: cursor rules, then frames in batches straight onto the socket.

Owns the WebSocket side of a PDS, a relay and the replay server, and the tricks that one socket is told to
play. Messages are framed here and written many at a time; a slow reader is held back by the socket, never
dropped. One event loop.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from indexer.simulator.framelog import Lane, Line, Turn
from indexer.simulator.wire import error_frame, info_frame, websocket_message

_BATCH_BYTES = 1 << 18
_HEARTBEAT_S = 30.0


class Feed(Protocol):
    """Frames by index, as `framelog.Lane` has them."""

    @property
    def seq(self) -> int: ...
    @property
    def head(self) -> int: ...
    @property
    def end(self) -> int: ...
    def floor(self) -> int: ...
    def start(self, cursor: int) -> int: ...
    def outdated(self, cursor: int) -> bool: ...
    def read(self, index: int, budget: int) -> list[bytes]: ...
    async def wait(self, index: int) -> None: ...


class Pace(Protocol):
    """How many of ``ready`` frames may go now (at least one, after waiting if need be)."""

    async def __call__(self, ready: int) -> int: ...


async def subscribe(
    request: web.Request,
    feed: Feed,
    *,
    pace: Pace | None = None,
    from_start: bool = False,
    lane: Lane | None = None,
) -> web.StreamResponse:
    """Serve one subscriber until it leaves. Without a cursor: the live tail, or all with ``from_start``.

    ``lane``: the feed, where tricks may be played on its open sockets.
    """
    cursor = request.query.get("cursor")
    if cursor is not None and not (cursor.isascii() and cursor.isdigit()):
        raise web.HTTPBadRequest(text='{"error":"InvalidRequest","message":"cursor must be a number"}')
    socket = web.WebSocketResponse(compress=False, heartbeat=_HEARTBEAT_S)
    writer = await socket.prepare(request)
    if cursor is not None and int(cursor) > feed.head and not (lane is not None and lane.mute):
        await socket.send_bytes(error_frame("FutureCursor", "Cursor in the future."))
        await socket.close()
        return socket
    if cursor is None:
        index = feed.floor() if from_start else feed.end
    else:
        index = feed.start(int(cursor))
        if feed.outdated(int(cursor)):
            await socket.send_bytes(info_frame("OutdatedCursor", "Requested cursor exceeded limit."))
    line = Line()
    if lane is None:
        sender = asyncio.create_task(_send(writer, feed, index, pace))
    else:
        lane.lines.append(line)
        sender = asyncio.create_task(_send_with_tricks(request, socket, writer, lane, line, index))
    try:
        async for _ in socket:  # clients send nothing; this answers pings and sees the close
            pass
    finally:
        if lane is not None:
            lane.lines.remove(line)
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)
    return socket


async def _send(writer: AbstractStreamWriter, feed: Feed, index: int, pace: Pace | None) -> None:
    while True:
        await feed.wait(index)
        frames = feed.read(index, _BATCH_BYTES)
        if pace is not None:
            frames = frames[: await pace(len(frames))]
        index += len(frames)
        await writer.write(b"".join(map(websocket_message, frames)))
        await asyncio.sleep(0)


async def _send_with_tricks(
    request: web.Request,
    socket: web.WebSocketResponse,
    writer: AbstractStreamWriter,
    lane: Lane,
    line: Line,
    index: int,
) -> None:
    """As `_send`; a turn of the line comes once all that lies before it is sent."""
    while True:
        await lane.wait(index, line)
        frames = lane.read(index, _BATCH_BYTES)
        index += len(frames)
        if frames:
            await writer.write(b"".join(map(websocket_message, frames)))
        while index >= lane.end and line.turns:
            await _take_turn(request, socket, writer, line.turns.popleft())
        await asyncio.sleep(0)


async def _take_turn(
    request: web.Request, socket: web.WebSocketResponse, writer: AbstractStreamWriter, turn: Turn
) -> None:
    transport = request.transport
    if turn.data:
        await writer.write(websocket_message(turn.data, 0x81 if turn.text else 0x82))
    if turn.silent_s:
        if turn.deaf and isinstance(transport, asyncio.ReadTransport):
            transport.pause_reading()
        await asyncio.sleep(turn.silent_s)
        if turn.deaf and isinstance(transport, asyncio.ReadTransport):
            transport.resume_reading()
    if turn.close:
        await socket.close()
    if turn.cut and isinstance(transport, asyncio.WriteTransport):
        transport.abort()
