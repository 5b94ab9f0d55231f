"""The reference counts that are not folded yet, in memory.

A block's count is its `block_refs` row plus what `References` holds (the log rows after the
checkpoint) plus the running group's own changes. Rebuilt from the log at start, moved on by commits,
settled by folds. On the writer's loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from indexer.atproto.types import Cid, Did
from indexer.errors import StoreCorrupt
from indexer.store.codecs import encode_u64
from indexer.store.database import Database
from indexer.store.keyspaces import CHECKPOINT, REFLOG
from indexer.store.wipes import Wipes

Life: TypeAlias = tuple[Did, int]  # a repository's DID and epoch


class References:
    """The reference changes after the checkpoint, summed by life and CID; bounded by the fold's trigger."""

    __slots__ = ("_last_rows", "next_row", "overlay", "position", "ready", "unfolded")

    def __init__(self) -> None:
        self.overlay: dict[Life, dict[Cid, int]] = {}
        self._last_rows: dict[Life, int] = {}  # the newest row of the log that names a life
        self.position = 0  # the first row of the log that is not folded
        self.next_row = 0
        self.unfolded = 0  # changes in the rows not folded
        self.ready = False  # the overlay is whole: counts may be believed

    def load(self, db: Database, wipes: Wipes) -> None:
        """Rebuild the overlay from the log. Raises `StoreCorrupt` for a malformed position."""
        position = db.cursor(CHECKPOINT) or 0
        if position < 0:
            raise StoreCorrupt(f"cursors: row {CHECKPOINT!r} holds {position}, no row of the log")
        self.position = self.next_row = position
        for row, changes in db.scan(REFLOG, encode_u64(position)):
            self.next_row = row + 1
            for did, epoch, cids in changes:
                self.unfolded += len(cids)
                if not wipes.stale(did, epoch):
                    self._add_all((did, epoch), cids)
                    self._last_rows[did, epoch] = row
        self.ready = True

    def pending(self, did: Did, epoch: int, cid: Cid) -> int:
        cids = self.overlay.get((did, epoch))
        return 0 if cids is None else cids.get(cid, 0)

    def folded(self, life: Life) -> bool:
        """Whether nothing committed of a life waits in the log: no fold that is planned now changes it."""
        return self._last_rows.get(life, -1) < self.position

    def merge(self, changes: Mapping[Life, Mapping[Cid, int]]) -> None:
        """Take in the changes of a commit, which wrote them as the row ``next_row``."""
        for life, cids in changes.items():
            self._add_all(life, cids)
            self._last_rows[life] = self.next_row
            self.unfolded += len(cids)
        self.next_row += 1

    def settle(self, life: Life, changes: Mapping[Cid, int]) -> None:
        """A fold has moved these changes into the rows. What is left may be nothing, or its opposite: a block
        whose changes sum to zero is counted by the rows and by the rest of the log, each in part."""
        if self.folded(life):
            self._last_rows.pop(life, None)
        if self.overlay.get(life) == changes:
            del self.overlay[life]
        else:
            for cid, delta in changes.items():
                self._add(life, cid, -delta)

    def drop(self, life: Life) -> None:
        """Forget a life that ended."""
        self.overlay.pop(life, None)
        self._last_rows.pop(life, None)

    def _add_all(self, life: Life, cids: Mapping[Cid, int]) -> None:
        mine = self.overlay.get(life)
        if 0 not in cids.values() and (mine is None or mine.keys().isdisjoint(cids)):
            if mine is None:
                self.overlay[life] = dict(cids)
            else:
                mine.update(cids)
        else:
            for cid, delta in cids.items():
                self._add(life, cid, delta)

    def _add(self, life: Life, cid: Cid, delta: int) -> None:
        cids = self.overlay.get(life)
        if cids is None:
            cids = self.overlay[life] = {}
        total = cids.get(cid, 0) + delta
        if total:
            cids[cid] = total
        else:
            cids.pop(cid, None)
            if not cids:
                del self.overlay[life]
