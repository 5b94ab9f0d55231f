"""The budgets of bytes over all workers."""

from __future__ import annotations

import asyncio

from indexer.backfill.budget import ByteBudget


async def test_a_share_beyond_the_budget_waits_for_room() -> None:
    budget = ByteBudget(100)
    with budget.share() as old:
        assert old.add(90)
        with budget.share() as young:
            assert not young.add(20)
            waiting = asyncio.create_task(young.room())
            await asyncio.sleep(0)
            assert not waiting.done()
            old.shrink()
            await waiting
            assert budget.used == 20
    assert budget.used == 0


async def test_the_oldest_of_the_large_ones_always_grows_and_no_other() -> None:
    budget = ByteBudget(100)
    with budget.share() as old, budget.share() as young:
        assert old.add(1000)
        assert not young.add(13)
        waiting = asyncio.create_task(young.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        assert old.add(1000)
        waiting.cancel()


async def test_a_body_without_end_holds_up_no_small_one() -> None:
    budget = ByteBudget(100)
    with budget.share() as endless:
        endless.add(1000)
        for _ in range(100):
            with budget.share() as small:
                assert small.add(12)
        assert endless.add(1000)


async def test_small_ones_have_what_large_ones_leave_and_the_oldest_goes_on() -> None:
    budget = ByteBudget(100)
    with budget.share() as large:
        large.add(50)
        shares = [budget.share() for _ in range(10)]
        granted = [share.add(10) for share in shares]
        assert granted == [True] * 4 + [False] * 6  # 50 + 4 · 10 < 100
        assert shares[0].add(1)
        for share in shares:
            share.__exit__(None, None, None)
        assert large.add(1)
    assert (budget.used, budget.used_large) == (0, 0)


async def test_the_next_share_becomes_the_oldest() -> None:
    budget = ByteBudget(100)
    with budget.share() as young:
        with budget.share() as other:
            other.add(500)
            assert young.add(500)
        await young.room()
    assert budget.used == 0


async def test_a_share_that_begins_anew_is_the_youngest() -> None:
    budget = ByteBudget(100)
    with budget.share() as first, budget.share() as second:
        first.add(60)
        first.shrink()
        second.add(60)
        assert not first.add(60)
        assert second.add(1)


async def test_a_share_is_taken_when_there_is_room() -> None:
    budget = ByteBudget(100)
    with budget.share() as old, budget.share() as young:
        await old.take(60)
        young.add(13)
        waiting = asyncio.create_task(young.take(30))
        await asyncio.sleep(0)
        assert not waiting.done()
        old.shrink()
        await waiting
        assert (young.size, budget.used) == (43, 43)


async def test_silent_hosts_are_counted() -> None:
    budget = ByteBudget(100)
    with budget.share() as silent, budget.share() as talking, budget.share() as verifying:
        silent.waits(10.0)
        talking.waits(19.0)
        verifying.waits(5.0)
        verifying.waits(None)
        assert budget.stalled(15.0) == 1
    assert budget.stalled(100.0) == 0
