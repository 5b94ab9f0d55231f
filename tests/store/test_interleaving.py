"""Steps that meet in an unlucky order: partial folds, callers that give up, wipes in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from indexer.errors import BadInput, StoreBusy
from indexer.store import keyspaces
from indexer.store.codecs import AccountStatus
from indexer.store.gc import collect
from indexer.store.keyspaces import BLOCK_REFS, EVENTS, GC_QUEUE, REFLOG
from indexer.store.refcounts import fold
from indexer.store.references import References
from indexer.store.retention import prune
from indexer.store.sweep import finish, sweep
from indexer.store.transaction import Transaction
from tests.store.support import ALICE, BOB, LIKE, POST, Clock, Store, block_of, cid_of, opened, put_step

DELETED = AccountStatus.DELETED
SHORT = {"retention": 100}


def assert_memory_is_as_reloaded(store: Store) -> None:
    """What memory holds of the references is what a start would load."""
    state, fresh = store.writer.state, References()
    fresh.load(store.db, state.wipes)
    assert state.refs.overlay == fresh.overlay
    assert state.refs._last_rows == fresh._last_rows
    assert state.refs.unfolded == fresh.unfolded
    assert (state.refs.position, state.refs.next_row) == (fresh.position, fresh.next_row)


async def fold_one_row(store: Store) -> None:
    plan = store.checkpoint._plan(store.writer.state.refs.position + 1)
    await store.writer.run("checkpoint", lambda tx: fold(plan, store.checkpoint._counts(plan), tx))


class Stalls:
    """Lets the next writes stall."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        write = type(store.db).write

        def stalling(db: Any, batch: Any, options: Any) -> None:
            if self.left:
                self.left -= 1
                raise StoreBusy("Write stall")
            write(db, batch, options)

        monkeypatch.setattr(type(store.db), "write", stalling)


async def given_up(store: Store, stalls: Stalls, work: Callable[[], Awaitable[object]]) -> None:
    """Cancel ``work`` while its step is being written."""
    before = store.writer.stats.stalls
    stalls.left = 3
    task = asyncio.ensure_future(work())
    while store.writer.stats.stalls == before:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# ---- folds


async def test_a_sum_of_zero_that_is_folded_in_part_is_counted(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock, events=SHORT, gc={"step_rows": 1}) as store:
        one = await store.put(ALICE, POST, "one")
        await store.retention.run_once()
        await store.checkpoint.run_once()
        clock.forward(200)
        await store.put(ALICE, LIKE, "two")
        await store.delete(ALICE, POST)
        await store.retention.run_once()
        await store.put(ALICE, POST, "one")
        for _ in range(3):
            await fold_one_row(store)
            assert_memory_is_as_reloaded(store)
        assert await store.writer.run("count", lambda tx: tx.block_count(ALICE, one)) == 2
        assert (await store.gc.run_once()).reclaimed == 0
        assert store.db.block(ALICE, one) == block_of("one")
        store.assert_clean()


async def test_a_fold_that_was_given_up_is_not_folded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        one = await store.put(ALICE, POST, "one")
        await store.put(ALICE, LIKE, "one")
        await given_up(store, Stalls(store, monkeypatch), store.checkpoint.run_once)
        report = await store.checkpoint.run_once()
        assert store.db.get(BLOCK_REFS, (ALICE, one)) == 4
        assert (report.rows, report.changes, report.steps) == (2, 0, 0)
        assert_memory_is_as_reloaded(store)
        store.assert_clean()


async def test_a_prune_that_was_given_up_releases_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock, events=SHORT) as store:
        await store.put(ALICE, POST, "one")
        await store.retention.run_once()
        clock.forward(200)
        plan = store.retention._below(2)
        await given_up(
            store,
            Stalls(store, monkeypatch),
            lambda: store.writer.run("retention", lambda tx: prune(plan, [], tx)),
        )
        again = store.retention._below(2)
        assert again.events  # read before the step above was committed
        assert await store.writer.run("retention", lambda tx: prune(again, [], tx)) == 0
        report = await store.retention.run_once()
        assert (report.floor, report.pruned, store.db.count("events")) == (2, 0, 0)
        await store.checkpoint.run_once()
        await store.gc.run_once()
        store.assert_clean()


async def test_a_sweep_that_was_given_up_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock, events=SHORT) as store:
        await store.put(ALICE, POST, "one")
        await store.put(BOB, POST, "one")
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        await store.checkpoint.run_once()
        await store.retention.run_once()
        await store.do(lambda tx: tx.wipe_repo(BOB, DELETED))
        await store.checkpoint.run_once()
        clock.forward(200)
        plan = store.retention._sweeper._plan(4)
        assert plan is not None
        await given_up(
            store, Stalls(store, monkeypatch), lambda: store.writer.run("sweep", lambda tx: sweep(plan, tx))
        )
        again, pruning = store.retention._sweeper._plan(4), store.retention._below(4)
        assert again is not None
        assert again.dead  # read before the step above was committed
        assert await store.writer.run("sweep", lambda tx: sweep(again, tx)) == 0
        assert await store.writer.run("retention", lambda tx: prune(pruning, [], tx)) == 0
        store.assert_clean()
        await store.retention.run_once()
        store.assert_clean()


