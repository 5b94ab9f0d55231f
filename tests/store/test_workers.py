"""Checkpoint, collection, retention: exact, paced, resumable at every step."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from indexer.errors import StoreCorrupt, StoreError
from indexer.store import keyspaces
from indexer.store.codecs import INVALID, AccountStatus, Mode
from indexer.store.database import Database
from indexer.store.gc import collect, verdict
from indexer.store.keyspaces import BLOCK_REFS, BLOCKS, CURSORS, EVENTS, GC_QUEUE, REFLOG
from indexer.store.refcounts import fold
from indexer.store.retention import Watermark, prune
from indexer.store.worker import Pace
from tests.store.support import ALICE, BOB, LIKE, POST, Clock, Store, block_of, cid_of, opened

HOUR = {"retention": 3600}


def rows(store: Store, keyspace: keyspaces.Keyspace[Any, Any]) -> int:
    return len(list(store.db.scan(keyspace)))


async def churn(store: Store, repositories: int = 3, paths: int = 10) -> None:
    """Creates, updates, deletes, and content that comes back."""
    for did in (ALICE, BOB, "did:web:carol.test")[:repositories]:
        for number in range(paths):
            path = f"a.b.c/{number}"
            await store.put(did, path, f"{number}")
            if number % 2:
                await store.put(did, path, f"{number} again")
            if number % 3 == 0:
                await store.delete(did, path)
            if number % 6 == 0:
                await store.put(did, path, f"{number}")
            if number % 5 == 0:
                await store.put(did, f"d.e.f/{number}", "bad", flags=INVALID)


class BusyWriter:
    """Lets every unit wait."""

    async def run(self, _name: str, fn: Any, *, ahead: bool) -> Any:
        assert ahead
        await asyncio.sleep(0.05)
        return fn(None)


async def test_waiting_at_the_writer_does_not_make_steps_smaller() -> None:
    pace = Pace(2000)
    for _ in range(3):
        assert (
            await pace.step(cast(Any, BusyWriter()), "test", lambda _tx: "done", time.perf_counter())
            == "done"
        )
        await pace.rest(pace.took, 2000)
    assert pace.rows == 2000


async def test_a_hurry_makes_steps_longer_and_leaves_out_the_rest() -> None:
    calm, hurried = Pace(2000), Pace(2000)
    await calm.rest(0.02, 500)
    started = time.perf_counter()
    await hurried.rest(0.02, 500, hurry=4)
    assert time.perf_counter() - started < 0.02
    assert (calm.rows, hurried.rows) == (250, 500)


async def test_a_fold_in_many_steps_leaves_nothing_in_memory(tmp_path: Path) -> None:
    """A step takes a part of what one life has in memory; the parts together are all of it."""
    async with opened(tmp_path, gc={"step_rows": 1}) as store:
        for number in range(6):
            await store.put(ALICE, f"{POST}/{number}", f"{number}")
        report = await store.checkpoint.run_once()
        assert report.steps > 1
        assert store.writer.state.refs.overlay == {}
        store.assert_clean()


async def test_a_checkpoint_goes_ahead_of_what_waits_at_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)  # how long a thread takes to read the counts is another matter

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    async with opened(tmp_path, writer={"group_ops": 10}, gc={"checkpoint_rows": 10}) as store:
        await churn(store)
        callers = [asyncio.create_task(store.put(ALICE, f"g.h.i/{n}", f"{n}")) for n in range(500)]
        await asyncio.sleep(0)  # they queue up
        report = await store.checkpoint.run_once()
        assert report.changes > 0
        assert sum(task.done() for task in callers) < 250
        await asyncio.gather(*callers)
        await store.checkpoint.run_once()
        store.assert_clean()


# ---- checkpoint


async def test_a_fold_moves_the_log_into_the_counts(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")
        cid = await store.put(ALICE, LIKE, "one")
        report = await store.checkpoint.run_once()
        assert (report.rows, report.changes, report.position) == (2, 2, 2)
        assert store.db.get(BLOCK_REFS, (ALICE, cid)) == 4
        assert rows(store, REFLOG) == 0
        refs = store.writer.state.refs
        assert (refs.overlay, refs.unfolded, refs.position) == ({}, 0, 2)
        store.assert_clean()
        assert (await store.checkpoint.run_once()).rows == 0


async def test_what_a_fold_reads_does_not_hold_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, told = threading.Event(), threading.Event()
    read = Database.multi_get

    def slow(self: Database, keyspace: Any, keys: Any) -> list[Any]:
        assert threading.current_thread() is not threading.main_thread()
        asked.set()
        assert told.wait(20)
        return read(self, keyspace, keys)

    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")
        monkeypatch.setattr(Database, "multi_get", slow)
        folding = asyncio.create_task(store.checkpoint.run_once())
        await asyncio.to_thread(asked.wait, 20)
        await store.put(ALICE, POST, "two")  # commits meanwhile
        told.set()
        assert (await folding).changes == 1
        monkeypatch.undo()
        await store.checkpoint.run_once()
        store.assert_clean()


@pytest.mark.parametrize("step_rows", [1, 3, 1000])
async def test_steps_of_any_size_give_the_same_counts(tmp_path: Path, step_rows: int) -> None:
    async with opened(tmp_path, gc={"step_rows": step_rows}) as store:
        await churn(store)
        report = await store.checkpoint.run_once()
        assert report.steps >= report.changes / max(step_rows, 50) / 2
        assert rows(store, REFLOG) == 0
        store.assert_clean()


async def test_after_a_kill_the_overlay_is_rebuilt_and_the_fold_goes_on(tmp_path: Path) -> None:
    async with opened(tmp_path, clean=False) as store:
        await churn(store, paths=4)
        await store.checkpoint.run_once()
        await churn(store, paths=7)
        before = {life: dict(cids) for life, cids in store.writer.state.refs.overlay.items() if cids}
        unfolded = store.writer.state.refs.unfolded
    async with opened(tmp_path) as store:
        refs = store.writer.state.refs
        assert {life: cids for life, cids in refs.overlay.items() if cids} == before
        assert refs.unfolded == unfolded
        await store.checkpoint.run_once()
        store.assert_clean()


async def test_a_wipe_between_plan_and_commit_leaves_the_repository_out(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")
        await store.put(BOB, POST, "one")
        plan = store.checkpoint._plan(store.writer.state.refs.next_row)
        counts = store.checkpoint._counts(plan)
        await store.do(lambda tx: tx.wipe_repo(ALICE, AccountStatus.DELETED))
        await store.put(ALICE, POST, "one")
        await store.writer.run("checkpoint", lambda tx: fold(plan, counts, tx))
        assert [key[0] for key, _ in store.db.scan(BLOCK_REFS)] == [BOB]
        store.assert_clean()
        await store.checkpoint.run_once()
        store.assert_clean()


async def test_the_log_asks_for_a_fold_when_it_grows_long(tmp_path: Path) -> None:
    async with opened(tmp_path, gc={"checkpoint_rows": 3}) as store:
        assert not store.checkpoint.due_early()
        for number in range(3):
            await store.put(ALICE, f"a.b.c/{number}", str(number))
        assert store.checkpoint.due_early()
        await store.checkpoint.run_once()
        assert not store.checkpoint.due_early()


async def test_what_reaches_zero_is_queued_whether_it_had_a_row_or_not(tmp_path: Path) -> None:
    async with opened(tmp_path, events=HOUR, clock=(clock := Clock())) as store:
        gone = await store.put(ALICE, POST, "one")
        await store.delete(ALICE, POST)
        await store.retention.run_once()
        clock.forward(4000)
        await store.retention.run_once()
        clock.forward(4000)
        assert (await store.retention.run_once()).pruned == 0
        report = await store.checkpoint.run_once()
        assert report.zeroed == 1
        assert [key for key, _ in store.db.scan(GC_QUEUE)] == [(ALICE, gone)]
        assert rows(store, BLOCK_REFS) == 0
        store.assert_clean()


# ---- collection


def test_only_an_exact_zero_with_whole_counts_destroys() -> None:
    assert verdict(0, True) == "destroy"
    assert verdict(1, True) == "keep"
    assert verdict(-1, True) == "fault"
    assert {verdict(count, False) for count in (-1, 0, 1)} == {"wait"}


async def dead_block(store: Store, clock: Clock, text: str = "one") -> bytes:
    """A block that was created, deleted, pruned and folded: queued, its count zero."""
    cid = await store.put(ALICE, POST, text)
    await store.delete(ALICE, POST)
    await store.retention.run_once()
    clock.forward(4000)
    await store.retention.run_once()
    await store.checkpoint.run_once()
    return cid


async def test_a_dead_block_goes_with_its_queue_entry(tmp_path: Path) -> None:
    async with opened(tmp_path, events=HOUR, clock=(clock := Clock())) as store:
        cid = await dead_block(store, clock)
        assert store.db.block(ALICE, cid) is not None
        report = await store.gc.run_once()
        assert (report.looked, report.reclaimed, report.reclaimed_bytes) == (1, 1, len(block_of("one")))
        assert store.db.block(ALICE, cid) is None
        assert rows(store, GC_QUEUE) == 0
        assert store.db.count("gc/blocks_reclaimed") == 1
        assert store.gc.stats["reclaimed"] == 1
        store.assert_clean()


async def test_a_block_that_came_back_is_kept(tmp_path: Path) -> None:
    async with opened(tmp_path, events=HOUR, clock=(clock := Clock())) as store:
        cid = await dead_block(store, clock)
        await store.put(ALICE, POST, "one")
        report = await store.gc.run_once()
        assert (report.reclaimed, report.kept) == (0, 1)
        assert store.db.block(ALICE, cid) is not None
        assert rows(store, GC_QUEUE) == 0
        store.assert_clean()


async def test_a_block_that_comes_back_in_the_same_group_is_kept(tmp_path: Path) -> None:
    async with opened(tmp_path, events=HOUR, clock=(clock := Clock())) as store:
        cid = await dead_block(store, clock)
        await asyncio.gather(
            store.put(ALICE, POST, "one"),
            store.writer.run("blocks_gc", lambda tx: collect([(ALICE, cid)], tx)),
        )
        assert store.db.block(ALICE, cid) is not None
        store.assert_clean()
    async with opened(tmp_path / "other", events=HOUR, clock=(clock := Clock())) as store:
        cid = await dead_block(store, clock)
        await asyncio.gather(
            store.writer.run("blocks_gc", lambda tx: collect([(ALICE, cid)], tx)),
            store.put(ALICE, POST, "one"),
        )
        assert store.db.block(ALICE, cid) is not None
        store.assert_clean()


async def test_a_fold_and_a_collection_in_one_group_count_nothing_twice(tmp_path: Path) -> None:
    async with opened(tmp_path, events=HOUR, clock=(clock := Clock())) as store:
        cid = await store.put(ALICE, POST, "one")
        await store.checkpoint.run_once()
        await store.delete(ALICE, POST)
        await store.retention.run_once()
        clock.forward(4000)
        await store.retention.run_once()
        plan = store.checkpoint._plan(store.writer.state.refs.next_row)
        counts = store.checkpoint._counts(plan)
        _, step = await asyncio.gather(
            store.writer.run("checkpoint", lambda tx: fold(plan, counts, tx)),
            store.writer.run("blocks_gc", lambda tx: collect([(ALICE, cid)], tx)),
        )
        assert (step.reclaimed, step.faults) == (1, 0)
        store.assert_clean()


async def test_nothing_is_destroyed_before_the_counts_are_whole(tmp_path: Path) -> None:
    async with opened(tmp_path, events=HOUR, clock=(clock := Clock())) as store:
        cid = await dead_block(store, clock)
        store.writer.state.refs.ready = False
        assert (await store.gc.run_once()).looked == 0
        step = await store.writer.run("blocks_gc", lambda tx: collect([(ALICE, cid)], tx))
        assert step.reclaimed == 0
        assert rows(store, GC_QUEUE) == 1
        assert store.db.block(ALICE, cid) is not None


async def test_a_negative_count_keeps_block_and_entry(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        cid = await store.put(ALICE, POST, "one")
        await store.checkpoint.run_once()
        await store.do(
            lambda tx: tx.put(BLOCK_REFS, (ALICE, cid), -1), lambda tx: tx.put(GC_QUEUE, (ALICE, cid), None)
        )
        report = await store.gc.run_once()
        assert (report.faults, report.reclaimed) == (1, 0)
        assert rows(store, GC_QUEUE) == 1
        assert store.db.block(ALICE, cid) is not None


async def test_many_reclaimed_blocks_ask_for_a_compaction_of_their_range(tmp_path: Path) -> None:
    async with opened(tmp_path, events=HOUR, clock=(clock := Clock()), gc={"compact_after": 20}) as store:
        for number in range(30):
            await store.put(ALICE, f"a.b.c/{number}", f"{number}" * 100)
            await store.delete(ALICE, f"a.b.c/{number}")
        await store.retention.run_once()
        clock.forward(4000)
        await store.retention.run_once()
        await store.checkpoint.run_once()
        report = await store.gc.run_once()
        assert report.reclaimed == 30
        assert report.compacted
        assert rows(store, BLOCKS) == 0
        assert store.gc.stats["dead_bytes"] == 0


# ---- retention


async def test_the_cutoff_is_the_newest_watermark_not_after_the_time(tmp_path: Path) -> None:
    async with opened(tmp_path, events=HOUR) as store:
        assert store.retention._cutoff(99) is None
        marks = [Watermark(10, 1), Watermark(20, 5), Watermark(30, 9)]
        for mark in marks:
            await store.do(lambda tx, mark=mark: tx.set_cursor(mark.cursor, mark.next))  # type: ignore[misc]
        assert [store.retention._cutoff(time) for time in (9, 10, 29, 99)] == [None, *marks]


async def test_events_go_when_they_are_older_than_the_retention(tmp_path: Path) -> None:
    async with opened(tmp_path, events=HOUR, clock=(clock := Clock())) as store:
        await store.put(ALICE, POST, "one")
        await store.do(lambda tx: tx.append_event("identity", ALICE, fields={"handle": "a.test"}))
        await store.retention.run_once()
        clock.forward(1800)
        await store.put(ALICE, LIKE, "two")
        await store.retention.run_once()
        clock.forward(1801)
        report = await store.retention.run_once()
        assert (report.pruned, report.floor) == (2, 3)
        assert [event.id for event in store.log.read(0, 10)] == [3]
        assert store.db.count("events") == 1
        assert store.db.count("gc/events_pruned") == 2
        assert len(store.db.records(ALICE)) == 2
        store.assert_clean()


async def test_watermarks_up_to_the_cutoff_go_with_the_last_step(tmp_path: Path) -> None:
    async with opened(tmp_path, events=HOUR, clock=(clock := Clock())) as store:
        for number in range(4):
            await store.put(ALICE, f"a.b.c/{number}", str(number))
            await store.retention.run_once()
            clock.forward(1000)
        assert [mark.next for mark in store.retention.watermarks()] == [2, 3, 4, 5]
        clock.forward(2500)
        assert (await store.retention.run_once()).floor == 4
        assert [mark.next for mark in store.retention.watermarks()] == [5]


async def test_a_quiet_log_gets_no_second_watermark(tmp_path: Path) -> None:
    async with opened(tmp_path, events=HOUR, clock=(clock := Clock())) as store:
        await store.put(ALICE, POST, "one")
        for _ in range(3):
            await store.retention.run_once()
            clock.forward(10)
        assert len(store.retention.watermarks()) == 1


async def test_forever_writes_no_watermark_and_prunes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, clock=(clock := Clock())) as store:
        await store.put(ALICE, POST, "one")
        await store.retention.run_once()
        clock.forward(10**8)
        assert (await store.retention.run_once()).pruned == 0
        assert store.retention.watermarks() == []


async def test_an_interrupted_prune_goes_on_at_the_floor(tmp_path: Path) -> None:
    async with opened(
        tmp_path, events=HOUR, clock=(clock := Clock()), clean=False, gc={"step_rows": 3}
    ) as store:
        for number in range(10):
            await store.put(ALICE, f"a.b.c/{number}", str(number))
        await store.retention.run_once()
        clock.forward(4000)
        plan = store.retention._below(11)
        assert plan.stop == 4
        await store.writer.run("retention", lambda tx: prune(plan, [], tx))
        store.assert_clean()
    async with opened(tmp_path, events=HOUR, clock=clock) as store:
        assert store.log.floor == 4
        report = await store.retention.run_once()
        assert (report.pruned, report.floor) == (7, 11)
        assert store.log.head == 11
        store.assert_clean()
    async with opened(tmp_path, events=HOUR, clock=clock) as store:
        assert store.log.head == 11
        await store.put(ALICE, POST, "next")
        assert [event.id for event in store.events()] == [11]


async def test_ephemeral_mode_forgets_blocks_with_their_events(tmp_path: Path) -> None:
    mode = Mode(ephemeral=True)
    async with opened(tmp_path, mode=mode, events={"retention": "60m"}, clock=(clock := Clock())) as store:
        for number in range(5):
            await store.put(ALICE, f"a.b.c/{number}", str(number % 2))
        assert rows(store, BLOCKS) == 2
        await store.retention.run_once()
        clock.forward(1800)
        kept = await store.put(ALICE, POST, "0")
        clock.forward(1900)
        assert (await store.retention.run_once()).pruned == 5
        await store.checkpoint.run_once()
        assert (await store.gc.run_once()).reclaimed == 1
        assert [key for key, _ in store.db.scan(BLOCKS)] == [(ALICE, kept)]
        assert rows(store, EVENTS) == 1
        store.assert_clean()


async def test_a_malformed_watermark_is_named(tmp_path: Path) -> None:
    async with opened(tmp_path, events=HOUR) as store:
        await store.do(lambda tx: tx.set_cursor(keyspaces.WATERMARK + "x", 5))
        with pytest.raises(StoreCorrupt, match="no watermark"):
            await store.retention.run_once()


# ---- the loop


async def test_a_failed_pass_is_counted_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, gc={"checkpoint_interval": 0.001}) as store:
        await store.put(ALICE, POST, "one")
        multi_get, calls = type(store.db).multi_get, []

        def flaky(*args: object) -> object:
            calls.append(1)
            if len(calls) < 3:
                raise StoreError("input/output error")
            return multi_get(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(type(store.db), "multi_get", flaky)
        task = asyncio.create_task(store.checkpoint.run())
        async with asyncio.timeout(5):
            while not store.checkpoint.passes:
                await asyncio.sleep(0.001)
        task.cancel()
        assert store.checkpoint.failures == 2
        assert not store.writer.poisoned
        assert rows(store, REFLOG) == 0


async def test_a_worker_ends_when_the_writer_is_closed(tmp_path: Path) -> None:
    async with opened(tmp_path, gc={"blocks_interval": 0.001, "ttl_interval": 0.001}, events=HOUR) as store:
        await store.writer.stop()
        async with asyncio.timeout(5):
            await store.retention.run()


async def test_the_mark_of_a_checkpoint_survives(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")
        await store.checkpoint.run_once()
        assert store.db.get(CURSORS, keyspaces.CHECKPOINT) == 1
        assert store.db.count("gc/checkpoints") == 1
        assert store.checkpoint.stats["passes"] == 1
        assert cid_of(block_of("one")) == store.events()[0].cid
