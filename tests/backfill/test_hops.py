"""Hosts that redirect to others: those are asked no more than their own limits allow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from indexer.backfill.hops import Hops
from indexer.backfill.hosts import Hosts, host_of
from indexer.backfill.job import Job
from indexer.backfill.outcome import HOST_BUSY
from indexer.crawl.tools import CrawlTools, expect_able
from indexer.errors import FetchTransient
from indexer.ingest.account import reason_of
from indexer.simulator.account import Account
from indexer.store.codecs import SyncState
from tests.backfill.part_host import PartHost
from tests.backfill.test_service import all_synced, several
from tests.backfill.world import Handler, Host, World, account, car_of

LIKE = "app.bsky.feed.like"


def redirect(target: Host) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(target.url + request.path_qs)

    return answer


def one_at_a_time(target: Host) -> dict[str, Any]:
    return {"rules": [f"{host_of(target.url)}=one"], "tiers": ["one=1/0/0", "trusted=16/200/0"]}


def slow(one: Account, others_began: Callable[[], bool]) -> Handler:
    """Answers once the other fetches began, and had the turns to come as far."""

    async def answer(_: web.Request) -> web.StreamResponse:
        while not others_began():
            await asyncio.sleep(0)
        for _turn in range(300):
            await asyncio.sleep(0)
        return web.Response(body=car_of(one))

    return answer


@pytest.mark.parametrize("source", ["pds", "relay"])
async def test_the_host_behind_a_redirect_is_asked_by_its_own_limits(tmp_path: Path, source: str) -> None:
    accounts = several(4)
    async with Host() as first, Host() as last:
        directory = first if source == "pds" else last
        for one in accounts:
            directory.serve(one)
            first.answers[one.did] = redirect(last)
            last.answers[one.did] = slow(one, lambda: directory.documents == 4)
        upstreams = [first.url.replace("http", "ws")] if source == "relay" else []
        tables = {
            "upstreams": upstreams,
            "backfill": {"source": source, "concurrency": 4, "stalled_after": 20},
        }
        async with World(tmp_path, directory, hosts=one_at_a_time(last), **tables) as world:
            hosts = world.backfill.tools.hosts
            hosts._state(host_of(first.url)).window = 4
            await world.backfill.add([one.did for one in accounts])
            await world.running(lambda: all_synced(world, accounts))
            assert (len(first.asked), len(last.asked), last.most_active) == (4, 4, 1)
            assert hosts.status()["active"] == 0


async def test_where_it_has_no_room_the_repository_waits_its_turn(tmp_path: Path) -> None:
    one = account("one", {f"{LIKE}/a": "x"})
    async with Host() as host, Host() as last:
        host.serve(one)
        host.answers[one.did] = redirect(last)
        last.serve(one)
        tables = {"hosts": one_at_a_time(last), "backfill": {"stalled_after": 0.001}}
        async with World(tmp_path, host, **tables) as world:
            hosts = world.backfill.tools.hosts
            hosts.take(host_of(last.url))
            await world.backfill.add([one.did])
            assert await Job(world.backfill.tools, one.did).run() == host_of(last.url)
            row = world.row(one)
            assert (row.state, row.due, row.attempt) == (SyncState.BACKFILLING, 1, 0)
            assert last.asked == []
            hosts.release(host_of(last.url))
            assert await Job(world.backfill.tools, one.did).run() is None
            assert world.row(one).state is SyncState.SYNCED
            assert hosts.status()["active"] == 0


class Redirecting(PartHost):
    target: Host

    async def _get_record(self, request: web.Request) -> web.StreamResponse:
        return await redirect(self.target)(request)


@pytest.mark.parametrize("part", [False, True])
async def test_a_host_that_rests_is_not_asked_by_a_redirect(tmp_path: Path, part: bool) -> None:
    one = account("one", {f"{LIKE}/a": "x"})
    async with Redirecting() as host, PartHost() as last:
        host.target = last
        host.serve(one)
        host.answers[one.did] = redirect(last)
        last.serve(one)
        tables = {"filter": {"collections": [LIKE]}} if part else {}
        async with World(tmp_path, host, **tables) as world:
            hosts = world.backfill.tools.hosts
            hosts.fault(host_of(last.url), jitter=0.0, retry_after=500, limited=True)
            row = await world.fetch(one)
            assert reason_of(row.error) == HOST_BUSY
            assert (last.proofs, last.asked) == (0, [])
            assert hosts.free(host_of(host.url))  # it is not to blame


async def test_a_sweep_asks_no_host_that_rests_by_a_redirect(tmp_path: Path) -> None:
    one = account("one", {})
    async with Host() as host, Host() as last, World(tmp_path, host) as world:
        host.answers[one.did] = redirect(last)
        last.serve(one)
        made: dict[str, Any] = {"db": world.db, "writer": world.writer, "resolver": world.resolver}
        hosts = Hosts(world.settings)
        tools = CrawlTools(http=world.http, hosts=hosts, applier=None, settings=world.settings, **made)  # type: ignore[arg-type]
        name, url = host_of(host.url), f"{host.url}/xrpc/com.atproto.sync.getRepo?did={one.did}"
        assert (await tools.ask(name, url, max_bytes=10_000, expect=expect_able)).status == 200
        hosts.fault(host_of(last.url), jitter=0.0, retry_after=500, limited=True)
        with pytest.raises(FetchTransient, match="left alone") as caught:
            await tools.ask(name, url, max_bytes=10_000, expect=expect_able)
        assert caught.value.reason == HOST_BUSY
        assert (len(last.asked), hosts.row(name).faults, hosts.status()["active"]) == (1, 0, 0)


async def test_each_hop_is_paid_for_but_the_first(tmp_path: Path) -> None:
    one = account("one", {})
    async with Host() as host, Host() as last, World(tmp_path, host) as world:
        host.answers[one.did] = redirect(last)
        last.answers[one.did] = redirect(host)
        hosts = Hosts(world.settings.model_copy(update={"hosts": rated(world)}), lambda: 0.0)
        name, url = host_of(host.url), f"{host.url}/xrpc/com.atproto.sync.getRepo?did={one.did}"
        with pytest.raises(Exception, match="redirects"):
            async with Hops(hosts, (name,)) as hops:
                await world.http.get(url, max_bytes=1000, before=hops)
        paid = [hosts._state(each).bucket.tokens for each in (name, host_of(last.url))]
        assert paid == [20.0 - 2, 20.0 - 3]


def rated(world: World) -> Any:
    return world.settings.hosts.model_copy(update={"requests_per_s": 20.0})
