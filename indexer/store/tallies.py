"""Totals that databases of older programs lack: counted step by step, and exact from then on.

The part of the transaction that keeps `counts.TALLIES`. On the writer's loop.
"""

from __future__ import annotations

from indexer.atproto.types import Did
from indexer.store.codecs import RepoRow
from indexer.store.counts import DELETIONS, HOMES, TALLIES, Tally
from indexer.store.group import Group
from indexer.store.host_rows import ALL_COUNTED


class Tallies(Group):
    """Totals of accounts by host, and of deleted ones."""

    __slots__ = ()

    def tally(self, did: Did, old: RepoRow | None, new: RepoRow | None) -> None:
        """The totals follow a repository's row, as far as they are made already."""
        for kind in TALLIES:
            before, after = kind.name_of(old), kind.name_of(new)
            if before != after and did <= (self.position(kind.counted) or ""):
                for name, delta in ((before, -1), (after, 1)):
                    if name:
                        self.add(self._deltas, name, delta)

    def count_homes(self, limit: int) -> bool:
        """Count the accounts of ``limit`` more repositories by host; true when all are counted."""
        return self._count_more(HOMES, limit)

    def count_deleted(self, limit: int) -> bool:
        """Count the deleted accounts among ``limit`` more repositories; true when all are counted."""
        return self._count_more(DELETIONS, limit)

    def _count_more(self, kind: Tally, limit: int) -> bool:
        start = self.position(kind.counted) or ""
        stored = [did for did, _ in self._db.repos(after=start, limit=limit)]
        stop = stored[-1] if len(stored) == limit else ALL_COUNTED
        fresh = {did for did in self._repos if start < did <= stop}  # written by this group
        for did in fresh.union(stored):
            name = kind.name_of(self.repo(did))
            if name:
                self.add(self._deltas, name, 1)
        self.set_cursor(kind.counted, stop)
        return stop == ALL_COUNTED
