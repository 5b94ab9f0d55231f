"""The check finds each kind of damage and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from indexer.store import check as module
from indexer.store import keyspaces
from indexer.store.check import check
from indexer.store.codecs import AccountStatus, Event, encode_event
from indexer.store.keyspaces import BLOCK_REFS, BLOCKS, COUNTS, EVENTS, GC_QUEUE, PENDING, RECORDS, REPOS
from indexer.store.transaction import Transaction
from tests.store.support import ALICE, BOB, LIKE, POST, REV, SYNCED, Store, block_of, cid_of, opened

ONE = cid_of(block_of("one"))


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
        assert [check(store.db, did).problems for did in (None, short, longer, ALICE)] == [[]] * 4
        await store.do(lambda tx: tx.add_count(f"did/{longer}/{LIKE}", 1))
        assert check(store.db, short).clean
        assert check(store.db, longer).problems == [f"counts: did/{longer}/{LIKE} says 1, a recount 0"]


DAMAGE: dict[str, tuple[Callable[[Transaction], None], str]] = {
    "lost block": (lambda tx: tx.delete(BLOCKS, (ALICE, ONE)), "blocks: .* is missing"),
    "rotten block": (lambda tx: tx.put(BLOCKS, (ALICE, ONE), b"rot"), "does not hash"),
    "stray block": (lambda tx: tx.put(BLOCKS, (ALICE, b"x" * 36), b"x"), "neither counted nor queued"),
    "count too high": (lambda tx: tx.put(BLOCK_REFS, (ALICE, ONE), 3), "counted 3 times, referred to 2"),
    "count lost": (lambda tx: tx.delete(BLOCK_REFS, (ALICE, ONE)), "counted 0 times"),
    "record lost": (lambda tx: tx.delete(RECORDS, (ALICE, POST)), "referred to 1 times"),
    "total wrong": (lambda tx: tx.put(COUNTS, "records", 9), "counts: records says 9, a recount 3"),
    "repository total wrong": (lambda tx: tx.put(COUNTS, "repos", 9), "counts: repos says 9"),
    "buffer total wrong": (lambda tx: tx.delete(COUNTS, "buffer/bytes"), "counts: buffer/bytes says 0"),
    "not queued": (lambda tx: tx.delete(PENDING, (50, ALICE)), "due at 50 but not queued"),
    "queued twice": (lambda tx: tx.put(PENDING, (60, ALICE), None), "queued for 60"),
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
        assert check(store.db) == ([], 1, 3, 3, 3)


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
        monkeypatch.setattr(module, "_PARTITION_ROWS", 1)
        assert check(store.db) == ([], 1, 3, 3, 3)
        await store.do(DAMAGE["count lost"][0], DAMAGE["stray block"][0])
        assert len(check(store.db).problems) == 2


async def test_a_queued_block_of_count_zero_is_in_order(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await filled(store)
        stray = (ALICE, b"x" * 36)
        await store.do(lambda tx: tx.put(BLOCKS, stray, b"x"), lambda tx: tx.put(GC_QUEUE, stray, None))
        assert check(store.db).clean
