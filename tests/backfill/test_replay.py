"""Commits that come while a repository is fetched, replayed by ingest itself through its normal checks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from indexer.atproto.frames import CommitFrame, decode_frame
from indexer.ingest import Ingest
from indexer.ingest.filters import Filters
from indexer.pool import Pool
from indexer.simulator.account import Account, Write
from indexer.simulator.world import Clock
from indexer.simulator.world import World as Network
from indexer.store.codecs import SyncState
from indexer.store.transaction import Transaction
from tests.backfill.world import START_US, Host, World, answer_car, cids_of

POST = "app.bsky.feed.post/"
RELAY = "wss://relay.test"


def new_repo() -> tuple[Network, Account]:
    network = Network(1, 1, Clock(START_US, 1000))
    network.create()
    (one,) = network.accounts.values()
    for number in range(4):
        commit(network, one, {f"{POST}3k{number:011d}": f"text {number}"})
    return network, one


def commit(network: Network, one: Account, changes: dict[str, str | None]) -> bytes:
    """The frame of a commit that sets or (None) deletes records."""
    writes = []
    for path, text in changes.items():
        action = "delete" if text is None else "update" if path in one.records else "create"
        writes.append(Write(action, path, None if text is None else {"$type": POST[:-1], "text": text}))
    (outgoing,) = network.commit(one.did, writes).frames
    return outgoing.halves.numbered(7)


def wait(tx: Transaction, data: bytes) -> None:
    frame = decode_frame(data)
    assert isinstance(frame, CommitFrame)
    assert tx.buffer_frame(frame.repo, frame.rev, "commit", RELAY, data)


async def fetch_while(world: World, one: Account, frames: list[bytes]) -> None:
    """One fetch of what the host serves, during which ``frames`` come in; replayed by ingest."""
    resolver = world.backfill.tools.resolver
    filters = Filters.of(world.settings.filter)
    ingest = Ingest(world.db, world.writer, Pool(0), resolver, filters, world.settings)
    world.drain_with = ingest.drain

    async def arrive() -> None:
        for data in frames:
            await world.writer.run("frame", partial(wait, data=data))

    served = world.host.cars[one.did]
    world.host.answers[one.did] = answer_car(one, arrive, body=served)
    await world.fetch(one)


async def test_frames_newer_than_the_fetched_repository_are_applied_in_order(tmp_path: Path) -> None:
    network, one = new_repo()
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        at = one.rev
        frames = [
            commit(network, one, {f"{POST}3k{1:011d}": "changed", f"{POST}3k{9:011d}": "new"}),
            commit(network, one, {f"{POST}3k{2:011d}": None, f"{POST}3k{9:011d}": "newer"}),
        ]
        await fetch_while(world, one, frames[::-1])
        row = world.row(one)
        assert (row.state, row.rev, row.data, row.complete) == (SyncState.SYNCED, one.rev, one.data, True)
        assert world.records(one) == cids_of(one)
        later = [event[:2] for event in world.events(one) if event[2] > at]
        assert sorted(later[:2]) == [("create", f"{POST}3k{9:011d}"), ("update", f"{POST}3k{1:011d}")]
        assert sorted(later[2:]) == [("delete", f"{POST}3k{2:011d}"), ("update", f"{POST}3k{9:011d}")]
        assert world.db.count("buffer/frames") == 0


async def test_frames_that_the_fetched_repository_holds_already_are_not_told_again(tmp_path: Path) -> None:
    network, one = new_repo()
    frames = [commit(network, one, {f"{POST}3k{1:011d}": "changed"})]
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        frames.append(commit(network, one, {f"{POST}3k{3:011d}": None}))
        await fetch_while(world, one, frames)
        assert world.row(one).state is SyncState.SYNCED
        assert world.records(one) == cids_of(one)
        events = world.events(one)
        assert len({event[1:] for event in events}) == len(events)
        assert [event[:2] for event in events if event[0] != "create"] == [("delete", f"{POST}3k{3:011d}")]


async def test_a_gap_in_the_frames_that_came_makes_it_desynchronized(tmp_path: Path) -> None:
    network, one = new_repo()
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        commit(network, one, {f"{POST}3k{1:011d}": "lost"})
        await fetch_while(world, one, [commit(network, one, {f"{POST}3k{3:011d}": None})])
        row = world.row(one)
        assert (row.state, row.min_rev) == (SyncState.DESYNCHRONIZED, one.rev)
        assert row.due > 0
        host.answers.clear()
        host.serve(one)
        await world.fetch(one)
        assert world.row(one).state is SyncState.SYNCED
        assert world.records(one) == cids_of(one)
