"""Retention: watermarks, and the prune of everything below them; sweeps wiped lives in between.

A watermark says which event id was next at a time of the log's own clock, which nobody sets. A pass prunes
everything below the newest one that is older than the retention: references are released through the log,
events go, the floor moves, one batch a step. All of it resumes where a kill left it. On the writer's loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from indexer.atproto.types import EventId, Micros
from indexer.config import Settings
from indexer.errors import StoreCorrupt
from indexer.store.codecs import after_prefix, decode_event, encode_u64
from indexer.store.database import Database
from indexer.store.keyspaces import CURSORS, EVENTS, FLOOR, LOG_CLOCK, WATERMARK
from indexer.store.log_clock import LogClock, uptime_us
from indexer.store.sweep import At, Sweeper, log_at
from indexer.store.transaction import Transaction
from indexer.store.worker import Worker
from indexer.store.writer import Writer

_MARKS_PER_RETENTION: Final = 1024  # so exact is a prune, and so few are the marks
_MARKS_AT_ONCE: Final = 1024


class Watermark(NamedTuple):
    time: Micros
    next: EventId

    @property
    def cursor(self) -> str:
        return _name(self.time)


class RetentionReport(NamedTuple):
    floor: EventId
    pruned: int
    swept: int
    wipes: int  # wiped lives of which nothing is left now


class PrunePlan(NamedTuple):
    """The next events from the floor, and where they end."""

    at: At
    events: list[tuple[EventId, bytes]]
    stop: EventId


class RetentionWorker(Worker):
    """Writes watermarks, prunes below them, sweeps wiped lives."""

    name = "retention"

    def __init__(
        self, db: Database, writer: Writer, settings: Settings, *, uptime: Callable[[], Micros] = uptime_us
    ) -> None:
        super().__init__(db, writer, settings.gc)
        self._clock = LogClock(db, writer.state.boot, uptime)
        self._stored = 0  # the clock's last time on disk
        retention_s = settings.events.retention
        self._retention_us = None if retention_s is None else int(retention_s * 1_000_000)
        self._sweeper = Sweeper(
            db, writer, self._pace, settings.store.quarantine_entries, self._prune_in_time
        )
        self._next_prune = 0.0
        self.last: RetentionReport | None = None
        self.pruned = 0
        self.swept = 0

    @property
    def interval(self) -> float:
        return self._settings.ttl_interval

    @property
    def stats(self) -> dict[str, int]:
        return {
            "passes": self.passes,
            "failures": self.failures,
            "floor": self._writer.floor,
            "pruned": self.pruned,
            "swept": self.swept,
            "wipes": len(self._writer.state.wipes.by_did),
        }

    async def run_once(self) -> RetentionReport:
        """Watermark, prune, sweep."""
        async with self._turn:
            before = self.pruned
            await self._prune()
            swept = await self._sweeper.run()
            self.swept += swept.events
            self.last = RetentionReport(self._writer.floor, self.pruned - before, swept.events, swept.wipes)
            self.passes += 1
            return self.last

    async def _prune_in_time(self) -> None:
        """A sweep may last for hours; the log is pruned at its intervals meanwhile."""
        if time.monotonic() >= self._next_prune:
            await self._prune()

    # ---- watermarks

    def watermarks(
        self, start: Micros = 0, stop: Micros | None = None, *, newest: bool = False, limit: int | None = None
    ) -> list[Watermark]:
        """Watermarks with start ≤ time < stop in order; ``newest``: backwards."""
        low = _name(start).encode() if start else WATERMARK.encode()
        high = after_prefix(WATERMARK.encode()) if stop is None else _name(stop).encode()
        return [_watermark(*row) for row in self._db.scan(CURSORS, low, high, reverse=newest, limit=limit)]

    def _cutoff(self, before: Micros) -> Watermark | None:
        """The newest watermark at or before a time."""
        found = self.watermarks(stop=max(before, 0) + 1, newest=True, limit=1)
        return found[0] if found else None

    def _mark(self, retention_us: Micros, tx: Transaction) -> Micros:
        """Write a watermark, unless the last one is as good; returns the log's time."""
        now, began = self._clock.now(tx.now_us), self._clock.is_new
        if began:  # what came before it knows was marked by a clock that anybody could set
            for mark in self.watermarks():
                tx.set_cursor(mark.cursor, None)
        spacing = max(1, retention_us // _MARKS_PER_RETENTION)
        last = None if began else next(iter(self.watermarks(newest=True, limit=1)), None)
        marks = last is None or (last.next < tx.next_event and now - last.time >= spacing)
        if marks:
            tx.set_cursor(Watermark(now, tx.next_event).cursor, tx.next_event)
        if marks or began or now - self._stored >= spacing:
            tx.set_cursor(LOG_CLOCK, self._clock.row(now))
            self._stored = now
        return now

    # ---- prune

    async def _prune(self) -> None:
        retention_us = self._retention_us
        if retention_us is None:
            return
        self._next_prune = time.monotonic() + self.interval
        now = await self._writer.run(self.name, partial(self._mark, retention_us), ahead=True)
        mark = self._cutoff(now - retention_us)
        if mark is None:
            return
        floor = 0
        while floor < mark.next:
            started = time.perf_counter()
            plan = self._below(mark.next)
            old = []
            if plan.stop >= mark.next:
                old = self.watermarks(stop=mark.time + 1, limit=_MARKS_AT_ONCE)
            step = partial(prune, plan, old)
            self.pruned += await self._pace.step(self._writer, self.name, step, started)
            floor = self._writer.floor
            if floor < mark.next:
                await self._pace.rest(self._pace.took, len(plan.events))

    def _below(self, stop: EventId) -> PrunePlan:
        at = self._sweeper.at()
        floor = at[0]
        rows = list(self._db.scan(EVENTS, encode_u64(floor), encode_u64(stop), limit=self._pace.rows))
        return PrunePlan(at, rows, max(stop, floor) if len(rows) < self._pace.rows else rows[-1][0] + 1)


def prune(plan: PrunePlan, marks: list[Watermark], tx: Transaction) -> int:
    """Release and delete events, move the floor, drop watermarks; returns how many events went."""
    if plan.at != log_at(tx.position):
        return 0
    for event_id, raw in plan.events:
        event = decode_event(event_id, raw)
        if event.cid is not None and tx.keeps_blocks and not tx.stale(event.did, event.epoch):
            tx.ref(event.did, event.epoch, event.cid, -1)
        tx.delete(EVENTS, event_id)
    tx.add_count("events", -len(plan.events))
    tx.add_count("gc/events_pruned", len(plan.events))
    tx.set_cursor(FLOOR, plan.stop)
    for mark in marks:
        tx.set_cursor(mark.cursor, None)
    return len(plan.events)


def _name(time_us: Micros) -> str:
    return f"{WATERMARK}{time_us:020d}"


def _watermark(name: str, value: Any) -> Watermark:
    digits = name.removeprefix(WATERMARK)
    if not (digits.isdigit() and isinstance(value, int)):
        raise StoreCorrupt(f"cursors: row {name!r} holds {value!r}, no watermark")
    return Watermark(int(digits), value)
