"""Reading an archive whose blocks come in any order: into memory, and when that is full, to a disk.

Owns the paused walk that a caller gets when memory is full, and chooses to go on with. A failure or a
cancellation empties the store. Event loop; calls of a blocking store go to a thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from indexer.atproto.car import CarSplitter, Limits
from indexer.atproto.cid import format_cid
from indexer.atproto.commit import Commit
from indexer.atproto.mst import TreeLimits
from indexer.atproto.types import Cid, Did, DidKey
from indexer.errors import CarError, DriveError, MissingBlock
from indexer.repo.blocks import BlockStore, Keeping, MemoryBlocks, raw_block
from indexer.repo.source import CarReader, Clock
from indexer.repo.tree_walk import Entry, TreeWalk
from indexer.repo.walker import checked_commit
from indexer.repo.walks import Span, StoreWalk, in_thread, translated

#: Bytes that go to a store at once.
_BATCH: Final = 1 << 20
#: Says why a block may be missing that the archive had.
_HINT: Final = " (if it came before under another key, load the archive again with streaming=False)"


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
        self._reader = reader
        self._splitter = CarSplitter(plan.limits, roots=(root,), offset=reader.offset, blocks=blocks)

    async def to_memory(self) -> bool:
        """True when all is read, false when memory is full."""
        async for piece in self._reader.pieces():
            for cid, kept in self._kept(piece):
                self.memory.put(cid, kept)
            if self.memory.size > self.plan.most:
                return False
        self._splitter.close()
        return True

    async def to_store(self, store: BlockStore) -> None:
        """Moves what memory holds, then reads the rest."""
        for batch in self.memory.drain(_BATCH):
            await _put(store, batch)
        batch, size = [], 0
        async for piece in self._reader.pieces():
            batch += self._kept(piece)
            size += len(piece)
            if size >= _BATCH:
                await _put(store, batch)
                batch, size = [], 0
        await _put(store, batch)
        self._splitter.close()

    async def walk(self, store: BlockStore, resume: Resume | None) -> StoreWalk:
        """The walk over what was gathered; checks the commit when no walk has begun."""
        plan = self.plan
        if resume is not None:
            return StoreWalk(
                resume.commit, plan.clock, store, plan.keeping, plan.tree_limits,
                walk=resume.walk, due=resume.due, span=resume.span, hint=_HINT,
            )  # fmt: skip
        kept = (await _get(store, self.root))[0]
        if kept is None:
            raise MissingBlock(f"the commit {format_cid(self.root)} is missing", cid=self.root)
        commit = checked_commit(self.root, raw_block(kept), plan.did, plan.key)
        return StoreWalk(commit, plan.clock, store, plan.keeping, plan.tree_limits)

    async def close(self) -> None:
        self.memory.reset()
        await self._reader.close()

    def _kept(self, piece: bytes) -> list[tuple[Cid, bytes]]:
        keep, root = self.plan.keeping.keep, self.root
        return [(cid, keep(block, raw=cid == root)) for cid, block in self._splitter.feed(piece)]


async def _put(store: BlockStore, batch: list[tuple[Cid, bytes]]) -> None:
    if store.blocking:
        await in_thread(lambda: store.put_many(batch))
    else:
        store.put_many(batch)


async def _get(store: BlockStore, cid: Cid) -> list[bytes | None]:
    return await in_thread(lambda: store.get_many([cid])) if store.blocking else store.get_many([cid])


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