async def test_a_sweep_that_goes_on_does_so_only_to_the_end_that_it_had(tmp_path: Path) -> None:
    async with opened(tmp_path, gc={"step_rows": 1}) as store:
        await store.put(BOB, POST, "one")
        await store.put(ALICE, POST, "one")
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        await store.checkpoint.run_once()
        for _ in range(2):  # and no further: interrupted
            plan = store.retention._sweeper._plan(3)
            assert plan is not None
            await store.writer.run("retention", lambda tx, plan=plan: sweep(plan, tx))  # type: ignore[misc]
        await store.do(lambda tx: tx.wipe_repo(BOB, DELETED))
        await store.checkpoint.run_once()
        assert (await store.retention.run_once()).swept == 1  # BOB's, before the sweep's position
        assert [event.kind for event in store.events()] == ["account", "account"]
        assert len(list(store.db.scan(EVENTS))) == 2
        store.assert_clean()


# ---- wipes


async def test_two_wipes_in_one_group_leave_no_life_in_memory(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")

        def twice(tx: Transaction) -> None:
            tx.wipe_repo(ALICE, DELETED)
            put_step(ALICE, POST, "two")(tx)
            tx.wipe_repo(ALICE, DELETED)

        await store.do(twice)
        assert store.writer.state.refs.overlay == {}
        assert_memory_is_as_reloaded(store)
        await store.checkpoint.run_once()
        await store.retention.run_once()
        assert store.writer.state.wipes.by_did == {}
        store.assert_clean()


async def test_a_second_wipe_remembers_that_the_first_was_by_range(tmp_path: Path) -> None:
    async with opened(tmp_path, gc={"wipe_point_rows": 2}) as store:
        for number in range(5):
            await store.put(ALICE, f"a.b.c/{number}", f"{number}")
        for _ in range(2):
            await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
            assert store.writer.state.wipes.by_did[ALICE].ranged


async def test_a_wipe_between_plan_and_prune_is_left_out(tmp_path: Path) -> None:
    async with opened(tmp_path, events=SHORT) as store:
        await store.put(ALICE, POST, "one")
        plan = store.retention._below(2)
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        await store.put(ALICE, POST, "one")
        await store.writer.run("retention", lambda tx: prune(plan, [], tx))
        changes = [change for _, row in store.db.scan(REFLOG) for change in row]
        assert [(epoch, list(cids.values())) for _, epoch, cids in changes] == [(0, [2]), (1, [2])]
        assert_memory_is_as_reloaded(store)


async def test_a_wipe_in_the_group_of_a_sweeps_end_is_not_forgotten(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")
        await store.do(lambda tx: tx.wipe_repo(ALICE, DELETED))
        done = dict(store.writer.state.wipes.by_did)
        await asyncio.gather(
            store.do(put_step(ALICE, POST, "two"), lambda tx: tx.wipe_repo(ALICE, DELETED)),
            store.writer.run("retention", lambda tx: finish(done, tx)),
        )
        assert store.writer.state.wipes.by_did[ALICE].epoch == 2
        assert store.db.get(keyspaces.CURSORS, keyspaces.WIPE + ALICE) is not None
        store.assert_clean()


async def test_a_wipe_by_range_that_fails_takes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, gc={"wipe_point_rows": 0}) as store:
        await store.put(ALICE, POST, "one")

        def failing(tx: Transaction) -> None:
            put_step(ALICE, LIKE, "two")(tx)
            tx.wipe_repo(ALICE, DELETED)
            raise BadInput("no")

        def after(tx: Transaction) -> list[str]:
            return [path for path, _ in tx.records(ALICE)]

        async def fail() -> None:
            with pytest.raises(BadInput):
                await store.writer.run("wipe", failing)

        _, paths = await asyncio.gather(fail(), store.writer.run("after", after))
        assert paths == [POST]
        await store.put(BOB, POST, "goes with what is left of the group")
        assert [path for path, _ in store.db.records(ALICE)] == [POST]
        store.assert_clean()


# ---- collection


async def test_a_block_that_is_not_queued_any_more_is_not_destroyed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        block = block_of("neither counted nor queued")
        key = (ALICE, cid_of(block))
        await store.do(lambda tx: tx.put(keyspaces.BLOCKS, key, block))
        step = await store.writer.run("blocks_gc", lambda tx: collect([key], tx))
        assert step.reclaimed == 0
        assert store.db.block(*key) == block
        assert list(store.db.scan(GC_QUEUE)) == []
