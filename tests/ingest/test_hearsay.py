"""Accounts that strangers name: what is kept of them until a directory knows them, how long, how many."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.backfill.outcome import judge
from indexer.backfill.rows import FailUnit, RequestUnit
from indexer.config import BackfillSettings
from indexer.errors import IdentityGone
from indexer.ingest.hearsay import FORGOTTEN, GONE, grace_left, unheard_of
from indexer.simulator.wire import frame, timestamp
from indexer.store.check import check
from indexer.store.codecs import NEW_REPO, AccountStatus, RepoRow, SyncState, Work
from indexer.store.keyspaces import ACCOUNT_STATUS, REPOS, RESYNC_BUFFER, STRANGERS
from indexer.store.transaction import Transaction
from indexer.store.writer import clock_us
from tests.ingest.forge import EPOCH_US, Forge
from tests.ingest.node import Node
from tests.ingest.test_pipeline import AWAY, World, count, holds, row_of, world
from tests.store.support import ALICE, opened

LETTERS = "abcdefghijklmnopqrstuvwxyz234567"
DIDS = ["did:plc:" + "".join(LETTERS[(n >> 5 * at) & 31] for at in range(24)) for n in range(1, 13)]
SOON = {"unknown_grace": 0.1, "work_retry_min": 0.02, "work_retry_max": 0.05}
HEARD = NEW_REPO._replace(tracked=True, work=int(Work.RESOLVE), hearsay=True)
NOW_US = 1_000_000_000


def name(net: World, dids: list[str]) -> None:
    """One message about each: a commit, an `#account` and an `#identity` in turn."""
    for number, did in enumerate(dids):
        said = {"did": did, "time": timestamp(EPOCH_US + number)}
        word = frame("#account", {**said, "active": False, "status": "deactivated"})
        net.seq += 1
        parts = Forge(did).parts()
        parts.seq = net.seq
        made = (parts.encode(), word.numbered(net.seq), frame("#identity", said).numbered(net.seq))
        net.network.playbacks[0].add([made[number % 3]])


def rows_left(node: Node) -> int:
    """Rows about accounts of any kind."""
    kept = (REPOS.name, STRANGERS.name, ACCOUNT_STATUS.name, RESYNC_BUFFER.name)
    return sum(1 for keyspace in kept for _ in node.db.raw_scan(keyspace, None, None))


@pytest.mark.parametrize("direct", [True, False])
async def test_nothing_stays_of_accounts_that_are_made_up(tmp_path: Path, direct: bool) -> None:
    async with world() as net, net.node(tmp_path, direct=direct, ingest=SOON) as node:
        name(net, DIDS)
        await node.until(lambda: node.seqs() == [len(DIDS)])
        assert direct is (node.db.count("repos") == 0)  # a PDS's word opens no row
        assert count(node, "reject/authority") == (4 if direct else 0)
        await node.until(lambda: rows_left(node) == 0)
        assert count(node, "reject/identity") == 4
        assert node.db.count(FORGOTTEN) == (0 if direct else len(DIDS))
        report = check(node.db)
        assert report.clean, report.problems


async def test_what_one_pds_may_name_is_bounded(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path, direct=True, ingest={"max_strangers": 6}) as node:
        for did in DIDS:
            net.network.documents[did] = {"status": 503, "doc": {}}
        name(net, DIDS[:9])
        await node.until(lambda: node.seqs() == [9])
        assert count(node, "drop/strangers_full") == 3
        assert (node.db.counts("strangers/"), node.db.count("repos")) == (
            {f"strangers/{node.settings.upstreams[0]}": 6},
            0,
        )
        name(net, DIDS[:6])  # those that are known as such are heard all the same
        await node.until(lambda: node.seqs() == [15])
        assert count(node, "drop/strangers_full") == 3


async def test_rows_of_accounts_that_no_directory_knows_are_bounded(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path, ingest={"max_unresolved": 4}) as node:
        forge = net.account()
        for did in DIDS:
            net.network.documents[did] = {"status": 503, "doc": {}}
        name(net, DIDS[:9])
        await node.until(lambda: node.seqs() == [9])
        assert (node.db.count("repos/hearsay"), count(node, "drop/unresolved_full")) == (4, 5)
        net.network.documents[DIDS[0]] = {"status": 404, "doc": {}}
        await node.backfill.tools.resolver.resolve(forge.did)  # whom a directory knows needs none of the room
        net.send(forge.parts())
        await node.until(lambda: holds(node, forge))
        assert not row_of(node, forge).hearsay


async def test_what_a_pds_sent_of_its_own_new_account_waits_for_the_directory_also_over_a_restart(
    tmp_path: Path,
) -> None:
    async with world() as net:
        forge, away = net.account("a"), net.account("b", pds=AWAY)
        for other in (forge, away):
            net.network.documents[other.did] = {"status": 503, "doc": {}}
        async with net.node(tmp_path, direct=True) as node:
            net.send(forge.parts(), forge.posts(2), away.parts(), net.plain(forge.status, False, "suspended"))
            await node.until(lambda: node.seqs() == [4])
            assert count(node, "buffer/identity") == 3
            assert (node.db.repo(forge.did), node.db.count("strangers/" + node.settings.upstreams[0])) == (
                None,
                2,
            )
        net.publish(forge)
        net.publish(away, AWAY)
        net.store(forge)
        async with net.node(tmp_path, direct=True) as node:
            await node.until(
                lambda: (row := node.db.repo(forge.did)) is not None and row.state is SyncState.SYNCED
            )
            await node.until(lambda: not node.db.counts("strangers/") and not row_of(node, forge).work)
            assert {path for path, _ in node.db.records(forge.did)} == set(forge.account.records)
            assert node.db.count("backfill/done/ok") == 0  # its frames were replayed, not fetched
            assert row_of(node, forge).status is AccountStatus.ACTIVE  # as its PDS said when asked
            words = {word.source: word.status for word in node.db.account_words(forge.did)}
            assert words[node.settings.upstreams[0]] is AccountStatus.SUSPENDED
            assert (node.db.repo(away.did), count(node, "reject/authority")) == (None, 2)
            assert node.db.counts("buffer/") == {}


async def test_a_frame_that_waits_too_long_goes_and_its_account_is_fetched_once_it_is_known(
    tmp_path: Path,
) -> None:
    short = {"unproven_age": 0.1, "work_retry_min": 0.02, "work_retry_max": 0.05}
    async with world() as net, net.node(tmp_path, ingest=short) as node:
        forge = net.account()
        net.network.documents[forge.did] = {"status": 503, "doc": {}}
        net.send(forge.parts(), forge.posts(1))
        await node.until(lambda: count(node, "drop/unproven_old") == 2)
        assert node.db.counts("buffer/") == {}
        assert row_of(node, forge).work & Work.RESOLVE
        net.store(forge)
        net.publish(forge)
        await node.until(lambda: holds(node, forge))
        assert node.db.count("backfill/done/ok") == 1


async def test_a_stranger_of_whom_nobody_knows_anything_is_forgotten_in_time(tmp_path: Path) -> None:
    short = {"unproven_age": 0.1, "work_retry_min": 0.02, "work_retry_max": 0.05}
    async with world() as net, net.node(tmp_path, direct=True, ingest=short) as node:
        for did in DIDS[:3]:
            net.network.documents[did] = {"status": 503, "doc": {}}
        name(net, DIDS[:3])
        await node.until(lambda: node.seqs() == [3] and rows_left(node) == 0)
        assert count(node, "drop/unproven_old") == 1


async def test_what_an_operator_asked_for_stays_though_no_directory_knows_it(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path, ingest=SOON | {"unknown_grace": 0.0}) as node:
        asked = RequestUnit(DIDS[:1], frozenset(), False, again=False, asked=clock_us())
        await node.writer.run("heard", lambda tx: tx.set_repo(DIDS[0], HEARD))
        await node.writer.run("asked", asked)
        name(net, [DIDS[1], DIDS[1], DIDS[0]])
        await node.until(lambda: (row := node.db.repo(DIDS[0])) is not None and row.error.startswith(GONE))
        await node.until(lambda: node.seqs() == [3] and node.db.repo(DIDS[1]) is None)
        assert node.db.repo(DIDS[0]) is not None


@pytest.mark.parametrize("tombstone", [False, True])
async def test_a_fetch_that_finds_no_such_account_forgets_it_after_the_grace(
    tmp_path: Path, tombstone: bool
) -> None:
    failure = judge(IdentityGone("nobody", tombstone=tombstone))
    async with opened(tmp_path) as store:
        for grace_s, kept in ((600.0, True), (0.0, False)):
            await store.do(lambda tx: tx.set_repo(ALICE, HEARD._replace(due=1)))
            unit = FailUnit(ALICE, None, failure, BackfillSettings(), 0.5, grace_s)
            await store.do(unit)
            row = store.db.repo(ALICE)
            assert (row is not None) is kept
            assert row is None or (row.due > 1 and row.hearsay and row.identity_at)
        store.assert_clean()


def test_the_grace_begins_with_the_first_no() -> None:
    first = unheard_of(HEARD, "nobody", NOW_US)
    assert (first.identity_at, first.work, first.error) == (NOW_US, Work.RESOLVE, f"{GONE}: nobody")
    later = unheard_of(first, "still nobody", NOW_US + 5_000_000)
    assert later.identity_at == NOW_US
    assert grace_left(later, NOW_US + 5_000_000, 60.0) == 55.0
    assert grace_left(later, NOW_US + 60_000_000, 60.0) == 0.0
    assert grace_left(later, NOW_US - 90_000_000, 60.0) == 60.0  # our clock was set back
    assert grace_left(HEARD, NOW_US, 60.0) == 0.0


async def test_a_slow_answer_is_taken_though_another_said_no_meanwhile(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        await node.ingest.stop()
        resolver, answers = node.backfill.tools.resolver, node.ingest._drainer._answers
        identity = await resolver.resolve(forge.did)

        def step(tx: Transaction) -> RepoRow | None:
            tx.set_repo(forge.did, unheard_of(HEARD, "nobody", tx.now_us))
            answers.learned(tx, forge.did, identity)
            return tx.repo(forge.did)

        row = await node.writer.run("slow", step)
        assert row is not None
        assert (row.signing_key, row.hearsay, row.error) == (forge.key, False, "")
