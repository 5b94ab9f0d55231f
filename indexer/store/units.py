"""Units of work: what waits at the writer, and what the writer tells of itself. On the writer's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from indexer.store.transaction import Transaction

T = TypeVar("T")
Step = Callable[[Transaction], None]
Rescue = Callable[[int, Exception], Step]


class WriterStats(NamedTuple):
    groups: int
    units: int
    stalls: int
    syncs: int
    waiting: int  # units in the queue
    commit_s: float  # time spent writing batches
    names: dict[str, int]  # units by name


class Unit(Generic[T]):
    """A function, or ordered steps, with one future for all."""

    __slots__ = ("admitted", "future", "index", "name", "rescue", "result", "steps")

    def __init__(
        self,
        name: str,
        steps: Sequence[Callable[[Transaction], Any]],
        rescue: Rescue | None,
        future: asyncio.Future[T],
    ) -> None:
        self.name = name
        self.steps = steps
        self.rescue = rescue
        self.future = future
        self.admitted: asyncio.Future[None] | None = None
        self.index = 0
        self.result: Any = None

    def fail(self, error: BaseException) -> None:
        for future in (self.future, self.admitted):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # a caller that is gone leaves no warning
