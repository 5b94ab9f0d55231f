"""The sweep of wiped lives: what a wipe leaves on disk, deleted under any retention.

A wipe takes content at once; events and refused frames of the old life follow in paced steps, one walk
over the log for all wipes before it, and ranges that were deleted whole are compacted. Then the marker
of the wipe goes. All of it resumes where a kill left it. On the writer's loop; compaction in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple, TypeAlias

from indexer.atproto.types import Did, EventId
from indexer.store.codecs import decode_event, did_range, encode_u64
from indexer.store.database import Database
from indexer.store.keyspaces import (
    CURSORS,
    EVENTS,
    FLOOR,
    QUARANTINE,
    QUARANTINE_NEXT,
    QUARANTINE_SHARED,
    SWEEP,
)
from indexer.store.overlay import CONTENT
from indexer.store.ring import KEPT
from indexer.store.transaction import Transaction
from indexer.store.wipes import Wipe
from indexer.store.worker import STEP_AIM_S, Pace
from indexer.store.writer import Writer

NAME: Final = "retention"  # of the steps, on the writer
_LONG_SWEEP_S: Final = 1.0
_SWEEP_SPACING: Final = 20  # times a long walk's duration until the next one; wipes gather meanwhile

#: Where the log ends below and where the sweep is. A step that was planned elsewhere is void: a pass that
#: was given up leaves its last step to be committed after the next pass has read.
At: TypeAlias = tuple[EventId, Any]


class Swept(NamedTuple):
    events: int
    wipes: int  # wiped lives of which nothing is left now


class SweepPlan(NamedTuple):
    at: At
    dead: list[EventId]
    position: EventId  # where the next step begins
    end: EventId
    looked: int


def log_at(read: Callable[[str], Any]) -> At:
    return read(FLOOR) or 1, read(SWEEP)


class Sweeper:
    """Sweeps all wipes whose last log row is folded; ``between`` is awaited before each step."""

    def __init__(
        self,
        db: Database,
        writer: Writer,
        pace: Pace,
        quarantine_entries: int,
        between: Callable[[], Awaitable[None]],
    ) -> None:
        self._db = db
        self._writer = writer
        self._pace = pace
        self._entries = quarantine_entries
        self._between = between
        self._next = 0.0
        self._trimmed = False

    def at(self) -> At:
        return log_at(partial(self._db.get, CURSORS))

    async def run(self) -> Swept:
        if not self._trimmed:
            await self._trim_quarantine()
            self._trimmed = True
        done = self._ready()
        if not done or time.monotonic() < self._next:
            return Swept(0, 0)
        started = time.monotonic()
        swept = await self._sweep_events(max(wipe.head for wipe in done.values()))
        await self._sweep_quarantine(done)
        await self._compact([did for did, wipe in done.items() if wipe.ranged])
        await self._writer.run(NAME, partial(finish, done))
        took = time.monotonic() - started
        if took > _LONG_SWEEP_S:
            self._next = time.monotonic() + took * _SWEEP_SPACING
        return Swept(swept, len(done))

    def _ready(self) -> dict[Did, Wipe]:
        """Wipes whose last log row is folded: after the sweep nothing of the old life is left."""
        state = self._writer.state
        return {did: wipe for did, wipe in state.wipes.by_did.items() if wipe.row <= state.refs.position}

    # ---- events

    async def _sweep_events(self, end: EventId) -> int:
        swept = 0
        while True:
            await self._between()
            started = time.perf_counter()
            plan = self._plan(end)
            if plan is None:
                return swept
            swept += await self._pace.step(self._writer, NAME, partial(sweep, plan), started)
            await self._pace.rest(self._pace.took, plan.looked)

    def _plan(self, end: EventId) -> SweepPlan | None:
        """The next step of a walk to ``end``; it goes on where one to the same end was left."""
        at = floor, stored = self.at()
        position = floor
        if isinstance(stored, list) and len(stored) == 2 and stored[1] == end:
            position = max(int(stored[0]), floor)
        if position >= end:
            return None
        wipes = self._writer.state.wipes
        dead: list[EventId] = []
        looked, rows = 0, self._pace.rows
        for event_id, raw in self._db.scan(EVENTS, encode_u64(position), encode_u64(end), limit=rows):
            looked += 1
            event = decode_event(event_id, raw)
            if wipes.stale(event.did, event.epoch):
                dead.append(event_id)
            position = event_id + 1
        return SweepPlan(at, dead, position if looked == rows else end, end, looked)

    # ---- refused frames

    async def _sweep_quarantine(self, done: dict[Did, Wipe]) -> None:
        """Refused frames of the old lives go by number. They are bulky, so a step ends by the clock."""
        position, end = 0, max(wipe.refused for wipe in done.values())
        while position < end:
            await self._between()
            started = time.perf_counter()
            dead, position = self._refused(position, end, done)
            if dead:
                await self._writer.run(NAME, partial(forget_refused, dead))
            await asyncio.sleep(time.perf_counter() - started)

    def _refused(self, position: int, end: int, done: dict[Did, Wipe]) -> tuple[list[int], int]:
        dead: list[int] = []
        until = time.perf_counter() + STEP_AIM_S
        for number, row in self._db.scan(QUARANTINE, encode_u64(position), encode_u64(end)):
            wipe = done.get(row.did)
            if wipe is not None and number < wipe.refused:
                dead.append(number)
            if time.perf_counter() > until:
                return dead, number + 1
        return dead, end

    async def _trim_quarantine(self) -> None:
        """The ring lets go of one frame for each new one; after a change of its length there are more."""
        position, stop = 0, (self._db.cursor(QUARANTINE_NEXT) or 0) - self._entries
        shared = self._db.cursor(QUARANTINE_SHARED)
        stop = stop if shared is None else min(stop, shared)
        while position < stop:
            started = time.perf_counter()
            numbers = self._numbers(position, stop)
            if not numbers:
                break
            await self._writer.run(NAME, partial(forget_refused, numbers))
            position = numbers[-1] + 1
            await asyncio.sleep(time.perf_counter() - started)
        while self._db.count(KEPT) > self._entries:
            started = time.perf_counter()
            await self._writer.run(NAME, lambda tx: tx.trim_quarantine(self._pace.rows))
            await asyncio.sleep(time.perf_counter() - started)

    def _numbers(self, start: int, stop: int) -> list[int]:
        keys = self._db.raw_keys(QUARANTINE.name, encode_u64(start), encode_u64(stop))
        return [QUARANTINE.key.decode(key) for key in islice(keys, self._pace.rows)]

    async def _compact(self, dids: list[Did]) -> None:
        """Range tombstones cost every read until they are compacted away."""
        for did in dids:
            for keyspace in CONTENT:
                await asyncio.to_thread(self._db.compact, keyspace, *did_range(did))


def sweep(plan: SweepPlan, tx: Transaction) -> int:
    """Delete events of wiped lives, whose references went with the wipe; returns how many."""
    if plan.at != log_at(tx.position):
        return 0
    for event_id in plan.dead:
        tx.delete(EVENTS, event_id)
    tx.add_count("events", -len(plan.dead))
    tx.set_cursor(SWEEP, [plan.position, plan.end])
    return len(plan.dead)


def forget_refused(numbers: list[int], tx: Transaction) -> None:
    for number in numbers:
        tx.delete(QUARANTINE, number)


def finish(done: dict[Did, Wipe], tx: Transaction) -> None:
    """Forget the wipes of which nothing is left; one that was wiped again since stays."""
    for did, wipe in done.items():
        if tx.wipe_of(did) == wipe:
            tx.forget_wipe(did)
    tx.set_cursor(SWEEP, None)
