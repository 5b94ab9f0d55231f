"""`/stream`: readers of the log over WebSocket, each a cursor that pulls.

Owns the sockets: limits, the loop that sends from the reader's position, pings, dead peers, closing.
What is sent comes from `stream_batches`; what is asked for and what is too slow, from `stream_rules`.
Frames are written to the transport already encoded, a batch at once, and `drain` is awaited after each write,
so that a reader holds at most `stream.send_buffer_kib` and one batch in its socket. A write never ends
within a frame: pings and goodbyes come between. One event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import WSMsgType, web
from aiohttp.abc import AbstractStreamWriter

from indexer.errors import RequestError, StoreError, WriterPoisoned
from indexer.serve import stream_format as wire
from indexer.serve.listener import client_address
from indexer.serve.stream_batches import EncodedLog
from indexer.serve.stream_rules import SlowRule, StreamOptions, parse_options, start_position
from indexer.serve.xrpc.params import Params

if TYPE_CHECKING:
    from indexer.serve.services import Services

log = structlog.get_logger(__name__)

#: Time that a waiting reader costs to wake, in seconds; with many, several commits share a wake-up.
_WAKE_S = 20e-6
_LONGEST_PAUSE_S = 0.05
#: Pings without an answer or any progress after which a peer is dead.
_DEAD_AFTER_PINGS = 2
#: Time for a last frame to leave before the connection is cut, in seconds.
_LINGER_S = 1.0

_NO_UPGRADE = "this is a WebSocket: connect to ws://…/stream with a WebSocket client, or run `indexer stream`"
_NORMAL, _GOING_AWAY, _POLICY, _OUR_FAULT = 1000, 1001, 1008, 1011


class HeadPulse:
    """Wakes the readers that wait at the head of the log."""

    def __init__(self, services: Services) -> None:
        self._writer = services.writer
        self._waiting: set[asyncio.Future[None]] = set()

    async def run(self) -> None:
        """Until cancelled."""
        seen = self._writer.head
        while True:
            try:
                seen = await self._writer.wait_head(seen)
            except WriterPoisoned:
                # Nothing will be written any more; readers stay until the server says goodbye.
                return
            waiting, self._waiting = self._waiting, set()
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)
            await asyncio.sleep(min(_LONGEST_PAUSE_S, _WAKE_S * len(waiting)))

    async def beyond(self, position: int) -> None:
        """Returns when the event with id ``position`` exists."""
        while self._writer.head <= position:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await waiter
            finally:  # a reader that leaves is waited for no longer
                self._waiting.discard(waiter)


class StreamHub:
    """All readers of one daemon, and what they share."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.settings = services.settings.stream
        self.log = services.log
        self.pulse = HeadPulse(services)
        self.encoded = EncodedLog(
            services.writer,
            services.log,
            batch_events=self.settings.batch_events,
            batch_bytes=self.settings.batch_kib << 10,
            cache_bytes=self.settings.cache_mib << 20,
        )
        self.readers: set[Reader] = set()
        self.addresses: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.frames_sent = 0
        self.bytes_sent = 0
        self._pulse_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to wake readers."""
        self._pulse_task = asyncio.create_task(self.pulse.run(), name="stream-pulse")

    async def stop(self) -> None:
        """Tells every reader that the server goes away; the listener waits for them to leave."""
        for reader in list(self.readers):
            reader.leave(_GOING_AWAY, "ServerStopping")
        if self._pulse_task is not None:
            self._pulse_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._pulse_task

    def status(self) -> dict[str, Any]:
        """Live figures for `/stats` and metrics."""
        head = self.services.writer.head
        return {
            "readers": len(self.readers),
            "largest_lag": max((head - reader.position for reader in self.readers), default=0),
            "frames_sent": self.frames_sent,
            "bytes_sent": self.bytes_sent,
            "events_encoded": self.encoded.encoded,
            "cache_hits": self.encoded.hits,
            "cache_bytes": self.encoded.size,
            "dropped": dict(self.dropped),
        }

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serves one reader until it or we end the stream."""
        options = parse_options(Params(request.query))
        address = client_address(request, self.services.settings.public.trusted_proxies)
        self._admit(address)
        self.addresses[address] += 1
        try:
            socket = web.WebSocketResponse(
                autoping=False,
                autoclose=False,
                compress=False,
                max_msg_size=self.settings.max_options_kib << 10,
            )
            if not socket.can_prepare(request):
                raise RequestError(_NO_UPGRADE, status=426, name="UpgradeRequired")
            writer = await socket.prepare(request)
            reader = Reader(self, socket, writer, request, options)
            self.readers.add(reader)
            try:
                await reader.serve()
            finally:
                self.readers.discard(reader)
            return socket
        finally:
            self.addresses[address] -= 1
            if not self.addresses[address]:
                del self.addresses[address]

    def _admit(self, address: str) -> None:
        limits = self.services.settings.public
        if self.addresses.total() >= limits.max_sockets:
            raise RequestError("too many streams are open", status=503, name="TooManyConnections")
        if self.addresses[address] >= limits.max_sockets_per_address:
            raise RequestError("too many streams from this address", status=429, name="TooManyConnections")


