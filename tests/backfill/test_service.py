"""Many repositories and hosts at once."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from aiohttp import web

from indexer.atproto.types import Did
from indexer.backfill import service
from indexer.backfill.hops import relay_origin
from indexer.backfill.hosts import Hosts
from indexer.backfill.outcome import HOST_RESTS
from indexer.backfill.queue import CLAIMED_DUE, Entry
from indexer.backfill.rows import PostponeUnit
from indexer.backfill.service import Backfill
from indexer.errors import WriterPoisoned
from indexer.ingest.account import reason_of
from indexer.serve.management_repos import unfollowed
from indexer.simulator.account import Account
from indexer.store.codecs import NEW_REPO, SyncState
from indexer.store.host_rows import ACCOUNTS, host_of
from indexer.store.transaction import Transaction
from indexer.store.writer import clock_us
from tests.backfill.world import Host, World, account, answer_car, answer_with, car_of

POST = "app.bsky.feed.post/"


def several(count: int) -> list[Account]:
    return [account(f"a{chr(97 + number)}", {f"{POST}3kaaaaaaaaaaa": str(number)}) for number in range(count)]


def all_synced(world: World, accounts: list[Account]) -> bool:
    return all(world.row(one).state is SyncState.SYNCED for one in accounts)


async def seen(world: World, accounts: list[Account]) -> None:
    """The repositories became due by being seen, in this order."""

    def insert(tx: Transaction) -> None:
        for number, one in enumerate(accounts):
            due = clock_us() - 1_000_000 + number
            tx.set_repo(one.did, NEW_REPO._replace(tracked=True, due=due, pds=world.host.url))

    await world.writer.run("seen", insert)


async def test_everything_due_is_fetched_within_the_limits_of_a_host(tmp_path: Path) -> None:
    accounts = several(12)
    async with Host() as host, World(tmp_path, host, backfill={"concurrency": 6, "per_host": 2}) as world:
        for one in accounts:
            host.serve(one)
        await seen(world, accounts)
        await world.running(lambda: all_synced(world, accounts))
        assert len(host.asked) == 12
        assert 1 <= host.most_active <= 2
        assert world.backfill.status()["done"] == 12


async def test_explicit_requests_come_first(tmp_path: Path) -> None:
    accounts = several(6)
    async with Host() as host, World(tmp_path, host, backfill={"concurrency": 1}) as world:
        for one in accounts:
            host.serve(one)
        await seen(world, accounts[:4])
        await world.backfill.add([accounts[4].did, accounts[5].did])
        await world.running(lambda: all_synced(world, accounts))
        assert sorted(host.asked[:2]) == sorted(one.did for one in accounts[4:])
        assert host.asked[2:] == [one.did for one in accounts[:4]]


async def test_what_one_request_names_is_fetched_in_key_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are written one after the other then lie together on disk."""
    monkeypatch.setattr(service, "STEP", 2)
    accounts = several(7)
    async with Host() as host, World(tmp_path, host, backfill={"concurrency": 1}) as world:
        for one in accounts:
            host.serve(one)
        await world.backfill.add([one.did for one in reversed(accounts)])
        await world.running(lambda: all_synced(world, accounts))
        assert host.asked == sorted(one.did for one in accounts)


async def test_a_request_overtakes_what_is_in_memory_already(tmp_path: Path) -> None:
    accounts = several(6)
    async with Host() as host, World(tmp_path, host, backfill={"concurrency": 1}) as world:
        for one in accounts:
            host.serve(one)
        late = accounts[5]
        host.answers[accounts[0].did] = answer_car(accounts[0], lambda: world.backfill.add([late.did]))
        await seen(world, accounts[:5])
        await world.running(lambda: world.db.repo(late.did) is not None and all_synced(world, accounts))
        assert host.asked == [one.did for one in (accounts[0], late, *accounts[1:5])]


async def test_a_stalled_host_holds_up_nobody_else(tmp_path: Path) -> None:
    stuck, free = several(4), [account(f"z{name}", {}) for name in "abc"]
    done = asyncio.Event()
    async with Host() as slow, Host() as host:

        async def wait(request: web.Request) -> web.StreamResponse:
            await done.wait()
            return web.Response(body=slow.cars[request.query["did"]])

        async with World(tmp_path, host, backfill={"concurrency": 3, "per_host": 2}) as world:
            for one in stuck:
                slow.serve(one)
                slow.answers[one.did] = wait
                host.keys[one.did] = one.key.multikey
                host.pds[one.did] = slow.url
            for one in free:
                host.serve(one)
            await seen(world, [*stuck, *free])
            await world.running(lambda: all_synced(world, free))
            assert slow.most_active == 2
            done.set()


