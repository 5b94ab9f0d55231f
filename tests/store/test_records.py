"""put_record and delete_record keep rows, blocks, references, counts and events in step, in every mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.store.check import check
from indexer.store.codecs import INVALID, OVERSIZE, Mode
from indexer.store.keyspaces import BLOCKS, RECORDS, REFLOG
from tests.store.support import ALICE, BOB, LIKE, POST, REV, SYNCED, block_of, cid_of, founded, opened

POSTS = "app.bsky.feed.post"


async def test_create_update_delete(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        first = await store.put(ALICE, POST, "one", rev="3ka")
        second = await store.put(ALICE, POST, "two", rev="3kb")
        assert await store.delete(ALICE, POST, rev="3kc")
        events = store.events()
        assert [(e.id, e.action, e.cid, e.rev) for e in events] == [
            (1, "create", first, "3ka"), (2, "update", second, "3kb"), (3, "delete", None, "3kc"),
        ]  # fmt: skip
        assert {(e.kind, e.did, e.collection, e.rkey, e.live) for e in events} == {
            ("record", ALICE, POSTS, "3kaaaaaaaaa2a", True)
        }
        assert store.db.record(ALICE, POST) is None
        assert store.log.blocks(events) == [block_of("one"), block_of("two"), None]
        assert store.db.counts("records") == {}
        store.assert_clean()


async def test_the_row_tells_cid_and_the_rev_of_arrival(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        cid = await store.put(ALICE, POST, "one", rev="3ka")
        await store.put(ALICE, POST, "one", rev="3kb")
        assert store.db.record(ALICE, POST) == (cid, "3ka", 0)


async def test_the_version_already_stored_is_no_event(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")
        await store.put(ALICE, POST, "one")
        assert store.actions() == ["create"]
        store.assert_clean()


async def test_deleting_what_is_not_there_is_no_event(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        assert not await store.delete(ALICE, POST)
        assert store.events() == []


async def test_identical_records_share_a_block_within_a_repository_only(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "same")
        await store.put(ALICE, LIKE, "same")
        await store.put(BOB, POST, "same")
        assert len(list(store.db.scan(BLOCKS))) == 2
        store.assert_clean()


async def test_counts_by_collection_and_repository(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for number in range(3):
            await store.put(ALICE, f"{POSTS}/{number}", str(number))
        await store.put(BOB, f"{POSTS}/1", "x")
        await store.put(BOB, LIKE, "y")
        await store.delete(ALICE, f"{POSTS}/0")
        assert store.db.counts("records") == {
            "records": 4, f"records/{POSTS}": 3, "records/app.bsky.feed.like": 1,
        }  # fmt: skip
        assert store.db.counts(f"did/{ALICE}/") == {f"did/{ALICE}/{POSTS}": 2}
        assert store.db.count("events") == 6
        store.assert_clean()


async def test_one_log_row_a_commit_with_all_its_changes(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        first = cid_of(block_of("one"))
        second = cid_of(block_of("two"))
        await store.do(
            lambda tx: founded(tx, ALICE),
            lambda tx: tx.put_record(ALICE, POST, first, block_of("one"), REV, live=True),
            lambda tx: tx.put_record(ALICE, POST, second, block_of("two"), REV, live=True),
            lambda tx: tx.delete_record(ALICE, POST, REV, live=True),
        )
        [(row, changes)] = store.db.scan(REFLOG)
        assert row == 0
        assert changes == [(ALICE, 0, {first: 1, second: 1})]
        store.assert_clean()


async def test_an_invalid_record_keeps_row_and_block_but_is_not_served(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        cid = await store.put(ALICE, POST, "bad", flags=INVALID)
        row = store.db.record(ALICE, POST)
        assert row == (cid, REV, INVALID)
        assert row is not None
        assert not row.served
        assert store.events() == []
        assert store.db.count("records") == 0
        assert store.db.block(ALICE, cid) is not None
        store.assert_clean()


async def test_an_oversize_record_keeps_its_row_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        cid = await store.put(ALICE, POST, "huge", flags=OVERSIZE)
        assert store.db.record(ALICE, POST) == (cid, REV, OVERSIZE)
        assert store.db.block(ALICE, cid) is None
        assert list(store.db.scan(REFLOG)) == []
        store.assert_clean()
        await store.do(lambda tx: tx.set_repo(ALICE, SYNCED._replace(complete=True)))
        assert "marked complete" in check(store.db).problems[0]


@pytest.mark.parametrize("flag", [INVALID, OVERSIZE])
async def test_a_flagged_version_deletes_the_served_one_and_the_next_is_a_create(
    tmp_path: Path, flag: int
) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "good")
        await store.put(ALICE, POST, "bad", flags=flag)
        assert store.db.count("records") == 0
        await store.put(ALICE, POST, "worse", flags=flag)
        await store.put(ALICE, POST, "good again")
        assert store.actions() == ["create", "delete", "create"]
        assert store.db.count("records") == 1
        store.assert_clean()


@pytest.mark.parametrize("flag", [INVALID, OVERSIZE])
async def test_deleting_a_flagged_record_is_silent(tmp_path: Path, flag: int) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "bad", flags=flag)
        assert await store.delete(ALICE, POST)
        assert store.events() == []
        assert store.db.record(ALICE, POST) is None
        store.assert_clean()


async def test_the_same_bytes_found_valid_later_are_a_create(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "text", flags=INVALID)
        await store.put(ALICE, POST, "text")
        assert store.actions() == ["create"]
        store.assert_clean()


async def test_something_else_than_a_binary_cid_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        with pytest.raises(ValueError, match="not a binary CID"):
            await store.do(lambda tx: tx.put_record(ALICE, POST, b"bafy", b"", REV, live=True))
        assert store.events() == []


async def test_ephemeral_mode_keeps_the_log_and_its_blocks_only(tmp_path: Path) -> None:
    async with opened(tmp_path, mode=Mode(ephemeral=True)) as store:
        one, two = block_of("one"), block_of("two")
        await store.do(
            lambda tx: founded(tx, ALICE),
            lambda tx: tx.put_record(ALICE, POST, cid_of(one), one, REV, live=True, action="create"),
            lambda tx: tx.put_record(ALICE, POST, cid_of(two), two, REV, live=True, action="update"),
            lambda tx: tx.put_record(
                ALICE, POST, cid_of(two), b"", REV, live=True, flags=OVERSIZE, action="update"
            ),
            lambda tx: tx.delete_record(ALICE, LIKE, REV, live=True),
        )
        assert store.actions() == ["create", "update", "delete", "delete"]
        assert list(store.db.scan(RECORDS)) == []
        assert store.log.blocks(store.events())[:2] == [one, two]
        assert store.db.count("records") == 0
        store.assert_clean()


async def test_index_only_mode_keeps_no_blocks(tmp_path: Path) -> None:
    async with opened(tmp_path, mode=Mode(blocks=False)) as store:
        cid = await store.put(ALICE, POST, "one")
        assert store.db.record(ALICE, POST) == (cid, REV, 0)
        assert list(store.db.scan(BLOCKS)) == []
        assert list(store.db.scan(REFLOG)) == []
        assert store.log.blocks(store.events()) == [None]
        store.assert_clean()
