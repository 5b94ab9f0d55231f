"""A repository from asked for to synced, and again."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from indexer.atproto.cid import parse_cid
from indexer.backfill.fetch import Intake, Spool
from indexer.pool import Pool
from indexer.simulator.account import Account
from indexer.simulator.keys import SigningKey
from indexer.store.check import check
from indexer.store.codecs import AccountStatus, SyncState, Work
from indexer.store.transaction import Transaction
from tests.backfill.world import Host, World, account, answer_car, cids_of, edit, rev
from tests.paths import shared_data

POST = "app.bsky.feed.post/"
LIKE = "app.bsky.feed.like/"


def posts(count: int, first: int = 0) -> dict[str, str]:
    return {f"{POST}3k{number:011d}": f"text {number}" for number in range(first, first + count)}


async def test_a_requested_repository_is_fetched_and_synced(tmp_path: Path) -> None:
    one = account("one", posts(12) | {"app.bsky.actor.profile/self": "me"})
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        assert await world.backfill.add([one.did]) == [one.did]
        await world.running(lambda: world.row(one).state is SyncState.SYNCED)
        row = world.row(one)
        assert world.records(one) == cids_of(one)
        assert (row.complete, row.rev, row.data, row.commit) == (True, one.rev, bytes(one.data), one.commit)
        assert (row.pds, row.signing_key) == (host.url, one.key.did_key)
        assert (row.due, row.attempt, row.error) == (0, 0, "")
        assert world.events(one) == [("create", path, one.rev) for path in sorted(one.records)]
        assert all(world.db.block(one.did, record.cid) == record.block for record in one.records.values())
        assert not any(event.live for event in world.log() if event.kind == "record")
        assert world.spooled() == []
        assert world.db.count("backfill/done/ok") == 1
        assert world.backfill.status()["done"] == 1


async def test_a_large_record_under_many_keys_is_written_once(tmp_path: Path) -> None:
    text, more = "x" * 50_000, "y" * 50_000
    one = account("one", {f"{POST}3kaaaaaaaa{n:03}": (text, more)[n % 2] for n in range(120)})
    units: list[str] = []

    async def count(name: str) -> None:
        units.append(name)

    async with (
        Host() as host,
        World(tmp_path, host, backfill={"chunk_records": 20, "chunk_kib": 128}) as world,
    ):
        host.serve(one)
        world.writer.hook = count
        await world.fetch(one)
        assert units.count("backfill_apply") <= 120 // 20 + 1
        log = sum(path.stat().st_size for path in world.db.path.glob("*.log"))
        assert 2 * 50_000 < log < 5 * 50_000
        assert world.records(one) == cids_of(one)
        assert all(world.db.block(one.did, cid) for cid in cids_of(one).values())
        assert check(world.db).problems == []


async def test_only_a_car_beyond_the_memory_for_one_is_spooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large, empty = account("one", posts(1)), account("two", posts(200)), account("three", {})
    spooled: list[str] = []
    remove = Spool.remove

    def removed(spool: Spool, car: Path) -> None:
        spooled.append(f"{car.exists()} {Spool.index_path(car).exists()}")
        remove(spool, car)

    monkeypatch.setattr(Spool, "remove", removed)
    async with Host() as host, World(tmp_path, host, backfill={"memory_kib": 8}) as world:
        for one in (small, large, empty):
            host.serve(one)
            await world.fetch(one)
            assert world.row(one).state is SyncState.SYNCED
            assert world.records(one) == cids_of(one)
        assert spooled == ["True True"]
        assert world.spooled() == []


async def test_a_large_repository_does_not_keep_the_worker_of_the_small_ones(tmp_path: Path) -> None:
    small = account("one", posts(1))
    large = account("two", {f"{POST}3k{number:011d}": f"{number:03d}" * 4000 for number in range(120)})
    began, may_end = asyncio.Event(), asyncio.Event()

    class Slow(Pool):
        async def run(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            began.set()
            await may_end.wait()
            return await super().run(function, *args, **kwargs)

    async with Host() as host, World(tmp_path, host, backfill={"verify_mib": 1}) as world:
        world.backfill.tools = dataclasses.replace(world.backfill.tools, disk_pool=Slow(0))
        for one in (large, small):
            host.serve(one)
        fetching = asyncio.create_task(world.fetch(large))
        await asyncio.wait_for(began.wait(), 10)
        assert (await world.fetch(small)).state is SyncState.SYNCED
        assert not fetching.done()
        may_end.set()
        assert (await fetching).state is SyncState.SYNCED
        assert world.records(large) == cids_of(large)


def test_an_intake_keeps_every_byte_in_order_wherever_it_goes(tmp_path: Path) -> None:
    chunks = [b"a" * 5, b"b" * 3, b"", b"c" * 7]
    for most in range(17):
        path = tmp_path / f"{most}.car"
        with Intake(path, most) as intake:
            for chunk in chunks:
                intake.write(chunk)
        car = intake.car()
        assert (car if isinstance(car, bytes) else car.read_bytes()) == b"".join(chunks)
        assert path.exists() == (most < 15)


async def test_nothing_is_fetched_before_the_state_is_stored(tmp_path: Path) -> None:
    one = account("one", posts(1))
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        seen = []

        async def look() -> None:
            seen.append(world.row(one).state)

        host.answers[one.did] = answer_car(one, look)
        await world.fetch(one)
        assert seen == [SyncState.BACKFILLING]


async def test_a_second_fetch_tells_only_what_changed(tmp_path: Path) -> None:
    one = account("one", posts(20) | {LIKE + "3kaaaaaaaaaaa": "x"})
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.fetch(one)
        before = len(world.events(one))
        changed, gone, new = f"{POST}3k{3:011d}", f"{POST}3k{4:011d}", f"{POST}3k{99:011d}"
        edit(one, 2, {changed: "changed", gone: None, new: "new", LIKE + "3kaaaaaaaaaaa": None})
        host.serve(one)
        await world.fetch(one)
        assert world.records(one) == cids_of(one)
        assert sorted(world.events(one)[before:]) == sorted(
            [
                ("update", changed, rev(2)),
                ("delete", gone, rev(2)),
                ("create", new, rev(2)),
                ("delete", LIKE + "3kaaaaaaaaaaa", rev(2)),
            ]
        )
        assert world.db.count("records") == len(one.records)


async def test_the_same_repository_again_tells_nothing(tmp_path: Path) -> None:
    one = account("one", posts(20))
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.fetch(one)
        before = world.events(one)
        row = await world.fetch(one)
        assert host.asked == [one.did] * 2
        assert world.events(one) == before
        assert row.state is SyncState.SYNCED


async def test_an_emptied_repository_deletes_everything(tmp_path: Path) -> None:
    one = account("one", posts(23))
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.fetch(one)
        host.serve(edit(one, 2, dict.fromkeys(one.records)))
        row = await world.fetch(one)
        assert world.records(one) == {}
        assert (row.state, row.complete, row.rev) == (SyncState.SYNCED, True, rev(2))


async def test_only_wanted_collections_are_kept(tmp_path: Path) -> None:
    one = account("one", posts(3) | {LIKE + "3kaaaaaaaaaaa": "x"})
    async with Host() as host, World(tmp_path, host, filter={"collections": ["app.bsky.feed.post"]}) as world:
        host.serve(one)
        row = await world.fetch(one)
        assert sorted(world.records(one)) == sorted(posts(3))
        assert (row.state, row.complete) == (SyncState.SYNCED, False)


async def test_records_stored_before_the_filter_go_only_when_they_changed(tmp_path: Path) -> None:
    likes = {
        LIKE + "3kaaaaaaaaaaa": "same",
        LIKE + "3kaaaaaaaaaab": "will change",
        LIKE + "3kaaaaaaaaaac": "goes",
    }
    one = account("one", posts(2) | likes)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.fetch(one)
        await world.writer.run("filter", _keep_posts)
        host.serve(edit(one, 2, {LIKE + "3kaaaaaaaaaab": "changed", LIKE + "3kaaaaaaaaaac": None}))
        await world.fetch(one)
        assert sorted(world.records(one)) == sorted([*posts(2), LIKE + "3kaaaaaaaaaaa"])


def _keep_posts(tx: Transaction) -> None:
    for item in ("", "app.bsky.feed.post"):
        tx.set_filter("collections", item)


async def test_a_flagged_record_keeps_its_row_and_is_not_served(tmp_path: Path) -> None:
    one = account("one", posts(2) | {LIKE + "3kaaaaaaaaaaa": "y" * 1_000_100})
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        row = await world.fetch(one)
        stored = world.db.record(one.did, LIKE + "3kaaaaaaaaaaa")
        assert stored is not None
        assert not stored.served
        assert (row.state, row.complete) == (SyncState.SYNCED, False)
        assert world.db.count("records") == 2
        assert len(world.events(one)) == 2


async def test_a_synced_repository_is_not_fetched_again_for_being_asked_for_again(tmp_path: Path) -> None:
    one = account("one", posts(1))
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.fetch(one)
        assert await world.backfill.add([one.did]) == []
        assert world.row(one).state is SyncState.SYNCED


async def test_waiting_frames_are_left_to_the_drain(tmp_path: Path) -> None:
    one = account("one", posts(7))
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.backfill.add([one.did])
        await world.buffer(one, 2)
        row = await world.fetch(one)
        assert world.drained == [one.did]
        assert (row.state, row.rev) == (SyncState.SYNCED, rev(1))


async def test_a_drain_that_could_not_finish_is_tried_again_without_a_fetch(tmp_path: Path) -> None:
    one = account("one", posts(7))
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.backfill.add([one.did])
        await world.buffer(one, 2)
        world.can_drain = False
        row = await world.fetch(one)
        assert (row.state, row.error.partition(":")[0]) == (SyncState.BACKFILLING, "drain")
        world.can_drain = True
        row = await world.fetch(one)
        assert row.state is SyncState.SYNCED
        assert host.asked == [one.did]


async def test_frames_dropped_during_the_fetch_make_it_desynchronized(tmp_path: Path) -> None:
    one = account("one", posts(7))
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)

        async def overflow(name: str) -> None:
            if name == "backfill_apply":
                world.writer.hook = None
                await world.change(one, min_rev=rev(9))

        world.writer.hook = overflow
        row = await world.fetch(one)
        assert row.state is SyncState.DESYNCHRONIZED
        assert row.due > 0
        assert (row.rev, row.min_rev) == (rev(1), rev(9))
        assert world.records(one) == cids_of(one)


async def test_a_wipe_in_the_middle_ends_the_job_without_a_trace(tmp_path: Path) -> None:
    one = account("one", posts(23))
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)

        async def wipe(name: str) -> None:
            if name == "backfill_apply":
                world.writer.hook = None
                await world.writer.run("wipe", lambda tx: tx.wipe_repo(one.did, AccountStatus.DELETED))

        world.writer.hook = wipe
        row = await world.fetch(one)
        assert world.records(one) == {}
        assert (row.tracked, row.rev, row.epoch) == (False, "", 1)
        assert world.backfill.status()["done"] == 0


async def test_a_new_life_begun_meanwhile_gets_nothing_of_the_old_fetch(tmp_path: Path) -> None:
    one = account("one", posts(23))
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)

        async def begin_anew(name: str) -> None:
            if name == "backfill_apply":
                world.writer.hook = None
                await world.writer.run("wipe", lambda tx: tx.wipe_repo(one.did, AccountStatus.ACTIVE))
                await world.change(one, tracked=True, state=SyncState.BACKFILLING, due=1)

        world.writer.hook = begin_anew
        row = await world.fetch(one)
        assert world.records(one) == {}
        assert (row.epoch, row.rev, row.attempt) == (1, "", 0)


async def test_a_failure_of_the_old_life_leaves_the_new_one_alone(tmp_path: Path) -> None:
    one = account("one", posts(1))
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)

        async def begin_anew() -> None:
            await world.writer.run("wipe", lambda tx: tx.wipe_repo(one.did, AccountStatus.ACTIVE))
            await world.change(one, tracked=True, due=7)

        host.answers[one.did] = answer_car(one, begin_anew, body=b"broken")
        row = await world.fetch(one)
        assert (row.epoch, row.due, row.attempt, row.error) == (1, 7, 0, "")


async def test_a_replay_planned_before_the_fetch_waits_for_its_end_and_other_work_stays(
    tmp_path: Path,
) -> None:
    one = account("one", posts(1))
    works = []
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)

        async def look() -> None:
            works.append(world.row(one).work)

        host.answers[one.did] = answer_car(one, look)
        await world.backfill.add([one.did])
        await world.change(one, work=int(Work.DRAIN | Work.COMPARE_REV | Work.RESOLVE))
        row = await world.fetch(one)
        assert works == [Work.COMPARE_REV | Work.RESOLVE | Work.VERIFY_HANDLE]
        assert (row.state, world.drained) == (SyncState.SYNCED, [])


async def test_an_unfollowed_repository_is_not_applied(tmp_path: Path) -> None:
    one = account("one", posts(3))
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        host.answers[one.did] = answer_car(one, lambda: world.change(one, tracked=False, due=0))
        await world.fetch(one)
        assert world.records(one) == {}


@pytest.mark.parametrize("name", ["empty", "ten", "kilo"])
async def test_real_repositories(tmp_path: Path, name: str) -> None:
    truth = json.loads(gzip.decompress(shared_data(f"repos/{name}.truth.json.gz").read_bytes()))["accounts"][
        0
    ]
    one = Account(truth["did"], "x.test", 0, SigningKey.derive("k256", "unused"))
    async with Host() as host, World(tmp_path, host, backfill={"chunk_records": 100}) as world:
        host.cars[one.did] = shared_data(f"repos/{name}.car").read_bytes()
        host.keys[one.did] = truth["signingKey"].removeprefix("did:key:")
        row = await world.fetch(one)
        assert (row.state, row.complete, row.rev) == (SyncState.SYNCED, True, truth["rev"])
        assert row.data == parse_cid(truth["data"])
        assert world.records(one) == {path: parse_cid(cid) for path, cid in truth["records"].items()}
