"""Killed anywhere, the backfill goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.atproto.types import Cid
from indexer.errors import WriterPoisoned
from indexer.simulator.account import Account
from indexer.store.codecs import SyncState, Work
from tests.backfill.world import Host, World, account, cids_of, edit, rev

POST = "app.bsky.feed.post/"
UNITS = 5  # of 23 changes, 5 a unit


class Killed(Exception):
    """The process ends here: nothing more is written."""


def one_with(count: int) -> Account:
    return account("one", {f"{POST}3k{number:011d}": f"text {number}" for number in range(count)})


def kill_at(world: World, name: str, nth: int) -> None:
    seen: list[str] = []

    def at(point: str) -> None:
        seen.append(point)
        if seen.count(name) == nth:
            raise Killed

    world.at = at


async def killed(tmp_path: Path, host: Host, one: Account, point: str, nth: int) -> None:
    async with World(tmp_path, host) as world:
        kill_at(world, point, nth)
        with pytest.raises(WriterPoisoned):
            await request_and_run(world, one)


async def request_and_run(world: World, one: Account) -> None:
    await world.backfill.add([one.did], again=True)
    await world.backfill.run()


def folded(events: list[tuple[str, str, str]]) -> set[str]:
    """The paths that a reader of the log holds in the end; each event must fit what came before."""
    paths: set[str] = set()
    for action, path, _ in events:
        assert (path in paths) == (action != "create"), f"{action} of {path} does not fit"
        paths = paths - {path} if action == "delete" else paths | {path}
    return paths


@pytest.mark.parametrize("point", ["before backfill_apply", "after backfill_apply"])
@pytest.mark.parametrize("nth", range(1, UNITS + 1))
async def test_killed_while_it_applies_it_tells_nothing_twice(tmp_path: Path, point: str, nth: int) -> None:
    one = one_with(23)
    async with Host() as host:
        host.serve(one)
        await killed(tmp_path, host, one, point, nth)
        async with World(tmp_path, host) as world:
            row = world.row(one)
            done = nth == UNITS and point.startswith("after")
            assert row.state is (SyncState.SYNCED if done else SyncState.BACKFILLING)
            assert row.complete is done
            await world.running(lambda: world.row(one).state is SyncState.SYNCED)
            assert world.records(one) == cids_of(one)
            assert world.events(one) == [("create", path, one.rev) for path in sorted(one.records)]
            assert world.row(one).complete
            assert world.spooled() == []


@pytest.mark.parametrize("point", ["before backfill_claim", "after backfill_claim", "after backfill_request"])
async def test_killed_around_the_claim_it_begins_again(tmp_path: Path, point: str) -> None:
    one = one_with(7)
    async with Host() as host:
        host.serve(one)
        await killed(tmp_path, host, one, point, 1)
        async with World(tmp_path, host) as world:
            await world.running(lambda: world.row(one).state is SyncState.SYNCED)
            assert world.records(one) == cids_of(one)


async def test_the_repository_moved_on_while_we_were_dead(tmp_path: Path) -> None:
    one = one_with(23)
    async with Host() as host:
        host.serve(one)
        await killed(tmp_path, host, one, "after backfill_apply", 3)
        changes: dict[str, str | None] = {f"{POST}3k{2:011d}": None, f"{POST}3k{3:011d}": "changed"}
        host.serve(edit(one, 2, {**changes, f"{POST}3kzzzzzzzzzzz": "new"}))
        async with World(tmp_path, host) as world:
            await world.running(lambda: world.row(one).state is SyncState.SYNCED)
            assert world.records(one) == cids_of(one)
            events = world.events(one)
            assert folded(events) == set(one.records)
            assert len({(path, at) for _, path, at in events}) == len(events)


async def test_half_applied_it_is_not_complete(tmp_path: Path) -> None:
    one = one_with(23)
    async with Host() as host:
        host.serve(one)
        async with World(tmp_path, host) as world:
            assert (await world.fetch(one)).complete
        host.serve(edit(one, 2, dict.fromkeys(sorted(one.records)[:12])))
        await killed(tmp_path, host, one, "after backfill_apply", 2)
        async with World(tmp_path, host) as world:
            row = world.row(one)
            assert (row.complete, row.rev) == (False, rev(1))
            await world.running(lambda: world.row(one).state is SyncState.SYNCED)
            assert world.row(one).complete
            assert world.records(one) == cids_of(one)


async def test_a_host_that_went_back_in_time_does_not_undo_what_was_applied(tmp_path: Path) -> None:
    one = one_with(23)
    async with Host() as host:
        host.serve(one)
        older = host.cars[one.did]
        host.serve(edit(one, 2, {f"{POST}3k{0:011d}": "changed"}))
        newer = host.cars[one.did]
        await killed(tmp_path, host, one, "after backfill_apply", 2)
        host.cars[one.did] = older
        async with World(tmp_path, host) as world:
            row = await world.fetch(one)
            assert row.error.startswith("below_min_rev")
            assert row.min_rev == rev(2)
            host.cars[one.did] = newer
            assert (await world.fetch(one)).state is SyncState.SYNCED
            assert world.records(one) == cids_of(one)


async def test_killed_before_the_replay_only_the_replay_is_left(tmp_path: Path) -> None:
    one = one_with(7)
    async with Host() as host:
        host.serve(one)
        async with World(tmp_path, host) as world:
            await world.buffer(one, 2)
            kill_at(world, "before drain", 1)
            with pytest.raises(WriterPoisoned):
                await request_and_run(world, one)
        async with World(tmp_path, host) as world:
            row = world.row(one)
            assert (row.state, bool(row.work & Work.DRAIN)) == (SyncState.BACKFILLING, True)
            await world.running(lambda: world.row(one).state is SyncState.SYNCED)
            assert world.drained == [one.did]
        assert host.asked == [one.did]


async def test_stopped_in_a_fetch_it_leaves_the_repository_in_the_queue(tmp_path: Path) -> None:
    one = one_with(7)
    async with Host() as host:
        host.serve(one)
        records: dict[str, Cid]
        async with World(tmp_path, host) as world:
            await world.backfill.add([one.did])
            await world.running(lambda: world.row(one).state is SyncState.BACKFILLING)
            assert world.row(one).due > 0
            assert world.spooled() == []
            assert world.backfill.status()["in_flight"] == 0
        async with World(tmp_path, host) as world:
            await world.running(lambda: world.row(one).state is SyncState.SYNCED)
            records = world.records(one)
        assert records == cids_of(one)


async def test_what_a_killed_process_left_in_the_spool_is_removed(tmp_path: Path) -> None:
    one = one_with(1)
    (tmp_path / "spool").mkdir(parents=True)
    (tmp_path / "spool" / "7.car").write_bytes(b"half")
    (tmp_path / "spool" / "7.index").write_bytes(b"half")
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.backfill.add([one.did])
        await world.running(lambda: world.row(one).state is SyncState.SYNCED)
        assert world.spooled() == []
