"""The sent frames in order, for replay by cursor and for the live tail.

Owns the index of frames in the journal and one `Lane` for each sender (a PDS or a relay) with that
sender's own sequence numbers. Readers pull; what is to happen to one open socket alone (a cut, a frame that
no replay repeats) waits with its `Line`. One event loop.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from indexer.simulator.cbor import head
from indexer.simulator.journal import Journal, Place

_BATCH_FRAMES = 512


class FrameLog:
    """Where each frame's halves lie in the journal, by a running number."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._segments = array("I")
        self._offsets = array("Q")
        self._before = array("I")
        self._after = array("I")

    def add(self, place: Place, sizes: Sequence[tuple[int, int]]) -> range:
        """Frames that lie one behind the other from ``place``; returns their numbers."""
        first, offset = len(self._offsets), place.offset
        for before, after in sizes:
            self._segments.append(place.segment)
            self._offsets.append(offset)
            self._before.append(before)
            self._after.append(after)
            offset += before + after
        return range(first, len(self._offsets))

    def retained(self, number: int) -> bool:
        return self._segments[number] >= self._journal.oldest_segment

    def size(self, number: int) -> int:
        return self._before[number] + self._after[number]

    def frame(self, number: int, seq: int) -> bytes:
        split = self._before[number]
        data = self._journal.read(self._segments[number], self._offsets[number], split + self._after[number])
        return data[:split] + head(0, seq) + data[split:]


class Turn(NamedTuple):
    """What one open socket does next, beside its lane: send ``data``, fall silent, close."""

    data: bytes = b""
    text: bool = False
    silent_s: float = 0.0
    deaf: bool = False  # nor are pings answered meanwhile
    cut: bool = False
    close: bool = False


class Line:
    """One subscriber's open socket, as far as the network may play tricks on it."""

    def __init__(self) -> None:
        self.turns: deque[Turn] = deque()


class Lane:
    """What one sender has sent: strictly increasing seqs over frames of the log."""

    def __init__(self, log: FrameLog, name: str = "") -> None:
        self._log = log
        self.name = name
        self._seqs = array("Q")
        self._numbers = array("Q")
        self._base = 0  # numbering goes on above it
        self._floor = 0
        self._changed = asyncio.Event()
        self.lines: list[Line] = []
        self.mute = False  # a cursor above the head is not told so
        self.overlap = 0  # frames up to the cursor that the next replay repeats

    @property
    def seq(self) -> int:
        """The newest seq; 0 before the first frame."""
        return self._seqs[-1] if self._seqs else 0

    @property
    def head(self) -> int:
        """The newest number that was given away, to a frame or to one that was withheld."""
        return max(self.seq, self._base)

    @property
    def end(self) -> int:
        return len(self._seqs)

    def add(self, seq: int, number: int) -> None:
        self._seqs.append(seq)
        self._numbers.append(number)

    def skip(self, seq: int) -> None:
        """No frame of this lane gets a number up to ``seq``."""
        self._base = max(self._base, seq)

    def reset(self, base: int, *, mute: bool) -> None:
        """All is forgotten; numbering begins anew above ``base``."""
        self._seqs, self._numbers = array("Q"), array("Q")
        self._base, self._floor, self.mute = base, 0, mute

    def start(self, cursor: int) -> int:
        """Index of the first frame that a replay from ``cursor`` sends."""
        index = self.end if self.mute and cursor > self.head else self.after(cursor)
        index, self.overlap = index - self.overlap, 0
        return max(index, self.floor())

    def play(self, *turns: Turn) -> int:
        """Every open socket takes these turns; returns how many there are."""
        for line in self.lines:
            line.turns.extend(turns)
        self.wake()
        return len(self.lines)

    def wake(self) -> None:
        """Tell waiting readers that frames were added."""
        self._changed.set()
        self._changed = asyncio.Event()

    def floor(self) -> int:
        """Index of the oldest frame that can still be replayed."""
        while self._floor < self.end and not self._log.retained(self._numbers[self._floor]):
            self._floor += 1
        return self._floor

    def after(self, seq: int) -> int:
        """Index of the first frame whose seq is above ``seq``."""
        return bisect_right(self._seqs, seq)

    def outdated(self, cursor: int) -> bool:
        """Whether frames after ``cursor`` are no longer there; 0 asks for whatever is left."""
        floor = self.floor()
        return (
            cursor > 0 and floor < self.end and cursor < self._seqs[floor] - 1 and self.after(cursor) <= floor
        )

    def read(self, index: int, budget: int) -> list[bytes]:
        """Frames from ``index``: at least one if there is any, then up to ``budget`` bytes."""
        frames: list[bytes] = []
        while index < self.end and budget > 0 and len(frames) < _BATCH_FRAMES:
            number = self._numbers[index]
            budget -= self._log.size(number)
            frames.append(self._log.frame(number, self._seqs[index]))
            index += 1
        return frames

    async def wait(self, index: int, line: Line | None = None) -> None:
        """Return when there is a frame at ``index``, or a turn for ``line``."""
        while index >= self.end and not (line is not None and line.turns):
            await self._changed.wait()
