"""Upkeep that stays within bounds: closing, compaction, watermarks, quarantine, wipes, errors."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from indexer.errors import StoreBusy, StoreCorrupt, StoreError, StoreFull, StoreLocked
from indexer.store.codecs import AccountStatus, QuarantineRow
from indexer.store.database import Database
from indexer.store.keyspaces import BLOCKS, QUARANTINE, QUARANTINE_NEXT, REFUSED
from indexer.store.rocks import translate
from indexer.store.transaction import Transaction
from tests.store.support import ALICE, BOB, POST, Clock, Store, block_of, cid_of, opened, put_step

DELETED = AccountStatus.DELETED
DAY = 86_400


# ---- closing


class Gate:
    """Holds compactions until it opens, as a long one would last; cancelling the work opens it."""

    def __init__(self, family: Any, inner: Any) -> None:
        self._family, self._inner = family, inner
        self.entered, self.open = threading.Event(), threading.Event()
        self.at_work = False
        self.closed_at_work = False

    def compact_range(self, *bounds: Any) -> None:
        self.at_work = True
        self.entered.set()
        assert self.open.wait(20)
        threading.Event().wait(0.1)  # it does not end at once
        self._family.compact_range(*bounds)
        self.at_work = False

    def close(self) -> None:
        self.closed_at_work = self.at_work
        self._family.close()

    def cancel_all_background(self, wait: bool) -> None:
        self._inner.cancel_all_background(wait)
        self.open.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)


class Whole:
    """The database's own handle, so that its cancelling reaches the gate."""

    def __init__(self, inner: Any, gate: Gate) -> None:
        self._inner, self._gate = inner, gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gate if name == "cancel_all_background" else self._inner, name)