async def test_the_repositories_of_a_host_that_rests_are_put_off(tmp_path: Path) -> None:
    accounts = several(6)
    limits = {"concurrency": 1, "per_host": 1}
    async with Host() as host, World(tmp_path, host, backfill=limits) as world:
        for one in accounts:
            host.serve(one)
            host.answers[one.did] = answer_with(429, {"Retry-After": "500"})
        await seen(world, accounts)
        await world.running(lambda: all(world.row(one).due > clock_us() + 400_000_000 for one in accounts))
        assert len(host.asked) == 1
        assert sum(world.row(one).attempt for one in accounts) == 1


async def test_what_waits_for_a_host_that_rests_says_so(tmp_path: Path) -> None:
    accounts = several(4)
    async with Host() as host, World(tmp_path, host, backfill={"concurrency": 1}) as world:
        for one in accounts:
            host.serve(one)
            host.answers[one.did] = answer_with(429, {"Retry-After": "500"})
        await world.backfill.add([one.did for one in accounts])
        await world.running(lambda: all(world.row(one).due > clock_us() + 400_000_000 for one in accounts))
        rows = [world.row(one) for one in accounts]
        name = host_of(host.url)
        assert [row.pds for row in rows] == [host.url] * 4
        assert all(row.signing_key for row in rows)
        assert world.db.count(ACCOUNTS + name) == 4
        assert sorted(reason_of(row.error) for row in rows) == [*[HOST_RESTS] * 3, "rate_limited"]
        said = next(row.error for row in rows if not row.attempt)
        assert re.match(f"{HOST_RESTS}: {name} is left alone until 20[0-9TZ:-]+: rate_limited: ", said)


async def test_a_failure_of_its_own_is_not_hidden_by_the_rest_of_its_host(tmp_path: Path) -> None:
    slow, held, free = several(3)
    async with Host() as host, World(tmp_path, host) as world:
        await seen(world, [slow, held, free])
        await world.change(slow, error="slow: it was")
        await world.change(held, error="host_banned: it was")
        unit = PostponeUnit([slow.did, held.did, free.did], clock_us() + 60_000_000, "why", {})
        await world.writer.run("postpone", unit)
        errors = [world.row(one).error for one in (slow, held, free)]
        assert errors == ["slow: it was", "host_rests: why", "host_rests: why"]


async def test_a_row_that_becomes_due_unannounced_is_found(tmp_path: Path) -> None:
    one = account("one", {})
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        task = asyncio.create_task(world.backfill.run())
        await seen(world, [one])
        await world.until(lambda: world.row(one).state is SyncState.SYNCED)
        await world.backfill.stop()
        await task


async def test_what_is_being_worked_on_is_left_alone_by_another_request(tmp_path: Path) -> None:
    one = account("one", {})
    acted: list[list[Did]] = []
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)

        async def again(request: web.Request) -> web.StreamResponse:
            acted.append(await world.backfill.add([one.did], again=True))
            assert world.row(one).due == CLAIMED_DUE
            return web.Response(body=car_of(one))

        host.answers[one.did] = again
        await world.backfill.add([one.did])
        await world.running(lambda: world.row(one).state is SyncState.SYNCED)
        assert acted == [[]]
        assert host.asked == [one.did]


@pytest.mark.limit(10)
@pytest.mark.parametrize(("purge", "status"), [(False, 500), (False, 200), (True, 500), (True, 200)])
async def test_what_is_removed_and_followed_again_during_its_fetch_is_fetched(
    tmp_path: Path, purge: bool, status: int
) -> None:
    one = account("one", {f"{POST}3kaaaaaaaaaaa": "text"})
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)

        def remove(tx: Transaction) -> None:
            row = tx.repo(one.did)
            assert row is not None
            assert row.state is SyncState.BACKFILLING
            tx.set_repo(one.did, unfollowed(row, 0))
            if purge:
                tx.wipe_repo(one.did, row.status)

        async def meanwhile(_: web.Request) -> web.StreamResponse:
            del host.answers[one.did]
            await world.writer.run("remove", remove)
            assert await world.backfill.add([one.did]) == [one.did]
            assert world.row(one).state is SyncState.PENDING
            assert world.row(one).due > CLAIMED_DUE
            return web.Response(status=status, body=car_of(one))

        host.answers[one.did] = meanwhile
        await world.backfill.add([one.did])
        await world.running(lambda: world.row(one).state is SyncState.SYNCED)
        assert host.asked == [one.did, one.did]
        assert len(world.events(one)) == len(world.records(one)) == 1


