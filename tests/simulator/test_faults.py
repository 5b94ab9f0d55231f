"""Faults on demand: planned for a host, seen on the wire, counted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import aiohttp
import dns.asyncresolver
import dns.exception
import dns.resolver
import pytest

from indexer.atproto.car import Limits, iter_blocks
from indexer.errors import BadInput, IndexerError
from indexer.repo.walker import load_repo
from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.simulator.account import Account, ActionError
from indexer.simulator.fault_answers import KINDS
from indexer.simulator.fault_cars import CARS, Subject
from indexer.simulator.faults import ROUTES, Fault
from tests.paths import ROOT
from tests.simulator.test_network import running as network

REPO = "/xrpc/com.atproto.sync.getRepo?did="
STATUS = "/xrpc/com.atproto.sync.getRepoStatus?did="
#: Spoilt CARs that are right all the same.
LEGAL = {"extra_blocks", "shuffled", "repeated_blocks"}


@asynccontextmanager
async def running(*faults: Fault) -> AsyncIterator[tuple[SimulatedNetwork, Account, aiohttp.ClientSession]]:
    """A network where nothing happens by itself, one of its accounts, and a client."""
    config = SimConfig(accounts=0, history_accounts=3, history_records=20, pds=2, rate=0, faults=faults)
    async with network(config) as (net, _), aiohttp.ClientSession(auto_decompress=False) as http:
        yield net, next(iter(net.world.accounts.values())), http


def _url(net: SimulatedNetwork, account: Account, path: str = REPO) -> str:
    return net.pds_urls[account.pds] + path + account.did


async def _get(http: aiohttp.ClientSession, url: str, **options: object) -> tuple[int, bytes, dict[str, str]]:
    async with asyncio.timeout(5), http.get(url, allow_redirects=False, **options) as response:  # type: ignore[arg-type]
        return response.status, await response.read(), {k.lower(): v for k, v in response.headers.items()}


async def test_the_next_requests_meet_the_fault_and_then_no_more() -> None:
    async with running(Fault("pds*", "status_503", times=2)) as (net, one, http):
        assert [(await _get(http, _url(net, one)))[0] for _ in range(3)] == [503, 503, 200]
        assert net.faults.fired == {("pds0", "status_503"): 2}
        assert net.faults.unfired() == []


async def test_a_fault_is_aimed_at_a_host_a_route_and_an_account() -> None:
    async with running() as (net, one, http):
        other = next(a for a in net.world.accounts.values() if a.did != one.did)
        planned = net.faults.add(Fault(f"pds{one.pds}", "status_500", route="getRepo", did=one.did))
        assert (await _get(http, _url(net, one)))[0] == 500
        assert (await _get(http, _url(net, one, STATUS)))[0] == 200
        assert (await _get(http, _url(net, other)))[0] == 200
        assert (await _get(http, f"{net.plc_url}/{one.did}"))[0] == 200
        net.faults.remove(planned.number)
        assert (await _get(http, _url(net, one)))[0] == 200
        assert net.faults.fired.total() == 1


async def test_the_dice_follow_the_seed() -> None:
    seen = []
    for _ in range(2):
        async with running(Fault("pds*", "status_500", chance=0.5)) as (net, one, http):
            seen.append([(await _get(http, _url(net, one, STATUS)))[0] for _ in range(30)])
    assert seen[0] == seen[1]
    assert 5 < seen[0].count(500) < 25


async def test_faults_are_set_seen_and_ended_by_the_control_api() -> None:
    async with running() as (net, one, http):
        url = net.control_url + "/faults"
        async with http.post(url, json={"host": "pds*", "kind": "html", "times": 1}) as response:
            number = (await response.json())["id"]
        assert (await _get(http, _url(net, one)))[1].startswith(b"<html>")
        async with http.get(url) as response:
            state = await response.json()
        assert state["fired"] == {"pds0": {"html": 1}}
        assert (state["faults"][0]["left"], state["faults"][0]["fired"]) == (0, 1)
        assert set(state["kinds"]) == set(KINDS)
        async with http.post(url, json={"remove": number}) as response:
            assert (await response.json())["faults"] == []
        for wrong in (
            {"host": "pds0", "kind": "no such"}, {"host": "pds0"}, {"kind": "html"}, {"remove": 99},
            {"host": "pds0", "kind": "html", "chance": 0}, {"host": "pds0", "kind": "html", "times": 0},
            {"host": "pds0", "kind": "html", "odd": 1}, {"host": "plc", "kind": "no_key", "route": "getRepo"},
            {"host": "pds0", "kind": "html", "value": []},
        ):  # fmt: skip
            async with http.post(url, json=wrong) as response:
                assert response.status == 400, wrong


def test_every_fault_is_in_the_page() -> None:
    page = (ROOT / "docs" / "simulator.md").read_text()
    assert not [name for name in (*KINDS, *ROUTES) if f"`{name}`" not in page]


def test_an_unknown_fault_is_refused_before_the_network_starts() -> None:
    with pytest.raises(ActionError, match="no such fault"):
        SimulatedNetwork(SimConfig(accounts=0, history_accounts=0, faults=(Fault("pds0", "nothing"),)))


@pytest.mark.parametrize("curve", ["k256", "p256"])
async def test_every_spoilt_repository_is_refused_and_the_unusual_ones_are_not(curve: str) -> None:
    async with running() as (net, _, http):
        did = net.add_account(40, curve=curve, pds=0)
        account = net.world.accounts[did]
        records = {path: record.cid for path, record in account.records.items()}
        for kind in CARS:
            net.faults.clear()
            net.faults.add(Fault("pds0", kind, did=did))
            status, body, _ = await _get(http, _url(net, account))
            assert status == 200
            assert net.faults.fired["pds0", kind] == 1
            error: IndexerError | None = None
            try:
                limits = Limits(max_bytes=64 << 20)
                repo = load_repo(body, did=did, key=account.key.did_key, limits=limits)
            except IndexerError as raised:
                error = raised
            if kind in LEGAL:
                assert error is None, (kind, error)
                assert {path: cid for path, cid, _ in repo.records} == records
            elif kind in ("old_rev", "future_rev", "huge_record"):  # only a reader who knows more can tell
                assert error is None or kind == "huge_record", (kind, error)
                assert error is not None or repo.commit.rev != account.rev
            else:
                assert isinstance(error, BadInput), kind
        assert records == {path: record.cid for path, record in account.records.items()}


async def test_an_account_that_a_fault_does_not_fit_gets_the_truth_and_nothing_is_counted() -> None:
    async with running() as (net, _, http):
        did = net.add_account(0, pds=0)
        net.faults.add(Fault("pds0", "missing_record", did=did))
        status, body, _ = await _get(http, _url(net, net.world.accounts[did]))
        assert status == 200
        assert len(list(iter_blocks(body))) == 2
        assert not net.faults.fired
        assert [fault.kind for fault in net.faults.unfired()] == ["missing_record"]


async def test_a_cut_at_a_block_boundary_ends_at_one() -> None:
    async with running() as (_, one, _):
        whole = {len(CARS["truncated_at_block"](Subject(one, [], Random(n), None)) or b"") for n in range(40)}
        ends = [end for _, _, end in iter_blocks(CARS["shuffled"](Subject(one, [], Random(0), None)) or b"")]
        assert len(whole) > 10
        assert max(whole) < ends[-1]


async def test_rate_limits_in_their_three_forms() -> None:
    async with running() as (net, one, http):
        for kind, header in (
            ("rate_limited", None),
            ("rate_limited_retry_after", "retry-after"),
            ("rate_limited_reset", "ratelimit-reset"),
        ):
            net.faults.add(Fault("pds0", kind, times=1, value=7))
            status, _, headers = await _get(http, _url(net, one))
            assert status == 429
            assert {"retry-after", "ratelimit-reset"} & set(headers) == ({header} if header else set())
        assert headers["ratelimit-reset"].isdigit()


async def test_slow_stalled_cut_reset_and_endless_answers() -> None:
    async with running() as (net, one, http):
        url, loop = _url(net, one), asyncio.get_running_loop()
        whole = (await _get(http, url))[1]
        net.faults.add(Fault("pds0", "slow", times=1, value=len(whole) * 5))
        started = loop.time()
        assert (await _get(http, url))[1] == whole
        assert loop.time() - started > 0.15
        for kind in ("stalled", "no_answer", "endless"):
            net.faults.add(Fault("pds0", kind, times=1))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await _get(http, url)
        for kind in ("cut", "reset", "not_http"):
            planned = net.faults.add(Fault("pds0", kind))  # a client tries a reused connection's GET again
            with pytest.raises(aiohttp.ClientError):
                await _get(http, url)
            net.faults.remove(planned.number)
        net.faults.add(Fault("pds0", "truncated", times=1))
        part = (await _get(http, url))[1]
        assert len(part) < len(whole)
        assert whole.startswith(part)
        assert len(net.faults.fired) == 8


async def test_redirects_and_a_compressed_body_nobody_asked_for() -> None:
    async with running() as (net, one, http):
        url = _url(net, one)
        for kind, start in (
            ("redirect_private", "http://169.254."), ("redirect_loop", url), ("redirect_scheme", "ftp:"),
        ):  # fmt: skip
            net.faults.add(Fault("pds0", kind, times=1))
            status, _, headers = await _get(http, url)
            assert (status, headers["location"].startswith(start)) == (302, True)
        net.faults.add(Fault("pds0", "gzip_bomb", times=1))
        _, body, headers = await _get(http, url)
        assert headers["content-encoding"] == "gzip"
        assert len(body) < 1 << 20


@pytest.mark.parametrize(
    "kind",
    ["id_mismatch", "no_key", "malformed_key", "lying_key", "no_pds", "lying_pds", "lying_handle",
     "huge_document", "invalid_json", "deep_json"],
)  # fmt: skip
async def test_lying_documents_of_both_methods(kind: str) -> None:
    async with running() as (net, one, http):
        did = net.add_account(0, pds=0, did="did:web:localhost%3A2600")
        web = net.pds_urls[0] + "/.well-known/did.json"
        for host, url, headers in (
            ("plc", f"{net.plc_url}/{one.did}", {}),
            ("names", web, {"Host": "localhost:2600"}),
        ):
            truth = (await _get(http, url, headers=headers))[1]
            net.faults.add(Fault(host, kind, times=1))
            status, lie, _ = await _get(http, url, headers=headers)
            assert (status, lie != truth) == (200, True)
            assert (await _get(http, url, headers=headers))[1] == truth
        assert did.encode() in truth
        assert net.faults.fired.total() == 2


async def test_lying_statuses_and_lists() -> None:
    async with running() as (net, one, http):
        lists = net.pds_urls[0] + "/xrpc/com.atproto.sync.listRepos?limit=1000&cursor="
        for path, kind, expected in (
            (_url(net, one, STATUS), "lying_status", b'"deleted"'),
            (_url(net, one, STATUS), "lying_rev", b'"rev"'),
            (lists, "repeated_cursor", b'"cursor":"again"'),
            (lists, "broken_entries", b"not a did"),
            (lists, "circular_cursor", b'"cursor":"circle0"'),
            (lists, "endless_list", b'"cursor":"page1"'),
            (lists, "invented_repos", b"did:plc:"),
        ):
            truth = (await _get(http, path))[1]
            net.faults.add(Fault("pds0", kind, times=1))
            status, lie, _ = await _get(http, path)
            assert (status, expected in lie, lie != truth) == (200, True, True), kind


async def test_lying_names() -> None:
    async with running() as (net, one, http):
        resolver = dns.asyncresolver.Resolver(configure=False)
        host, _, port = net.dns_address.rpartition(":")
        resolver.port, resolver.nameservers, resolver.lifetime = int(port), [host], 0.3

        async def ask() -> list[str]:
            answer = await resolver.resolve(f"_atproto.{one.handle}.", "TXT", search=False)
            return sorted(record.to_text() for record in answer)

        assert await ask() == [f'"did={one.did}"']
        for kind, count in (("wrong_did", 1), ("malformed_did", 1), ("several_dids", 2)):
            net.faults.add(Fault("names", kind, route="dns", times=1))
            answer = await ask()
            assert (len(answer), answer != [f'"did={one.did}"']) == (count, True)
        for kind, error in (
            ("no_name", dns.resolver.NXDOMAIN), ("server_failure", dns.exception.DNSException),
            ("silent", dns.exception.Timeout), ("malformed_answer", dns.exception.DNSException),
        ):  # fmt: skip
            net.faults.clear()
            net.faults.add(Fault("names", kind))
            with pytest.raises(error):
                await ask()
        net.faults.clear()
        net.faults.add(Fault("names", "wrong_did", route="wellKnown"))
        url = net.pds_urls[0] + "/.well-known/atproto-did"
        _, named, _ = await _get(http, url, headers={"Host": one.handle})
        assert named.decode() != one.did
        assert await ask() == [f'"did={one.did}"']
        assert not net.faults.unfired()


async def test_a_relay_may_serve_a_spoilt_copy_itself() -> None:
    async with running(Fault("relay0", "bad_signature")) as (net, one, http):
        one.seen = True
        status, body, _ = await _get(http, net.relay_url.replace("ws", "http", 1) + REPO + one.did)
        assert (status, len(list(iter_blocks(body)))) == (200, len(one.blocks()))


async def test_a_stalled_answer_ends_when_its_client_leaves() -> None:
    async with running(Fault("pds0", "no_answer")) as (net, one, _):
        port = int(net.pds_urls[0].rpartition(":")[2])
        before = len(asyncio.all_tasks())
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        await asyncio.get_running_loop().sock_sendall(
            sock, f"GET {REPO}{one.did} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        )
        while not net.faults.fired:
            await asyncio.sleep(0)
        sock.close()
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0)
