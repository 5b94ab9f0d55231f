from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web

from indexer.errors import FetchError, FetchRefused, FetchTransient, UrlRefused
from indexer.identity.guard import GuardedResolver
from indexer.identity.http import MAX_REDIRECTS, HttpClient, Response, retry_after
from tests.identity.servers import FixedNames, answering, client_tls, http_server, settings


def private_client() -> HttpClient:
    return HttpClient(settings(network={"allow_private": True}).network)


def public_client(port: int, *hosts: str, names: dict[str, list[str]] | None = None) -> HttpClient:
    """A client under the public rules that finds ``hosts`` (port 443) on a local TLS port."""
    overrides = [f"{host}:443=127.0.0.1:{port}" for host in hosts]
    client = HttpClient(settings(network={"connect_to": overrides}).network, tls=client_tls())
    client.resolver = GuardedResolver(client.network, FixedNames(names or {}))
    return client


async def test_an_answer() -> None:
    handler = answering(418, b"short and stout", {"X-Kind": "Teapot", "Retry-After": "7"})
    async with http_server(handler) as port, private_client() as http:
        response = await http.get(f"http://127.0.0.1:{port}/a", max_bytes=100)
        assert (response.status, response.body, response.headers["x-kind"]) == (
            418,
            b"short and stout",
            "Teapot",
        )
        assert response.retry_after == 7
        assert response.url == f"http://127.0.0.1:{port}/a"


async def test_what_is_sent() -> None:
    seen: list[dict[str, str]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(dict(request.headers))
        response = web.Response()
        response.set_cookie("stay", "here")
        return response

    async with http_server(handler) as port, private_client() as http:
        for _ in range(2):
            await http.get(f"http://127.0.0.1:{port}/", max_bytes=100, headers={"Accept": "x/y"})
    assert seen[0]["Accept"] == "x/y"
    assert seen[0]["User-Agent"] == "atproto-indexer"
    assert all("Cookie" not in headers and "Accept-Encoding" not in headers for headers in seen)


async def test_a_host_under_the_public_rules_by_an_override() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=request.host)

    async with http_server(handler, tls=True) as port, public_client(port, "www.example.com") as http:
        response = await http.get("https://www.example.com/", max_bytes=100)
        assert response.body == b"www.example.com"


async def test_an_unknown_authority_is_a_failure() -> None:
    async with http_server(answering(), tls=True) as port, private_client() as http:
        with pytest.raises(FetchTransient, match="certificate"):
            await http.get(f"https://127.0.0.1:{port}/", max_bytes=100)


@pytest.mark.parametrize("host", ["a" * 70 + ".com", "a..b.com", ".a.com"])
@pytest.mark.parametrize("private", [True, False])
async def test_a_host_that_no_lookup_takes_is_refused(host: str, private: bool) -> None:
    async with HttpClient(settings(network={"allow_private": private}).network) as http:
        with pytest.raises(UrlRefused):
            await http.get(f"https://{host}/", max_bytes=100)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/", "https://127.0.0.1/", "https://10.0.0.1/", "nonsense"]
)
async def test_the_guard_stands_before_every_request(url: str) -> None:
    async with HttpClient(settings().network) as http:
        with pytest.raises(UrlRefused):
            await http.get(url, max_bytes=100)


async def test_a_name_that_resolves_to_a_private_address_is_not_dialled() -> None:
    async with public_client(1, names={"rebound.example.com": ["127.0.0.1"]}) as http:
        with pytest.raises(UrlRefused, match="not a public address"):
            await http.get("https://rebound.example.com/", max_bytes=100)


async def test_a_name_that_does_not_resolve_may_be_tried_again() -> None:
    async with public_client(1) as http:
        with pytest.raises(FetchTransient, match="no such name"):
            await http.get("https://nowhere.example.com/", max_bytes=100)


async def test_nobody_listens() -> None:
    async with http_server(answering()) as port:
        pass
    async with private_client() as http:
        with pytest.raises(FetchTransient):
            await http.get(f"http://127.0.0.1:{port}/", max_bytes=100)


async def test_redirects_are_followed() -> None:
    async def handler(request: web.Request) -> web.Response:
        steps = int(request.path[1:])
        if steps == 0:
            return web.Response(text="arrived")
        return web.Response(
            status=[301, 302, 303, 307, 308][steps % 5], headers={"Location": f"/{steps - 1}"}
        )

    async with http_server(handler) as port, private_client() as http:
        base = f"http://127.0.0.1:{port}"
        response = await http.get(f"{base}/{MAX_REDIRECTS}", max_bytes=100)
        assert (response.body, response.url) == (b"arrived", f"{base}/0")
        with pytest.raises(FetchRefused, match="redirects") as raised:
            await http.get(f"{base}/{MAX_REDIRECTS + 1}", max_bytes=100)
        assert raised.value.name == "TooManyRedirects"


async def test_a_redirect_loop_ends() -> None:
    requests = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal requests
        requests += 1
        return web.Response(status=302, headers={"Location": str(request.url)})

    async with http_server(handler) as port, private_client() as http:
        with pytest.raises(FetchRefused):
            await http.get(f"http://127.0.0.1:{port}/", max_bytes=100)
    assert requests == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("https://127.0.0.1/", "not public"),
        ("https://169.254.169.254/latest", "not public"),
        ("http://www.example.com/", "scheme"),
        ("//10.0.0.1/", "not public"),
        ("https://inside.example.com/", "not a public address"),
        ("https://www.example.com:22/", "port"),
        ("file:///etc/passwd", "scheme"),
        ("https://ann:secret@www.example.com/", "credentials"),
        ("https://[", "not a URL"),
    ],
)
async def test_a_redirect_is_judged_like_a_request(location: str, problem: str) -> None:
    handler = answering(302, headers={"Location": location})
    names = {"inside.example.com": ["192.168.1.1"]}
    async with (
        http_server(handler, tls=True) as port,
        public_client(port, "www.example.com", names=names) as http,
    ):
        with pytest.raises(UrlRefused, match=problem):
            await http.get("https://www.example.com/", max_bytes=100)


