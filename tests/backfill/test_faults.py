"""Every fault of the simulated hosts against a real fetch: nothing wrong is taken, each is retried."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiohttp import web

from indexer.backfill.budget import Share
from indexer.backfill.hosts import Hosts, host_of
from indexer.config import HostSettings
from indexer.identity.guard import GuardedResolver
from indexer.identity.http import HttpClient
from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.simulator.account import Account
from indexer.simulator.fault_answers import KINDS
from indexer.simulator.faults import GET_REPO, Fault
from indexer.simulator.servers import pds_app, plc_app
from indexer.store.codecs import OVERSIZE, AccountStatus, RepoRow, SyncState
from indexer.store.writer import clock_us
from tests.backfill.world import Host, World, cids_of
from tests.identity.servers import FixedNames, client_tls, server_tls

FAULTS_BEFORE_PENALTY = HostSettings().faults


class Expected(NamedTuple):
    """What a fault of `getRepo` leads to. ``blamed``: it counts against the host as a whole."""

    reason: str
    blamed: bool = False
    least_s: float = 0.0  # wait that the host asked for
    value: float | str | None = None


_REPO, _HOST = False, True
#: Fault → what it leads to; "" is a repository that is taken, because nothing is wrong with it.
EXPECTED = {
    **{f"status_{status}": Expected(f"http_{status}", _REPO) for status in (400, 404, 410)},
    **{f"status_{status}": Expected(f"http_{status}", _HOST) for status in (401, 403, 408, 501)},
    **{f"status_{status}": Expected("http_5xx", _HOST) for status in (500, 502, 503, 504)},
    "rate_limited": Expected("rate_limited", _HOST),
    "rate_limited_retry_after": Expected("rate_limited", _HOST, 600, 600),
    "rate_limited_reset": Expected("rate_limited", _HOST, 590, 600),
    "unavailable_retry_after": Expected("http_5xx", _HOST, 600, 600),
    "no_answer": Expected("slow", _HOST),
    "slow": Expected("slow", _HOST),
    "stalled": Expected("slow", _HOST),
    "reset": Expected("fetch_transient", _HOST),
    "not_http": Expected("fetch_transient", _HOST),
    "cut": Expected("fetch_transient", _HOST),
    "redirect_private": Expected("fetch_transient", _HOST, value="http://127.0.0.1:9/"),
    "redirect_loop": Expected("http_302", _HOST),
    "redirect_scheme": Expected("url_refused", _HOST),
    "gzip_bomb": Expected("car"),
    "html": Expected("incomplete"),
    "empty": Expected("incomplete"),
    "garbage": Expected("incomplete|car"),
    "truncated": Expected("incomplete"),
    "truncated_at_block": Expected("incomplete"),
    "trailing": Expected("incomplete"),
    "missing_commit": Expected("incomplete"),
    "missing_record": Expected("incomplete"),
    "missing_node": Expected("incomplete"),
    "endless": Expected("too_large"),
    "huge_record": Expected("block_size"),
    "long_section": Expected("block_size"),
    "wrong_hash": Expected("bad_hash"),
    "wrong_root": Expected("commit"),
    "other_account": Expected("did_mismatch"),
    "misdirected": Expected("did_mismatch"),
    "old_rev": Expected("below_min_rev"),
    "future_rev": Expected("future_rev"),
    "other_key": Expected("signature"),
    "bad_signature": Expected("signature"),
    "high_s": Expected("signature"),
    "root_is_a_record": Expected("mst"),
    "wrong_tree": Expected("mst"),
    "extra_blocks": Expected(""),
    "shuffled": Expected(""),
    "repeated_blocks": Expected(""),
}
#: So that slowness is judged at once, bodies end soon, and all of them are spooled.
LIMITS = {
    "retry_min": 10, "retry_max": 1000, "grace": "600ms", "max_car_mib": 8, "min_kib_per_s": 100,
    "memory_kib": 0,
}  # fmt: skip


@asynccontextmanager
async def simulated(tmp_path: Path, **sections: Any) -> AsyncIterator[tuple[SimulatedNetwork, World]]:
    """Two PDSes where nothing happens by itself, and a backfill that follows their directory."""
    net = SimulatedNetwork(SimConfig(accounts=0, history_accounts=1, history_records=5, pds=2, rate=0))
    await net.start()
    host = Host()
    host.url = net.plc_url
    try:
        async with World(tmp_path, host, **{"backfill": LIMITS, "archive": {}, **sections}) as world:
            yield net, world
    finally:
        await net.stop()


def account(net: SimulatedNetwork, records: int = 12, pds: int = 1) -> Account:
    return net.world.accounts[net.add_account(records, pds=pds)]


@contextmanager
def faulty(net: SimulatedNetwork, fault: Fault) -> Iterator[None]:
    """A fault for a while. One that did not happen fails the test."""
    planned = net.faults.add(fault)
    yield
    assert planned.fired, f"{fault} did not happen"
    net.faults.remove(planned.number)


def reason(row: RepoRow) -> str:
    return row.error.partition(":")[0]


def wait_s(row: RepoRow) -> float:
    return (row.due - clock_us()) / 1e6


def test_every_fault_of_getrepo_has_its_expectation() -> None:
    assert {kind for kind, made in KINDS.items() if GET_REPO in made.routes} == set(EXPECTED)


@pytest.mark.slow
async def test_every_fault_of_getrepo_is_answered_as_it_deserves(tmp_path: Path) -> None:
    async with simulated(tmp_path) as (net, world):
        host = host_of(net.pds_urls[1])
        for kind, expected in EXPECTED.items():
            one = account(net)
            if kind == "old_rev":  # only who has a newer one can tell
                await world.fetch(one)
            held = world.records(one)
            with faulty(net, Fault("pds1", kind, GET_REPO, one.did, value=expected.value)):
                row = await world.fetch(one)
            hosts = world.backfill.tools.hosts
            if not expected.reason:
                assert (row.state, world.records(one)) == (SyncState.SYNCED, cids_of(one)), kind
                continue
            assert reason(row) in expected.reason.split("|"), (kind, row.error)
            assert (row.status, row.attempt, row.complete) == (AccountStatus.ACTIVE, 1, bool(held)), kind
            assert world.records(one) == held, kind
            assert expected.least_s or 4 <= wait_s(row) <= 10, kind
            assert wait_s(row) >= expected.least_s - 3, kind
            assert (hosts.row(host).faults > 0) == expected.blamed, kind
            if kind.startswith("rate_limited") or expected.least_s:
                assert hosts.penalty_s(host) >= max(4.0, expected.least_s - 3), kind
            else:
                assert not hosts.penalty_s(host), kind
            assert world.spooled() == [], kind
            world.forgive()
            row = await world.fetch(one)  # the host is well again
            assert (row.state, row.attempt, row.error) == (SyncState.SYNCED, 0, ""), kind
            assert world.records(one) == cids_of(one), kind
        assert world.backfill.status()["in_flight_bytes"] == 0


@pytest.mark.parametrize("kind", ["status_503", "truncated_at_block"])
async def test_waits_grow_and_outlive_the_process(tmp_path: Path, kind: str) -> None:
    net = SimulatedNetwork(SimConfig(accounts=0, history_accounts=1, history_records=5, pds=2, rate=0))
    await net.start()
    host = Host()
    host.url = net.plc_url
    one, waits = account(net), []
    with faulty(net, Fault("pds1", kind)):
        for attempt in (1, 2, 3):
            async with World(tmp_path, host) as world:  # each try in a process of its own
                if attempt > 1:
                    assert wait_s(world.row(one)) > 0
                row = await world.fetch(one)
                assert row.attempt == attempt
                waits.append(wait_s(row))
    await net.stop()
    assert waits[0] * 1.8 < waits[1] < waits[2] / 1.8


async def test_an_oversize_record_that_a_host_signs_is_flagged_and_the_rest_stands(tmp_path: Path) -> None:
    async with simulated(tmp_path) as (net, world):
        one = account(net)
        with faulty(net, Fault("pds1", "huge_record", did=one.did, value=1_200_000)):
            row = await world.fetch(one)
        assert (row.state, row.complete) == (SyncState.SYNCED, False)
        flags = {path: record.flags for path, record in world.db.records(one.did, limit=100)}
        (made_up,) = set(flags) - set(one.records)
        assert [path for path, flag in flags.items() if flag & OVERSIZE] == [made_up]


async def test_a_host_in_trouble_is_left_alone_and_the_other_one_is_not(tmp_path: Path) -> None:
    async with simulated(tmp_path) as (net, world):
        bad = [account(net, 3, pds=1) for _ in range(12)]
        good = [account(net, 3, pds=0) for _ in range(12)]
        with faulty(net, Fault("pds1", "status_502", GET_REPO)):
            await world.backfill.add([one.did for pair in zip(bad, good, strict=True) for one in pair])
            await world.running(lambda: all(world.row(one).state is SyncState.SYNCED for one in good))
        asked = net.faults.fired["pds1", "status_502"]
        assert FAULTS_BEFORE_PENALTY <= asked < FAULTS_BEFORE_PENALTY + 4 * 2  # per_host at a time
        hosts = world.backfill.tools.hosts
        assert hosts.penalty_s(host_of(net.pds_urls[1])) > 0
        assert hosts.free(host_of(net.pds_urls[0]))


async def test_hosts_that_stall_do_not_hold_up_the_others(tmp_path: Path) -> None:
    limits = {**LIMITS, "grace": "20s", "concurrency": 6, "per_host": 3}
    async with simulated(tmp_path, backfill=limits) as (net, world):
        bad = [account(net, 3, pds=1) for _ in range(10)]
        good = [account(net, 3, pds=0) for _ in range(20)]
        with faulty(net, Fault("pds1", "stalled", GET_REPO)):
            await world.backfill.add([one.did for one in (*bad, *good)])  # the stalled ones come first
            async with asyncio.timeout(10):
                await world.running(lambda: all(world.row(one).state is SyncState.SYNCED for one in good))
        assert net.faults.fired["pds1", "stalled"] <= 3
        assert all(not world.records(one) for one in bad)


async def test_endless_bodies_stay_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {**LIMITS, "max_car_mib": 4, "inflight_mib": 4, "concurrency": 6, "per_host": 6}
    async with simulated(tmp_path, backfill=limits, hosts={"faults": 10}) as (net, world):
        budget = world.backfill.tools.budget
        peak, add = 0, budget.add

        def counted(share: Share, size: int) -> None:
            nonlocal peak
            add(share, size)
            peak = max(peak, budget.used)

        monkeypatch.setattr(budget, "add", counted)
        accounts = [account(net, 3, pds=1) for _ in range(6)]
        with faulty(net, Fault("pds1", "endless", GET_REPO)):
            await world.backfill.add([one.did for one in accounts])
            await world.running(lambda: all(world.row(one).attempt for one in accounts))
        assert {reason(world.row(one)) for one in accounts} == {"too_large"}
        # The oldest may always go on, up to the largest CAR; each other one by what it had asked for.
        assert 4 << 20 <= peak <= (4 + 4) * (1 << 20) + 6 * (1 << 18)
        assert (budget.used, world.spooled()) == (0, [])


async def test_a_hosts_404_is_no_fault_of_the_host(tmp_path: Path) -> None:
    async with simulated(tmp_path) as (net, world):
        gone = [account(net, 3, pds=1) for _ in range(FAULTS_BEFORE_PENALTY + 3)]
        there = account(net, 3, pds=1)
        for one in gone:
            net.faults.add(Fault("pds1", "status_404", GET_REPO, one.did))
            assert reason(await world.fetch(one)) == "http_404"
        assert world.backfill.tools.hosts.free(host_of(net.pds_urls[1]))
        assert (await world.fetch(there)).state is SyncState.SYNCED
        assert len(net.faults.unfired()) == 0


@pytest.mark.parametrize("source", ["relay", "pds"])
async def test_the_host_behind_a_redirect_is_the_one_to_blame(tmp_path: Path, source: str) -> None:
    net = SimulatedNetwork(SimConfig(accounts=1, history_accounts=0, pds=2, rate=0))
    await net.start()
    (one,) = net.world.accounts.values()
    host = Host()
    host.url = net.plc_url
    relay, pds = host_of(net.relay_url), host_of(net.pds_urls[one.pds])
    tables = {
        "upstreams": [net.relay_url],
        "backfill": {"source": source, "retry_min": 10, "retry_max": 1000},
    }
    async with World(tmp_path, host, **tables) as world:
        hosts: Hosts = world.backfill.tools.hosts
        with faulty(net, Fault("pds*", "rate_limited_retry_after", GET_REPO, times=2, value=300)):
            row = await world.fetch(one)
        assert reason(row) == "rate_limited"
        assert (hosts.free(relay), hosts.free(pds)) == (True, False)
        fired = net.faults.fired.total()
        await world.backfill.add([one.did], again=True)
        with faulty(net, Fault("pds*", "status_500", GET_REPO)):
            await world.fetch(one)  # not now: its PDS is left alone, however it would be asked
            assert net.faults.fired.total() == fired
            world.forgive()
            await world.fetch(one)
        assert hosts.row(pds).faults > 0
        assert hosts.row(relay).faults == 0
    await net.stop()


async def test_a_redirect_into_a_private_network_is_not_followed(tmp_path: Path) -> None:
    """Under the public rules: TLS, and hosts that are found by an override."""
    net = SimulatedNetwork(SimConfig(accounts=0, history_accounts=2, history_records=5, pds=1, rate=0))
    await net.start()
    one, two = net.world.accounts.values()
    ports = {}
    async with _tls(plc_app(net)) as ports["plc"], _tls(pds_app(net, 0)) as ports["pds"]:
        network = {
            "allow_private": False,
            "connect_to": [f"{name}.example.com:443=127.0.0.1:{port}" for name, port in ports.items()],
        }
        host = Host()
        host.url = "https://plc.example.com"
        net.faults.add(Fault("plc", "lying_pds", value="https://pds.example.com"))
        world = World(tmp_path, host, network=network)
        world.http = HttpClient(world.settings.network, tls=client_tls())
        names = FixedNames({"inside.example.com": ["10.0.0.1"]})
        world.http.resolver = GuardedResolver(world.settings.network, names)
        async with world:
            for kind, value in (
                ("redirect_private", "https://127.0.0.1/"),
                ("redirect_private", "https://inside.example.com/"),
                ("redirect_private", net.pds_urls[0]),
                ("redirect_scheme", "http://pds.example.com/"),
            ):
                with faulty(net, Fault("pds0", kind, GET_REPO, one.did, value=value)):
                    row = await world.fetch(one)
                assert reason(row) == "url_refused", (value, row.error)
                assert world.records(one) == {}
            world.forgive()
            assert (await world.fetch(two)).state is SyncState.SYNCED
            assert world.backfill.tools.hosts.row("pds.example.com").faults == 0
    await net.stop()


@asynccontextmanager
async def _tls(app: web.Application) -> AsyncIterator[int]:
    """A server of the network behind TLS; its port."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_tls()).start()
    yield runner.addresses[0][1]
    await runner.cleanup()
