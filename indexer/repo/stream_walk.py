"""The walk of an archive in streaming order while it is read: memory for a window of it, whatever its size.

Goes through `Preorder`. Records that passed are remembered as long as there is room, for those that stand
under several keys and came once. Where the order ends, what follows is gathered in memory and the walk goes
on in the tree; what memory does not hold needs a disk, and `OrderLost` hands over the paused walk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from indexer.atproto.cid import CID_LENGTH
from indexer.atproto.commit import Commit
from indexer.atproto.types import Cid, Path
from indexer.errors import OrderLost
from indexer.repo.blocks import BLOCK_OVERHEAD, Output
from indexer.repo.collector import paused
from indexer.repo.loading import Gathering, NeedDisk, Plan, Resume
from indexer.repo.preorder import WINDOW, Preorder, Taken
from indexer.repo.source import CarReader
from indexer.repo.tree_walk import TreeWalk
from indexer.repo.walks import RecordWalk, Span, StoreWalk


class _Window(NamedTuple):
    number: int  # bytes that were added before it
    data: bytes
    starts: list[int]
    ends: list[int]

    @property
    def size(self) -> int:
        return len(self.data) + BLOCK_OVERHEAD * len(self.starts)

    def blocks(self) -> Iterator[tuple[Cid, tuple[int, bytes]]]:
        """CID → (number of the window, block)."""
        data, number = self.data, self.number
        for start, end in zip(self.starts, self.ends, strict=True):
            yield data[start - CID_LENGTH : start], (number, data[start:end])


class Passed:
    """Records that passed lately, by their CIDs. The index is made when it is first asked for."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._windows: deque[_Window] = deque()
        self._size = 0
        self._added = 0
        self._index: dict[Cid, tuple[int, bytes]] | None = None

    def add(self, data: bytes, starts: list[int], ends: list[int]) -> None:
        """Records of which each lies behind its CID in ``data``; the oldest are forgotten for them."""
        if not starts:
            return
        window = _Window(self._added, data, starts, ends)
        self._added += window.size
        self._windows.append(window)
        self._size += window.size
        if self._index is not None:
            self._index.update(window.blocks())
        while self._size > self._most and self._windows:
            self._forget(self._windows.popleft())

    def recall(self, cid: Cid) -> bytes | None:
        """The record ``cid``; None when it is not remembered."""
        if self._index is None:
            self._index = {}
            for window in self._windows:
                self._index.update(window.blocks())
        found = self._index.get(cid)
        return None if found is None else found[1]

    def renew(self, records: dict[Cid, bytes]) -> None:
        """Those of them that would be forgotten before long count as the latest."""
        index, oldest = self._index or {}, self._added - self._most // 4
        old = {cid: block for cid, block in records.items() if index.get(cid, (self._added,))[0] < oldest}
        starts, ends, at = [], [], 0
        for block in old.values():
            starts.append(at + CID_LENGTH)
            at += CID_LENGTH + len(block)
            ends.append(at)
        self.add(b"".join(part for item in old.items() for part in item), starts, ends)

    def clear(self) -> None:
        self._windows.clear()
        self._size, self._index = 0, None

    def _forget(self, window: _Window) -> None:
        self._size -= window.size
        if self._index is not None:
            for cid, (number, _block) in window.blocks():
                if self._index.get(cid, (0, b""))[0] == number:
                    del self._index[cid]