async def test_credentials_stay_with_their_host() -> None:
    seen: list[tuple[str, str | None]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((request.host, request.headers.get("Authorization")))
        target = {"/": "/again", "/again": "https://b.example.com/end"}.get(request.path)
        return web.Response(status=307 if target else 200, headers={"Location": target} if target else {})

    async with (
        http_server(handler, tls=True) as port,
        public_client(port, "a.example.com", "b.example.com") as http,
    ):
        await http.get("https://a.example.com/", max_bytes=100, headers={"Authorization": "Bearer x"})
    assert seen == [("a.example.com", "Bearer x"), ("a.example.com", "Bearer x"), ("b.example.com", None)]


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(bytes(1 << 14))


async def test_a_body_is_read_up_to_its_limit() -> None:
    async with http_server(answering(body=bytes(1000))) as port, private_client() as http:
        url = f"http://127.0.0.1:{port}/"
        assert len((await http.get(url, max_bytes=1000)).body) == 1000
        with pytest.raises(FetchRefused, match="larger than 999 bytes") as raised:
            await http.get(url, max_bytes=999)
        assert raised.value.name == "TooLarge"


async def test_an_endless_body_is_cut() -> None:
    async with http_server(endless) as port, private_client() as http:
        with pytest.raises(FetchRefused, match="larger than"):
            await http.get(f"http://127.0.0.1:{port}/", max_bytes=1 << 20)


async def test_a_body_that_breaks_off() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"part")
        assert request.transport is not None
        request.transport.close()
        return response

    async with http_server(handler) as port, private_client() as http:
        with pytest.raises(FetchTransient):
            await http.get(f"http://127.0.0.1:{port}/", max_bytes=2000)


async def test_a_compressed_body_that_nobody_asked_for() -> None:
    handler = answering(body=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    async with http_server(handler) as port, private_client() as http:
        with pytest.raises(FetchTransient, match="Content-Encoding"):
            await http.get(f"http://127.0.0.1:{port}/", max_bytes=100)


@pytest.mark.parametrize("headers_first", [False, True])
async def test_a_slow_server_is_left(headers_first: bool) -> None:
    done = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if headers_first:
            await response.prepare(request)
        await done.wait()
        return response

    async with http_server(handler) as port, private_client() as http:
        try:
            with pytest.raises(FetchTransient, match="within") as raised:
                await http.get(f"http://127.0.0.1:{port}/", max_bytes=100, timeout=0.05)
            assert raised.value.reason == "timeout"
        finally:
            done.set()


async def test_a_stream_arrives_in_chunks() -> None:
    go_on = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=203)
        await response.prepare(request)
        await response.write(b"first")
        await go_on.wait()
        await response.write(b"second")
        return response

    async with http_server(handler) as port, private_client() as http:
        received = b""
        async with http.stream(f"http://127.0.0.1:{port}/", max_bytes=100) as response:
            assert response.status == 203
            async for chunk in response.chunks:
                received += chunk
                go_on.set()
        assert received == b"firstsecond"


async def test_a_stream_may_be_left_early() -> None:
    async with (
        http_server(endless) as port,
        private_client() as http,
        http.stream(f"http://127.0.0.1:{port}/", max_bytes=1 << 30) as response,
    ):
        async for _ in response.chunks:
            break


async def test_the_callers_own_timeout_is_not_taken_for_the_hosts() -> None:
    async with http_server(answering()) as port, private_client() as http:
        with pytest.raises(TimeoutError):
            async with http.stream(f"http://127.0.0.1:{port}/", max_bytes=100):
                raise TimeoutError


async def test_use_outside_of_its_context_is_a_mistake() -> None:
    http = private_client()
    with pytest.raises(RuntimeError):
        await http.get("http://127.0.0.1:1/", max_bytes=1)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("30", 30.0),
        (" 5 ", 5.0),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1e9", None),
        ("99999999999", 1e9),
        ("9" * 30, 1e9),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after({"retry-after": value}) == seconds
    assert retry_after({}) is None


def test_retry_after_as_a_date() -> None:
    future = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    seconds = retry_after({"retry-after": future})
    assert seconds is not None
    assert 90 < seconds <= 101
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"error":"RepoNotFound","message":"no"}', ("RepoNotFound", "no")),
        (b'{"error":7}', ("", "")),
        (b"[]", ("", "")),
        (b"<html>", ("", "")),
        (b"", ("", "")),
    ],
)
def test_xrpc_errors(body: bytes, error: tuple[str, str]) -> None:
    assert Response(400, {}, body, "").xrpc_error() == error


async def test_only_our_errors_come_out() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with http_server(handler) as port, private_client() as http:
        with pytest.raises(FetchError):
            await http.get(f"http://127.0.0.1:{port}/", max_bytes=100)


async def test_a_server_that_speaks_no_http() -> None:
    async def answer(_: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, private_client() as http:
        with pytest.raises(FetchTransient):
            await http.get(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", max_bytes=100)
