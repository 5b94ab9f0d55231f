"""One doorway: group commits, savepoints, order, backpressure, stalls, poison, durability."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from indexer.errors import BadInput, StoreBusy, StoreCorrupt, StoreError, StoreFull, WriterPoisoned
from indexer.store import keyspaces
from indexer.store.codecs import AccountStatus
from indexer.store.keyspaces import CURSORS
from indexer.store.state import RESERVE_IDS, State
from indexer.store.transaction import Transaction
from tests.store.support import ALICE, BOB, LIKE, POST, REV, SYNCED, Clock, block_of, cid_of, opened, put_step


def refuse(_index: int, error: Exception) -> Callable[[Transaction], None]:
    raise AssertionError(f"no rescue was expected: {error!r}")


def failing(tx: Transaction) -> None:
    """Touches everything, then fails."""
    put_step(ALICE, POST, "lost")(tx)
    tx.set_repo(BOB, SYNCED._replace(due=5))
    tx.set_cursor("upstream", 99)
    tx.add_count("ingest/x", 1)
    tx.append_event("account", ALICE, fields={})
    tx.buffer_frame(ALICE, REV, "commit", "s", b"frame")
    tx.wipe_repo(ALICE, AccountStatus.DELETED)
    raise BadInput("no")


async def test_what_is_written_together_is_read_together(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(put_step(ALICE, POST, "one"), lambda tx: tx.set_cursor("upstream", 7))
        assert store.db.cursor("upstream") == 7
        assert store.db.block(ALICE, cid_of(block_of("one"))) == block_of("one")
        assert store.actions() == ["create"]
        store.assert_clean()


async def test_the_result_of_a_function_is_its_callers(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        assert await store.writer.run("answer", lambda tx: 42) == 42


async def test_units_that_wait_are_joined_in_one_commit(tmp_path: Path) -> None:
    async with opened(tmp_path, writer={"group_ms": 1000}) as store:
        before = store.writer.stats.groups
        await asyncio.gather(*[store.put(ALICE, f"a.b.c/{n}", str(n)) for n in range(50)])
        assert store.writer.stats.groups - before == 1
        assert store.writer.stats.names["put"] == 50


@pytest.mark.parametrize("bound", [{"group_ops": 10}, {"group_kib": 1}, {"group_ms": 0.0001}])
async def test_a_group_ends_at_each_of_its_bounds(tmp_path: Path, bound: dict[str, Any]) -> None:
    async with opened(tmp_path, writer=bound) as store:
        await store.writer.run_ordered(
            "ordered", [put_step(ALICE, f"a.b.c/{n}", "x" * 300 + str(n)) for n in range(50)], refuse
        )
        assert store.writer.stats.groups >= 10
        assert [event.rkey for event in store.events()] == [str(n) for n in range(50)]
        store.assert_clean()


async def test_later_units_of_a_group_see_the_earlier_ones(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        seen: list[object] = []

        def second(tx: Transaction) -> None:
            row = tx.record(ALICE, POST)
            seen.append(row and row.cid)
            seen.append(tx.repo(ALICE))
            seen.append(tx.cursor("upstream"))
            seen.append(tx.block(ALICE, cid_of(block_of("one"))))
            seen.append([path for path, _ in tx.records(ALICE)])
            tx.delete_record(ALICE, POST, REV, live=True)
            seen.append(tx.record(ALICE, POST))
            seen.append(tx.records(ALICE))

        def first(tx: Transaction) -> None:
            put_step(ALICE, POST, "one")(tx)
            tx.set_repo(ALICE, SYNCED)
            tx.set_cursor("upstream", 3)

        await asyncio.gather(store.writer.run("a", first), store.writer.run("b", second))
        assert store.writer.stats.groups == 1
        assert seen == [cid_of(block_of("one")), SYNCED, 3, block_of("one"), [POST], None, []]


async def test_a_function_that_raises_is_undone_and_only_its_caller_hears(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        results = await asyncio.gather(
            store.put(ALICE, POST, "one"),
            store.writer.run("bad", failing),
            store.put(ALICE, LIKE, "two"),
            return_exceptions=True,
        )
        assert [isinstance(result, BadInput) for result in results] == [False, True, False]
        assert [(event.id, event.rkey) for event in store.events()] == [(1, POST[-13:]), (2, LIKE[-13:])]
        assert store.db.cursor("upstream") is None
        assert store.db.repo(BOB) is None
        assert store.db.count("ingest/x") == 0
        assert store.db.account_words(ALICE) == []
        assert len(store.db.records(ALICE)) == 2
        store.assert_clean()


async def test_a_step_that_raises_is_replaced_before_the_next_one(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        order: list[object] = []

        def rescue(index: int, error: Exception) -> Callable[[Transaction], None]:
            def step(tx: Transaction) -> None:
                order.append((index, type(error), tx.record(ALICE, POST)))
                tx.quarantine("s", 5, ALICE, "bad_input", str(error), b"frame")
                tx.set_cursor("upstream", 2)

            return step

        def last(tx: Transaction) -> None:
            order.append(tx.cursor("upstream"))
            put_step(ALICE, LIKE, "two")(tx)

        await store.writer.run_ordered("frames", [failing, last], rescue)
        assert order == [(0, BadInput, None), 2]
        assert store.actions() == ["create"]
        assert [row.reason for _, row in store.db.scan(keyspaces.QUARANTINE)] == ["bad_input"]
        store.assert_clean()


async def test_our_own_faults_are_not_rescued(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:

        def damaged(_tx: Transaction) -> None:
            raise StoreCorrupt("a row does not decode")

        steps = [put_step(ALICE, POST, "one"), damaged, put_step(ALICE, LIKE, "two")]
        frames = await store.writer.submit_ordered("frames", steps, refuse)
        later = await store.writer.submit_ordered("frames", [lambda tx: tx.set_cursor("upstream", 9)], refuse)
        for future in (frames, later):
            with pytest.raises(WriterPoisoned, match="does not decode"):
                await future
        assert isinstance(await store.writer.wait_closed(), StoreCorrupt)
        assert store.events() == []
        assert store.db.cursor("upstream") is None
    async with opened(tmp_path) as store:
        store.assert_clean()


async def test_a_store_error_in_a_function_without_a_rescue_is_its_callers(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:

        def damaged(_tx: Transaction) -> None:
            raise StoreCorrupt("a row does not decode")

        with pytest.raises(StoreCorrupt):
            await store.writer.run("one", damaged)
        assert not store.writer.poisoned
        await store.put(ALICE, POST, "one")


async def test_a_rescue_that_fails_poisons_the_writer(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:

        def rescue(_index: int, _error: Exception) -> Callable[[Transaction], None]:
            def step(tx: Transaction) -> None:
                put_step(ALICE, LIKE, "half")(tx)
                raise RuntimeError("worse")

            return step

        with pytest.raises(WriterPoisoned, match="worse"):
            await store.writer.run_ordered("frames", [failing, put_step(ALICE, POST, "one")], rescue)
        assert store.events() == []
        with pytest.raises(WriterPoisoned):
            await store.put(ALICE, POST, "one")
    async with opened(tmp_path) as store:
        assert store.events() == []
        store.assert_clean()


async def test_a_full_queue_makes_callers_wait_in_order(tmp_path: Path) -> None:
    async with opened(tmp_path, writer={"queue_units": 4, "group_ops": 3}) as store:
        futures: list[asyncio.Future[None]] = []

        async def submit(number: int) -> None:
            steps = [put_step(ALICE, f"a.b.c/{number}-{n}", f"{number}-{n}") for n in range(3)]
            futures.append(await store.writer.submit_ordered("frames", steps, refuse))

        tasks = [asyncio.create_task(submit(number)) for number in range(5)]
        await asyncio.sleep(0)
        assert store.writer.stats.waiting <= 4
        assert not all(task.done() for task in tasks)
        await asyncio.gather(*tasks)
        await asyncio.gather(*futures)
        assert [event.rkey for event in store.events()] == [f"{a}-{b}" for a in range(5) for b in range(3)]


async def test_a_caller_that_gives_up_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        task = asyncio.create_task(store.put(ALICE, POST, "one"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.put(ALICE, LIKE, "two")
        assert [event.collection for event in store.events()] == ["app.bsky.feed.like"]


async def test_a_stall_is_waited_out_and_the_batch_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        write, sizes = type(store.db).write, []

        def stalling(db: Any, batch: Any, options: Any) -> None:
            sizes.append(batch.len())
            if len(sizes) < 4:
                batch.clear()  # as a stall leaves it
                raise StoreBusy("Write stall")
            write(db, batch, options)

        monkeypatch.setattr(type(store.db), "write", stalling)
        await store.put(ALICE, POST, "one")
        assert len(set(sizes)) == 1
        assert len(sizes) == 4
        assert store.writer.stats.stalls == 3
        store.assert_clean()


async def test_a_failed_commit_poisons_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")

        def full(_db: Any, _batch: Any, _options: Any) -> None:
            raise StoreFull("the disk is full")

        monkeypatch.setattr(type(store.db), "write", full)
        waiting = asyncio.create_task(store.writer.wait_head(store.writer.head))
        results = await asyncio.gather(
            store.put(ALICE, LIKE, "two"), store.put(BOB, LIKE, "three"), waiting, return_exceptions=True
        )
        assert all(isinstance(result, WriterPoisoned) for result in results)
        assert store.writer.poisoned
        assert isinstance(await store.writer.wait_closed(), StoreFull)
        monkeypatch.undo()
        with pytest.raises(WriterPoisoned, match="disk is full"):
            await store.put(ALICE, LIKE, "two")
        assert store.log.head == 2
    async with opened(tmp_path) as store:
        assert store.actions() == ["create"]
        store.assert_clean()


async def test_a_failed_sync_poisons_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path, durability={"flush_interval": 0.01}) as store:

        def fail(_db: Any) -> None:
            raise StoreError("input/output error")

        monkeypatch.setattr(type(store.db), "sync_wal", fail)
        waiting = asyncio.create_task(store.writer.wait_head(100))
        await store.put(ALICE, POST, "one")
        with pytest.raises(WriterPoisoned, match="input/output"):
            await waiting


async def test_every_commit_is_synced_when_asked(tmp_path: Path) -> None:
    async with opened(tmp_path, durability={"flush_interval": 0}) as store:
        before = store.writer.stats.syncs
        await store.put(ALICE, POST, "one")
        await store.put(ALICE, LIKE, "two")
        assert store.writer.stats.syncs - before == 2


async def test_readers_see_an_event_only_once_it_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, durability={"flush_interval": 0}) as store:
        sync, heads = type(store.db).sync_wal, []

        def watched(db: Any) -> None:
            heads.append((store.log.head, len(store.events())))
            sync(db)

        monkeypatch.setattr(type(store.db), "sync_wal", watched)
        await store.put(ALICE, POST, "one")
        assert heads == [(1, 0)]
        assert (store.log.head, len(store.events())) == (2, 1)


async def test_the_log_is_synced_at_intervals_only_when_something_was_written(tmp_path: Path) -> None:
    async with opened(tmp_path, durability={"flush_interval": 0.005}) as store:
        await store.put(ALICE, POST, "one")
        async with asyncio.timeout(5):
            while store.writer.stats.syncs < 2:
                await asyncio.sleep(0.005)
        syncs = store.writer.stats.syncs
        await asyncio.sleep(0.03)
        assert store.writer.stats.syncs == syncs


async def test_readers_of_the_log_wake_after_the_commit(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        readers = [asyncio.create_task(store.writer.wait_head(1)) for _ in range(3)]
        await asyncio.sleep(0)
        assert await store.writer.wait_head(0) == 1
        await store.writer.run("quiet", lambda tx: tx.set_cursor("x", 1))
        assert not any(reader.done() for reader in readers)
        await store.put(ALICE, POST, "one")
        assert await asyncio.gather(*readers) == [2, 2, 2]


async def test_stop_commits_what_is_queued(tmp_path: Path) -> None:
    async with opened(tmp_path, writer={"group_ops": 3, "queue_units": 2}) as store:
        tasks = [asyncio.create_task(store.put(ALICE, f"a.b.c/{n}", str(n))) for n in range(10)]
        await asyncio.sleep(0)
        await store.writer.stop()
        await asyncio.gather(*tasks)
        with pytest.raises(WriterPoisoned, match="stopped"):
            await store.put(ALICE, POST, "late")
        assert store.db.get(CURSORS, keyspaces.CLEAN) == 1
        assert len(store.db.records(ALICE)) == 10


# ---- event ids and times over restarts


async def test_ids_are_consecutive_after_a_kill(tmp_path: Path) -> None:
    for number in range(3):
        async with opened(tmp_path, clean=False) as store:
            assert store.log.head == number + 1
            await store.put(ALICE, f"a.b.c/{number}", "x")
            assert store.writer.state.hole is None


async def test_ids_go_on_above_the_synced_mark_after_a_power_cut(tmp_path: Path) -> None:
    async with opened(tmp_path, boot="one", clean=False) as store:
        await store.put(ALICE, POST, "one")
    async with opened(tmp_path, boot="two", clean=False) as store:
        head = store.log.head
        assert head >= RESERVE_IDS
        assert store.writer.state.hole == (2, head)
        assert store.db.get(CURSORS, f"{keyspaces.HOLE}2") == head
        await store.put(ALICE, LIKE, "two")
        assert [event.id for event in store.events()] == [1, head]
        assert [event.id for event in store.log.read(2, 10)] == [head]
        store.assert_clean()
    async with opened(tmp_path, boot="two") as store:
        assert store.log.head == head + 1
        assert store.writer.state.hole is None


async def test_a_clean_shutdown_leaves_no_hole_over_a_restart_of_the_machine(tmp_path: Path) -> None:
    async with opened(tmp_path, boot="one") as store:
        await store.put(ALICE, POST, "one")
    async with opened(tmp_path, boot="two") as store:
        assert store.log.head == 2
        assert store.writer.state.hole is None


async def test_without_a_boot_id_only_a_clean_shutdown_is_trusted(tmp_path: Path) -> None:
    async with opened(tmp_path, boot="", clean=False) as store:
        await store.put(ALICE, POST, "one")
    async with opened(tmp_path, boot="") as store:
        assert store.log.head >= RESERVE_IDS
        head = store.log.head
    async with opened(tmp_path, boot="") as store:
        assert store.log.head == head


async def test_the_reserve_mark_stays_ahead_of_the_ids(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        store.writer.state.margin = 10
        store.writer.state.reserved = 15
        syncs = store.writer.stats.syncs
        for number in range(10):
            await store.put(ALICE, f"a.b.c/{number}", "x")
            assert (store.db.cursor(keyspaces.RESERVE) or 0) >= store.log.head
        assert store.writer.stats.syncs > syncs
        assert store.writer.state.reserved == store.db.cursor(keyspaces.RESERVE)


async def test_time_strictly_increases_even_when_the_clock_goes_back(tmp_path: Path) -> None:
    times: list[int] = []
    for start in (2_000, 1_000, 1_000):
        async with opened(tmp_path, clock=lambda start=start: start, clean=False) as store:  # type: ignore[misc]
            await store.put(ALICE, POST, f"text {len(times)}")
            await store.do(lambda tx: tx.append_event("account", ALICE, fields={}))
            times = [event.time_us for event in store.events()]
    assert times == sorted(set(times))
    assert len(times) == 6


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (keyspaces.HEAD, "x", "cursors: row 'head'"),
        (keyspaces.HEAD, [1, 0], "not below the head"),
        (keyspaces.HEAD, None, "missing"),
        (keyspaces.FLOOR, 99, "above the head"),
        (keyspaces.CHECKPOINT, "x", "cursors: row 'checkpoint'"),
        (keyspaces.WIPE + ALICE, 3, "no marker"),
    ],
)
async def test_malformed_positions_stop_the_start_and_are_named(
    tmp_path: Path, name: str, value: Any, match: str
) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")
        await store.do(lambda tx: tx.set_cursor(name, value))
        if name == keyspaces.HEAD:
            store.db.family("cursors").put(b"head", keyspaces.CURSORS.value.encode(value))
            if value is None:
                store.db.family("cursors").delete(b"head")
        with pytest.raises(StoreCorrupt, match=match):
            State(store.db, "boot")


async def test_a_stopped_writer_wakes_its_readers(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock) as store:
        waiting = asyncio.create_task(store.writer.wait_head(50))
        await asyncio.sleep(0)
        await store.writer.stop()
        with pytest.raises(WriterPoisoned):
            await waiting
        assert await store.writer.wait_closed() is None
