"""Egress proxies: whose turn it is, who rests, and that the guard's verdict goes with the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from indexer.errors import ConfigError, FetchTransient, UrlRefused
from indexer.identity.guard import GuardedResolver
from indexer.identity.http import PROXY, HttpClient
from indexer.identity.proxies import Proxies
from tests.identity.servers import FixedNames, answering, client_tls, http_server, settings


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def names(ring: Proxies) -> list[str]:
    return [proxy.name.rpartition("/")[2] for proxy in ring.turn()]


def test_they_take_turns_and_one_out_of_reach_rests_ever_longer() -> None:
    clock = Clock()
    ring = Proxies(["http://a.test:1", "http://b.test:1", "http://c.test:1"], 15.0, clock)
    assert names(ring)[0] == "a.test:1"
    assert names(ring) == ["b.test:1", "c.test:1", "a.test:1"]
    bad = next(proxy for proxy in ring.turn() if proxy.name.startswith("http://b"))
    rests = []
    for _ in range(4):
        ring.failed(bad, unreachable=True)
        assert "b.test:1" not in names(ring)
        rests.append(bad.not_before - clock.now)
        clock.now = bad.not_before
        assert "b.test:1" in names(ring)
    assert rests == [5, 10, 15, 15]
    ring.worked(bad)
    assert (bad.failures, bad.rests, bad.used) == (0, 0, 1)


def test_failures_in_a_row_rest_a_proxy_whoever_is_at_fault() -> None:
    clock = Clock()
    ring = Proxies(["http://a.test:1", "http://b.test:1"], 300.0, clock)
    bad = next(ring.turn())
    for _ in range(4):
        ring.failed(bad, unreachable=False)
    assert len(names(ring)) == 2
    ring.failed(bad, unreachable=False)
    assert names(ring) == ["b.test:1"]


def test_when_all_rest_the_one_that_is_back_first_is_tried() -> None:
    clock = Clock()
    ring = Proxies(["http://a.test:1", "http://b.test:1"], 300.0, clock)
    first, second = ring.turn()
    ring.failed(first, unreachable=True)
    ring.failed(first, unreachable=True)
    ring.failed(second, unreachable=True)
    assert names(ring) == ["b.test:1"]


def test_no_figure_shows_a_password() -> None:
    ring = Proxies(["http://me:s3cret@a.test:3128"], 300.0)
    assert ring.status() == [{"proxy": "http://a.test:3128", "answers": 0, "failures": 0, "rests_s": 0.0}]


@pytest.mark.parametrize(
    "url", ["a.test:1", "https://a.test", "http://", "http://a.test/path", "socks5://a:1"]
)
def test_what_is_no_proxy_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="not a proxy"):
        settings(backfill={"proxies": [url]})


# ---- requests


class Relay:
    """A CONNECT and plain HTTP proxy on loopback. ``seen``: the request lines; ``answer`` refuses instead."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.headers: list[bytes] = []
        self.answer = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        line = head.split(b"\r\n")[0].decode()
        self.seen.append(line)
        self.headers.append(head)
        try:
            if self.answer:
                writer.write(self.answer)
                await writer.drain()
                return
            method, target, _ = line.split(" ")
            authority = target if method == "CONNECT" else target.split("/")[2]
            host, _, port = authority.rpartition(":")
            onward, back = await asyncio.open_connection(host, int(port))
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                back.write(head)
            await asyncio.gather(_pipe(reader, back), _pipe(onward, writer))
        finally:
            writer.close()


async def _pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    except ConnectionError:
        pass
    finally:
        sink.close()


@asynccontextmanager
async def relay(proxy: Relay) -> AsyncIterator[str]:
    """The proxy's URL."""
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def body_of(http: HttpClient, url: str) -> bytes:
    async with http.stream(url, max_bytes=1000, proxied=True) as response:
        return b"".join([chunk async for chunk in response.chunks])


async def test_a_proxy_is_told_the_address_that_was_judged_and_tls_goes_by_the_name() -> None:
    proxy = Relay()
    async with http_server(answering(body=b"here"), tls=True) as port, relay(proxy) as url:
        network = settings(network={"connect_to": [f"pds.example.com:443=127.0.0.1:{port}"]}).network
        client = HttpClient(network, tls=client_tls(), proxies=Proxies([url], 300.0))
        async with client as http:
            async with http.stream("https://pds.example.com/x", max_bytes=100, proxied=True) as response:
                assert response.url == "https://pds.example.com/x"
                assert b"".join([chunk async for chunk in response.chunks]) == b"here"
            await http.get("https://pds.example.com/x", max_bytes=100)  # not asked for
        assert proxy.seen == [f"CONNECT 127.0.0.1:{port} HTTP/1.1"]


async def test_the_guard_judges_targets_whoever_carries_the_request() -> None:
    proxy = Relay()
    async with relay(proxy) as url:
        network = settings().network
        client = HttpClient(network, tls=client_tls(), proxies=Proxies([url], 300.0))
        client.resolver = GuardedResolver(network, FixedNames({"inside.example.com": ["10.0.0.1"]}))
        async with client as http:
            for target in ("https://inside.example.com/", "https://127.0.0.1/", "http://example.com/"):
                with pytest.raises(UrlRefused):
                    await body_of(http, target)
        assert proxy.seen == []


async def test_another_proxy_is_tried_and_none_means_nothing_about_the_host() -> None:
    good, refusing = Relay(), Relay()
    refusing.answer = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    async with (
        http_server(answering(body=b"here"), tls=True) as port,
        relay(good) as url,
        relay(refusing) as bad,
    ):
        network = settings(network={"connect_to": [f"pds.example.com:443=127.0.0.1:{port}"]}).network
        ring = Proxies(["http://127.0.0.1:9", bad, url], 300.0)
        async with HttpClient(network, tls=client_tls(), proxies=ring) as http:
            for _ in range(3):
                assert await body_of(http, "https://pds.example.com/") == b"here"
        assert len(refusing.seen) == 1  # it rests since
        ring = Proxies(["http://127.0.0.1:9", bad], 300.0)
        async with HttpClient(network, tls=client_tls(), proxies=ring) as http:
            with pytest.raises(FetchTransient) as caught:
                await body_of(http, "https://pds.example.com/")
        assert caught.value.reason == PROXY


async def test_credentials_go_to_the_proxy_and_to_nobody_else() -> None:
    proxy = Relay()
    async with http_server(answering(body=b"here")) as port, relay(proxy) as url:
        network = settings(network={"allow_private": True}).network
        ring = Proxies([url.replace("http://", "http://me:s3cret@")], 300.0)
        async with HttpClient(network, proxies=ring) as http:
            assert await body_of(http, f"http://127.0.0.1:{port}/") == b"here"
        assert b"Proxy-Authorization: Basic " in proxy.headers[0]


def test_a_malformed_proxy_is_named_without_its_password() -> None:
    from indexer.config import load

    with pytest.raises(ConfigError, match=r"backfill\.proxies") as caught:
        load(overrides={"backfill": {"proxies": ["http://me:s3cret@a.test/x"]}}, environment=False)
    assert "s3cret" not in str(caught.value)