async def test_closing_waits_for_a_compaction_that_its_caller_gave_up(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")
        db = store.db
        gate = Gate(db._families[BLOCKS.name], db._rocks)
        db._families[BLOCKS.name] = gate
        db._rocks = Whole(db._rocks, gate)
        task = asyncio.create_task(asyncio.to_thread(db.compact, BLOCKS))
        await asyncio.to_thread(gate.entered.wait, 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert gate.open.is_set()
    assert not gate.closed_at_work
    with pytest.raises(StoreError, match="closed"):
        db.compact(BLOCKS)
    async with opened(tmp_path) as store:
        assert store.db.block(ALICE, cid_of(block_of("one"))) == block_of("one")
        store.assert_clean()


async def test_closing_reaches_the_end_whatever_a_part_says(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")
    db = Database.open(tmp_path / "db")
    db._families["records"].close()

    class Broken:
        def close(self) -> None:
            raise Exception("IO error: Input/output error")

    db._families["records"] = Broken()
    with pytest.raises(StoreError, match="closing"):
        db.close()
    Database.open(tmp_path / "db").close()


# ---- compaction


async def reclaim(store: Store, clock: Clock, did: str, count: int) -> None:
    def churn(tx: Transaction) -> None:
        for number in range(count):
            put_step(did, f"a.b.c/dead{number}", f"{did} {number}")(tx)
            tx.delete_record(did, f"a.b.c/dead{number}", "3kc", live=True)

    await store.do(churn)
    await store.retention.run_once()
    clock.forward(4000)
    await store.retention.run_once()
    await store.checkpoint.run_once()


async def test_dead_blocks_among_many_living_are_left_to_the_collectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, ranges = Clock(), []
    async with opened(tmp_path, clock=clock, events={"retention": 3600}, gc={"compact_after": 10}) as store:

        def noted(_db: Database, _keyspace: object, start: bytes | None, stop: bytes | None) -> None:
            ranges.append((start, stop))

        monkeypatch.setattr(Database, "compact", noted)
        for did in (ALICE, BOB):
            await store.do(*(put_step(did, f"a.b.c/{n}", f"{did} live {n}") for n in range(100)))
        await reclaim(store, clock, ALICE, 8)
        await reclaim(store, clock, BOB, 8)
        report = await store.gc.run_once()
        assert (report.reclaimed, report.compacted, ranges) == (16, False, [])
        did = "did:plc:c"
        await reclaim(store, clock, did, 12)
        assert (await store.gc.run_once()).compacted
        assert ranges == [(did.encode() + b"\0", did.encode() + b"\1")]
        await reclaim(store, clock, BOB, 300)
        assert (await store.gc.run_once()).compacted
        assert ranges[1:] == [(None, None)]


# ---- watermarks


async def test_watermarks_are_few_however_often_a_pass_is_made(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock, events={"retention": 1024}) as store:
        for number in range(20):
            await store.put(ALICE, f"a.b.c/{number}", str(number))
            await store.retention.run_once()
            clock.forward(0.25)
        assert len(store.retention.watermarks()) == 5


async def test_a_pass_reads_no_more_than_the_marks_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock, events={"retention": DAY}) as store:
        for number in range(50):
            await store.put(ALICE, f"a.b.c/{number}", str(number))
            await store.retention.run_once()
            clock.forward(100)
        scan, read = Database.raw_scan, []

        def counted(db: Database, name: str, *bounds: Any) -> Any:
            for row in scan(db, name, *bounds):
                read.append(name)
                yield row

        monkeypatch.setattr(Database, "raw_scan", counted)
        await store.retention.run_once()
        assert read.count("cursors") <= 2


async def test_a_prune_is_made_while_a_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    async with opened(
        tmp_path, clock=clock, events={"retention": 100}, gc={"step_rows": 1, "ttl_interval": 1e-6}
    ) as store:
        for number in range(5):
            await store.put(ALICE, f"a.b.c/{number}", str(number))
            await store.put(BOB, f"a.b.c/{number}", str(number))
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        await store.checkpoint.run_once()
        await store.retention.run_once()
        for number in range(3):
            await store.put(ALICE, f"a.b.c/{number}", str(number))
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        await store.checkpoint.run_once()
        sweeper = store.retention._sweeper
        between, floors = sweeper._between, []

        async def later() -> None:
            await between()
            floors.append(store.log.floor)
            clock.forward(101)

        monkeypatch.setattr(sweeper, "_between", later)
        await store.retention.run_once()
        assert floors[0] < floors[-1]
        store.assert_clean()


# ---- quarantine


def refused(tx: Transaction, did: str, count: int, size: int = 10, source: str = "s") -> None:
    for number in range(count):
        tx.quarantine(source, number, did, "r", "", b"x" * size)


async def test_a_ring_that_was_made_shorter_is_trimmed(tmp_path: Path) -> None:
    async with opened(tmp_path, store={"quarantine_entries": 50}) as store:
        await store.do(lambda tx: refused(tx, ALICE, 70))
    async with opened(tmp_path, store={"quarantine_entries": 5}, gc={"step_rows": 7}) as store:
        await store.do(lambda tx: refused(tx, ALICE, 2))
        await store.retention.run_once()
        assert [number for number, _ in store.db.scan(QUARANTINE)] == [67, 68, 69, 70, 71]


def of_source(store: Store) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for _, row in store.db.scan(QUARANTINE):
        found.setdefault(row.source, []).append(row.seq)
    return found


async def test_who_is_refused_most_loses_his_own_frames(tmp_path: Path) -> None:
    async with opened(tmp_path, store={"quarantine_entries": 12}) as store:
        await store.do(lambda tx: refused(tx, ALICE, 4, source="honest"))
        for _ in range(3):
            await store.do(lambda tx: refused(tx, ALICE, 30, source="liar"))
        assert of_source(store) == {"honest": [0, 1, 2, 3], "liar": list(range(22, 30))}
    async with opened(tmp_path, store={"quarantine_entries": 12}) as store:  # the shares are durable
        await store.do(lambda tx: refused(tx, ALICE, 9, source="honest"))
        assert of_source(store) == {"honest": [3, *range(9)][-6:], "liar": list(range(24, 30))}
        await store.do(lambda tx: refused(tx, BOB, 4, source="third"))
        assert {source: len(seqs) for source, seqs in of_source(store).items()} == {
            "honest": 4, "liar": 4, "third": 4,
        }  # fmt: skip
        assert sum(1 for _ in store.db.scan(REFUSED)) == 12


async def test_frames_from_before_there_were_shares_leave_one_by_one(tmp_path: Path) -> None:
    async with opened(tmp_path, store={"quarantine_entries": 5}) as store:

        def as_before(tx: Transaction) -> None:
            for number in range(2, 7):
                tx.put(QUARANTINE, number, QuarantineRow(0, "s", number, ALICE, "r", "", 1, b"x"))
            tx.set_cursor(QUARANTINE_NEXT, 7)

        await store.do(as_before)
        await store.do(lambda tx: refused(tx, ALICE, 3))
        assert [number for number, _ in store.db.scan(QUARANTINE)] == [5, 6, 7, 8, 9]
        await store.do(lambda tx: refused(tx, ALICE, 6))
        assert [number for number, _ in store.db.scan(QUARANTINE)] == [11, 12, 13, 14, 15]


async def test_a_sweep_reads_the_quarantine_outside_the_writers_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexer.store.sweep.STEP_AIM_S", 0)  # every step reads one row
    async with opened(tmp_path) as store:
        await store.do(lambda tx: refused(tx, ALICE, 3), lambda tx: refused(tx, BOB, 3))
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        await store.do(lambda tx: refused(tx, ALICE, 1))
        await store.do(lambda tx: tx.wipe_repo("did:plc:c", DELETED))
        before = store.writer.stats.names.get("retention", 0)
        await store.retention.run_once()
        assert [number for number, _ in store.db.scan(QUARANTINE)] == [3, 4, 5, 6]
        # the events, the frames one by one, the end
        assert store.writer.stats.names["retention"] - before == 1 + 3 + 1


# ---- wipes


async def test_a_large_wipe_looks_at_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path, gc={"wipe_point_rows": 30}) as store:
        for did, records in ((ALICE, 11), (BOB, 5)):
            await store.do(*(put_step(did, f"a.b.c/{n}", str(n)) for n in range(records)))
        await store.checkpoint.run_once()
        scan, keys, read = Database.raw_scan, Database.raw_keys, []

        def scanned(db: Database, name: str, *bounds: Any) -> Any:
            read.append(name)
            return scan(db, name, *bounds)

        def listed(db: Database, name: str, *bounds: Any) -> Any:
            read.append(f"keys of {name}")
            return keys(db, name, *bounds)

        monkeypatch.setattr(Database, "raw_scan", scanned)
        monkeypatch.setattr(Database, "raw_keys", listed)
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        assert not {"records", "blocks", "block_refs", "keys of blocks"} & set(read)
        await store.do(lambda tx: tx.wipe_repo(BOB, DELETED))
        assert "keys of blocks" in read
        assert not {"records", "blocks", "block_refs"} & set(read)
        monkeypatch.undo()
        assert not list(store.db.scan(BLOCKS))
        store.assert_clean()


async def test_rows_that_were_only_read_are_not_kept_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexer.store.group._CACHED_REPOS", 10)
    async with opened(tmp_path) as store:
        for number in range(50):
            await store.do(lambda tx, number=number: tx.repo(f"did:web:{number}.test"))  # type: ignore[misc]
        assert len(store.writer._tx._repo_cache) <= 11


# ---- errors


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Exception("IO error: No space left on device: While appending to file: /LOCK/1.log: x"), StoreFull),
        (
            Exception("IO error: While appending to file: /Corruption/1.log: No space left on device"),
            StoreFull,
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), StoreFull),
        (Exception("IO error: While open a file for appending: /checksum-db/1.log: Permission denied"), None),
        (Exception("IO error: While open a file: /LOCK/1.log: Permission denied"), None),
        (Exception("IO error: While lock file: /db/LOCK: Resource temporarily unavailable"), StoreLocked),
        (
            Exception("IO error: lock hold by current process, acquire time 1: /db/LOCK: No locks"),
            StoreLocked,
        ),
        (Exception("Corruption: block checksum mismatch in /db/1.sst"), StoreCorrupt),
        (Exception("Result incomplete: Write stall"), StoreBusy),
    ],
)
def test_errors_are_told_by_their_status_not_by_paths(
    error: Exception, kind: type[StoreError] | None
) -> None:
    assert type(translate(error, "x")) is (kind or StoreError)


def test_what_rocksdb_says_is_told_once_on_one_line() -> None:
    error = Exception("Corruption: Corruption: IO error: no 1.sst\n  The MANIFEST is bad")
    assert str(translate(error, "opening /db")) == (
        "opening /db: the database is damaged: IO error: no 1.sst The MANIFEST is bad; restore a backup"
    )
