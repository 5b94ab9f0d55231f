"""Retention: watermarks, the prune below them, and the sweep of wiped lives.

A watermark says which event id was next at a time. A pass prunes everything below the newest one
that is older than the retention: references are released through the log, events go, the floor
moves, one batch a step. Then events of wiped lives are swept under any retention. All of it resumes
where a kill left it. On the writer's loop; compaction in a thread.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Final, NamedTuple

from indexer.atproto.types import Did, EventId, Micros
from indexer.config import Settings
from indexer.errors import StoreCorrupt
from indexer.store.codecs import after_prefix, decode_event, did_range, encode_u64
from indexer.store.database import Database
from indexer.store.keyspaces import CURSORS, EVENTS, FLOOR, QUARANTINE, SWEEP, WATERMARK
from indexer.store.overlay import CONTENT
from indexer.store.transaction import Transaction
from indexer.store.wipes import Wipe
from indexer.store.worker import Worker
from indexer.store.writer import Writer

_LONG_SWEEP_S: Final = 1.0
_SWEEP_SPACING: Final = 20  # times a long walk's duration until the next one; wipes gather meanwhile


class Watermark(NamedTuple):
    time: Micros
    next: EventId

    @property
    def cursor(self) -> str:
        return f"{WATERMARK}{self.time:020d}"


class RetentionReport(NamedTuple):
    floor: EventId
    pruned: int
    swept: int
    wipes: int  # wiped lives of which nothing is left now


def cutoff(marks: list[Watermark], before: Micros) -> Watermark | None:
    """The newest watermark at or before a time."""
    return max((mark for mark in marks if mark.time <= before), default=None)


class RetentionWorker(Worker):
    """Writes watermarks, prunes below them, sweeps wiped lives."""

    name = "retention"

    def __init__(self, db: Database, writer: Writer, settings: Settings) -> None:
        super().__init__(db, writer, settings.gc)
        self._retention_s = settings.events.retention
        self.last: RetentionReport | None = None
        self.pruned = 0
        self.swept = 0
        self._next_sweep = 0.0

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
            pruned = await self._prune()
            swept, wipes = await self._sweep()
            self.pruned += pruned
            self.swept += swept
            self.last = RetentionReport(self._writer.floor, pruned, swept, wipes)
            self.passes += 1
            return self.last

    # ---- prune

    def watermarks(self) -> list[Watermark]:
        start = WATERMARK.encode()
        marks: list[Watermark] = []
        for name, value in self._db.scan(CURSORS, start, after_prefix(start)):
            digits = name.removeprefix(WATERMARK)
            if not (digits.isdigit() and isinstance(value, int)):
                raise StoreCorrupt(f"cursors: row {name!r} holds {value!r}, no watermark")
            marks.append(Watermark(int(digits), value))
        return marks

    async def _prune(self) -> int:
        if self._retention_s is None:
            return 0
        now = await self._writer.run(self.name, self._mark)
        marks = self.watermarks()
        mark = cutoff(marks, now - int(self._retention_s * 1_000_000))
        if mark is None:
            return 0
        pruned = 0
        while True:
            started = time.perf_counter()
            events, stop = self._below(mark.next)
            old = [item for item in marks if item <= mark] if stop >= mark.next else []
            pruned += await self._writer.run(self.name, partial(prune, events, stop, old))
            if stop >= mark.next:
                return pruned
            await self._pace.rest(time.perf_counter() - started, len(events))

    def _mark(self, tx: Transaction) -> Micros:
        """Write a watermark unless nothing was appended since the last one; returns the time."""
        now = tx.now_us
        marks = self.watermarks()
        if not marks or (marks[-1].next < tx.next_event and marks[-1].time < now):
            tx.set_cursor(Watermark(now, tx.next_event).cursor, tx.next_event)
        return now

    def _below(self, stop: EventId) -> tuple[list[tuple[EventId, bytes]], EventId]:
        """The next events below ``stop`` from the floor, and where they end."""
        floor = self._writer.floor
        rows = list(self._db.scan(EVENTS, encode_u64(floor), encode_u64(stop), limit=self._pace.rows))
        if len(rows) < self._pace.rows:
            return rows, max(stop, floor)
        return rows, rows[-1][0] + 1

    # ---- sweep

    async def _sweep(self) -> tuple[int, int]:
        """Delete the events of wiped lives; one walk over the log serves all wipes before it."""
        done = self._ready_wipes()
        if not done or time.monotonic() < self._next_sweep:
            return 0, 0
        started_sweep = time.monotonic()
        end = max(wipe.head for wipe in done.values())
        position = self._sweep_position(end)
        swept = 0
        while position < end:
            started = time.perf_counter()
            dead, position, looked = self._dead(max(position, self._writer.floor), end)
            swept += await self._writer.run(self.name, partial(sweep, dead, position, end))
            await self._pace.rest(time.perf_counter() - started, looked)
        await self._compact([did for did, wipe in done.items() if wipe.ranged])
        await self._writer.run(self.name, partial(self._finish_sweep, done))
        took = time.monotonic() - started_sweep
        if took > _LONG_SWEEP_S:
            self._next_sweep = time.monotonic() + took * _SWEEP_SPACING
        return swept, len(done)

    def _ready_wipes(self) -> dict[Did, Wipe]:
        """Wipes whose last log row is folded: after the sweep nothing of the old life is left."""
        state = self._writer.state
        return {did: wipe for did, wipe in state.wipes.by_did.items() if wipe.row <= state.refs.position}

    def _sweep_position(self, end: EventId) -> EventId:
        """Where an interrupted sweep to the same end goes on; else the floor."""
        stored = self._db.get(CURSORS, SWEEP)
        if isinstance(stored, list) and len(stored) == 2 and stored[1] == end:
            return max(int(stored[0]), self._writer.floor)
        return self._writer.floor

    def _dead(self, start: EventId, stop: EventId) -> tuple[list[EventId], EventId, int]:
        wipes = self._writer.state.wipes
        dead: list[EventId] = []
        looked = 0
        for event_id, raw in self._db.scan(
            EVENTS, encode_u64(start), encode_u64(stop), limit=self._pace.rows
        ):
            looked += 1
            event = decode_event(event_id, raw)
            if wipes.stale(event.did, event.epoch):
                dead.append(event_id)
            start = event_id + 1
        return dead, start if looked == self._pace.rows else stop, looked

    async def _compact(self, dids: list[Did]) -> None:
        """Range tombstones cost every read until they are compacted away."""
        for did in dids:
            for keyspace in CONTENT:
                await asyncio.to_thread(self._db.compact, keyspace, *did_range(did))

    def _finish_sweep(self, done: dict[Did, Wipe], tx: Transaction) -> None:
        for number, row in self._db.scan(QUARANTINE):
            if row.did in done and row.time_us <= done[row.did].time:
                tx.delete(QUARANTINE, number)
        for did, wipe in done.items():
            if self._writer.state.wipes.by_did.get(did) == wipe and not tx.wiped_here(did):
                tx.forget_wipe(did)
        tx.set_cursor(SWEEP, None)


def prune(events: list[tuple[EventId, bytes]], stop: EventId, marks: list[Watermark], tx: Transaction) -> int:
    """Release and delete events, move the floor, drop watermarks; returns how many events went."""
    for event_id, raw in events:
        event = decode_event(event_id, raw)
        if event.cid is not None and tx.keeps_blocks and not tx.stale(event.did, event.epoch):
            tx.ref(event.did, event.epoch, event.cid, -1)
        tx.delete(EVENTS, event_id)
    tx.add_count("events", -len(events))
    tx.add_count("gc/events_pruned", len(events))
    tx.set_cursor(FLOOR, stop)
    for mark in marks:
        tx.set_cursor(mark.cursor, None)
    return len(events)


def sweep(dead: list[EventId], position: EventId, end: EventId, tx: Transaction) -> int:
    """Delete events of wiped lives; references went with the wipe."""
    for event_id in dead:
        tx.delete(EVENTS, event_id)
    tx.add_count("events", -len(dead))
    tx.set_cursor(SWEEP, [position, end])
    return len(dead)
