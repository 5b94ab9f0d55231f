"""Repair sets counts and references to a recount, and touches nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.errors import StoreCorrupt
from indexer.store.check import check
from indexer.store.codecs import Mode
from indexer.store.database import Database
from indexer.store.keyspaces import (
    BLOCK_REFS,
    BLOCKS,
    COUNTS,
    EVENTS,
    FLOOR,
    GC_QUEUE,
    RECORDS,
)
from indexer.store.raw import Change, RawRows
from indexer.store.repair import Repaired, repair
from tests.store.support import ALICE, BOB, LIKE, POST, SYNCED, block_of, cid_of, opened, settings_of
from tests.store.test_check import DAMAGE, ONE, filled

SETTINGS = settings_of()
MENDED = [
    "row that counts nothing",
    "row that holds no number",
    "rows left below the checkpoint",
    "total of nobody",
    "count too high",
    "count lost",
    "record lost",
    "total wrong",
    "repository total wrong",
]


async def damaged(path: Path, *kinds: str) -> None:
    async with opened(path) as store:
        await filled(store)
        await store.do(*[DAMAGE[kind][0] for kind in kinds])
        assert not check(store.db).clean


def rows(db: Database) -> list[tuple[bytes, bytes]]:
    return [row for keyspace in (RECORDS, EVENTS, BLOCKS) for row in db.raw_scan(keyspace.name, None, None)]


@pytest.mark.parametrize("kind", [*MENDED, "buffer total wrong"])
async def test_wrong_counts_are_set_and_content_stays(tmp_path: Path, kind: str) -> None:
    await damaged(tmp_path, kind)
    with Database.open(tmp_path / "db") as db:
        before = rows(db)
        assert sum(await repair(db, SETTINGS)) > 0
        assert check(db).problems == []
        assert rows(db) == before
        assert await repair(db, SETTINGS) == Repaired(0, 0)


async def test_a_count_that_comes_to_zero_is_queued(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")
        await store.delete(ALICE, POST)
        await store.do(
            lambda tx: tx.delete(EVENTS, 1),
            lambda tx: tx.add_count("events", -1),
            lambda tx: tx.set_cursor(FLOOR, 2),
        )
    with Database.open(tmp_path / "db") as db:
        assert (await repair(db, SETTINGS)).references == 1
        assert [key for key, _ in db.scan(GC_QUEUE)] == [(ALICE, ONE)]
        assert db.block(ALICE, ONE) is not None
        assert check(db).clean


async def test_a_block_neither_counted_nor_queued_stays_and_stays_reported(tmp_path: Path) -> None:
    await damaged(tmp_path, "stray block", "count lost")
    with Database.open(tmp_path / "db") as db:
        await repair(db, SETTINGS)
        (problem,) = check(db).problems
        assert "neither counted nor queued" in problem


async def test_one_repository_is_repaired_alone(tmp_path: Path) -> None:
    await damaged(tmp_path, "count too high")
    with Database.open(tmp_path / "db") as db:
        two = (BOB, cid_of(block_of("two")))
        RawRows(db).commit([(BLOCK_REFS.name, BLOCK_REFS.key.encode(two), BLOCK_REFS.value.encode(9))])
        assert await repair(db, SETTINGS, ALICE) == Repaired(1, 0)
        assert check(db, ALICE).clean
        assert len(check(db).problems) == 1


async def test_nothing_is_let_go_while_events_do_not_decode(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await filled(store)
        await store.do(lambda tx: tx.put(EVENTS, 2, b"\xc1"))
    with Database.open(tmp_path / "db") as db:
        with pytest.raises(StoreCorrupt, match="1 events do not decode"):
            await repair(db, SETTINGS)
        assert db.get(BLOCK_REFS, (BOB, cid_of(block_of("two")))) == 2


async def test_lost_references_come_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.store.repair._BATCH", 3)
    async with opened(tmp_path) as store:
        await store.do(lambda tx: tx.set_repo(ALICE, SYNCED))
        for number in range(10):
            await store.put(ALICE, f"a.b.c/{number}", str(number % 4))
        await store.checkpoint.run_once()
    with Database.open(tmp_path / "db") as db:
        expected = list(db.scan(BLOCK_REFS))
        lost: list[Change] = [
            (keyspace.name, key, None)
            for keyspace in (BLOCK_REFS, COUNTS)
            for key, _ in db.raw_scan(keyspace.name, None, None)
        ]
        RawRows(db).commit(lost)
        assert (await repair(db, SETTINGS)).references == 4
        assert list(db.scan(BLOCK_REFS)) == expected
        assert check(db).clean


async def test_an_index_only_database_has_totals_alone(tmp_path: Path) -> None:
    async with opened(tmp_path, mode=Mode(blocks=False)) as store:
        await store.put(ALICE, LIKE, "one")
        await store.do(lambda tx: tx.put(COUNTS, "records", 5))
    with Database.open(tmp_path / "db") as db:
        assert await repair(db, SETTINGS) == Repaired(0, 1)


async def test_a_check_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.store.check._PROGRESS_ROWS", 1)
    async with opened(tmp_path) as store:
        await filled(store)
        told: list[tuple[int, int]] = []
        assert check(store.db, progress=lambda done, total: told.append((done, total))).clean
        assert [done for done, _ in told] == list(range(1, len(told) + 1))
        assert told[0][1] > 10
