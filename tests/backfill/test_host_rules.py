"""Whole fetches under rules for hosts: bans, account limits, rates, silent hosts, what a restart keeps."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web

from indexer.backfill.holds import HoldUnit, Releases
from indexer.backfill.host_book import SaveUnit
from indexer.backfill.hosts import BANNED, OVER_LIMIT, host_of
from indexer.ingest.account import reason_of
from indexer.simulator.account import Account
from indexer.store.check import check
from indexer.store.codecs import NEW_REPO, SyncState
from indexer.store.host_rows import ACCOUNTS, HostRow
from indexer.store.keyspaces import HOSTS
from indexer.store.transaction import Transaction
from indexer.store.writer import clock_us
from tests.backfill.test_service import all_synced, seen, several
from tests.backfill.world import Handler, Host, World, account, answer_with, car_of
from tests.paths import ROOT


def serve(host: Host, accounts: list[Account]) -> None:
    for one in accounts:
        host.serve(one)


def held(world: World, accounts: list[Account], reason: str) -> bool:
    rows = [world.row(one) for one in accounts]
    return all(reason_of(row.error) == reason and row.due > clock_us() + 3_600_000_000 for row in rows)


async def test_nothing_is_fetched_from_a_banned_host_until_it_is_let_go(tmp_path: Path) -> None:
    accounts = several(6)
    async with Host() as host:
        serve(host, accounts)
        name = host_of(host.url)
        async with World(tmp_path, host) as world:
            await seen(world, accounts)
            await world.backfill.hosts.ban(name, "spam")
            await world.running(lambda: held(world, accounts, BANNED))
            assert host.asked == []
            assert all(world.row(one).attempt == 0 for one in accounts)
        async with World(tmp_path, host) as world:  # the ban and its marks are still there
            book = world.backfill.hosts
            assert (book.info(name).status, book.banned()) == ("banned", [name])
            assert held(world, accounts, BANNED)
            task = asyncio.create_task(world.backfill.run())
            await book.unban(name)
            await world.until(lambda: all_synced(world, accounts))
            await world.backfill.stop()
            await task


async def test_a_banned_relay_is_gone_past_and_holds_nothing(tmp_path: Path) -> None:
    queued, later = accounts = several(2)
    async with Host() as host, Host() as relay:
        serve(host, accounts)
        name = host_of(relay.url)
        tables = {"upstreams": [relay.url.replace("http", "ws")], "backfill": {"source": "relay"}}
        async with World(tmp_path, host, **tables) as world:
            hosts = world.backfill.tools.hosts
            await seen(world, [queued])
            for _ in range(2):
                hosts.take(name)  # it is in use, so that one waits for it when it is banned
            task = asyncio.create_task(world.backfill.run())
            while name not in world.backfill._ready.hosts():
                await asyncio.sleep(0)
            await world.backfill.hosts.ban(name)
            await world.until(lambda: all_synced(world, [queued]))
            await world.backfill.add([later.did])
            await world.until(lambda: all_synced(world, accounts))
            await world.backfill.stop()
            await task
        assert (host.asked, relay.asked) == ([queued.did, later.did], [])


async def test_a_row_is_let_go_with_the_host_that_holds_it(tmp_path: Path) -> None:
    one, other = accounts = several(2)
    async with Host() as host, World(tmp_path, host) as world:
        await seen(world, accounts)
        for held_one, name in ((one, "old.example.com"), (other, "another.example.com")):
            unit = HoldUnit([held_one.did], name, BANNED, clock_us() + 10_000_000_000, {})
            await world.writer.run("hold", unit)
        assert world.row(one).error == f"{BANNED}: old.example.com is banned"
        releases = Releases(world.db, world.writer, world.backfill.tools.hosts)
        await releases._walk({"old.example.com"})
        assert [reason_of(world.row(each).error) for each in accounts] == ["", BANNED]


async def test_a_host_with_too_many_accounts_waits_for_a_word(tmp_path: Path) -> None:
    accounts = several(5)
    async with Host() as host, World(tmp_path, host, hosts={"account_limit": 4}) as world:
        serve(host, accounts)
        await seen(world, accounts)
        name = host_of(host.url)
        while not await world.writer.run("count", lambda tx: tx.count_homes(2)):
            pass
        assert world.db.count(ACCOUNTS + name) == 5
        task = asyncio.create_task(world.backfill.run())
        await world.until(lambda: held(world, accounts, OVER_LIMIT))
        assert host.asked == []
        assert world.backfill.hosts.info(name).status == "throttled"
        await world.backfill.hosts.set_limits(name, {"accounts": 0})
        await world.until(lambda: all_synced(world, accounts))
        await world.backfill.stop()
        await task
        assert check(world.db).problems == []


async def test_the_accounts_of_a_host_are_counted_whenever_they_come_go_and_move(tmp_path: Path) -> None:
    accounts = several(7)
    async with Host() as host, World(tmp_path, host) as world:
        await seen(world, accounts[:4])
        name = host_of(host.url)
        assert world.db.count(ACCOUNTS + name) == 0

        def half(tx: Transaction) -> bool:
            tx.set_repo(accounts[4].did, NEW_REPO._replace(tracked=True, pds=host.url))  # in the same group
            return tx.count_homes(2)

        assert not await world.writer.run("half", half)
        assert world.db.count(ACCOUNTS + name) == 2
        await world.change(accounts[0], pds="https://elsewhere.test")
        await world.change(accounts[3], pds="https://elsewhere.test")  # is counted later
        while not await world.writer.run("count", lambda tx: tx.count_homes(2)):
            pass
        assert world.db.counts(ACCOUNTS) == {ACCOUNTS + name: 3, ACCOUNTS + "elsewhere.test": 2}
        await world.change(accounts[5], tracked=True, pds=host.url)
        await world.change(accounts[1], tracked=False)
        await world.writer.run("wipe", lambda tx: tx.wipe_repo(accounts[0].did, NEW_REPO.status))
        assert world.db.counts(ACCOUNTS) == {ACCOUNTS + name: 3, ACCOUNTS + "elsewhere.test": 1}
        assert check(world.db).problems == []
        await world.writer.run("wrong", lambda tx: tx.add_count(ACCOUNTS + name, 1))
        assert any(ACCOUNTS + name in problem for problem in check(world.db).problems)


async def test_a_host_is_asked_at_the_rate_of_its_tier(tmp_path: Path) -> None:
    accounts = several(16)
    limits = {"concurrency": 8, "per_host": 8}
    async with (
        Host() as host,
        World(tmp_path, host, backfill=limits, hosts={"requests_per_s": 10.0}) as world,
    ):
        serve(host, accounts)
        await seen(world, accounts)
        start = asyncio.get_running_loop().time()
        await world.running(lambda: all_synced(world, accounts))
        # Ten at once, then one each 0.1 s.
        assert asyncio.get_running_loop().time() - start >= 0.55


async def test_a_penalty_and_its_reason_survive_a_restart(tmp_path: Path) -> None:
    (one,) = several(1)
    async with Host() as host:
        host.serve(one)
        host.answers[one.did] = answer_with(429, {"Retry-After": "500"})
        name = host_of(host.url)
        async with World(tmp_path, host) as world:
            await world.fetch(one)
            await world.backfill.hosts.save()
        async with World(tmp_path, host) as world:
            hosts = world.backfill.tools.hosts
            assert 490 < hosts.penalty_s(name) <= 500
            info = world.backfill.hosts.info(name)
            assert (info.status, info.row.limits, reason_of(info.row.error)) == (
                "throttled",
                1,
                "rate_limited",
            )
            assert not hosts.free(name)


async def test_what_is_seen_of_a_host_leaves_an_operators_word(tmp_path: Path) -> None:
    async with Host() as host, World(tmp_path, host) as world:
        await world.backfill.hosts.set_tier("a.test", "trusted")
        await world.writer.run("save", SaveUnit({"a.test": HostRow(banned=True, faults=3, error="slow")}))
        row = world.db.get(HOSTS, "a.test")
        assert row == HostRow(tier="trusted", faults=3, error="slow")


_KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from tests.backfill.world import Host, World

async def main():
    host = Host()
    host.url = "http://127.0.0.1:9"
    async with World(Path(sys.argv[1]), host) as world:
        await world.backfill.hosts.ban("bad.test", "spam")
        await world.backfill.hosts.set_limits("slow.test", {"fetches": 1})
        world.backfill.tools.hosts.fault("slow.test", jitter=0.0, retry_after=900, limited=True)
        await world.backfill.hosts.save()
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_what_was_said_and_seen_of_hosts_survives_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    child = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, check=False, timeout=25)
    assert child.returncode == -9
    async with Host() as host, World(tmp_path, host) as world:
        assert world.backfill.hosts.banned() == ["bad.test"]
        hosts = world.backfill.tools.hosts
        assert (hosts.held("bad.test"), hosts.penalty_s("slow.test") > 800) == (BANNED, True)
        assert hosts.tiers.of("slow.test", hosts.row("slow.test")).fetches == 1


async def test_jobs_that_wait_for_silent_hosts_give_their_places_away(tmp_path: Path) -> None:
    """Three hosts that prove good and fall silent with every worker in their hands."""
    done = asyncio.Event()
    free = [account(f"z{name}", {}) for name in "abcdef"]
    limits = {"concurrency": 2, "per_host": 2, "stalled_after": "100ms"}
    async with Host() as slow, Host() as host:

        async def wait(request: web.Request) -> web.StreamResponse:
            await done.wait()
            return web.Response(body=slow.cars[request.query["did"]])

        async with World(tmp_path, host, backfill=limits) as world:
            stuck = several(4)
            for one in stuck:
                slow.serve(one)
                slow.answers[one.did] = wait
                host.keys[one.did] = one.key.multikey
                host.pds[one.did] = slow.url
            serve(host, free)
            await seen(world, [*stuck, *free])
            await world.running(lambda: all_synced(world, free))
            assert slow.most_active == 2
            done.set()


# ---- bodies


def gzipped(one: Account, more: bytes = b"") -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.headers["Accept-Encoding"] == "gzip"
        body = gzip.compress(car_of(one)) + more
        return web.Response(body=body, headers={"Content-Encoding": "gzip"})

    return answer


async def test_a_compressed_car_is_taken(tmp_path: Path) -> None:
    one, cut, more = several(3)
    async with Host() as host, World(tmp_path, host) as world:
        serve(host, [one, cut, more])
        host.answers[one.did] = gzipped(one)
        assert (await world.fetch(one)).state is SyncState.SYNCED
        host.answers[more.did] = gzipped(more, b"trailing")
        assert reason_of((await world.fetch(more)).error) == "encoding"

        async def half(_: web.Request) -> web.StreamResponse:
            body = gzip.compress(car_of(cut))[:-12]
            return web.Response(body=body, headers={"Content-Encoding": "gzip"})

        host.answers[cut.did] = half
        assert reason_of((await world.fetch(cut)).error) == "fetch_transient"
        assert world.spooled() == []


async def test_what_a_compressed_body_unfolds_to_is_bounded_and_what_is_sent_too(tmp_path: Path) -> None:
    bomb, wide = several(2)
    limits = {"max_car_mib": 4, "max_wire_mib": 1}
    async with Host() as host, World(tmp_path, host, backfill=limits) as world:
        serve(host, [bomb, wide])

        async def zeros(_: web.Request) -> web.StreamResponse:
            return web.Response(body=gzip.compress(bytes(64 << 20)), headers={"Content-Encoding": "gzip"})

        async def noise(_: web.Request) -> web.StreamResponse:
            body = gzip.compress(bytes(2 << 20), compresslevel=0)
            return web.Response(body=body, headers={"Content-Encoding": "gzip"})

        host.answers = {bomb.did: zeros, wide.did: noise}
        for one in (bomb, wide):
            assert reason_of((await world.fetch(one)).error) == "too_large"
        assert (world.backfill.tools.budget.used, world.spooled()) == (0, [])


async def test_without_gzip_a_compressed_body_is_refused(tmp_path: Path) -> None:
    (one,) = several(1)
    async with Host() as host, World(tmp_path, host, backfill={"gzip": False}) as world:
        host.serve(one)

        async def packed(request: web.Request) -> web.StreamResponse:
            assert "Accept-Encoding" not in request.headers
            return web.Response(body=gzip.compress(car_of(one)), headers={"Content-Encoding": "gzip"})

        host.answers[one.did] = packed
        assert reason_of((await world.fetch(one)).error) == "encoding"


# ---- the queue


def strange(number: int) -> str:
    """The DID of an account that nobody serves."""
    return "did:plc:z" + "".join("abcdefghij"[int(digit)] for digit in f"{number:023d}")


@pytest.mark.slow
@pytest.mark.limit(120)
async def test_a_request_comes_before_a_hundred_thousand_due_rows(tmp_path: Path) -> None:
    one, late = several(2)
    limits = {"concurrency": 1, "window": 2000}
    async with Host() as host, World(tmp_path, host, backfill=limits) as world:
        serve(host, [one, late])
        now = clock_us()
        for start in range(0, 100_000, 5000):

            def insert(tx: Transaction, start: int = start) -> None:
                for number in range(start, start + 5000):
                    did = strange(number)
                    row = NEW_REPO._replace(
                        tracked=True, due=now - 200_000 + number, pds="http://127.0.0.1:9"
                    )
                    tx.set_repo(did, row)

            await world.writer.run("insert", insert)
        await world.backfill.hosts.ban("127.0.0.1:9")  # they fill the window again and again
        task = asyncio.create_task(world.backfill.run())
        started = asyncio.get_running_loop().time()
        await world.backfill.add([one.did])
        await world.until(lambda: world.row(one).state is SyncState.SYNCED)
        first = asyncio.get_running_loop().time() - started
        await world.backfill.add([late.did])
        await world.until(lambda: world.row(late).state is SyncState.SYNCED)
        await world.backfill.stop()
        await task
        assert host.asked == [one.did, late.did]
        assert first < 2.0


async def test_many_rows_of_a_stalled_host_do_not_hide_the_others(tmp_path: Path) -> None:
    """More than the window holds of one host, all due before the rows of another."""
    async with Host() as host, World(tmp_path, host, backfill={"window": 16}) as world:
        good = [account(f"z{name}", {}) for name in "abc"]
        serve(host, good)

        def insert(tx: Transaction) -> None:
            now = clock_us()
            for number in range(700):
                did = strange(number)
                row = NEW_REPO._replace(tracked=True, due=now - 10_000_000 + number, pds="http://127.0.0.1:9")
                tx.set_repo(did, row)

        await world.writer.run("insert", insert)
        world.backfill.tools.hosts.fault("127.0.0.1:9", jitter=0.0, retry_after=4.0)
        await seen(world, good)
        await world.running(lambda: all_synced(world, good))
