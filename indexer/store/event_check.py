"""The event log's order: ids between floor and head, none missing, times that rise. Any thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

from indexer.atproto.types import EventId, Micros
from indexer.store import keyspaces
from indexer.store.codecs import Event, after_prefix
from indexer.store.findings import Findings
from indexer.store.keyspaces import CURSORS
from indexer.store.reads import Reads

Range: TypeAlias = tuple[EventId, EventId]  # first, and the one after the last

_MAX_GAPS: Final = 1000


class LogOrder:
    """Hears every event in order (`event`, `undecodable`), then the end (`done`).

    An id may be missing in an announced hole. It may also be missing before the account event of a wipe,
    because the sweep of a wiped life leaves no record of its ids: there only the total tells.
    """

    def __init__(self, reads: Reads, findings: Findings) -> None:
        self._reads = reads
        self._findings = findings
        self.floor: EventId = reads.cursor(keyspaces.FLOOR) or 1
        self.head, self.head_time = self._head()
        self._expected = self.floor
        self._last_id: EventId = 0
        self._last_time: Micros = 0
        self._gaps: list[Range] = []

    def _head(self) -> tuple[EventId, Micros]:
        stored = self._reads.get(CURSORS, keyspaces.HEAD)
        if stored is None:
            return 1, 0
        if isinstance(stored, list) and len(stored) == 2 and all(isinstance(n, int) for n in stored):
            return stored[0], stored[1]
        self._findings.problem(f"cursors: row {keyspaces.HEAD!r} holds {stored!r}, not [id, time]")
        return 1, 0

    def event(self, event: Event) -> None:
        self._id(event.id)
        if event.time_us <= self._last_time:
            self._findings.problem(f"events: time of {event.id} is not after that of {self._last_id}")
        self._last_id, self._last_time = event.id, event.time_us
        if event.kind == "account" and event.epoch:
            self._gaps.clear()  # a life ended up to here, whose events may be swept

    def undecodable(self, event_id: EventId) -> None:
        self._id(event_id)

    def _id(self, event_id: EventId) -> None:
        if not self.floor <= event_id < self.head:
            self._findings.problem(
                f"events: id {event_id} is outside floor {self.floor} and head {self.head}"
            )
            return
        if event_id > self._expected and len(self._gaps) < _MAX_GAPS:
            self._gaps.append((self._expected, event_id))
        self._expected = event_id + 1

    def done(self) -> None:
        if self.floor > self.head:
            self._findings.problem(f"events: the floor {self.floor} is above the head {self.head}")
        if self.head_time < self._last_time:
            self._findings.problem(
                f"events: the head's time {self.head_time} is before that of {self._last_id}, the last event"
            )
        if self._expected < self.head:
            self._gaps.append((self._expected, self.head))
        holes = list(self._holes()) if self._gaps else []
        for gap in self._gaps:
            for first, after in _outside(gap, holes):
                ids = f"id {first} is" if after == first + 1 else f"ids {first} to {after - 1} are"
                self._findings.problem(f"events: {ids} missing, and no hole is announced there")

    def _holes(self) -> Iterator[Range]:
        prefix = keyspaces.HOLE
        for name, after in self._reads.scan(CURSORS, prefix.encode(), after_prefix(prefix.encode())):
            first = name.removeprefix(prefix)
            if first.isdigit() and isinstance(after, int):
                yield int(first), after
            else:
                self._findings.problem(f"cursors: row {name!r} holds {after!r}, no hole of the log")


def _outside(gap: Range, holes: list[Range]) -> Iterator[Range]:
    """The parts of a range that no hole covers."""
    start, stop = gap
    for first, after in sorted(holes):
        if first >= stop:
            break
        if start < first:
            yield start, first
        start = max(start, after)
    if start < stop:
        yield start, stop
