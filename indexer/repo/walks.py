"""Walks over a loaded repository: records in key order, in chunks, from memory or from a store.

A walk gives out only what its signed commit names, each node and record checked on the way; None as the next
chunk means that the repository was complete. An error or a cancellation ends a walk and lets go of all it
holds. Event loop; calls of a blocking store go to a thread.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from operator import itemgetter
from typing import NamedTuple, TypeVar, cast

from indexer.atproto.cid import format_cid
from indexer.atproto.commit import Commit
from indexer.atproto.mst import TreeLimits
from indexer.atproto.node import describe
from indexer.atproto.types import Cid, Path
from indexer.errors import (
    CarError,
    CommitError,
    DriveError,
    IndexerError,
    MissingBlock,
    MstError,
    OrderLost,
    SignatureInvalid,
    StoreError,
)
from indexer.repo.blocks import BlockStore, Keeping, Output
from indexer.repo.collector import paused
from indexer.repo.records import Records, Row
from indexer.repo.source import Clock
from indexer.repo.subtrees import HIGHEST, take_subtree
from indexer.repo.tree_walk import Entry, TreeWalk

#: A character above all that a path may hold: what begins with a prefix lies between it and it with this.
_ABOVE = "\x7f"
#: Nodes that are fetched together.
_AHEAD = 64

T = TypeVar("T")


@contextmanager
def translated(commit: Commit | None = None, commit_cid: Cid = b"") -> Iterator[None]:
    """Every error of ours inside becomes a `DriveError` whose cause it is."""
    try:
        yield
    except OSError as error:  # of a store; a source's errors are told where it is read
        raise DriveError(f"the disk failed: {type(error).__name__}: {error}", kind="disk") from error
    except DriveError:
        raise
    except IndexerError as error:
        raise DriveError(str(error), kind=_kind(error, commit, commit_cid)) from error


def _kind(error: IndexerError, commit: Commit | None, commit_cid: Cid) -> str:
    if isinstance(error, MissingBlock):
        if error.cid == commit_cid:
            return "missing_commit"
        return "missing_root" if commit is not None and error.cid == commit.data else "missing_block"
    if isinstance(error, CarError):
        return {"bad_hash": "bad_block", "block_size": "bad_block", "car_size": "limit"}.get(
            error.reason, "car"
        )
    if isinstance(error, MstError):
        return "limit" if error.reason in ("tree_size", "tree_depth", "node_size") else "walk"
    kinds = ((CommitError, "commit"), (SignatureInvalid, "signature"), (StoreError, "disk"))
    return next((kind for each, kind in kinds if isinstance(error, each)), "walk")


class RecordWalk(ABC):
    """Records in key order; what `next_chunk` has given out is not given out again."""

    def __init__(self, commit: Commit, clock: Clock) -> None:
        self.commit = commit
        self._clock = clock
        self._broken: DriveError | None = None

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Blocks that were read from the archive, one as often as it came; after the last chunk all."""

    async def next_chunk(self, size: int = 1000) -> list[Output] | None:
        """The next ``size`` records (the last chunk may be shorter), None when there are no more."""
        if not isinstance(size, int):
            raise TypeError(f"the size of a chunk is {size!r}, not a whole number")
        if size < 1:
            raise ValueError(f"a chunk of {size} records")
        return await self._guarded(self._chunk(size)) or None

    async def chunks(self, size: int = 1000) -> AsyncIterator[list[Output]]:
        """`next_chunk` until there is none."""
        while (chunk := await self.next_chunk(size)) is not None:
            yield chunk

    async def seek(self, start: Path, stop: Path | None = None) -> None:
        """Goes on with the first record at or behind ``start``, and ends before ``stop``.

        That a path is not among them is proven: every node on the way to where it would be was checked. A
        walk of a stream only goes forward, by reading.
        """
        await self._guarded(self._seek(start, stop))

    async def prefix(self, prefix: Path, size: int = 1000) -> AsyncIterator[list[Output]]:
        """The records whose path begins with ``prefix``, a collection and a slash for example, in chunks."""
        await self.seek(prefix, prefix + _ABOVE)
        async for chunk in self.chunks(size):
            yield chunk

    async def get(self, path: Path) -> Output | None:
        """The record at ``path``; None is a proof that there is none."""
        await self.seek(path, path + "\0")
        chunk = await self.next_chunk(1)
        return chunk[0] if chunk else None

    async def close(self) -> None:
        """Ends the walk and lets go of what it holds."""
        if self._broken is None:
            self._broken = DriveError("the walk was closed", kind="walk")
            await self._release()

    async def _guarded(self, work: Coroutine[None, None, T]) -> T:
        """Does a step of the walk within its time. Whatever ends it early ends the walk."""
        if self._broken is not None:
            work.close()
            raise DriveError(f"the walk has ended: {self._broken}", kind=self._broken.kind) from self._broken
        try:
            with translated(self.commit):
                async with self._clock.running():
                    return await work
        except BaseException as error:
            interrupted = DriveError("it was interrupted", kind="walk")
            self._broken = error if isinstance(error, DriveError) else interrupted
            if not isinstance(error, OrderLost):
                await self._release()
            raise

    @abstractmethod
    async def _chunk(self, size: int) -> list[Output]: ...

    @abstractmethod
    async def _seek(self, start: Path, stop: Path | None) -> None: ...

    @abstractmethod
    async def _release(self) -> None: ...


