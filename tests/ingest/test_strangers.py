"""What anybody can send in an account's name costs the account nothing: its own frames, state and place."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from indexer.atproto.frames import decode_frame
from indexer.identity.resolver import Identity
from indexer.ingest import drain
from indexer.ingest.apply import Arrival
from indexer.ingest.holders import Holders
from indexer.ingest.machine import Act
from indexer.ingest.suspects import verified
from indexer.ingest.tools import IngestTools
from indexer.ingest.verify import Item, Verdict
from indexer.simulator.keys import K256, SigningKey
from indexer.store.codecs import (
    NEW_REPO,
    AccountStatus,
    RepoRow,
    SyncState,
    Work,
    decode_repo,
    decode_waiting,
    encode_repo,
    pack,
)
from indexer.store.host_rows import host_of
from indexer.store.transaction import Transaction
from tests.ingest.forge import POST, Forge, create
from tests.ingest.test_missed import arrive
from tests.ingest.test_pipeline import AWAY, World, count, followed, holds, row_of, world

HOUR_US = 3_600_000_000


def liar(victim: Forge) -> Forge:
    """Signs in the name of another account, with a key of its own, and always an hour ahead."""
    shadow = Forge(victim.did)
    shadow.account.key = SigningKey.derive(K256, "liar")
    shadow._now = victim._now + HOUR_US
    return shadow


def lies(net: World, shadow: Forge, number: int, first: int = 1) -> None:
    """So many forged commits on the second upstream."""
    frames = []
    for seq in range(first, first + number):
        parts = shadow.parts()
        parts.seq = seq
        frames.append(parts.encode())
    net.network.playbacks[1].add(frames)


async def test_forged_frames_hold_up_nobody_s_true_ones(tmp_path: Path) -> None:
    async with world() as net:
        forge, slow = net.account(), {"refresh_interval": 600.0}
        async with net.node(tmp_path, upstreams=net.network.stream_urls[:2], ingest=slow) as node:
            net.send(forge.parts())
            await node.until(lambda: holds(node, forge))
            net.network.documents[forge.did] = {"status": 503, "doc": {}}
            lies(net, liar(forge), 3)
            await node.until(lambda: count(node, "buffer/signature") == 3)
            net.send(forge.posts(1), forge.posts(1))
            await node.until(lambda: row_of(node, forge).rev == forge.account.rev)
            assert row_of(node, forge).state is SyncState.SYNCED
            assert count(node, "buffer/waiting") == 0
            assert node.db.count("buffer/unproven_frames") == 3


async def test_more_forged_frames_than_there_is_room_for_change_no_state(tmp_path: Path) -> None:
    async with world() as net:
        forge = net.account()
        ingest = {"refresh_interval": 600.0, "unproven_frames_per_repo": 3, "buffer_frames_per_repo": 3}
        async with net.node(tmp_path, upstreams=net.network.stream_urls[:2], ingest=ingest) as node:
            net.send(forge.parts())
            net.store(forge)
            await node.until(lambda: holds(node, forge))
            net.network.documents[forge.did] = {"status": 503, "doc": {}}
            await node.backfill.stop()
            fetching = row_of(node, forge)._replace(state=SyncState.BACKFILLING, due=1, attempt=7)
            await node.writer.run("fetch", lambda tx: tx.set_repo(forge.did, fetching))
            true = [forge.posts(1), forge.posts(1)]
            net.send(*true)
            await node.until(lambda: count(node, "buffer/backfilling") == 2)
            lies(net, liar(forge), 5)
            await node.until(lambda: count(node, "buffer/signature") == 5)
            row = row_of(node, forge)
            assert (row.state, row.due, row.attempt, row.min_rev) == (
                SyncState.BACKFILLING,
                1,
                7,
                fetching.min_rev,
            )
            assert count(node, "drop/unproven_full") == 2
            assert count(node, "drop/buffer_full") == 0
            assert row.work & (Work.RESOLVE | Work.COMPARE_REV) == Work.RESOLVE | Work.COMPARE_REV
            waiting = node.db.buffered(forge.did, row.epoch, limit=9)
            assert [frame.rev for frame in waiting if frame.vouched] == [parts.rev for parts in true]
            assert len(waiting) == 5


async def test_a_forged_frame_takes_no_true_one_s_place(tmp_path: Path) -> None:
    async with followed(tmp_path) as (_net, node, forge):
        true = forge.posts(1).encode()
        rev = forge.account.rev

        def step(tx: Transaction) -> list[bytes]:
            for data, vouched in ((b"forged", False), (true, True), (b"forged again", False)):
                assert tx.buffer_frame(forge.did, rev, "commit", "one", data, vouched=vouched)
            kept = [frame.data for frame in tx.buffered(forge.did)]
            assert tx.unproven_size(forge.did) == (0, 0)
            tx.drop_buffered(forge.did)
            return kept

        assert await node.writer.run("same place", step) == [true]


async def test_frames_that_come_while_others_are_replayed_are_verified_in_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with followed(tmp_path) as (_net, node, forge):
        await node.backfill.stop()
        fetched = row_of(node, forge)._replace(state=SyncState.BACKFILLING, due=1, work=int(Work.DRAIN))
        first, *late = [forge.posts(1).encode() for _ in range(4)]
        seen: list[bytes] = []

        def buffer(tx: Transaction, *frames: bytes) -> None:
            for data in frames:
                frame = decode_frame(data)
                assert tx.buffer_frame(forge.did, frame.rev, "commit", "one", data)  # type: ignore[union-attr]

        async def pooled(tools: IngestTools, items: Sequence[Item]) -> list[Verdict]:
            verdicts = await verified(tools, items)
            seen.extend(data for data, _, _ in items)
            if len(seen) == 1:
                await node.writer.run("late", lambda tx: buffer(tx, *late))
            return verdicts

        monkeypatch.setattr(drain, "verified", pooled)

        def begin(tx: Transaction) -> None:
            tx.set_repo(forge.did, fetched)
            buffer(tx, first)

        await node.writer.run("first", begin)
        assert await node.ingest.drain(forge.did)
        assert seen == [first, *late]
        assert holds(node, forge)


async def test_a_true_commit_of_the_new_host_is_not_refused_by_an_answer_from_before_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world() as net:
        forge, other = net.account("a"), Forge("did:plc:" + "a" * 24)
        direct = ["pds::" + url for url in net.network.stream_urls[:2]]
        async with net.node(tmp_path, upstreams=direct) as node:
            net.send(forge.parts())
            await node.until(lambda: holds(node, forge))
            entered, gate = asyncio.Event(), asyncio.Event()

            async def held(tools: IngestTools, items: Sequence[Item]) -> list[Verdict]:
                verdicts = await verified(tools, items)
                entered.set()
                await gate.wait()
                return verdicts

            with monkeypatch.context() as patch:
                patch.setattr(drain, "verified", held)
                shadow = liar(forge)
                lies(net, shadow, 1)  # anything of the other host's, so that a drain is under way
                await asyncio.wait_for(entered.wait(), 10)
            net.publish(forge, AWAY)
            moved = forge.posts(1)
            net.store(forge)
            other.seq = 1
            moved.seq = 3
            net.network.playbacks[1].add([other.identity(), moved.encode()])
            await node.until(lambda: node.seqs()[1] == 3)
            gate.set()
            await node.until(lambda: holds(node, forge))
            assert row_of(node, forge).pds == net.network.urls[1]
            assert count(node, "reject/authority") == 0
            assert node.db.count("backfill/done/ok") == 0  # applied, not fetched


async def test_an_older_answer_does_not_undo_a_newer_one(tmp_path: Path) -> None:
    async with followed(tmp_path) as (_net, node, forge):
        row, answers = row_of(node, forge), node.ingest._drainer._answers
        old = Identity(forge.did, "someone.test", row.signing_key, row.pds, row.identity_at)
        key = SigningKey.derive(K256, "newer").did_key
        new = old._replace(signing_key=key, pds=AWAY, fetched_at=row.identity_at + 1)
        await node.ingest.stop()

        def step(tx: Transaction) -> tuple[str, str]:
            answers.learned(tx, forge.did, new)
            answers.checked(tx, forge.did, old, AccountStatus.ACTIVE)
            answers.learned(tx, forge.did, old)
            now = tx.repo(forge.did)
            assert now is not None
            return now.signing_key, now.pds

        assert await node.writer.run("answers", step) == (key, AWAY)


async def test_a_time_that_our_clock_has_not_reached_yet_holds_no_answer_up(tmp_path: Path) -> None:
    async with followed(tmp_path) as (_net, node, forge):
        row, answers = row_of(node, forge), node.ingest._drainer._answers
        new = Identity(forge.did, "someone.test", row.signing_key, AWAY, row.identity_at + 1)

        def step(tx: Transaction) -> str:
            tx.set_repo(forge.did, row._replace(identity_at=tx.now_us + HOUR_US))
            answers.learned(tx, forge.did, new)
            now = tx.repo(forge.did)
            assert now is not None
            return now.pds

        assert await node.writer.run("answer", step) == AWAY


async def test_a_forged_frame_of_a_banned_host_s_account_has_nothing_fetched(tmp_path: Path) -> None:
    async with followed(tmp_path) as (_net, node, forge):
        row = row_of(node, forge)
        node.ingest.bans.set(host_of(row.pds), True)
        forged = liar(forge).parts()

        def step(tx: Transaction) -> list[tuple[Act, SyncState]]:
            frame = decode_frame(forged.encode())
            unverified = Arrival("relay", 9, forge.did, frame, forged.encode())  # type: ignore[arg-type]

            def state() -> SyncState:
                now = tx.repo(forge.did)
                assert now is not None
                return now.state

            made = [(arrive(node, tx, forge, forged, "relay").act, state())]
            made.append((node.ingest.applier.frame(tx, unverified, None).act, state()))
            made.append((arrive(node, tx, forge, forge.posts(1), "relay").act, state()))
            tx.set_repo(forge.did, row)
            return made

        synced, broken = SyncState.SYNCED, SyncState.DESYNCHRONIZED
        made = await node.writer.run("banned", step)
        assert made == [(Act.DROP, synced), (Act.DROP, synced), (Act.DROP, broken)]


async def test_the_largest_of_those_that_nobody_vouches_for_makes_room(tmp_path: Path) -> None:
    async with (
        world() as net,
        net.node(tmp_path, ingest={"unproven_mib": 1, "refresh_interval": 600.0}) as node,
    ):
        strangers = [Forge("did:plc:" + name * 24) for name in "bcdefg"]
        honest = net.account("h")
        for forge in (honest, *strangers):
            net.network.documents[forge.did] = {"status": 503, "doc": {}}
        for number, forge in enumerate(strangers):
            large = forge.parts()
            large.records = {b"\x01\x55\x12\x20" + bytes(32): bytes(200_000 + number)}
            net.send(large)
        await node.until(lambda: count(node, "buffer/identity") == 6)
        assert count(node, "drop/unproven_full") == 1  # the sixth is larger than each of the five before it
        assert node.db.count("buffer/frames") == 5
        small = honest.parts(*(create(f"{POST}/3aaaaaaaaab2{n}", n * 30_000) for n in "23"))
        net.send(small)
        await node.until(lambda: node.db.count(f"buffer/{honest.did}/frames") == 1)
        assert count(node, "drop/unproven_full") == 2
        assert node.db.count(f"buffer/{strangers[4].did}/frames") == 0
        assert row_of(node, strangers[4]).work & Work.COMPARE_REV
        assert node.db.count("buffer/unproven_bytes") <= 1 << 20
        assert Holders(node.db).heaviest() == (strangers[3].did, node.ingest.applier._holders.heaviest()[1])  # type: ignore[index]


def test_rows_from_before_times_and_vouchers_were_kept_are_read() -> None:
    row = NEW_REPO._replace(tracked=True, rev="3kb", identity_at=7)
    assert decode_repo(encode_repo(row)) == row
    assert decode_repo(pack(tuple(row)[: RepoRow._fields.index("identity_at")])) == row._replace(
        identity_at=0
    )
    assert tuple(decode_waiting(pack((2, b"frame")))) == (2, b"frame", 0, True)
