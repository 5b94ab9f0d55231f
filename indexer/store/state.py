"""What the writer mirrors in memory: positions of the log, unfolded references, wiped lives.

Loaded when the writer is made, moved on when a group commits. Decides the next event id after a
kill (the stored head) and after a power cut (the synced reserve mark). On the writer's loop.
"""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any, Final

from indexer.atproto.types import EventId, Micros
from indexer.errors import StoreCorrupt
from indexer.store import keyspaces
from indexer.store.database import Database
from indexer.store.keyspaces import CURSORS, EVENTS
from indexer.store.references import References
from indexer.store.wipes import Wipes

RESERVE_IDS: Final = 2**20
_BOOT_ID: Final = FilePath("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Changes with every start of the machine; "" where the system does not tell."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


class State:
    """Positions and mirrors of a database that has one writer."""

    __slots__ = (
        "boot",
        "floor",
        "hole",
        "last_time",
        "margin",
        "next_id",
        "refs",
        "reserved",
        "wipes",
    )

    def __init__(self, db: Database, boot: str | None = None) -> None:
        self.boot = boot_id() if boot is None else boot
        self.margin = RESERVE_IDS // 2
        self.wipes = Wipes()
        self.wipes.load(db)
        self.refs = References()
        self.refs.load(db, self.wipes)
        self.floor: EventId = db.cursor(keyspaces.FLOOR) or 1
        self.reserved: EventId = db.cursor(keyspaces.RESERVE) or 0
        self.next_id, self.last_time = self._head(db)
        self.hole: tuple[EventId, EventId] | None = None  # ids that this start left out: a power cut
        if self._power_was_cut(db) and self.reserved > self.next_id:
            self.hole = (self.next_id, self.reserved)
            self.next_id = self.reserved

    def _head(self, db: Database) -> tuple[EventId, Micros]:
        stored = db.get(CURSORS, keyspaces.HEAD)
        last = next(db.scan(EVENTS, reverse=True, limit=1), None)
        if stored is None:
            if last is not None:
                raise StoreCorrupt(f"cursors: row {keyspaces.HEAD!r} is missing though there are events")
            return 1, 0
        if not (isinstance(stored, list) and len(stored) == 2 and all(isinstance(n, int) for n in stored)):
            raise StoreCorrupt(f"cursors: row {keyspaces.HEAD!r} holds {stored!r}, not [id, time]")
        head, time_us = stored
        if last is not None and last[0] >= head:
            raise StoreCorrupt(
                f"events: id {last[0]} is not below the head {head} (cursors: {keyspaces.HEAD})"
            )
        if self.floor > head:
            raise StoreCorrupt(f"cursors: row {keyspaces.FLOOR!r} holds {self.floor}, above the head {head}")
        return head, time_us

    def _power_was_cut(self, db: Database) -> bool:
        stored = db.get(CURSORS, keyspaces.BOOT)
        if stored is None or db.get(CURSORS, keyspaces.CLEAN):
            return False
        return not self.boot or stored != self.boot

    def start_rows(self) -> dict[str, Any]:
        """The cursors to write, synced, before the first event id is given out."""
        self.reserved = max(self.reserved, self.next_id + RESERVE_IDS)
        rows: dict[str, Any] = {
            keyspaces.BOOT: self.boot,
            keyspaces.CLEAN: None,
            keyspaces.RESERVE: self.reserved,
        }
        if self.hole is not None:
            rows[f"{keyspaces.HOLE}{self.hole[0]}"] = self.hole[1]
            rows[keyspaces.HEAD] = [self.next_id, self.last_time]
        return rows

    def cursor_moved(self, name: str, value: Any) -> None:
        """A cursor was committed."""
        if name == keyspaces.FLOOR:
            self.floor = value
        elif name == keyspaces.CHECKPOINT:
            self.refs.position = value
        elif name == keyspaces.RESERVE:
            self.reserved = value
