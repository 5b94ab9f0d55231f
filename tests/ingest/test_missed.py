"""What was never sent, or was dropped for want of room, is missed by nobody for good."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from indexer.atproto.frames import decode_frame
from indexer.atproto.types import Rev
from indexer.ingest import drain, pipeline
from indexer.ingest.apply import SYNC_BLOCKS_BYTES, Arrival
from indexer.ingest.machine import Act
from indexer.ingest.newcomers import Result
from indexer.ingest.suspects import verified
from indexer.ingest.tools import IngestTools
from indexer.ingest.verify import Item, Verdict, VerifyLimits, verify_frame
from indexer.simulator.cbor import block_cid
from indexer.simulator.wire import car
from indexer.store.codecs import NEW_REPO, AccountStatus, RepoRow, SyncState
from indexer.store.transaction import Transaction
from tests.ingest.forge import FAR_FUTURE, Forge, Parts
from tests.ingest.node import Node
from tests.ingest.test_pipeline import count, followed, holds, row_of, world


async def test_an_account_that_comes_back_is_fetched_though_nobody_sent_what_it_wrote_meanwhile(
    tmp_path: Path,
) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(2))
        await node.until(lambda: holds(node, forge))
        net.network.accounts[forge.did] = {"status": "deactivated"}
        net.send(net.plain(forge.status, False, "deactivated"))
        await node.until(lambda: row_of(node, forge).status is AccountStatus.DEACTIVATED)
        await node.until(lambda: row_of(node, forge).work == 0)
        forge.posts(1)  # the relay does not forward commits of accounts that are not active
        net.store(forge)
        net.send(net.plain(forge.status, True))
        await node.until(lambda: holds(node, forge))
        assert count(node, "drop/inactive") == 0


async def test_a_sync_frame_longer_than_the_lexicon_allows_is_taken_and_counted(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(1))
        await node.until(lambda: holds(node, forge))
        long = forge.sync()
        forge.posts(0)  # the same tree under a newer rev
        long = forge.sync()
        stuffing = bytes(SYNC_BLOCKS_BYTES)
        long.payload["blocks"] = car(
            block_cid(long.commit()), [*long.blocks(), (block_cid(stuffing), stuffing)]
        )
        net.send(long)
        await node.until(lambda: holds(node, forge))
        assert count(node, "note/sync_blocks") == 1
        assert count(node, "apply/sync") + count(node, "ok/sync") == 1


async def test_a_dropped_buffer_is_made_up_for_by_a_fetch_as_new_as_its_newest_frame(tmp_path: Path) -> None:
    async with followed(tmp_path, ingest={"buffer_frames_per_repo": 3}) as (_net, node, forge):
        base = row_of(node, forge)
        late, *ahead = [forge.posts(1) for _ in range(4)]
        forged = forge.posts(1)
        forged.payload["rev"] = FAR_FUTURE
        fetching = base._replace(state=SyncState.BACKFILLING, due=1)

        def step(tx: Transaction) -> tuple[list[Act], RepoRow, int]:
            tx.set_repo(forge.did, fetching)
            results = [arrive(node, tx, forge, parts, "ahead") for parts in ahead[:2]]
            tx.buffer_frame(
                forge.did, forged.payload["rev"], "commit", "liar", forged.encode(), vouched=False
            )
            results.append(arrive(node, tx, forge, ahead[2], "ahead"))
            results.append(arrive(node, tx, forge, late, "behind"))
            row = tx.repo(forge.did)
            assert row is not None
            waiting = tx.buffer_size(forge.did)[0]
            tx.drop_buffered(forge.did)
            tx.set_repo(forge.did, base)
            return [result.act for result in results], row, waiting

        acts, row, waiting = await node.writer.run("overflow", step)
        assert acts == [Act.BUFFER] * 4
        assert waiting == 1  # what nobody vouches for has a place of its own
        assert (row.state, row.min_rev) == (SyncState.BACKFILLING, ahead[2].rev)


async def test_what_waited_for_a_fetch_that_is_not_needed_any_more_is_replayed(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        first, second = forge.parts(), forge.posts(1)
        new = NEW_REPO._replace(tracked=True, signing_key=forge.key, pds=net.network.urls[0])

        def step(tx: Transaction) -> list[Act]:
            tx.set_repo(forge.did, new._replace(state=SyncState.BACKFILLING, due=1))
            acts = [arrive(node, tx, forge, second, "ahead").act]
            row = tx.repo(forge.did)
            assert row is not None
            tx.set_repo(forge.did, row._replace(state=SyncState.PENDING, due=1 << 60))  # the fetch failed
            return [*acts, arrive(node, tx, forge, first, "behind").act]

        assert await node.writer.run("base", step) == [Act.BUFFER, Act.APPLY]
        await node.until(lambda: row_of(node, forge).rev == second.rev)
        await node.until(lambda: node.db.count("buffer/frames") == 0)


async def test_the_cursor_stands_at_what_is_committed_not_at_what_was_received(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with followed(tmp_path, ingest={"batch_frames": 1}) as (net, node, forge):
        first, second = asyncio.Event(), asyncio.Event()
        gates = [first, second]

        async def held(tools: IngestTools, items: Sequence[Item]) -> list[Verdict]:
            await gates.pop(0).wait()
            return await verified(tools, items)

        monkeypatch.setattr(pipeline, "verified", held)
        before = net.seq
        net.send(forge.posts(1), forge.posts(1))
        await node.until(lambda: node.ingest.status()[0]["seq"] == net.seq)
        first.set()
        await node.until(lambda: node.seqs() != [before])
        assert node.seqs() == [before + 1]
        second.set()
        await node.until(lambda: holds(node, forge))


async def test_a_frame_that_was_replayed_is_not_met_again_when_another_of_its_rev_comes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with followed(tmp_path) as (_net, node, forge):
        waiting = forge.posts(1)
        data, rev = waiting.encode(), waiting.rev

        def buffer(source: str) -> Callable[[Transaction], object]:
            return lambda tx: tx.buffer_frame(forge.did, rev, "commit", source, data)

        async def late(tools: IngestTools, items: Sequence[Item]) -> list[Verdict]:
            await node.writer.run("late", buffer("two"))
            return await verified(tools, items)

        monkeypatch.setattr(drain, "verified", late)
        await node.writer.run("first", buffer("one"))
        assert await node.ingest.drain(forge.did)
        assert node.db.counts("ingest/one/") == {"ingest/one/ok/commit": 1}
        assert node.db.counts("ingest/two/") == {"ingest/two/drop/stale_rev": 1}
        assert node.db.count("buffer/frames") == 0


def arrive(node: Node, tx: Transaction, forge: Forge, parts: Parts, source: str) -> Result:
    """A verified frame on the writer."""
    data = parts.encode()
    frame = decode_frame(data)
    newest: Rev = FAR_FUTURE
    verdict = verify_frame(data, forge.key, VerifyLimits(newest))
    arrival = Arrival(source, parts.seq, forge.did, frame, data, forge.key)  # type: ignore[arg-type]
    return node.ingest.applier.frame(tx, arrival, verdict)
