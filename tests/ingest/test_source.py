"""Dialling: addresses, waits, and what an upgrade answer means."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import WSMsgType, web
from yarl import URL

from indexer.atproto.types import Seq
from indexer.config import IngestSettings, NetworkSettings
from indexer.identity.guard import GuardedResolver
from indexer.ingest.source import FIRST_WAIT_S, Backoff, Source, Upstream, subscribe_url


def test_upstreams_are_relays_unless_marked_as_a_pds() -> None:
    assert Upstream.parse("wss://relay.test/") == ("wss://relay.test/", "wss://relay.test")
    assert not Upstream.parse("wss://relay.test").is_pds
    assert Upstream.parse("pds::wss://pds.test").is_pds
    assert Upstream.parse("pds::wss://pds.test").url == "wss://pds.test"


@pytest.mark.parametrize(
    ("base", "cursor", "url"),
    [
        ("wss://a.test", None, "wss://a.test/xrpc/com.atproto.sync.subscribeRepos"),
        ("wss://a.test/", 7, "wss://a.test/xrpc/com.atproto.sync.subscribeRepos?cursor=7"),
        ("ws://a.test:81/x/", 0, "ws://a.test:81/x/xrpc/com.atproto.sync.subscribeRepos?cursor=0"),
    ],
)
def test_the_cursor_is_a_parameter(base: str, cursor: int | None, url: str) -> None:
    assert str(subscribe_url(URL(base), cursor)) == url


def test_waits_double_up_to_the_longest_with_jitter() -> None:
    backoff = Backoff(8.0, chance=lambda: 1.0)
    assert [backoff.next_wait() for _ in range(6)] == [FIRST_WAIT_S * n for n in (1, 2, 4, 8, 16, 16)]
    backoff.reset()
    backoff.chance = lambda: 0.0
    assert backoff.next_wait() == FIRST_WAIT_S / 2
    assert backoff.next_wait(asked=30.0) == 30.0


class Sink:
    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.received: list[bytes] = []

    async def settled(self) -> Seq | None:
        return None

    async def receive(self, data: bytes) -> bool:
        self.received.append(data)
        return data != b"no event"

    def opened(self) -> None: ...

    def closed(self, reason: str, message: str) -> None:
        self.reasons.append(reason)


def source(url: str, sink: Sink, *, private: bool = True, **limits: float) -> Source:
    network = NetworkSettings(allow_private=private)
    settings = IngestSettings.model_validate({"reconnect_max": 0.01, **limits})
    return Source(Upstream.parse(url), sink, GuardedResolver(network).addresses, settings, network)


async def serve(handler: object) -> tuple[web.AppRunner, str]:
    app = web.Application()
    app.router.add_get("/xrpc/com.atproto.sync.subscribeRepos", handler)  # type: ignore[arg-type]
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"ws://127.0.0.1:{runner.addresses[0][1]}"


async def test_a_host_without_a_firehose_is_not_asked_again() -> None:
    async def refuse(_request: web.Request) -> web.Response:
        return web.Response(status=501)

    runner, url = await serve(refuse)
    sink = Sink()
    await source(url, sink).run()
    assert sink.reasons == ["http_501"]
    await runner.cleanup()


async def test_a_busy_host_is_asked_again() -> None:
    async def busy(_request: web.Request) -> web.Response:
        return web.Response(status=429, headers={"Retry-After": "0"})

    runner, url = await serve(busy)
    sink = Sink()
    task = asyncio.create_task(source(url, sink).run())
    while len(sink.reasons) < 3:
        await asyncio.sleep(0.005)
    task.cancel()
    assert set(sink.reasons) == {"http_429"}
    await runner.cleanup()


@pytest.mark.parametrize("kind", ["text", "oversize"])
async def test_what_is_no_frame_ends_the_connection(kind: str) -> None:
    async def talk(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_bytes(b"fine")
        if kind == "text":
            await socket.send_str("hello")
        else:
            await socket.send_bytes(bytes(70_000))
        await socket.receive()
        return socket

    runner, url = await serve(talk)
    sink = Sink()
    task = asyncio.create_task(source(url, sink, max_frame_bytes=65_536).run())
    while not sink.reasons:
        await asyncio.sleep(0.005)
    task.cancel()
    assert sink.received[0] == b"fine"
    assert sink.reasons[0] == ("text_frame" if kind == "text" else "closed")
    await runner.cleanup()


@pytest.mark.parametrize(
    "url", ["ws://127.0.0.1:1", "wss://127.0.0.1", "https://relay.test", "wss://a:b@relay.test"]
)
async def test_the_guard_judges_upstreams(url: str) -> None:
    sink = Sink()
    task = asyncio.create_task(source(url, sink, private=False).run())
    while not sink.reasons:
        await asyncio.sleep(0.005)
    task.cancel()
    assert sink.reasons[0] == "refused"


async def first_reasons(made: Source, sink: Sink, count: int = 1) -> list[str]:
    """Why the first connections ended; raises what ended the source itself."""
    task = asyncio.create_task(made.run())
    while len(sink.reasons) < count and not task.done():
        await asyncio.sleep(0.005)
    if task.done():
        await task
    task.cancel()
    return sink.reasons[:count]


@pytest.mark.parametrize("place", ["ws://other.test/x", "/elsewhere", "not a url:"])
async def test_redirects_are_not_followed(place: str) -> None:
    async def elsewhere(_request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": place})

    runner, url = await serve(elsewhere)
    sink = Sink()
    assert await first_reasons(source(url, sink), sink) == ["http_302"]
    await runner.cleanup()


async def test_a_name_that_cannot_be_looked_up_ends_the_attempt_alone() -> None:
    sink = Sink()
    made = source("ws://relay.test", sink)

    async def fails(host: str, port: int) -> list[tuple[str, int]]:
        raise UnicodeError("label empty or too long")

    made._dial = fails
    assert await first_reasons(made, sink, 2) == ["handshake"] * 2


async def talk_of(*messages: bytes) -> tuple[web.AppRunner, str]:
    async def talk(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for message in messages:
            await socket.send_bytes(message)
        await socket.close()
        return socket

    return await serve(talk)


async def test_every_address_of_a_host_is_tried() -> None:
    runner, url = await talk_of(b"fine")
    open_port = int(url.rpartition(":")[2])

    async def addresses(host: str, port: int) -> list[tuple[str, int]]:
        return [("127.0.0.1", 1), ("127.0.0.1", 2), ("127.0.0.1", open_port)]

    sink = Sink()
    made = source("ws://relay.test", sink)
    made._dial = addresses
    assert await first_reasons(made, sink) == ["closed"]
    assert sink.received == [b"fine"]
    await runner.cleanup()


@pytest.mark.parametrize(("message", "attempts"), [(b"no event", 3), (b"event", 1)])
async def test_only_a_valid_event_ends_the_growing_of_waits(message: bytes, attempts: int) -> None:
    runner, url = await talk_of(message, b"no event")
    sink = Sink()
    made = source(url, sink)
    made._backoff.chance = lambda: 0.0
    task = asyncio.create_task(made.run())
    while len(sink.reasons) < 3:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    task.cancel()
    assert made._backoff.attempt >= attempts if attempts > 1 else made._backoff.attempt <= 1
    await runner.cleanup()


async def test_a_quiet_host_that_answers_pings_is_healthy() -> None:
    pings = 0

    async def quiet(request: web.Request) -> web.WebSocketResponse:
        nonlocal pings
        socket = web.WebSocketResponse(autoping=False)
        await socket.prepare(request)
        async for message in socket:
            assert message.type is WSMsgType.PING
            pings += 1
            await socket.pong(message.data)
        return socket

    runner, url = await serve(quiet)
    sink = Sink()
    task = asyncio.create_task(source(url, sink, receive_timeout=0.06).run())
    while pings < 4:  # longer than the silence that is tolerated
        await asyncio.sleep(0.005)
    assert sink.reasons == []
    task.cancel()
    await runner.cleanup()


async def test_a_half_open_peer_is_dropped() -> None:
    async def deaf(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(autoping=False)
        await socket.prepare(request)
        await socket.send_bytes(b"event")
        async for _ in socket:  # pings are seen and not answered
            pass
        return socket

    runner, url = await serve(deaf)
    sink = Sink()
    assert await first_reasons(source(url, sink, receive_timeout=0.15), sink) == ["closed"]
    assert sink.received == [b"event"]
    await runner.cleanup()


async def test_a_closing_that_is_cancelled_lets_the_socket_go() -> None:
    told, gone = asyncio.Event(), asyncio.Event()

    async def deaf(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str("what ends the connection")
        told.set()
        while request.transport is not None:  # a close frame is never read, nor answered
            await asyncio.sleep(0.005)
        gone.set()
        return socket

    runner, url = await serve(deaf)
    task = asyncio.create_task(source(url, Sink()).run())
    await told.wait()
    await asyncio.sleep(0.1)  # it waits for the host's close frame now, a second long
    task.cancel()
    await asyncio.wait([task])
    async with asyncio.timeout(5):
        await gone.wait()
    await runner.cleanup()


async def test_a_handshake_without_an_answer_is_given_up() -> None:
    ended = asyncio.Event()

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        ended.set()

    server = await asyncio.start_server(stall, "127.0.0.1", 0)
    sink = Sink()
    made = source(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", sink)
    made._network = made._network.model_copy(update={"connect_timeout": 0.05})
    assert await first_reasons(made, sink) == ["unreachable"]
    await ended.wait()
    server.close()


@pytest.mark.parametrize(
    ("asked", "least", "most"), [("30", 30, 30), ("99999999", 3600, 3600), ("soon", 0, 1)]
)
async def test_the_wait_that_a_host_asks_for_is_kept_within_a_bound(
    asked: str, least: float, most: float
) -> None:
    async def busy(_request: web.Request) -> web.Response:
        return web.Response(status=503, headers={"Retry-After": asked})

    runner, url = await serve(busy)
    made = source(url, Sink())
    task = asyncio.create_task(made.run())
    while made.link.retry_at == 0:
        await asyncio.sleep(0.001)
    task.cancel()
    assert made.link.last is not None
    assert least <= made.link.retry_at - made.link.last.at <= most + 0.001
    assert made.link.status()["throttled"] or not least
    await runner.cleanup()


async def test_a_host_is_slowed_down_before_large_frames_fill_the_memory() -> None:
    """What a socket holds counts in frames, and a frame may be 5 MB."""
    sent, slowed, frame = 0, asyncio.Event(), bytes(4 << 20)

    async def handler(request: web.Request) -> web.WebSocketResponse:
        nonlocal sent
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        try:
            while sent < 64:
                async with asyncio.timeout(0.5):
                    await socket.send_bytes(frame)
                sent += 1
        except TimeoutError:
            pass
        slowed.set()
        return socket

    class Waiting(Sink):
        async def receive(self, data: bytes) -> bool:
            await asyncio.Event().wait()
            return True

    runner, url = await serve(handler)
    running = asyncio.create_task(source(url, Waiting()).run())
    await slowed.wait()
    running.cancel()
    await asyncio.wait([running])
    await runner.cleanup()
    assert sent < 12  # the kernel's buffers, our socket's queue and one in the sink's hands
