"""The ring of refused frames, in which every source has a share.

Numbers go up over all sources; beside the frames stands, for each source, which of them are its own and in
which order. When the ring is full the oldest frame of a source goes that has more than its share (all of
them divided by the sources that have any): the refusing source's own, else the largest one's. So whoever
lies loses his own lies. Frames from before there were shares leave by number. On the writer's loop.
"""

from __future__ import annotations

from typing import Final

from indexer.atproto.types import Did, Seq
from indexer.store.codecs import QuarantineRow, after_prefix, encode_u64
from indexer.store.group import Group
from indexer.store.keyspaces import (
    CURSORS,
    QUARANTINE,
    QUARANTINE_NEXT,
    QUARANTINE_SHARED,
    QUARANTINE_SOURCE,
    REFUSED,
)

#: Totals: frames with a place in a source's row, and sources that have any.
KEPT: Final = "quarantine/kept"
SOURCES_KEPT: Final = "quarantine/sources"
_EMPTY: Final = (0, 0)
#: Frames that leave a ring, which may have been made shorter, for each new one.
_LEAVE_FOR_ONE: Final = 2


class RefusedRing(Group):
    """Refused frames."""

    __slots__ = ()

    def quarantine(self, source: str, seq: Seq, did: Did, reason: str, message: str, data: bytes) -> None:
        """Keep a refused frame for inspection; in a full ring it takes the place of another."""
        number = self.cursor(QUARANTINE_NEXT) or 0
        self._leave_by_number(number)
        first, after = self._places(source)
        for _ in range(_LEAVE_FOR_ONE):
            if (kept := self.count(KEPT)) < self._limits.quarantine_entries:
                break
            sources = self.count(SOURCES_KEPT) + (first == after)
            mine = first < after and (after - first) * sources >= kept
            self._drop_oldest(source if mine else self._largest())
            first, after = self._places(source)
        kept_data = data[: self._limits.quarantine_bytes]
        row = QuarantineRow(self._clock(), source, seq, did, reason, message[:1000], len(data), kept_data)
        self.put(QUARANTINE, number, row)
        self.put(REFUSED, (source, encode_u64(after)), number)
        self._set_places(source, first, after + 1)
        self.set_cursor(QUARANTINE_NEXT, number + 1)

    def trim_quarantine(self, limit: int) -> None:
        """Drop up to ``limit`` frames that are over the ring's length."""
        for _ in range(min(limit, self.count(KEPT) - self._limits.quarantine_entries)):
            self._drop_oldest(self._largest())

    def _leave_by_number(self, number: int) -> None:
        """For each new frame one goes that was kept before there were shares."""
        shared = self.cursor(QUARANTINE_SHARED)
        if shared is None:
            shared = number
            self.set_cursor(QUARANTINE_SHARED, number)
        old = number - self._limits.quarantine_entries
        if 0 <= old < shared:
            self.delete(QUARANTINE, old)

    def _places(self, source: str) -> tuple[int, int]:
        """The first place of the source that is taken, and the one after the last."""
        first, after = self.position(QUARANTINE_SOURCE + source) or _EMPTY
        return first, after

    def _set_places(self, source: str, first: int, after: int) -> None:
        before = self._places(source)
        self.set_cursor(QUARANTINE_SOURCE + source, [first, after] if first < after else None)
        self.add_count(KEPT, (after - first) - (before[1] - before[0]))
        self.add_count(SOURCES_KEPT, (first < after) - (before[0] < before[1]))

    def _largest(self) -> str:
        """The source with the most frames; asked only while somebody has more than his share."""
        start = QUARANTINE_SOURCE.encode()
        rings = dict(self._db.scan(CURSORS, start, after_prefix(start)))
        rings.update((name, row) for name, row in self._cursors.items() if name.startswith(QUARANTINE_SOURCE))
        sizes = {name: row[1] - row[0] for name, row in rings.items() if row is not None}
        return max(sizes, key=lambda name: (sizes[name], name)).removeprefix(QUARANTINE_SOURCE)

    def _drop_oldest(self, source: str) -> None:
        first, after = self._places(source)
        number = self.get(REFUSED, (source, encode_u64(first)))
        if number is not None:
            self.delete(QUARANTINE, number)
            self.delete(REFUSED, (source, encode_u64(first)))
        self._set_places(source, first + 1, after)
