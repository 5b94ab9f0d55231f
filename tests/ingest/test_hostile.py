"""Hosts and frames that mean ill, or are only unlucky: clocks, names, killed workers, toggling accounts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from indexer.atproto.frames import ErrorFrame
from indexer.errors import UpstreamError, WorkerDied
from indexer.identity.resolver import Resolver
from indexer.ingest import due
from indexer.ingest.account import micros_of
from indexer.ingest.answers import Latest
from indexer.ingest.identities import DueWork
from indexer.ingest.machine import Act
from indexer.ingest.newcomers import Result
from indexer.ingest.pipeline import Batch, Message
from indexer.pool import Pool
from indexer.simulator.wire import error_frame, info_frame
from indexer.store.codecs import AccountStatus, SyncState, Work
from indexer.store.keyspaces import QUARANTINE
from tests.ingest.forge import Forge
from tests.ingest.node import Node
from tests.ingest.test_pipeline import count, followed, holds, row_of, world

YEAR_2096_US = 3_976_214_400_000_000


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(due.Waits, "of", lambda _: due.Waits(0.02, 0.05, 0.1))


async def test_a_word_dated_in_the_future_does_not_outweigh_later_ones(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(2))
        await node.until(lambda: holds(node, forge))
        net.store(forge)
        forge._now, now = YEAR_2096_US, forge._now
        net.send(net.plain(forge.status, False, "deactivated"))
        await node.until(lambda: node.seqs() == [net.seq] and holds(node, forge))
        assert row_of(node, forge).status is AccountStatus.ACTIVE
        forge._now = now
        net.network.accounts[forge.did] = {"status": "deactivated"}
        net.send(net.plain(forge.status, False, "deactivated"))  # and its next one is no replay
        await node.until(lambda: row_of(node, forge).status is AccountStatus.DEACTIVATED)


async def test_names_that_hosts_make_up_are_counted_as_one(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        net.send(info_frame("a" * 5000, "b" * 5000), info_frame("c", ""), error_frame("d" * 5000, "e" * 5000))
        status = node.ingest.status
        await node.until(lambda: status()[0]["outcomes"].get("connection/other", 0) >= 1)
        assert set(status()[0]["outcomes"]) == {"info/other", "error/other", "connection/other"}
        assert len(status()[0]["error"]) < 1000


async def test_few_lines_are_logged_about_many_infos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with world() as net, net.node(tmp_path) as node:
        net.send(*(info_frame("OutdatedCursor", "x") for _ in range(50)))
        await node.until(lambda: node.ingest.status()[0]["outcomes"].get("info/OutdatedCursor") == 50)
    assert capsys.readouterr().out.count("upstream_info") == 1


def kill_workers_at(monkeypatch: pytest.MonkeyPatch, *killers: bytes) -> list[list[bytes]]:
    """Workers die of these frames; gives the batches that were verified."""
    run, batches = Pool.run, list[list[bytes]]()

    async def fragile(self: Pool, function: Any, /, *args: Any) -> Any:
        if function.__name__ == "verify_batch":
            frames = [data for data, _, _ in args[0]]
            if any(frame in killers for frame in frames):
                raise WorkerDied("a worker process died twice")
            batches.append(frames)
        return await run(self, function, *args)

    monkeypatch.setattr(Pool, "run", fragile)
    return batches


@pytest.mark.parametrize("waiting", [False, True], ids=["from the socket", "from the buffer"])
async def test_a_frame_that_kills_its_worker_costs_its_own_repository_a_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: bool
) -> None:
    async with world() as net:
        bad, good = net.account("a"), net.account("b")
        firsts = [bad.parts(), good.parts()]
        killer, others = bad.posts(1), [good.posts(1), good.posts(2)]
        killer.seq = 3
        kill_workers_at(monkeypatch, killer.encode())
        known = net.network.documents[bad.did]
        async with net.node(tmp_path) as node:
            if waiting:
                net.network.documents[bad.did] = {"status": 503, "doc": {}}
            net.send(*firsts)
            net.store(bad)
            net.send(killer, *others)
            await node.until(lambda: node.seqs() == [net.seq])
            net.network.documents[bad.did] = known
            await node.until(lambda: holds(node, bad) and holds(node, good))
            assert count(node, "desync/worker_died") == 1
            assert count(node, "reject/worker_died") == 0
            assert [row.reason for _, row in node.db.scan(QUARANTINE)] == ["worker_died"]
            assert node.db.count("backfill/done/ok") == 1


async def test_frames_of_accounts_that_are_not_followed_are_not_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = kill_workers_at(monkeypatch)
    async with world() as net, net.node(tmp_path) as node:
        forge, excluded = net.account("a"), net.account("b")
        net.send(forge.parts(), excluded.parts())
        await node.until(lambda: holds(node, forge) and holds(node, excluded))
        row = row_of(node, forge)._replace(tracked=False)
        await node.writer.run("untrack", lambda tx: tx.set_repo(forge.did, row))
        net.send(forge.posts(1))  # a route is still known: verified, dropped, forgotten
        await node.until(lambda: count(node, "drop/unwanted") == 1)
        node.ingest.set_filters(replace(node.ingest.filters, excludes=frozenset({excluded.did})))
        verified = len(batches)
        net.send(forge.posts(1), excluded.posts(1), excluded.posts(1))
        await node.until(lambda: count(node, "drop/unwanted") == 4)
        assert len(batches) == verified


async def test_a_toggling_account_is_asked_about_at_a_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def latest(_self: DueWork, identity: Any, _presumed: str) -> Latest:
        asked.append(identity.did)
        return Latest(None, None)

    monkeypatch.setattr(DueWork, "_latest", latest)
    async with world() as net, net.node(tmp_path, ingest={"refresh_interval": 600}) as node:
        forge = net.account()
        net.send(forge.parts())
        await node.until(lambda: row_of_rev(node, forge))
        # The identity was just asked for; that holds up no question of another kind.
        flags = row_of(node, forge)
        await node.writer.run(
            "resolve", lambda tx: tx.set_repo(forge.did, flags._replace(work=flags.work | Work.RESOLVE))
        )
        for _ in range(10):
            net.send(net.plain(forge.status, False, "deactivated"), net.plain(forge.status, True))
            seq = net.seq
            await node.until(lambda seq=seq: node.seqs() == [seq])  # type: ignore[misc]
        await node.until(lambda: forge.did in node.ingest._due._waiting)
        assert asked in ([forge.did], [forge.did] * 2)  # its status, and its rev for having come back


def row_of_rev(node: Node, forge: Forge) -> bool:
    row = node.db.repo(forge.did)
    return row is not None and row.rev == forge.account.rev and not row.work & ~Work.VERIFY_HANDLE


async def test_work_that_nobody_knows_of_is_noticed_with_the_next_frame(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts())
        await node.until(lambda: holds(node, forge) and node.ingest.due == 0)
        row = row_of(node, forge)._replace(work=int(Work.COMPARE_REV))
        await node.writer.run("forgotten", lambda tx: tx.set_repo(forge.did, row))
        net.send(forge.posts(1))
        await node.until(lambda: holds(node, forge))


async def test_an_error_of_our_own_does_not_lose_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve, errors = Resolver.resolve, [UnicodeError("label too long"), ZeroDivisionError("ours")]

    async def broken(self: Resolver, did: str, *, refresh: bool = False) -> Any:
        if errors:
            raise errors.pop()
        return await resolve(self, did, refresh=refresh)

    monkeypatch.setattr(Resolver, "resolve", broken)
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(1))
        await node.until(lambda: holds(node, forge))
        assert not errors


async def test_after_a_future_cursor_reconnects_go_on_in_the_new_numbering(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), *(forge.posts(1) for _ in range(5)))
        await node.until(lambda: holds(node, forge))
        pipeline, stored = node.ingest.sources.find(node.settings.upstreams[0]).pipeline, net.seq
        assert await pipeline.settled() == stored
        with pytest.raises(UpstreamError):
            await pipeline.receive(error_frame("FutureCursor", ""))
        assert await pipeline.settled() == 0  # all that is retained of the new numbering
        pipeline.opened()
        forge.seq = 2
        assert await pipeline.receive(forge.identity())
        assert await pipeline.settled() == 3
        assert node.seqs() == [stored]
        assert isinstance(pipeline._refused(ErrorFrame("FutureCursor", "")), UpstreamError)
        assert await pipeline.settled() == 0


async def test_the_stored_time_is_the_batch_s_own(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path, upstreams=["ws://127.0.0.1:9"]) as node:  # nobody is there
        pipeline, batch = node.ingest.sources.find(node.settings.upstreams[0]).pipeline, Batch()
        time = "2026-01-01T00:00:00Z"
        times = (time, time, "9999-12-31T00:00:00Z", "")  # a lie says nothing beside others
        result = Result(Act.DROP, "unwanted")
        batch.messages = [Message(5, "", b"", when, lambda _tx, _verdict: result) for when in times]
        pipeline._last_time = "2026-01-02T00:00:00Z"  # received, not yet committed
        await pipeline._submit(batch, [])
        await node.until(lambda: node.db.cursor(pipeline.position.time_name) is not None)
        assert node.db.cursor(pipeline.position.time_name) == micros_of(time)


async def test_a_handle_is_told_once_it_is_verified_both_ways(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        owner, thief = net.account("a"), net.account("b")  # both claim someone.test, which names the first
        net.send(owner.parts(), thief.parts())
        await node.until(lambda: holds(node, owner) and holds(node, thief))
        assert row_of(node, owner).handle == "someone.test"
        assert row_of(node, thief).handle == "handle.invalid"
        told = {(e.did, e.fields["handle"]) for e in node.events() if e.kind == "identity"}
        assert told == {
            (owner.did, None), (owner.did, "someone.test"), (thief.did, None), (thief.did, "handle.invalid"),
        }  # fmt: skip


async def test_a_handle_without_an_answer_holds_nothing_up(tmp_path: Path) -> None:
    async with world() as net:
        nowhere = [f"mute.test:{port}=127.0.0.1:1" for port in (80, 443)]
        network = {"connect_to": [*net.network.connect_to, *net.handles, *nowhere]}
        async with net.node(tmp_path, network=network, ingest={"refresh_interval": 600}) as node:
            forge = net.account()
            net.publish(forge, handle="mute.test")
            net.send(forge.parts(), forge.posts(2))
            await node.until(lambda: row_of_rev(node, forge))
            assert row_of(node, forge).state is SyncState.SYNCED
            assert (row_of(node, forge).handle, row_of(node, forge).work) == ("", Work.VERIFY_HANDLE)
            assert [event.fields["handle"] for event in node.events() if event.kind == "identity"] == [None]


async def test_a_claim_that_is_given_up_is_told_no_longer(tmp_path: Path) -> None:
    async with followed(tmp_path) as (net, node, forge):
        net.network.documents[forge.did]["alsoKnownAs"] = []
        net.send(net.plain(forge.identity, "someone.test"))
        await node.until(lambda: row_of(node, forge).handle == "handle.invalid")
        assert node.events()[-1].fields["handle"] == "handle.invalid"
        await asyncio.sleep(0)
