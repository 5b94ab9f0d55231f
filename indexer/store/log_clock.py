"""The clock by which events grow old: it counts the time that passes, and nobody can set it.

Retention must not believe the machine's clock, which may be wrong for a moment, or for the first minutes
after the machine starts: everything would be pruned at once. This clock goes on by the time since the
machine's start alone, so it is never ahead of the time that really passed; what passed while the machine was
off, or before a start that cannot be told from another, does not count. It begins at the machine's time,
once. On the writer's loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple

from indexer.atproto.types import Micros
from indexer.errors import StoreCorrupt
from indexer.store.database import Database
from indexer.store.keyspaces import CURSORS, LOG_CLOCK

#: Goes on while the machine sleeps, where it is known.
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def uptime_us() -> Micros:
    """Time since the machine was started."""
    return time.clock_gettime_ns(_CLOCK) // 1000


class Reading(NamedTuple):
    """What the clock said, and when: ``uptime`` after the machine's start ``boot``."""

    time: Micros
    boot: str
    uptime: Micros


class LogClock:
    """``now`` is what it says. Its `row` belongs in `LOG_CLOCK` now and then, so that a start goes on there.

    ``boot`` tells one start of the machine from another; "" where it cannot.
    """

    def __init__(self, db: Database, boot: str, uptime: Callable[[], Micros] = uptime_us) -> None:
        self._db = db
        self._boot = boot
        self._uptime = uptime
        self._since: Reading | None = None  # set by the first look

    @property
    def is_new(self) -> bool:
        """Whether it was never stored: no mark that is there was made by it."""
        return _stored(self._db) is None

    def now(self, wall: Micros) -> Micros:
        """The log's time; ``wall`` is where a new clock begins."""
        uptime = self._uptime()
        if self._since is None:
            stored = _stored(self._db)
            self._since = self._continued(stored, uptime) or Reading(max(wall, 1), self._boot, uptime)
        return self._since.time + max(0, uptime - self._since.uptime)

    def row(self, now: Micros) -> list[object]:
        """The row to store with the time ``now``."""
        assert self._since is not None
        return [now, self._boot, self._since.uptime + now - self._since.time]

    def _continued(self, stored: Reading | None, uptime: Micros) -> Reading | None:
        if stored is None:
            return None
        if self._boot and stored.boot == self._boot and stored.uptime <= uptime:
            return stored
        return Reading(stored.time, self._boot, uptime)


def _stored(db: Database) -> Reading | None:
    row = db.get(CURSORS, LOG_CLOCK)
    if row is None:
        return None
    match row:
        case [int(now), str(boot), int(uptime)]:
            return Reading(now, boot, uptime)
    raise StoreCorrupt(f"cursors: row {LOG_CLOCK!r} holds {row!r}, not [time, boot, uptime]")
