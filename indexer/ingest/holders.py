"""Who has how much waiting that nothing vouches for, so that the largest makes room for the others.

Owns the order: accounts of which no identity is known first, then by bytes. In memory and only a hint: a
step that was undone leaves it behind the rows, so whoever evicts asks them. Event loop only.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from indexer.atproto.types import Did
from indexer.store.database import Database

_BYTES = "/unproven_bytes"
#: Entries of the heap beyond twice those that count, at which it is made anew.
_SLACK = 64


class Weight(NamedTuple):
    """The heavier one goes first."""

    unknown: bool  # no identity of the account was ever known
    size: int


class Holders:
    """The repositories with unproven frames, heaviest first; begins with those that the rows tell of."""

    def __init__(self, db: Database) -> None:
        self._weights: dict[Did, Weight] = {}
        self._heap: list[tuple[bool, int, Did]] = []
        for name, size in db.counts("buffer/did:").items():
            if name.endswith(_BYTES):
                did = name.removeprefix("buffer/").removesuffix(_BYTES)
                row = db.repo(did)
                self.note(did, Weight(row is None or not row.signing_key, size))

    def note(self, did: Did, weight: Weight) -> None:
        if not weight.size:
            self._weights.pop(did, None)
            return
        self._weights[did] = weight
        heapq.heappush(self._heap, (not weight.unknown, -weight.size, did))
        if len(self._heap) > 2 * len(self._weights) + _SLACK:
            self._heap = [(not known.unknown, -known.size, did) for did, known in self._weights.items()]
            heapq.heapify(self._heap)

    def heaviest(self) -> tuple[Did, Weight] | None:
        while self._heap:
            known, size, did = self._heap[0]
            weight = self._weights.get(did)
            if weight == (not known, -size) and weight is not None:
                return did, weight
            heapq.heappop(self._heap)
        return None
