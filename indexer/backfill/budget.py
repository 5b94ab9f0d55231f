"""The budget of repository bytes that are fetched and not yet applied, over all workers.

Owns who may go on reading. The oldest share may always grow, so one repository larger than the whole
budget still gets through and nobody waits for ever; all others wait until there is room. Event loop only.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class ByteBudget:
    """``limit`` bytes, given out in `Share`s."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._shares: dict[Share, None] = {}  # in order of age
        self._changed = asyncio.Event()

    def share(self) -> Share:
        """A new, empty share: the youngest. Use it as a context manager."""
        share = Share(self)
        self._shares[share] = None
        return share

    def may_grow(self, share: Share) -> bool:
        return self.used < self.limit or next(iter(self._shares)) is share

    async def room(self, share: Share) -> None:
        """Waits until ``share`` may grow."""
        while not self.may_grow(share):
            self._changed.clear()
            await self._changed.wait()

    def add(self, size: int) -> None:
        self.used += size

    def release(self, share: Share) -> None:
        self.used -= share.size
        share.size = 0
        self._changed.set()

    def close(self, share: Share) -> None:
        self._shares.pop(share, None)
        self.release(share)


class Share:
    """What one repository uses of the budget."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.size = 0

    def add(self, size: int) -> bool:
        """Counts ``size`` more bytes; false when the next ones have to wait for `room`."""
        self.size += size
        self._budget.add(size)
        return self._budget.may_grow(self)

    async def room(self) -> None:
        await self._budget.room(self)

    def shrink(self) -> None:
        """Nothing is held any more, the share stays (a fetch that begins anew)."""
        self._budget.release(self)

    def __enter__(self) -> Share:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._budget.close(self)