class Reader:
    """One subscriber: a position in the log and a socket."""

    def __init__(
        self,
        hub: StreamHub,
        socket: web.WebSocketResponse,
        writer: AbstractStreamWriter,
        request: web.Request,
        options: StreamOptions,
    ) -> None:
        assert request.transport is not None
        self._hub = hub
        self._socket = socket
        self._writer = writer
        self._transport = request.transport
        self._transport.set_write_buffer_limits(high=hub.settings.send_buffer_kib << 10)
        self._wanted = options.filter
        self._zstd = options.zstd
        self._cursor = options.cursor
        self.position = 0
        self._told = 0
        self._alive = True
        self._left = asyncio.Event()
        settings = hub.settings
        self._slow = SlowRule(
            window=settings.slow_window, lag=settings.slow_lag_events, rate=settings.slow_min_events_per_s
        )

    async def serve(self) -> None:
        """Runs the stream to its end."""
        start = start_position(self._cursor, self._hub.log.floor, self._hub.log.head)
        if start is None:
            head = self._hub.log.head
            self._send(
                wire.error_text("FutureCursor", f"the cursor lies above the head; the next id is {head}")
            )
            self.leave(_POLICY, "FutureCursor")
            return await self._linger()
        self.position = self._told = start.position
        if start.outdated:
            self._notice("OutdatedCursor")
        pump = asyncio.create_task(self._pump())
        tasks = [pump, *(asyncio.create_task(work()) for work in (self._listen, self._watch, self._gone))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._report(pump)
        await self._linger()
        return None

    def leave(self, code: int, reason: str) -> None:
        """Says goodbye and ends the stream; ``reason`` is what the peer and the metric are told."""
        if not self._left.is_set():
            self._hub.dropped[reason] += 1
            self._write(wire.close_frame(code, reason))
            self._left.set()

    async def _gone(self) -> None:
        await self._left.wait()

    async def _pump(self) -> None:
        """Sends from the position on, for ever."""
        hub, events = self._hub, self._hub.log
        while True:
            if self.position >= events.head:
                await hub.pulse.beyond(self.position)
            if self.position < events.floor:
                self.position = events.floor
                self._notice("OutdatedCursor")
                continue
            taken = hub.encoded.take(self.position, self._wanted, self._zstd)
            self.position = taken.next_id
            if taken.payload:
                self._write(taken.payload)
                hub.frames_sent += taken.frames
                await self._drain()
            # Others get their turn between two batches of a long replay.
            await asyncio.sleep(0)

    async def _drain(self) -> None:
        await self._writer.drain()
        self._alive = True

    async def _listen(self) -> None:
        """Answers pings; everything else that a reader sends is ignored. Ends when it closes."""
        while True:
            message = await self._socket.receive()
            self._alive = True
            if message.type is WSMsgType.PING:
                self._write(wire.frame(wire.PONG, message.data))
            elif message.type is WSMsgType.CLOSE:
                self._write(wire.close_frame(_NORMAL, ""))
                self._left.set()
                return
            elif message.type in (WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
                self._left.set()
                return

    async def _watch(self) -> None:
        """Pings, judges, and tells filtered readers how far they are."""
        settings, clock = self._hub.settings, asyncio.get_running_loop().time
        next_ping, next_notice, unanswered = clock() + settings.ping_interval, clock(), 0
        while True:
            await asyncio.sleep(
                min(settings.ping_interval, settings.cursor_notice_interval, settings.slow_window / 4)
            )
            now = clock()
            if self._slow.is_too_slow(now, self.position, self._hub.log.head):
                return self.leave(_POLICY, "ConsumerTooSlow")
            if now >= next_ping:
                unanswered = 0 if self._alive else unanswered + 1
                if unanswered >= _DEAD_AFTER_PINGS:
                    return self.leave(_POLICY, "DeadPeer")
                self._alive = False
                self._write(wire.frame(wire.PING, b""))
                next_ping = now + settings.ping_interval
            if now >= next_notice and not self._wanted.is_open and self.position > self._told:
                self._notice("Cursor")
                next_notice = now + settings.cursor_notice_interval

    def _report(self, pump: asyncio.Task[None]) -> None:
        """Logs what ended the pump, when it was not the reader."""
        if pump.cancelled():
            return
        error = pump.exception()
        if isinstance(error, StoreError):
            log.error("stream_store_error", error=str(error), reason=error.reason, position=self.position)
            self.leave(_OUR_FAULT, "StoreError")
        elif error is not None and not isinstance(error, ConnectionError):
            log.error("stream_failed", exc_info=error, position=self.position)
            self.leave(_OUR_FAULT, "InternalError")

    async def _linger(self) -> None:
        """Gives the last frames a moment to leave, then cuts the connection."""
        if self._transport.get_write_buffer_size():
            self._transport.set_write_buffer_limits(high=0)
            with suppress(TimeoutError, ConnectionError):
                await asyncio.wait_for(self._writer.drain(), _LINGER_S)
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._transport.abort()

    def _notice(self, name: str) -> None:
        self._told = self.position
        self._send(wire.notice_text(name, self.position))

    def _send(self, text: bytes) -> None:
        if self._zstd:
            self._write(wire.frame(wire.BINARY, wire.pack(text)))
        else:
            self._write(wire.frame(wire.TEXT, text))

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)
            self._hub.bytes_sent += len(data)
