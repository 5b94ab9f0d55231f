"""Reading an archive whose blocks come in any order: into memory, and when that is full, to a disk.

Owns the paused walk that a caller gets when memory is full, and chooses to go on with. A failure or a
cancellation empties the store. Event loop; calls of a blocking store go to a thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, TypeVar

from indexer.atproto.car import CarSplitter, Limits
from indexer.atproto.cid import CID_LENGTH, format_cid
from indexer.atproto.commit import Commit
from indexer.atproto.mst import TreeLimits
from indexer.atproto.types import Cid, Did, DidKey
from indexer.errors import CarError, DriveError, MissingBlock
from indexer.repo.blocks import BlockStore, Keeping, MemoryBlocks
from indexer.repo.collector import paused
from indexer.repo.sections import TWO_BYTES, all_match, whole_sections
from indexer.repo.source import CarReader, Clock
from indexer.repo.tree_walk import Entry, TreeWalk
from indexer.repo.walker import checked_commit
from indexer.repo.walks import Span, StoreWalk, in_thread, translated

#: Bytes that are taken apart, and go to a store, at once.
_PIECE: Final = 256 << 10
#: Says why a block may be missing that the archive had.
_HINT: Final = " (if it came before under another key, load the archive again with streaming=False)"


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a load was asked for. ``most``: bytes of memory for blocks that wait."""

    keeping: Keeping
    limits: Limits
    tree_limits: TreeLimits
    clock: Clock
    most: int
    did: Did | None
    key: DidKey | None


class Resume(NamedTuple):
    """Where a walk in streaming order stands, for one that takes blocks in any order."""

    commit: Commit
    walk: TreeWalk
    due: list[Entry]
    span: Span


class Gathering:
    """The archive's remaining blocks on their way into memory or a store."""

    def __init__(self, plan: Plan, reader: CarReader, root: Cid, blocks: int = 0) -> None:
        """``root``: the commit's CID; ``blocks``: how many were read before."""
        self.plan = plan
        self.root = root
        self.memory = MemoryBlocks()
        #: Blocks of the archive that were read.
        self.blocks = blocks
        self._reader = reader
        self._splitter: CarSplitter | None = None

    async def to_memory(self) -> bool:
        """True when all is read, false when memory is full."""
        async for part in self._parts():
            part.put(self.memory)
            if self.memory.size > self.plan.most:
                return False
        return True

    async def to_store(self, store: BlockStore) -> None:
        """Moves what memory holds, then reads the rest."""
        for batch in self.memory.drain(_PIECE):
            await _done(store, partial(store.put_many, batch))
        async for part in self._parts():
            await _done(store, partial(part.put, store))

    async def walk(self, store: BlockStore, resume: Resume | None) -> StoreWalk:
        """The walk over what was gathered; checks the commit when no walk has begun."""
        plan = self.plan
        if resume is not None:
            return StoreWalk(
                resume.commit, plan.clock, store, plan.keeping, plan.tree_limits,
                walk=resume.walk, due=resume.due, span=resume.span, hint=_HINT, blocks=self.blocks,
            )  # fmt: skip
        kept = (await _done(store, lambda: store.get_many([self.root])))[0]
        if kept is None:
            raise MissingBlock(f"the commit {format_cid(self.root)} is missing", cid=self.root)
        commit = checked_commit(self.root, plan.keeping.raw(kept), plan.did, plan.key)
        return StoreWalk(commit, plan.clock, store, plan.keeping, plan.tree_limits, blocks=self.blocks)

    async def close(self) -> None:
        """Lets memory and source go."""
        self.memory.reset()
        await self._reader.close()

    async def _parts(self) -> AsyncIterator[_Part]:
        """The blocks that follow, many at a time. May be left and begun again."""
        while self._splitter is None:
            with paused():
                part = self._many() if self._reader.left else None
            if part is not None:
                yield part
            elif self._splitter is None and not await self._reader.grow(_PIECE):
                if not self._reader.left:
                    return
                self._judge()
        async for piece in self._reader.pieces():
            pairs = self._splitter.feed(piece)
            self.blocks = self._splitter.blocks
            if pairs:
                yield self._kept([cid for cid, _block in pairs], [block for _cid, block in pairs])
        self._splitter.close()

    def _many(self) -> _Part | None:
        """What lies whole in what was read, None when that is less than a section. Whatever is not as it
        should be is left to the splitter, which says what is wrong."""
        reader, limits = self._reader, self.plan.limits
        data = reader.data
        stop = min(reader.at + _PIECE, len(data))
        largest = limits.max_block + CID_LENGTH
        found = whole_sections(data, reader.at, stop, largest) if largest > TWO_BYTES else None
        if found is not None and self.blocks + len(found.cids) <= limits.max_blocks:
            blocks = [data[start:end] for start, end in zip(found.starts, found.ends, strict=True)]
            if all_match(found.cids, blocks):
                reader.at = found.end
                self.blocks += len(blocks)
                if self.plan.keeping.plain:
                    return (
                        _Part(found.cids, blocks, Where(data, found.starts, found.ends)) if blocks else None
                    )
                return self._kept(found.cids, blocks) if blocks else None
        self._judge()
        return None

    def _judge(self) -> None:
        """From here on one section after the other."""
        limits, offset = self.plan.limits, self._reader.offset
        self._splitter = CarSplitter(limits, roots=(self.root,), offset=offset, blocks=self.blocks)

    def _kept(self, cids: list[Cid], blocks: list[bytes]) -> _Part:
        with paused():
            return _Part(cids, self.plan.keeping.keep(cids, blocks, self.root))


class Where(NamedTuple):
    """The bytes that blocks were cut out of, each behind its CID, and where they lay."""

    data: bytes
    starts: list[int]
    ends: list[int]


class _Part(NamedTuple):
    """Blocks of an archive, as they are to be kept."""

    cids: list[Cid]
    kept: Sequence[bytes]
    where: Where | None = None

    def put(self, store: BlockStore) -> None:
        with paused():
            if self.where is not None and store.blocking:
                data, starts, ends = self.where
                store.put_sections(data, self.cids, starts, ends)
            else:
                store.put_many(list(zip(self.cids, self.kept, strict=True)))


async def _done(store: BlockStore, work: Callable[[], T]) -> T:
    """A call of the store, on a thread where it blocks."""
    return await in_thread(work) if store.blocking else work()


class NeedDisk:
    """A load that its memory limit paused. What was read so far waits in memory until one of both is called.

    ``commit`` is there when the archive has shown it.
    """

    def __init__(self, gathering: Gathering, commit: Commit | None, resume: Resume | None = None) -> None:
        self.commit = commit
        self._gathering = gathering
        self._resume = resume
        self._spent = False

    async def finish_loading(self, store: BlockStore) -> tuple[Commit, StoreWalk]:
        """Reads the rest into ``store``, which is empty: (commit, driver). Fails with the store emptied."""
        if self._spent:
            raise DriveError("this load was finished or dropped before", kind="disk")
        self._spent = True
        gathering = self._gathering
        try:
            with translated(self.commit, gathering.root):
                async with gathering.plan.clock.running():
                    await gathering.to_store(store)
                    walk = await gathering.walk(store, self._resume)
                    return walk.commit, walk
        except BaseException:
            await in_thread(store.reset)
            raise
        finally:
            await gathering.close()

    async def drop(self) -> None:
        """Gives the load up: memory and source are let go."""
        self._spent = True
        await self._gathering.close()


def root_of(roots: tuple[Cid, ...]) -> Cid:
    """The commit's CID of an archive's header."""
    if not roots:
        raise CarError("CAR has no root")
    return roots[0]