class StreamWalk(RecordWalk):
    """Reads no further than the chunk that is asked for needs."""

    def __init__(self, commit: Commit, commit_cid: Cid, plan: Plan, reader: CarReader) -> None:
        """``reader`` stands behind the commit, which is the first block."""
        super().__init__(commit, plan.clock)
        self._root = commit_cid
        self._reader = reader
        self._plan = plan
        self._order = Preorder(commit.data, plan.limits, plan.tree_limits)
        self._passed = Passed(plan.most // 2)
        self._ready: list[Output] = []
        self._span = Span()
        self._rest: StoreWalk | None = None
        self._lost: OrderLost | None = None
        self._finished = False

    @property
    def blocks(self) -> int:
        return self._order.blocks if self._rest is None else self._rest.blocks

    async def first_window(self) -> bool:
        """Whether the archive begins in streaming order."""
        await self._reader.fill(WINDOW)
        return self._take(self._reader.at + WINDOW)

    async def _chunk(self, size: int) -> list[Output]:
        ready = self._ready
        while len(ready) < size and not (
            self._finished or self._lost or self._rest or self._span.ends(ready)
        ):
            await self._more()
        ready = self._ready
        if self._rest is not None and len(ready) < size and not self._span.ends(ready):
            ready += await self._rest._chunk(size - len(ready))
        if self._lost is not None and not ready:
            raise self._lost
        count = self._span.leading(ready, size)
        out = ready[:count]
        del ready[:count]
        self._span = self._span.behind(out)
        return out

    async def _seek(self, start: Path, stop: Path | None) -> None:
        self._span = self._span.forward(start, stop)
        self._ready = list(filter(self._span.begins, self._ready))
        if self._rest is not None:
            await self._rest._seek(start, stop)

    async def _release(self) -> None:
        self._ready = []
        self._passed.clear()
        await self._reader.close()
        if self._rest is not None:
            await self._rest._release()

    async def _more(self) -> None:
        reader = self._reader
        before = reader.offset
        await reader.fill(WINDOW)
        if self._order.done and not reader.left:
            self._finished = True
            return
        if self._take(reader.at + WINDOW) and (reader.offset > before or await reader.grow(WINDOW)):
            return
        # One section after the other, up to the one that is out of order.
        while self._take(reader.at + 1) and reader.offset > before:
            before = reader.offset
        if not self._supply():
            await self._leave_order()

    def _take(self, stop: int) -> bool:
        """Walks what begins before ``stop``; false when it is out of order, and nothing has changed then."""
        reader = self._reader
        with paused():
            stop = min(stop, len(reader.data))
            taken = self._order.window(reader.data, reader.at, stop, self._passed.recall)
            if taken is None:
                return False
            self._give_out(taken)
        reader.at = taken.end
        return True

    def _give_out(self, taken: Taken) -> None:
        if not taken.text:
            return
        shift = self._reader.at
        data = self._reader.data[shift : taken.end]
        starts = [start - shift for start in taken.starts]
        ends = [end - shift for end in taken.ends]
        cids = [data[start - CID_LENGTH : start] for start in starts]
        blocks = [data[start:end] for start, end in zip(starts, ends, strict=True)]
        found = self._outputs(taken.paths, cids, blocks, taken.recalled)
        self._passed.add(data, starts, ends)
        self._ready += filter(self._span.begins, found) if found[0].path < self._span.start else found

    def _outputs(
        self, paths: list[Path], cids: list[Cid], blocks: list[bytes], recalled: dict[int, tuple[Cid, bytes]]
    ) -> list[Output]:
        """The records under ``paths``, of which some were recalled and the others came in order."""
        keeping = self._plan.keeping
        if not recalled:
            return keeping.outputs(paths, cids, blocks)
        known = dict(recalled.values())
        self._passed.renew(known)
        outcomes = {cid: keeping.outcome(block) for cid, block in known.items()}
        own = [path for line, path in enumerate(paths) if line not in recalled]
        came = iter(keeping.outputs(own, cids, blocks))
        found = []
        for line, path in enumerate(paths):
            cid = recalled[line][0] if line in recalled else None
            found.append(next(came) if cid is None else Output(path, cid, *outcomes[cid]))
        return found

    def _supply(self) -> bool:
        """Gives out records that are named next and passed before; false when there are none."""
        taken = self._order.supply(self._reader.at, self._passed.recall)
        self._give_out(taken)
        return bool(taken.recalled)

    async def _leave_order(self) -> None:
        """Goes on in the tree with the blocks that remain, once all of them are here."""
        order, plan = self._order, self._plan
        self._passed.clear()
        gathering = Gathering(plan, self._reader, self._root, order.blocks)
        walk = TreeWalk.resume(self.commit.data, order.frames(), order.entries, plan.tree_limits)
        resume = Resume(self.commit, walk, order.pending(), self._span)
        if await gathering.to_memory():
            self._rest = await gathering.walk(gathering.memory, resume)
            return
        what = f"blocks out of order take more than the {plan.most} bytes of memory"
        self._lost = OrderLost(what, need_disk=NeedDisk(gathering, self.commit, resume))
