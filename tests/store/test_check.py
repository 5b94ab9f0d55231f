"""The check finds each kind of damage and nothing else."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from indexer.store import demand, keyspaces
from indexer.store.check import check
from indexer.store.codecs import AccountStatus, Event, RecordRow, encode_event
from indexer.store.database import Database
from indexer.store.keyspaces import (
    BLOCK_REFS,
    BLOCKS,
    CHECKPOINT,
    COUNTS,
    CURSORS,
    EVENTS,
    GC_QUEUE,
    HEAD,
    HOLE,
    PENDING,
    RECORDS,
    REPOS,
)
from indexer.store.transaction import Transaction
from tests.store.support import ALICE, BOB, LIKE, POST, REV, SYNCED, Store, block_of, cid_of, founded, opened

ONE = cid_of(block_of("one"))
TWO = cid_of(block_of("two"))
ROW = RecordRow(ONE, REV, 0)
STRANGE: Any = "x"  # where a number belongs


async def filled(store: Store) -> None:
    await store.do(lambda tx: tx.set_repo(ALICE, SYNCED._replace(due=50)))
    await store.put(ALICE, POST, "one")
    await store.put(BOB, LIKE, "two")
    await store.checkpoint.run_once()
    await store.put(ALICE, LIKE, "three")
    await store.do(lambda tx: tx.buffer_frame(ALICE, REV, "commit", "s", b"frame"))


def stray_event(event_id: int, **changes: object) -> Callable[[Transaction], None]:
    event = Event(event_id, "account", True, 1, ALICE, 0, "", "", "", "", None, {})._replace(**changes)  # type: ignore[arg-type]
    return lambda tx: tx.put(EVENTS, event_id, encode_event(event))


def without(*events: int) -> Callable[[Transaction], None]:
    def delete(tx: Transaction) -> None:
        for event_id in events:
            tx.delete(EVENTS, event_id)

    return delete


async def test_a_repository_is_judged_by_its_own_rows_alone(tmp_path: Path) -> None:
    short, longer = "did:web:a.test", "did:web:a.test2"
    async with opened(tmp_path) as store:
        for did in (short, longer):
            await store.put(did, POST, did)
            await store.do(lambda tx, did=did: tx.buffer_frame(did, REV, "commit", "s", b"x"))  # type: ignore[misc]
        await store.do(lambda tx: tx.wipe_repo(longer, AccountStatus.DELETED))
        await store.put(longer, POST, "its second life")
        await store.checkpoint.run_once()
        await store.retention.run_once()
        assert [check(store.db, did).problems for did in (None, short, longer)] == [[]] * 3
        await store.do(lambda tx: tx.add_count(f"did/{longer}/{LIKE}", 1))
        assert check(store.db, short).clean
        assert check(store.db, longer).problems == [f"counts: did/{longer}/{LIKE} says 1, a recount 0"]


DAMAGE: dict[str, tuple[Callable[[Transaction], None], str]] = {
    "lost block": (lambda tx: tx.delete(BLOCKS, (ALICE, ONE)), "blocks: .* is missing"),
    "rotten block": (lambda tx: tx.put(BLOCKS, (ALICE, ONE), b"rot"), "does not hash"),
    "stray block": (lambda tx: tx.put(BLOCKS, (ALICE, b"x" * 36), b"x"), "neither counted nor queued"),
    "count too high": (lambda tx: tx.put(BLOCK_REFS, (ALICE, ONE), 3), "counted 3 times, referred to 2"),
    "count lost": (lambda tx: tx.delete(BLOCK_REFS, (ALICE, ONE)), "counted 0 times"),
    "other count lost": (lambda tx: tx.delete(BLOCK_REFS, (BOB, TWO)), "counted 0 times"),
    "row that counts nothing": (lambda tx: tx.put(BLOCK_REFS, (ALICE, b"x" * 36), 0), "counts nothing"),
    "row that holds no number": (lambda tx: tx.put(BLOCK_REFS, (ALICE, ONE), STRANGE), "counts nothing"),
    "rows left below the checkpoint": (
        lambda tx: tx.set_cursor(CHECKPOINT, 3),
        "reflog: rows 2 to 2 are left below the checkpoint at 3",
    ),
    "log rows lost": (lambda tx: tx.set_cursor(CHECKPOINT, 1), "reflog: rows 1 to 1 are missing"),
    "checkpoint below zero": (lambda tx: tx.set_cursor(CHECKPOINT, -1), "holds -1, no row of the log"),
    "record lost": (lambda tx: tx.delete(RECORDS, (ALICE, POST)), "referred to 1 times"),
    "total wrong": (lambda tx: tx.put(COUNTS, "records", 9), "counts: records says 9, a recount 3"),
    "repository total wrong": (lambda tx: tx.put(COUNTS, "repos", 9), "counts: repos says 9"),
    "buffer total wrong": (lambda tx: tx.delete(COUNTS, "buffer/bytes"), "counts: buffer/bytes says 0"),
    "total of nobody": (lambda tx: tx.put(COUNTS, f"did/did:web:x/{LIKE}", 4), "says 4, a recount 0"),
    "total no number": (lambda tx: tx.put(COUNTS, "records", STRANGE), "where a number belongs"),
    "repository of no row": (lambda tx: tx.put(RECORDS, ("did:web:x", POST), ROW), "did:web:x has records"),
    "blocks of no row": (lambda tx: tx.put(BLOCKS, ("did:web:x", ONE), b"x"), "did:web:x has blocks"),
    "not queued": (lambda tx: tx.delete(PENDING, (50, ALICE)), "due at 50 but not queued"),
    "queued twice": (lambda tx: tx.put(PENDING, (60, ALICE), None), "queued for 60"),
    "events missing": (lambda tx: tx.delete(EVENTS, 2), "events: id 2 is missing"),
    "newest events missing": (without(2, 3), "events: ids 2 to 3 are missing"),
    "head's time behind": (lambda tx: tx.put(CURSORS, HEAD, [4, 5]), "the head's time 5 is before"),
    "head no position": (lambda tx: tx.put(CURSORS, HEAD, "x"), "holds 'x', not"),
    "floor above the head": (lambda tx: tx.set_cursor(keyspaces.FLOOR, 9), "the floor 9 is above the head 4"),
    "event lost": (lambda tx: tx.delete(EVENTS, 2), "counts: events"),
    "event beyond the head": (stray_event(99, time_us=2**60), "outside floor 1 and head 4"),
    "time goes back": (stray_event(3), "not after that of"),
    "event of a strange epoch": (stray_event(3, time_us=2**60, epoch=4), "of epoch 4"),
    "event does not decode": (lambda tx: tx.put(EVENTS, 3, b"\xc1"), "events: row 3 does not decode"),
    "floor too high": (lambda tx: tx.set_cursor(keyspaces.FLOOR, 2), "outside floor 2"),
}


async def test_a_sound_store_is_clean(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await filled(store)
        assert check(store.db).clean
        assert check(store.db) == ([], 2, 3, 3, 3, 0)


@pytest.mark.parametrize("kind", DAMAGE)
async def test_damage_is_found(tmp_path: Path, kind: str) -> None:
    damage, match = DAMAGE[kind]
    async with opened(tmp_path) as store:
        await filled(store)
        await store.do(damage)
        problems = check(store.db).problems
        assert problems
        assert any(re.search(match, problem) for problem in problems), problems


async def test_a_row_that_does_not_decode_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await filled(store)
        store.db.family(REPOS.name)[ALICE.encode()] = b"\xc1"
        assert "does not decode" in check(store.db).problems[0]


async def test_one_repository_can_be_checked_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await filled(store)
        await store.do(lambda tx: tx.delete(BLOCKS, (ALICE, ONE)), lambda tx: tx.put(COUNTS, "repos", 9))
        assert len(check(store.db, ALICE).problems) == 1
        assert check(store.db, BOB).problems == []
        assert check(store.db, BOB).records == 1


async def test_partitions_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        await filled(store)
        monkeypatch.setattr(demand, "_PARTITION_ROWS", 1)
        assert check(store.db) == ([], 2, 3, 3, 3, 0)
        await store.do(DAMAGE["count lost"][0], DAMAGE["stray block"][0], DAMAGE["other count lost"][0])
        found = check(store.db)
        assert (len(found.problems), found.repairable, found.blocks) == (3, 2, 3)


async def test_a_queued_block_of_count_zero_is_in_order(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await filled(store)
        stray = (ALICE, b"x" * 36)
        await store.do(lambda tx: tx.put(BLOCKS, stray, b"x"), lambda tx: tx.put(GC_QUEUE, stray, None))
        assert check(store.db).clean


async def test_an_unknown_repository_is_said_to_be_unknown(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await filled(store)
        found = check(store.db, "did:web:nobody.test")
        assert found.problems == [
            "repos: did:web:nobody.test is unknown here: it has no row, no record and no block"
        ]
        await store.do(DAMAGE["repository of no row"][0])
        assert [text for text in check(store.db, "did:web:x").problems if "unknown" in text] == []


async def test_ids_may_be_missing_where_a_hole_is_announced_or_a_life_ended(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for number in range(6):
            await store.put(ALICE, f"a.b.c/{number}", str(number))
        await store.put(BOB, POST, "other")
        await store.do(lambda tx: tx.wipe_repo(ALICE, AccountStatus.DELETED))
        await store.checkpoint.run_once()
        assert (await store.retention.run_once()).swept == 6  # the first of the log, of which nothing tells
        store.assert_clean()
        await store.put(BOB, LIKE, "after it")  # event 9
        await store.put(BOB, LIKE, "and again")
        await store.put(BOB, LIKE, "and once more")
        await store.do(lambda tx: tx.delete(EVENTS, 9), lambda tx: tx.delete(EVENTS, 10))
        assert "events: ids 9 to 10 are missing, and no hole is announced there" in check(store.db).problems
        await store.do(lambda tx: tx.set_cursor(f"{HOLE}10", 11))
        assert "events: id 9 is missing, and no hole is announced there" in check(store.db).problems
        await store.do(lambda tx: tx.set_cursor(f"{HOLE}9", 10))
        assert not [text for text in check(store.db).problems if "missing" in text]
        await store.do(lambda tx: tx.put(CURSORS, f"{HOLE}x", 11), lambda tx: tx.delete(EVENTS, 7))
        assert "no hole of the log" in str(check(store.db).problems)


async def test_a_check_changes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await filled(store)

    def dump() -> list[list[tuple[bytes, bytes]]]:
        with Database.open(tmp_path / "db") as db:
            return [list(db.raw_scan(name, None, None)) for name in keyspaces.KEYSPACES]

    before = dump()
    with Database.open(tmp_path / "db") as db:
        assert check(db).clean
    assert dump() == before


async def test_memory_does_not_grow_with_records_and_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "_BUCKETS", 64)  # all are in use at once

    def peak() -> int:
        tracemalloc.start()
        try:
            assert check(store.db).clean
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    async def load(start: int, stop: int) -> None:
        for first in range(start, stop, 500):
            texts = [(f"a.b.c/{number:06}", block_of(str(number))) for number in range(first, first + 500)]
            records = [(path, cid_of(block), block, 0) for path, block in texts]
            await store.do(lambda tx, records=records: tx.put_records(ALICE, REV, records, live=False))  # type: ignore[misc]
        await store.checkpoint.run_once()  # what is not folded is kept in memory

    async with opened(tmp_path) as store:
        await store.do(lambda tx: founded(tx, ALICE))
        await load(0, 1000)
        before = peak()
        await load(1000, 5000)
        assert peak() - before < 100_000  # a block that is kept takes some 200 bytes
