"""The budget of bytes in flight."""

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


async def test_the_oldest_share_always_grows() -> None:
    budget = ByteBudget(100)
    with budget.share() as old, budget.share() as young:
        assert old.add(1000)
        assert not young.add(1)
        waiting = asyncio.create_task(young.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        assert old.add(1000)
        waiting.cancel()


async def test_the_next_share_becomes_the_oldest() -> None:
    budget = ByteBudget(100)
    with budget.share() as young:
        with budget.share() as other:
            other.add(500)
            assert young.add(500)
        await young.room()
    assert budget.used == 0
