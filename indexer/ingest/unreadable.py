"""Frames that end a connection and come again on the next one (row 0 of sync.md §2).

Owns the judgement which frame is passed over, so that one frame that nobody can read does not hold its
upstream up for ever, while an upstream that sends garbage is hung up on each time. No I/O.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final

from indexer.atproto.types import Seq

#: Times that one and the same frame comes behind one and the same cursor until it is passed over.
TRIES: Final = 3
#: Different unreadable frames behind one cursor that are remembered; others end the connection each time.
REMEMBERED: Final = 256


class Unreadable:
    """Those of one upstream."""

    def __init__(self) -> None:
        self._after: Seq = -1
        self._tries: dict[bytes, int] = {}  # by digest
        self._passed: set[bytes] = set()  # in this connection

    def connected(self) -> None:
        """A new connection begins."""
        self._passed.clear()

    def passes(self, after: Seq, data: bytes) -> bool:
        """Whether this frame, which came behind ``after``, is passed over; else it ends the connection."""
        if after != self._after:
            self._after = after
            self._tries.clear()
            self._passed.clear()
        digest = sha256(data).digest()
        if digest in self._passed or (digest not in self._tries and len(self._tries) >= REMEMBERED):
            return False
        self._tries[digest] = self._tries.get(digest, 0) + 1
        if self._tries[digest] < TRIES:
            return False
        self._passed.add(digest)
        return True
