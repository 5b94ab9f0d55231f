"""Budgets of repository bytes over all workers: those being fetched, and those verified but not applied.

Owns who may go on. A share beyond an eighth of the budget is *large*. Large ones together may use half of
it, but for the oldest of them, which may always grow; the others have the rest, and the oldest of those may
always grow. So a repository larger than the whole budget still gets through, nobody waits for ever, and
a body without end holds up other large ones at most. Event loop only.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final

#: Part of the budget beyond which a share is large, and what all large ones may use together.
_LARGE: Final = 1 / 8
_LARGE_TOGETHER: Final = 1 / 2


class ByteBudget:
    """``limit`` bytes, given out in `Share`s."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.used_large = 0
        self._shares: dict[Share, None] = {}  # in order of age
        self._changed = asyncio.Event()

    def share(self) -> Share:
        """A new, empty share: the youngest. Use it as a context manager."""
        share = Share(self)
        self._shares[share] = None
        return share

    def may_grow(self, share: Share) -> bool:
        if share.large:
            fits = self.used_large < self.limit * _LARGE_TOGETHER
        else:
            fits = self.used - self._beyond() < self.limit
        return fits or self._oldest(share.large) is share

    def _oldest(self, large: bool) -> Share | None:
        return next((share for share in self._shares if share.large is large), None)

    def _beyond(self) -> float:
        """What large shares use beyond their part, which is not taken from the others."""
        return max(0.0, self.used_large - self.limit * _LARGE_TOGETHER)

    async def room(self, share: Share) -> None:
        """Waits until ``share`` may grow."""
        while not self.may_grow(share):
            self._changed.clear()
            await self._changed.wait()

    def add(self, share: Share, size: int) -> None:
        self.used += size
        if share.large:
            self.used_large += size
        elif share.size > self.limit * _LARGE:
            share.large = True
            self.used_large += share.size

    def release(self, share: Share) -> None:
        self.used -= share.size
        self.used_large -= share.size if share.large else 0
        share.size, share.large = 0, False
        self._changed.set()

    def close(self, share: Share) -> None:
        self._shares.pop(share, None)
        self.release(share)

    def renew(self, share: Share) -> None:
        """The share is as a new one."""
        self.release(share)
        self._shares.pop(share, None)
        self._shares[share] = None

    def stalled(self, since: float) -> int:
        """Shares whose host has sent nothing since then."""
        waiting = (share.waiting_since for share in self._shares)
        return sum(at is not None and at <= since for at in waiting)


class Share:
    """What one repository uses of the budget."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.size = 0
        self.large = False
        self.waiting_since: float | None = None  # for its host

    def add(self, size: int) -> bool:
        """Counts ``size`` more bytes; false when the next ones have to wait for `room`."""
        self.size += size
        self._budget.add(self, size)
        return self._budget.may_grow(self)

    async def room(self) -> None:
        await self._budget.room(self)

    async def take(self, size: int) -> None:
        """Waits for room and counts ``size`` bytes."""
        await self._budget.room(self)
        self.add(size)

    def shrink(self) -> None:
        """Nothing is held any more; the share stays, as the youngest (for a fetch that begins anew)."""
        self._budget.renew(self)

    def waits(self, since: float | None) -> None:
        """The host is expected to send, as of then; None: it is not its turn."""
        self.waiting_since = since

    def __enter__(self) -> Share:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._budget.close(self)
