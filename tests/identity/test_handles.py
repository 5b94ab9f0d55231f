from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from indexer.errors import ConfigError, IdentityError, IdentityGone, IdentityUnavailable
from indexer.identity.guard import GuardedResolver
from indexer.identity.handles import HandleLookup
from indexer.identity.http import HttpClient
from indexer.identity.paces import HostPaces
from tests.identity.servers import FixedNames, client_tls, dns_server, http_server, settings

ANN = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"
BOB = "did:web:bob.example.com"
HOST = "ann.example.com"


class Asked:
    """What went to the two ways."""

    def __init__(self) -> None:
        self.dns: list[str] = []
        self.web: list[str] = []


@asynccontextmanager
async def looking(
    txt: list[str] | str | None, body: str | int = 404, handle: str = HOST
) -> AsyncIterator[tuple[HandleLookup, Asked]]:
    """A lookup under the public rules: TXT records (or a failure's name) and a well-known file."""
    asked = Asked()

    async def well_known(request: web.Request) -> web.Response:
        asked.web.append(request.host)
        return web.Response(status=body) if isinstance(body, int) else web.Response(text=body)

    records = {} if txt is None else {f"_atproto.{handle}": txt}
    async with dns_server(records) as (address, names), http_server(well_known, tls=True) as port:
        asked.dns = names
        chosen = settings(network={"dns_server": address, "connect_to": [f"{handle}:443=127.0.0.1:{port}"]})
        http = HttpClient(chosen.network, tls=client_tls())
        http.resolver = GuardedResolver(chosen.network, FixedNames({}))
        async with http:
            yield HandleLookup(http, chosen, HostPaces(chosen.identity)), asked


async def test_dns_is_asked_first_and_wins() -> None:
    async with looking([f"did={ANN}"], BOB) as (lookup, asked):
        assert await lookup.lookup("ANN.example.com") == ANN
        assert asked.dns == ["_atproto.ann.example.com"]
        assert asked.web == []


@pytest.mark.parametrize("txt", [None, [], ["v=spf1 -all"], ["DID=x", "xdid=y"]])
async def test_the_well_known_file_is_read_where_dns_says_nothing(txt: list[str] | None) -> None:
    async with looking(txt or None, f" {BOB} \r\n") as (lookup, asked):
        assert await lookup.lookup(HOST) == BOB
        assert asked.web == [HOST]


async def test_other_records_and_repeated_ones_do_not_matter() -> None:
    async with looking(["v=spf1 -all", f"did={ANN}", f"did={ANN}", f"did={ANN} "]) as (lookup, _):
        assert await lookup.lookup(HOST) == ANN


async def test_several_different_dids_are_a_no() -> None:
    async with looking([f"did={ANN}", f"did={BOB}"], ANN) as (lookup, asked):
        with pytest.raises(IdentityGone, match="2 different"):
            await lookup.lookup(HOST)
        assert asked.web == []


async def test_a_record_that_names_no_did_is_a_no() -> None:
    async with looking(["did=nonsense"], ANN) as (lookup, _):
        with pytest.raises(IdentityGone, match="not a DID"):
            await lookup.lookup(HOST)


@pytest.mark.parametrize(
    ("txt", "body", "error"),
    [
        (None, 404, IdentityGone),
        (None, 403, IdentityGone),
        (None, "nonsense", IdentityGone),
        (None, "", IdentityGone),
        (None, "x" * 3000, IdentityGone),
        (None, f"{ANN}\n{BOB}", IdentityGone),
        (None, 500, IdentityUnavailable),
        (None, 429, IdentityUnavailable),
        ("REFUSED", 404, IdentityUnavailable),
        ("SERVFAIL", 404, IdentityUnavailable),
        ("SERVFAIL", 500, IdentityUnavailable),
    ],
)
async def test_what_no_answer_means(txt: str | None, body: str | int, error: type[IdentityError]) -> None:
    async with looking(txt, body) as (lookup, _):
        with pytest.raises(error):
            await lookup.lookup(HOST)


@pytest.mark.parametrize(("txt", "reason"), [(None, "identity_unavailable"), ("SERVFAIL", "dns")])
async def test_a_silent_name_server_is_told_from_a_silent_host(txt: str | None, reason: str) -> None:
    async with looking(txt, 500) as (lookup, _):
        with pytest.raises(IdentityUnavailable) as caught:
            await lookup.lookup(HOST)
        assert caught.value.reason == reason


async def test_the_web_answers_for_a_broken_dns() -> None:
    async with looking("SERVFAIL", ANN) as (lookup, _):
        assert await lookup.lookup(HOST) == ANN


@pytest.mark.parametrize(
    "handle",
    [
        "", "ann", "ann..com", "@ann.com", "ann.com.", "127.0.0.1", "ann.alt", "ann.arpa",
        "ann.example", "ann.internal", "ann.invalid", "ann.local", "ann.localhost", "ann.onion",
        "ann.test", "ANN.LOCAL", "a." * 130 + "com",
    ],
)  # fmt: skip
async def test_names_that_are_never_asked_for(handle: str) -> None:
    async with looking([f"did={ANN}"]) as (lookup, asked):
        with pytest.raises(IdentityGone):
            await lookup.lookup(handle)
        assert asked.dns == []


async def test_a_handle_that_points_inside_is_a_no() -> None:
    async with dns_server({}) as (address, _):
        chosen = settings(network={"dns_server": address})
        http = HttpClient(chosen.network)
        http.resolver = GuardedResolver(chosen.network, FixedNames({HOST: ["192.168.0.1"]}))
        async with http:
            with pytest.raises(IdentityGone, match="not a public address"):
                await HandleLookup(http, chosen, HostPaces(chosen.identity)).lookup(HOST)


async def test_development_names_by_a_dns_server_of_ones_own() -> None:
    async with dns_server({"_atproto.ann.test": [f"did={ANN}"]}) as (address, asked):
        chosen = settings(network={"dns_server": address, "allow_private": True})
        async with HttpClient(chosen.network) as http:
            assert await HandleLookup(http, chosen, HostPaces(chosen.identity)).lookup("ann.test") == ANN
            assert asked == ["_atproto.ann.test"]


async def test_development_names_over_plain_http() -> None:
    async def well_known(_: web.Request) -> web.Response:
        return web.Response(text=ANN)

    async with http_server(well_known) as port:
        chosen = settings(
            network={
                "allow_private": True,
                "connect_to": [f"ann.test:{p}=127.0.0.1:{port}" for p in (80, 443)],
            }
        )
        async with HttpClient(chosen.network) as http:
            assert await HandleLookup(http, chosen, HostPaces(chosen.identity)).lookup("ann.test") == ANN


def test_a_dns_server_must_be_an_address() -> None:
    chosen = settings(network={"dns_server": "ns.example.com:53"})
    with pytest.raises(ConfigError, match=r"network\.dns_server"):
        HandleLookup(HttpClient(chosen.network), chosen, HostPaces(chosen.identity))
