"""Long blocking work that ends when nobody waits for it any more.

A thread cannot be stopped from outside, and a program does not end before its threads. So the work itself
calls ``between`` after every piece. On the loop of the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from indexer.errors import StoreError

T = TypeVar("T")


class _Between:
    """Called between the pieces of long work; raises once nobody waits for the end any more."""

    def __init__(self) -> None:
        self.abandoned = False

    def __call__(self) -> None:
        if self.abandoned:
            raise StoreError("the work was given up: the daemon stops")


async def in_thread(work: Callable[..., T]) -> T:
    """Runs ``work(between=…)`` in a thread; it calls ``between`` after every piece. Cancelled, this ends
    with the thread, which is within a piece."""
    between = _Between()
    task = asyncio.create_task(asyncio.to_thread(work, between=between))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        between.abandoned = True
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        raise
