"""The library's front: a repository's archive in, its verified records out, in bounded memory.

::

    match await DriverBuilder(mem_limit_mb=16).load_car(source):
        case Driver.Memory(commit, driver): ...
        case Driver.Disk(need_disk): commit, driver = await need_disk.finish_loading(store)
    while (chunk := await driver.next_chunk(1000)) is not None: ...

A small archive is checked as a whole before its first record; a large one in streaming order is walked while
it is read; of any other the blocks wait in memory, or on a disk that the caller provides. Event loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import iscoroutinefunction
from math import inf
from typing import Final

from indexer.atproto.car import Limits, read_header
from indexer.atproto.commit import Commit
from indexer.atproto.dagcbor import MAX_RECORD_BYTES
from indexer.atproto.mst import TreeLimits
from indexer.atproto.node import MAX_LAYER, MAX_NODE_BYTES
from indexer.atproto.types import Did, DidKey
from indexer.repo.blocks import Keeping, Processor, noop
from indexer.repo.loading import Gathering, NeedDisk, Plan, root_of
from indexer.repo.slices import RepoSlice
from indexer.repo.source import CarReader, Clock, Source
from indexer.repo.stream_walk import StreamWalk
from indexer.repo.walker import Section, checked_commit, find_commit, index_repo
from indexer.repo.walks import RecordWalk, WholeWalk, translated

MIB: Final = 1 << 20
#: Read before anything else is decided: the header and, in nearly every archive, the commit.
_HEAD: Final = 128 << 10
#: Longest archive that is kept as it came, whatever the limit.
_WHOLE: Final = 64 * MIB


@dataclass(frozen=True, slots=True)
class WalkLimits:
    """Bounds on one archive. Bytes, except where the name says otherwise."""

    max_bytes: int = 2 << 30
    max_block: int = 2 << 20
    max_blocks: int = 5_000_000
    max_record: int = MAX_RECORD_BYTES
    max_node: int = MAX_NODE_BYTES
    max_nodes_and_records: int = 5_000_000
    max_depth: int = MAX_LAYER
    max_seconds: float = 300.0


class Driver:
    """What a load comes to."""

    @dataclass(frozen=True, slots=True)
    class Memory:
        """A walk that needs no disk."""

        commit: Commit
        driver: RecordWalk

    @dataclass(frozen=True, slots=True)
    class Disk:
        """More than the memory limit: the load is paused until the caller provides a disk, or drops it."""

        need_disk: NeedDisk


class DriverBuilder:
    """How archives are to be loaded; may be used for any number of them, also at the same time.

    ``mem_limit_mb``: memory (MiB) for what must wait, with the processor's output and what the objects around
    it take. ``processor``: a record's bytes to what is wanted of them, bytes again; it runs while the archive
    is read, and its failure stays with its record. ``did`` and ``key``: whose the repository must be, and who
    must have signed it; unchecked when None. ``streaming``: whether to walk an archive while it is read.
    What can be none of these is a `TypeError` or `ValueError` at once.
    """

    def __init__(
        self, mem_limit_mb: float = 16, processor: Processor = noop, *, did: Did | None = None,
        key: DidKey | None = None, limits: WalkLimits | None = None, streaming: bool = True,
    ) -> None:  # fmt: skip
        _check_memory(mem_limit_mb)
        _check_processor(processor)
        if limits is not None and not isinstance(limits, WalkLimits):
            raise TypeError(f"limits is {limits!r}, not WalkLimits")
        self._most = int(mem_limit_mb * MIB)
        self._processor = processor
        self._did = did
        self._key = key
        self._limits = limits or WalkLimits()
        self._streaming = streaming

    async def load_car(self, source: Source) -> Driver.Memory | Driver.Disk:
        """Reads as much of ``source`` as it takes to know how it can be walked.

        Raises `DriveError`. The commit is checked, with its signature when there is a key, before a record is
        walked.
        """
        plan = self._plan()
        reader = CarReader(source, self._limits.max_bytes)
        try:
            with translated():
                async with plan.clock.running():
                    return await _load(plan, reader, self._streaming)
        except BaseException:
            await reader.close()
            raise

    async def load_slice(self, source: Source) -> RepoSlice:
        """A part of a repository in memory, as `com.atproto.sync.getRecord` answers it: for single questions.

        Raises `DriveError`, of the kind ``limit`` when it is larger than the memory limit.
        """
        plan = self._plan()
        reader = CarReader(source, min(self._limits.max_bytes, self._most))
        try:
            with translated():
                async with plan.clock.running():
                    await reader.fill(self._limits.max_bytes + 1)
                    return RepoSlice.read(reader.data, plan)
        finally:
            await reader.close()

    def _plan(self) -> Plan:
        bounds = self._limits
        return Plan(
            Keeping(self._processor, bounds.max_record),
            Limits(max_bytes=bounds.max_bytes, max_block=bounds.max_block, max_blocks=bounds.max_blocks),
            TreeLimits(bounds.max_nodes_and_records, bounds.max_depth, bounds.max_node),
            Clock(bounds.max_seconds),
            self._most,
            self._did,
            self._key,
        )


def _check_memory(mem_limit_mb: object) -> None:
    if not isinstance(mem_limit_mb, (int, float)):
        raise TypeError(f"mem_limit_mb is {mem_limit_mb!r}, not a number")
    if not 0 <= mem_limit_mb < inf:
        raise ValueError(f"mem_limit_mb is {mem_limit_mb}, below zero or no finite number")


def _check_processor(processor: object) -> None:
    if not callable(processor):
        raise TypeError(f"processor is {processor!r}, not a function of bytes that returns bytes")
    if iscoroutinefunction(processor) or iscoroutinefunction(getattr(processor, "__call__", None)):  # noqa: B004
        raise TypeError(f"processor is the coroutine function {processor!r}; it must return bytes at once")


async def _load(plan: Plan, reader: CarReader, streaming: bool) -> Driver.Memory | Driver.Disk:
    await reader.fill(_HEAD)
    most = min(plan.most // 2, _WHOLE)
    if not reader.ended:
        root, start = _header(reader, plan)
        early = find_commit(reader.data, start, root)
        if early is not None:
            checked_commit(root, early.block, plan.did, plan.key)
        await reader.fill(most + 1)
    if reader.ended and reader.left <= most:
        return _whole(plan, reader)
    return await _large(plan, reader, streaming)


def _header(reader: CarReader, plan: Plan) -> tuple[bytes, int]:
    roots, start = read_header(reader.data, plan.limits)
    return root_of(roots), start


def _whole(plan: Plan, reader: CarReader) -> Driver.Memory:
    """All of it is here: checked at once."""
    data = reader.data
    root, start = _header(reader, plan)
    early = find_commit(data, start, root)
    commit = None if early is None else checked_commit(root, early.block, plan.did, plan.key)
    with translated(commit, root):
        index = index_repo(data, did=plan.did, key=plan.key, limits=plan.limits, tree_limits=plan.tree_limits)
    walk = WholeWalk(index.commit, plan.clock, data, index.records, plan.keeping, index.blocks)
    return Driver.Memory(index.commit, walk)


async def _large(plan: Plan, reader: CarReader, streaming: bool) -> Driver.Memory | Driver.Disk:
    root, start = _header(reader, plan)
    early: Section | None = find_commit(reader.data, start, root)
    commit = None if early is None else checked_commit(root, early.block, plan.did, plan.key)
    if streaming and commit is not None and early is not None and early.begin == start:
        reader.at = early.end
        walk = StreamWalk(commit, root, plan, reader)
        if await walk.first_window():
            return Driver.Memory(commit, walk)
    reader.at = start
    gathering = Gathering(plan, reader, root)
    if not await gathering.to_memory():
        return Driver.Disk(NeedDisk(gathering, commit))
    walk_in_memory = await gathering.walk(gathering.memory, None)
    return Driver.Memory(walk_in_memory.commit, walk_in_memory)
