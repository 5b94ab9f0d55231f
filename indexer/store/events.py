"""The event log as readers see it.

Ids are consecutive from 1 but for wiped lives and the holes of power cuts; `EventLog.read` gives
only committed, retained events of current lives. Reads from any thread; `floor` and `head` belong
to the writer's loop. Appending is the transaction's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from indexer.atproto.types import EventId, Micros
from indexer.errors import StoreCorrupt
from indexer.store.codecs import Event, decode_event, decode_u64, encode_u64
from indexer.store.database import Database
from indexer.store.keyspaces import BLOCKS, EVENTS
from indexer.store.writer import Writer


class Page(NamedTuple):
    """Events in order, and where to go on reading."""

    events: list[Event]
    next: EventId


class EventLog:
    """Reads the log by event id."""

    __slots__ = ("_db", "_writer")

    def __init__(self, db: Database, writer: Writer) -> None:
        self._db = db
        self._writer = writer

    @property
    def floor(self) -> EventId:
        """The first id that may still be read."""
        return self._writer.floor

    @property
    def head(self) -> EventId:
        """The id of the next event."""
        return self._writer.head

    def read(self, start: EventId, limit: int) -> list[Event]:
        """Up to ``limit`` events with id ≥ ``start``; fewer only when the head is reached."""
        return self.page(start, limit, scanned=None).events

    def page(self, start: EventId, limit: int, *, scanned: int | None = 10_000) -> Page:
        """As `read`, but looks at no more than ``scanned`` rows, and tells where to go on."""
        head = self._writer.head
        start = max(start, self._writer.floor)
        events: list[Event] = []
        if start >= head or limit <= 0:
            return Page(events, start)
        wipes = self._writer.state.wipes
        rows = self._db.raw_scan(EVENTS.name, encode_u64(start), encode_u64(head))
        for looked, (key, raw) in enumerate(rows, 1):
            event = self._decode(decode_u64(key), raw)
            if not (wipes.by_did and wipes.stale(event.did, event.epoch)):
                events.append(event)
            if len(events) == limit or looked == scanned:
                return Page(events, event.id + 1)
        return Page(events, head)

    @staticmethod
    def _decode(event_id: EventId, raw: bytes) -> Event:
        try:
            return decode_event(event_id, raw)
        except Exception as error:
            raise StoreCorrupt(f"events: row {event_id} does not decode: {error}") from error

    def blocks(self, events: Sequence[Event]) -> list[bytes | None]:
        """The block of each event that carries a CID, None for the others and for pruned ones.

        Raises `StoreCorrupt` when a block is missing that floor, epoch and row still demand.
        """
        if not self._db.mode.blocks:
            return [None] * len(events)
        wanted = [(event.did, event.cid) for event in events if event.cid is not None]
        rows = self._db.multi_get(BLOCKS, wanted)
        found = iter(rows)
        blocks = [None if event.cid is None else next(found) for event in events]
        for event, block in zip(events, blocks, strict=True):
            if block is None and event.cid is not None and self._demands(event):
                raise StoreCorrupt(
                    f"blocks: event {event.id} of {event.did} has lost its block {event.cid.hex()}"
                )
        return blocks

    def _demands(self, event: Event) -> bool:
        """Whether the event is still retained, of the current life, and stored."""
        if event.id < self._writer.floor:
            return False
        row = self._db.repo(event.did)
        if (0 if row is None else row.epoch) != event.epoch:
            return False
        return self._db.get(EVENTS, event.id) is not None

    def at_time(self, time_us: Micros) -> EventId:
        """The id of the first event at or after ``time_us``; the head when there is none."""
        low, high = self._writer.floor, self._writer.head
        while low < high:
            middle = (low + high) // 2
            row = next(self._db.scan(EVENTS, encode_u64(middle), encode_u64(high), limit=1), None)
            if row is None:
                high = middle
            elif self._decode(*row).time_us < time_us:
                low = row[0] + 1
            else:
                high = middle if row[0] > middle else row[0]
        return low
