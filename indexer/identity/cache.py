"""Small pieces that bound what resolution costs: a cache with an end, and a pace.

`TtlCache` keeps the most recently used entries, each until its own time; `Pace` spaces requests
evenly. Both belong to one event loop and are not locked.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class TtlCache(Generic[K, V]):
    """At most ``capacity`` entries; the least recently used goes first, an expired one is never seen."""

    def __init__(self, capacity: int, *, clock: Callable[[], float] = monotonic) -> None:
        self._capacity = capacity
        self._clock = clock
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[0] <= self._clock():
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return entry[1]

    def put(self, key: K, value: V, ttl: float) -> None:
        """Keeps ``value`` for ``ttl`` seconds. Expired entries that were not used since go."""
        entries, now = self._entries, self._clock()
        entries[key] = now + ttl, value
        entries.move_to_end(key)
        while len(entries) > self._capacity or next(iter(entries.values()))[0] <= now:
            entries.popitem(last=False)
            if not entries:  # the new one itself was not to be kept
                return

    def drop(self, key: K) -> None:
        self._entries.pop(key, None)


class Pace:
    """At most ``per_s`` requests a second, evenly spaced; `pause` holds everyone back for a while.

    ``burst`` requests may follow at once on a time of rest.
    """

    def __init__(self, per_s: float, *, burst: float = 1.0) -> None:
        self._interval = 1.0 / per_s
        self._ahead = max(0.0, burst - 1.0) * self._interval
        self._next = 0.0

    def wait_s(self) -> float:
        """Seconds until the next turn."""
        return max(0.0, self._next - monotonic())

    async def wait(self) -> None:
        """Returns when it is the caller's turn."""
        now = monotonic()
        turn = max(now - self._ahead, self._next)
        self._next = turn + self._interval
        if turn > now:
            await asyncio.sleep(turn - now)

    def pause(self, seconds: float) -> None:
        self._next = max(self._next, monotonic() + seconds)