async def test_nothing_is_fetched_for_synced_or_unfollowed_rows_with_other_work(tmp_path: Path) -> None:
    synced, gone, wanted = several(3)
    async with Host() as host, World(tmp_path, host) as world:
        for one in (synced, gone, wanted):
            host.serve(one)
        await seen(world, [synced, gone, wanted])
        await world.change(synced, state=SyncState.SYNCED)
        await world.change(gone, tracked=False)
        await world.running(lambda: world.row(wanted).state is SyncState.SYNCED)
        assert host.asked == [wanted.did]


async def test_ephemeral_mode_follows_without_fetching(tmp_path: Path) -> None:
    one = account("one", {})
    async with Host() as host, World(tmp_path, host, ephemeral={"enabled": True}) as world:
        host.serve(one)
        await world.backfill.add([one.did])
        row = world.row(one)
        assert (row.tracked, row.due) == (True, 0)


async def test_below_the_soft_floor_of_the_disk_nothing_begins(tmp_path: Path) -> None:
    one = account("one", {})
    async with Host() as host, World(tmp_path, host, disk={"soft_floor_mib": 1 << 40}) as world:
        host.serve(one)
        task = asyncio.create_task(world.backfill.run())
        await world.backfill.add([one.did])
        while not world.backfill.status()["paused"]:
            await asyncio.sleep(0)
        await world.backfill.stop()
        await task
        assert host.asked == []
        assert world.backfill.status()["paused"] == "disk"


async def test_a_poisoned_writer_ends_the_backfill(tmp_path: Path) -> None:
    one = account("one", {})
    async with Host() as host:
        host.serve(one)
        async with World(tmp_path, host) as world:
            await world.backfill.add([one.did])

            def fail(name: str) -> None:
                raise RuntimeError(name)

            world.at = fail
            with pytest.raises(WriterPoisoned):
                await world.backfill.run()


def test_the_relay_is_the_first_upstream_that_is_no_pds() -> None:
    assert relay_origin(["pds::wss://a", "wss://relay.example/", "wss://b"]) == "https://relay.example"
    assert relay_origin(["ws://127.0.0.1:1"]) == "http://127.0.0.1:1"
    assert relay_origin(["pds::wss://a"]) == ""


async def test_a_repository_is_worked_on_by_one_job_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dispatcher comes in the very turn of the loop in which a job finds its host busy."""
    running: list[Did] = []
    turn, hold = asyncio.Event(), asyncio.Event()

    class Working:
        def __init__(self, _tools: object, did: Did) -> None:
            self.did = did

        async def run(self) -> str | None:
            running.append(self.did)
            assert len(running) == len(set(running))
            try:
                if not turn.is_set():
                    await turn.wait()
                    return "host"
                await hold.wait()
                return None
            finally:
                running.remove(self.did)

    async def dispatcher(backfill: Backfill) -> None:
        await turn.wait()
        await backfill._dispatch()

    async def turns() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    monkeypatch.setattr("indexer.backfill.service.Job", Working)
    monkeypatch.setattr(Hosts, "free", lambda _self, _host: True)
    one = account("one")
    async with Host() as host, World(tmp_path, host) as world:
        row = NEW_REPO._replace(tracked=True, state=SyncState.BACKFILLING, due=CLAIMED_DUE)
        await world.writer.run("row", lambda tx: tx.set_repo(one.did, row))
        backfill = world.backfill
        backfill._start(Entry(CLAIMED_DUE, one.did, "host"))
        await turns()
        dispatched = asyncio.create_task(dispatcher(backfill))
        await turns()
        turn.set()
        await turns()
        await dispatched
        backfill.wake()
        await backfill._dispatch()
        await turns()
        assert running == [one.did] == list(backfill._jobs)
        jobs = [task for task in asyncio.all_tasks() if task.get_name().startswith("backfill ")]
        assert len(jobs) == 1
        hold.set()
        await asyncio.gather(*jobs)