class Span(NamedTuple):
    """The paths that a walk which only goes forward gives out next: from ``start`` to before ``stop``."""

    start: Path = ""
    stop: Path | None = None

    def begins(self, record: Entry | Output) -> bool:
        """Whether a record does not lie before the span."""
        return record[0] >= self.start

    def ends(self, records: Sequence[Entry | Output]) -> bool:
        """Whether the last of the records lies behind the span."""
        return bool(records) and self.stop is not None and records[-1][0] >= self.stop

    def leading(self, records: Sequence[Entry | Output], most: int) -> int:
        """How many of the first records lie before the span's end."""
        if self.stop is None:
            return min(len(records), most)
        return min(bisect_left(records, self.stop, key=itemgetter(0)), most)

    def behind(self, records: Sequence[Entry | Output]) -> Span:
        """What is left of the span when these were given out."""
        return Span(records[-1][0] + "\0", self.stop) if records else self

    def forward(self, start: Path, stop: Path | None) -> Span:
        """The next span; `DriveError` when records that it would hold may have passed."""
        if start < self.start:
            raise DriveError(f"a walk that reads a stream cannot go back to {start!r}", kind="walk")
        return Span(start, stop)


class WholeWalk(RecordWalk):
    """A repository that lies in memory as it came, and was checked completely before."""

    def __init__(
        self, commit: Commit, clock: Clock, data: bytes, records: Records, keeping: Keeping, blocks: int
    ) -> None:
        super().__init__(commit, clock)
        self._blocks = blocks
        self._data = data
        self._records = records
        self._keeping = keeping
        self._rows: Iterator[Row] = iter(records)

    @property
    def blocks(self) -> int:
        return self._blocks

    async def _chunk(self, size: int) -> list[Output]:
        rows = list(islice(self._rows, size))
        data = self._data
        blocks = [data[start:end] for _path, _cid, start, end in rows]
        return self._keeping.outputs([row[0] for row in rows], [row[1] for row in rows], blocks)

    async def _seek(self, start: Path, stop: Path | None) -> None:
        first = self._records.place(start)
        last = None if stop is None else max(0, self._records.place(stop) - first)
        self._rows = islice(self._records.after(first), last)

    async def _release(self) -> None:
        self._data, self._rows = b"", iter(())


class StoreWalk(RecordWalk):
    """A repository whose blocks all wait in a store."""

    def __init__(
        self, commit: Commit, clock: Clock, store: BlockStore, keeping: Keeping, limits: TreeLimits,
        walk: TreeWalk | None = None, due: Sequence[Entry] = (), span: Span | None = None, hint: str = "",
        blocks: int = 0,
    ) -> None:  # fmt: skip
        """``walk`` and ``due``: where a walk goes on that began as a stream; it only goes forward."""
        super().__init__(commit, clock)
        self._blocks = blocks
        self._store = store
        self._keeping = keeping
        self._limits = limits
        self._walk = walk or TreeWalk(commit.data, limits=limits)
        self._span = span or Span()
        self._due = list(filter(self._span.begins, due))
        self._resumed = walk is not None
        self._ahead: dict[Cid, bytes | None] = {}
        self._hint = hint

    @property
    def blocks(self) -> int:
        return self._blocks

    async def _chunk(self, size: int) -> list[Output]:
        if self._store.blocking:
            return await in_thread(lambda: self._step(size))
        return self._step(size)

    def _step(self, size: int) -> list[Output]:
        with paused():
            return self._next(size)

    def _next(self, size: int) -> list[Output]:
        due = self._due
        while len(due) < size and self._walk.want is not None and not self._span.ends(due):
            due += filter(self._span.begins, self._more(self._walk.want))
        count = self._span.leading(due, size)
        entries, self._due = due[:count], due[count:]
        self._span = self._span.behind(entries)
        paths, cids = [entry[0] for entry in entries], [entry[1] for entry in entries]
        kept = self._store.get_many(cids)
        if None in kept:
            path, cid = entries[kept.index(None)]
            raise MissingBlock(f"record {path} ({format_cid(cid)}) is missing{self._hint}", cid=cid)
        return self._keeping.records(paths, cids, cast("list[bytes]", kept))

    def _more(self, cid: Cid) -> list[Entry]:
        """The next records: of the whole subtree where that is possible, else up to the next node."""
        walk = self._walk
        if not walk.bounded and 0 < walk.layer <= HIGHEST:
            found = take_subtree(cid, walk.layer, self._nodes, self._limits)
            if found is not None:
                entries = list(zip(found.paths, found.values, strict=True))
                return entries + walk.skip(found.keys[0], found.keys[-1], found.size)
        return walk.take(self._node(cid))

    def _nodes(self, cids: Sequence[Cid]) -> list[bytes | None]:
        raw = self._keeping.raw
        return [None if kept is None else raw(kept) for kept in self._store.get_many(cids)]

    def _node(self, cid: Cid) -> bytes:
        if cid not in self._ahead:
            cids = self._walk.upcoming(_AHEAD)
            self._ahead = dict(zip(cids, self._nodes(cids), strict=True))
        block = self._ahead.pop(cid)
        if block is None:
            raise MissingBlock(f"{describe(cid)} is missing{self._hint}", cid=cid)
        return block

    async def _seek(self, start: Path, stop: Path | None) -> None:
        if self._resumed:
            self._span = self._span.forward(start, stop)
            self._due = list(filter(self._span.begins, self._due))
            return
        self._walk = TreeWalk(self.commit.data, start=start, stop=stop, limits=self._limits)
        self._span, self._due, self._ahead = Span(), [], {}

    async def _release(self) -> None:
        if self._store.blocking:
            await in_thread(self._store.reset)
        else:
            self._store.reset()


async def in_thread(work: Callable[[], T]) -> T:
    """``work`` on a thread. A cancellation waits for its end, so that nothing goes on behind its back."""
    task = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
