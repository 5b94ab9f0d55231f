"""Repository rows with `pending` and totals; wipes; what waits and what failed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from indexer.store import keyspaces
from indexer.store.codecs import NEW_REPO, AccountStatus, BufferedFrame, SyncState, did_range
from indexer.store.keyspaces import BLOCK_REFS, BLOCKS, GC_QUEUE, PENDING, QUARANTINE
from indexer.store.transaction import Transaction
from tests.store.support import ALICE, BOB, LIKE, POST, REV, SYNCED, Store, opened, put_step

DELETED = AccountStatus.DELETED


def queue(store: Store) -> list[tuple[int, str]]:
    return [key for key, _ in store.db.scan(PENDING)]


async def buffer(store: Store, rev: str, data: bytes) -> bool:
    return await store.writer.run("buffer", lambda tx: tx.buffer_frame(ALICE, rev, "commit", "s", data))


def refuse(seq: int, tx: Transaction) -> None:
    tx.quarantine("s", seq, ALICE, "car", "bad", b"x" * 5000)


async def test_totals_follow_state_status_and_tracking(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(
            lambda tx: tx.set_repo(ALICE, NEW_REPO._replace(tracked=True)),
            lambda tx: tx.set_repo(BOB, SYNCED),
        )
        await store.do(
            lambda tx: tx.set_repo(ALICE, SYNCED._replace(status=AccountStatus.TAKENDOWN, tracked=False))
        )
        assert store.db.counts("repos") == {
            "repos": 2, "repos/tracked": 1, "repos/state/synced": 2,
            "repos/status/active": 1, "repos/status/takendown": 1,
        }  # fmt: skip
        store.assert_clean()


HEARD = NEW_REPO._replace(tracked=True, due=50, work=1, hearsay=True)


async def test_a_row_of_which_nothing_ever_was_leaves_no_trace(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(lambda tx: (tx.count_homes(9), tx.count_deleted(9)))

        def heard(tx: Transaction) -> None:
            tx.set_repo(ALICE, HEARD)
            tx.set_account_word(ALICE, "s", AccountStatus.DEACTIVATED, False, 1, 2)
            assert tx.buffer_frame(ALICE, "3aaaaaaaaaa22", "commit", "s", b"frame", vouched=False)

        await store.do(heard)
        assert store.db.count("repos/hearsay") == 1

        def forget_and_undo(tx: Transaction) -> None:
            assert tx.forget_repo(ALICE)
            assert tx.repo(ALICE) is None
            raise ValueError("undone")

        with pytest.raises(ValueError, match="undone"):
            await store.do(forget_and_undo)
        assert store.db.repo(ALICE) == HEARD
        assert await store.writer.run("forget", lambda tx: tx.forget_repo(ALICE))
        assert store.db.repo(ALICE) is None
        assert (queue(store), store.db.account_words(ALICE), store.db.counts("repos")) == ([], [], {})
        assert store.db.counts("buffer/") == {}
        store.assert_clean()
        await store.do(lambda tx: tx.set_repo(ALICE, HEARD))  # and it may come again
        store.assert_clean()


@pytest.mark.parametrize(
    "changes",
    [
        {"signing_key": "did:key:z"},
        {"rev": "3aaaaaaaaaa22"},
        {"state": SyncState.BACKFILLING},
    ],
)
async def test_a_row_of_which_something_is_known_stays(tmp_path: Path, changes: dict[str, Any]) -> None:
    row = HEARD._replace(**changes)
    async with opened(tmp_path) as store:
        await store.do(lambda tx: tx.set_repo(ALICE, row))
        assert not await store.writer.run("forget", lambda tx: tx.forget_repo(ALICE))
        assert store.db.repo(ALICE) == row


@pytest.mark.parametrize("status", [AccountStatus.ACTIVE, AccountStatus.TAKENDOWN])
async def test_the_log_takes_back_what_it_said_of_a_forgotten_account(
    tmp_path: Path, status: AccountStatus
) -> None:
    """Whoever follows the log knows it as a row that is opened later begins: as active."""
    async with opened(tmp_path) as store:
        await store.do(lambda tx: tx.set_repo(ALICE, HEARD._replace(status=status)))
        assert await store.writer.run("forget", lambda tx: tx.forget_repo(ALICE))
        told = [(event.kind, event.did, event.fields) for event in store.events()]
        assert told == ([] if status.active else [("account", ALICE, {"active": True})])
        store.assert_clean()


async def test_a_row_with_records_or_an_earlier_life_stays(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(
            lambda tx: tx.set_repo(ALICE, HEARD),
            lambda tx: tx.set_repo(BOB, HEARD),
            put_step(ALICE, POST, "one"),
        )
        await store.do(lambda tx: tx.wipe_repo(BOB, AccountStatus.ACTIVE))
        for did in (ALICE, BOB, "did:plc:c"):
            assert not await store.writer.run("forget", partial(Transaction.forget_repo, did=did))
        assert store.db.repo(ALICE) == HEARD
        store.assert_clean()


async def test_deleted_accounts_are_counted_apart_also_in_an_older_database(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(
            lambda tx: tx.set_repo(ALICE, SYNCED), lambda tx: tx.set_repo(BOB, NEW_REPO),
            lambda tx: tx.wipe_repo(ALICE, AccountStatus.DELETED),
        )  # fmt: skip
        assert store.db.count("deleted") == 0  # as an older program left it
        while not await store.writer.run("count", lambda tx: tx.count_deleted(1)):
            store.assert_clean()
        assert store.db.count("deleted") == 1
        await store.do(lambda tx: tx.wipe_repo(BOB, AccountStatus.DELETED))
        assert store.db.count("deleted") == 2
        back = store.db.repo(ALICE)
        assert back is not None
        await store.do(lambda tx: tx.set_repo(ALICE, back._replace(status=AccountStatus.ACTIVE)))
        assert store.db.count("deleted") == 1
        store.assert_clean()


async def test_pending_follows_the_due_time(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(
            lambda tx: tx.set_repo(ALICE, SYNCED._replace(due=50)), lambda tx: tx.schedule(BOB, 20)
        )
        assert queue(store) == [(20, BOB), (50, ALICE)]
        await store.do(lambda tx: tx.schedule(ALICE, 10), lambda tx: tx.unschedule(BOB))
        assert queue(store) == [(10, ALICE)]
        assert store.db.repo(BOB) == NEW_REPO
        store.assert_clean()


async def test_a_row_of_an_earlier_life_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(lambda tx: tx.set_repo(ALICE, SYNCED))
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        with pytest.raises(ValueError, match="out of date"):
            await store.do(lambda tx: tx.set_repo(ALICE, SYNCED))


# ---- wipes: small ones by point deletes, large ones by range


@pytest.mark.parametrize("point_rows", [0, 1000])
async def test_a_wipe_ends_the_life_at_once(tmp_path: Path, point_rows: int) -> None:
    async with opened(tmp_path, gc={"wipe_point_rows": point_rows}) as store:
        await store.do(lambda tx: tx.set_repo(ALICE, SYNCED._replace(due=9, rev="3kz", handle="a.test")))
        await store.put(ALICE, POST, "one")
        await store.put(BOB, POST, "one")
        await store.checkpoint.run_once()
        cid = await store.put(ALICE, LIKE, "two")
        await store.do(lambda tx: tx.buffer_frame(ALICE, REV, "commit", "s", b"frame"))
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        assert store.db.records(ALICE) == []
        assert store.db.block(ALICE, cid) is None
        assert store.db.counts(f"did/{ALICE}") == {}
        assert store.db.counts("buffer") == {}
        assert queue(store) == []
        for keyspace in (BLOCKS, BLOCK_REFS, GC_QUEUE):
            assert [key for key, _ in store.db.raw_scan(keyspace.name, *did_range(ALICE))] == []
        row = store.db.repo(ALICE)
        assert row is not None
        assert (row.epoch, row.status, row.state, row.rev, row.due) == (1, DELETED, SyncState.PENDING, "", 0)
        assert row.handle == "a.test"
        [bobs, account] = store.events()
        assert (bobs.did, account.did) == (BOB, ALICE)
        assert (account.kind, account.epoch) == ("account", 1)
        assert account.fields == {"active": False, "status": "deleted"}
        assert len(store.db.records(BOB)) == 1
        store.assert_clean()


@pytest.mark.parametrize("point_rows", [0, 1000])
async def test_a_new_life_may_begin_in_the_very_same_function(tmp_path: Path, point_rows: int) -> None:
    async with opened(tmp_path, gc={"wipe_point_rows": point_rows}) as store:
        await store.put(ALICE, POST, "one")
        await store.put(ALICE, LIKE, "two")
        await store.do(
            put_step(ALICE, "a.b.c/same-group", "three"),
            lambda tx: tx.wipe_repo(ALICE, DELETED),
            lambda tx: tx.set_repo(ALICE, (tx.repo(ALICE) or SYNCED)._replace(status=AccountStatus.ACTIVE)),
            put_step(ALICE, POST, "one"),
            put_step(ALICE, "a.b.c/new", "four"),
        )
        assert [path for path, _ in store.db.records(ALICE)] == ["a.b.c/new", POST]
        assert store.actions() == ["account", "create", "create"]
        store.assert_clean()
        for _ in range(2):
            await store.checkpoint.run_once()
            await store.gc.run_once()
            await store.retention.run_once()
            store.assert_clean()
        assert store.writer.state.wipes.by_did == {}
        assert store.log.blocks(store.events())[1:] == [
            block for block in store.log.blocks(store.events())[1:] if block
        ]


@pytest.mark.parametrize("point_rows", [0, 1000])
async def test_the_wiping_function_itself_sees_nothing_of_the_old_life(
    tmp_path: Path, point_rows: int
) -> None:
    async with opened(tmp_path, gc={"wipe_point_rows": point_rows}) as store:
        cid = await store.put(ALICE, POST, "one")

        def wipe(tx: Transaction) -> None:
            tx.wipe_repo(ALICE, DELETED)
            assert tx.records(ALICE) == []
            assert tx.record(ALICE, POST) is None
            assert tx.block(ALICE, cid) is None
            assert tx.block_count(ALICE, cid) == 0
            assert tx.did_counts(ALICE) == {}
            put_step(ALICE, LIKE, "two")(tx)
            assert [path for path, _ in tx.records(ALICE)] == [LIKE]
            tx.wipe_repo(ALICE, DELETED)
            assert tx.records(ALICE) == []

        await store.writer.run("wipe", wipe)
        assert store.db.records(ALICE) == []
        assert [event.epoch for event in store.events()] == [2]
        store.assert_clean()


async def test_the_sweep_removes_the_events_of_the_old_life_only(tmp_path: Path) -> None:
    async with opened(tmp_path, gc={"step_rows": 1}) as store:
        for number in range(5):
            await store.put(ALICE, f"a.b.c/{number}", str(number))
            await store.put(BOB, f"a.b.c/{number}", str(number))
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        await store.put(ALICE, POST, "new life")
        assert store.db.count("events") == 12
        assert (await store.retention.run_once()).wipes == 0  # its log rows are not folded yet
        await store.checkpoint.run_once()
        report = await store.retention.run_once()
        assert (report.swept, report.wipes, report.pruned) == (5, 1, 0)
        assert store.db.count("events") == 7
        assert store.db.get(keyspaces.CURSORS, keyspaces.WIPE + ALICE) is None
        assert store.db.get(keyspaces.CURSORS, keyspaces.SWEEP) is None
        store.assert_clean()


async def test_a_wiped_life_stays_invisible_after_a_kill(tmp_path: Path) -> None:
    async with opened(tmp_path, clean=False) as store:
        await store.put(ALICE, POST, "one")
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        await store.put(ALICE, POST, "one")
    async with opened(tmp_path) as store:
        assert store.actions() == ["account", "create"]
        assert store.writer.state.refs.pending(ALICE, 0, store.events()[1].cid or b"") == 0
        store.assert_clean()
        await store.checkpoint.run_once()
        store.assert_clean()


async def test_a_second_wipe_takes_the_second_life(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for text in ("one", "two"):
            await store.put(ALICE, POST, text)
            await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        assert [event.epoch for event in store.events()] == [2]
        await store.checkpoint.run_once()
        assert (await store.retention.run_once()).swept == 3
        assert [event.epoch for event in store.events()] == [2]
        store.assert_clean()


async def test_wiping_what_was_never_seen_leaves_a_tombstone(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        row = store.db.repo(ALICE)
        assert row is not None
        assert (row.tracked, row.status, row.epoch) == (False, DELETED, 1)
        store.assert_clean()


async def test_the_sweep_takes_the_old_lifes_quarantine(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(
            lambda tx: tx.quarantine("s", 1, ALICE, "old", "", b""),
            lambda tx: tx.quarantine("s", 2, BOB, "x", "", b""),
        )
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        await store.do(lambda tx: tx.quarantine("s", 3, ALICE, "new", "", b""))
        await store.checkpoint.run_once()
        await store.retention.run_once()
        assert [row.reason for _, row in store.db.scan(QUARANTINE)] == ["x", "new"]


# ---- frames that wait


async def test_waiting_frames_come_back_in_order_and_go_up_to_a_rev(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:

        def fill(tx: Transaction) -> None:
            assert tx.buffer_frame(ALICE, "3kb", "sync", "a", b"3kb")
            assert tx.buffer_frame(ALICE, "3kb", "commit", "b", b"3kb")
            assert tx.buffer_frame(ALICE, "3ka", "commit", "a", b"3ka")

        await store.do(fill)
        await store.do(lambda tx: tx.buffer_frame(ALICE, "3kc", "commit", "a", b"later"))
        frames = await store.writer.run("read", lambda tx: tx.buffered(ALICE))
        assert [(f.rev, f.kind) for f in frames] == [
            ("3ka", "commit"), ("3kb", "commit"), ("3kb", "sync"), ("3kc", "commit"),
        ]  # fmt: skip
        assert await store.writer.run("size", lambda tx: tx.buffer_size(ALICE)) == (4, 14)
        assert await store.writer.run("drop", lambda tx: tx.drop_buffered(ALICE, "3kb")) == 3
        assert len(await store.writer.run("read", lambda tx: tx.buffered(ALICE, limit=9))) == 1
        assert await store.writer.run("drop", lambda tx: tx.drop_buffered(ALICE)) == 1
        assert store.db.counts("buffer") == {}
        store.assert_clean()


async def test_one_waiting_frame_is_dropped_as_long_as_it_is_the_one_that_was_read(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for data in (b"one", b"another"):
            await buffer(store, REV, data)
            await buffer(store, REV + "z", b"later")
        one, other, later = (
            BufferedFrame(rev, "commit", "s", data)
            for rev, data in ((REV, b"one"), (REV, b"another"), (REV + "z", b"later"))
        )

        async def waiting() -> list[BufferedFrame]:
            frames = await store.writer.run("read", lambda tx: tx.buffered(ALICE))
            assert frames == store.db.buffered(ALICE, 0, limit=9)
            assert all(frame.arrived and frame.vouched for frame in frames)
            return [frame._replace(arrived=0) for frame in frames]

        assert await waiting() == [other, later]
        await store.do(lambda tx: tx.drop_buffered_frame(ALICE, one))
        assert await waiting() == [other, later]
        await store.do(lambda tx: tx.drop_buffered_frame(ALICE, other))
        assert await waiting() == [later]
        assert await store.writer.run("size", lambda tx: tx.buffer_size(ALICE)) == (1, 5)
        store.assert_clean()


@pytest.mark.parametrize(
    "limit", [{"buffer_frames_per_repo": 2}, {"buffer_kib_per_repo": 1}, {"buffer_mib": 1}]
)
async def test_the_buffer_refuses_beyond_each_limit(tmp_path: Path, limit: dict[str, int]) -> None:
    size = 600_000 if "buffer_mib" in limit else 500
    async with opened(tmp_path, ingest=limit) as store:
        kept = [await buffer(store, f"3k{n}", b"x" * size) for n in range(4)]
        assert kept == ([True] + [False] * 3 if size > 500 else [True] * 2 + [False] * 2)
        store.assert_clean()


async def test_the_same_frame_again_takes_no_more_room(tmp_path: Path) -> None:
    async with opened(tmp_path, ingest={"buffer_frames_per_repo": 1}) as store:
        for data in (b"one", b"longer"):
            assert await buffer(store, REV, data)
        assert await store.writer.run("size", lambda tx: tx.buffer_size(ALICE)) == (1, 6)
        store.assert_clean()


# ---- quarantine, words, filter


async def test_the_quarantine_is_a_ring_of_cut_frames(tmp_path: Path) -> None:
    async with opened(tmp_path, store={"quarantine_entries": 3, "quarantine_entry_kib": 1}) as store:
        for number in range(5):
            await store.do(partial(refuse, number))
        rows = [row for _, row in store.db.scan(QUARANTINE)]
        assert [row.seq for row in rows] == [2, 3, 4]
        assert {(row.size, len(row.data)) for row in rows} == {(5000, 1024)}


async def test_account_words_are_kept_by_source(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(
            lambda tx: tx.set_account_word(ALICE, "wss://b", AccountStatus.SUSPENDED, False, 7, 70),
            lambda tx: tx.set_account_word(ALICE, "wss://a", AccountStatus.ACTIVE, True, 5, 50),
            lambda tx: tx.set_account_word(ALICE, "wss://b", AccountStatus.ACTIVE, True, 9, 90),
        )
        words = await store.writer.run("words", lambda tx: tx.account_words(ALICE))
        assert words == store.db.account_words(ALICE)
        assert [(word.source, word.seq, word.active) for word in words] == [
            ("wss://a", 5, True),
            ("wss://b", 9, True),
        ]


async def test_filter_rows_come_and_go(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(
            lambda tx: tx.set_filter("signals", "a.b.c"), lambda tx: tx.set_filter("mode", "full"),
            lambda tx: tx.set_filter("signals", "d.e.*"), lambda tx: tx.drop_filter("signals", "a.b.c"),
        )  # fmt: skip
        assert store.db.filters() == [("mode", "full"), ("signals", "d.e.*")]
        assert store.db.filters("signals") == [("signals", "d.e.*")]


async def test_cursors_can_be_removed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(lambda tx: tx.set_cursor("upstream", 5))

        def remove(tx: Transaction) -> int | None:
            tx.set_cursor("upstream", None)
            return tx.cursor("upstream")

        assert await store.writer.run("remove", remove) is None
        assert store.db.cursor("upstream") is None
