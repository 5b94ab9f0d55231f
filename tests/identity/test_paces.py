"""Who is dialled is asked at a pace: by host, by registered domain, at the end of redirects too."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest
from aiohttp import web

from indexer.config import Settings
from indexer.errors import FetchTransient
from indexer.identity.domains import domain_of
from indexer.identity.http import HttpClient
from indexer.identity.paces import HostPaces
from tests.identity.servers import http_server, settings


def paces(**limits: object) -> HostPaces:
    return HostPaces(Settings(identity=limits).identity)


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("example.com", "example.com"),
        ("a.b.Example.com.", "example.com"),
        ("a.b.example.co.uk", "example.co.uk"),
        ("co.uk", "co.uk"),
        ("localhost", "localhost"),
        ("192.0.2.7", "192.0.2.7"),
        ("127.0.0.1:2583", "127.0.0.1:2583"),
    ],
)
def test_hosts_belong_to_what_was_registered(host: str, domain: str) -> None:
    assert domain_of(host) == domain


async def test_turns_of_a_host_are_spaced_whatever_its_spelling() -> None:
    made = paces(web_requests_per_s=20)
    began = monotonic()
    await asyncio.gather(*(made.turn(host) for host in ("A.test", "a.test") for _ in range(13)))
    assert monotonic() - began >= 0.25  # a second's worth at once, then one each 50 ms


async def test_hosts_of_one_domain_share_its_pace_unless_it_is_known_to_be_shared() -> None:
    made = paces(web_requests_per_s=1000, domain_requests_per_s=20, shared_domains=["wide.test"])
    began = monotonic()
    await asyncio.gather(*(made.turn(f"h{n}.wide.test") for n in range(100)))
    wide = monotonic() - began
    await asyncio.gather(*(made.turn(f"h{n}.one.test") for n in range(26)))
    assert monotonic() - began - wide >= 0.25 > wide


async def test_nobody_waits_long_for_a_turn() -> None:
    made = paces(web_requests_per_s=0.1)
    await made.turn("a.test")
    with pytest.raises(FetchTransient) as caught:
        await made.turn("a.test")
    assert caught.value.reason == "paced"
    assert 5 < (caught.value.retry_after or 0) <= 10
    await made.turn("b.other")


async def test_a_redirect_is_a_request_to_where_it_leads() -> None:
    made, dialled = paces(), list[str]()
    turn = made.turn

    async def seen(host: str) -> None:
        dialled.append(host)
        await turn(host)

    made.turn = seen  # type: ignore[method-assign]

    async def handler(request: web.Request) -> web.Response:
        if request.host.startswith("a.test"):
            return web.Response(status=302, headers={"Location": f"http://victim.test:{port}/"})
        return web.Response(text="here")

    async with http_server(handler) as port:
        hosts = [f"{name}:{port}=127.0.0.1:{port}" for name in ("a.test", "victim.test")]
        chosen = settings(network={"allow_private": True, "connect_to": hosts})
        async with HttpClient(chosen.network) as http:
            answer = await http.get(f"http://a.test:{port}/", max_bytes=100, before=made.dial)
    assert (answer.body, dialled) == (b"here", ["a.test", "victim.test"])
