"""Blocks that wait for their place in the tree: what is kept of each, and the memory that keeps them.

A record's block is put through the processor when it arrives, so that only its output waits. What looks like
a tree node may be one, or a record: it stays raw until the walk reaches it. A processor's failure is kept
instead of its output and comes out with the record. The disk that keeps more than memory does is
`indexer.store.spill`'s; both are a `BlockStore`. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Final, NamedTuple, Protocol

from indexer.atproto.node import NODE_START
from indexer.atproto.types import Cid, Path

#: A record's bytes to the bytes that are wanted of it.
Processor = Callable[[bytes], bytes]

_RAW: Final = b"r"
_OUTPUT: Final = b"o"
_FAILURE: Final = b"f"
#: What a block in memory takes beside its own bytes: its CID, two objects, a place in the dictionary.
BLOCK_OVERHEAD: Final = 250
_LONGEST_FAILURE: Final = 500


def noop(block: bytes) -> bytes:
    """The processor that keeps records as they are."""
    return block


class Output(NamedTuple):
    """A record: ``data`` is what the processor made of it, None when that failed, and ``error`` says why."""

    path: Path
    cid: Cid
    data: bytes | None
    error: str | None = None


class BlockStore(Protocol):
    """Where blocks wait. ``blocking``: calls are for a thread, not for an event loop."""

    blocking: bool

    def put_many(self, blocks: Sequence[tuple[Cid, bytes]]) -> None:
        """Keeps the blocks; `DiskError` when that is more than the store's maximum."""

    def get_many(self, cids: Sequence[Cid]) -> list[bytes | None]:
        """What was put under each, None for what was not."""

    def reset(self) -> None:
        """Empties the store."""


class MemoryBlocks:
    """A `BlockStore` in a dictionary. ``size`` counts bytes with what the objects around them take."""

    blocking = False

    def __init__(self) -> None:
        self.size = 0
        self._blocks: dict[Cid, bytes] = {}

    def put(self, cid: Cid, kept: bytes) -> None:
        if cid not in self._blocks:
            self._blocks[cid] = kept
            self.size += len(kept) + BLOCK_OVERHEAD

    def put_many(self, blocks: Sequence[tuple[Cid, bytes]]) -> None:
        for cid, kept in blocks:
            self.put(cid, kept)

    def get_many(self, cids: Sequence[Cid]) -> list[bytes | None]:
        return list(map(self._blocks.get, cids))

    def reset(self) -> None:
        self._blocks = {}
        self.size = 0

    def drain(self, least: int) -> Iterator[list[tuple[Cid, bytes]]]:
        """Takes everything out, in batches of at least ``least`` bytes."""
        batch: list[tuple[Cid, bytes]] = []
        size = 0
        while self._blocks:
            cid, kept = self._blocks.popitem()
            batch.append((cid, kept))
            size += len(kept)
            if size >= least:
                yield batch
                batch, size = [], 0
        self.size = 0
        if batch:
            yield batch


class Keeping:
    """What is kept of a block: the processor and the limit on a record."""

    __slots__ = ("_max_record", "_process")

    def __init__(self, process: Processor, max_record: int) -> None:
        self._process = process
        self._max_record = max_record

    def keep(self, block: bytes, *, raw: bool = False) -> bytes:
        """What is kept of a block that arrives before its place is known; ``raw`` when it is the commit."""
        if raw or block.startswith(NODE_START):
            return _RAW + block
        data, error = self.outcome(block)
        if data is None:
            return _FAILURE + (error or "").encode()
        return _OUTPUT + data

    def outputs(self, paths: Sequence[Path], cids: Sequence[Cid], blocks: Sequence[bytes]) -> list[Output]:
        """The records with these blocks; `outcome` for many."""
        if self._process is noop and max(map(len, blocks), default=0) <= self._max_record:
            return list(map(Output._make, zip(paths, cids, blocks, repeat(None), strict=False)))
        rows = zip(paths, cids, map(self.outcome, blocks), strict=True)
        return [Output(path, cid, data, error) for path, cid, (data, error) in rows]

    def outcome(self, block: bytes) -> tuple[bytes | None, str | None]:
        """(what the processor made of a record, None) or (None, why there is nothing)."""
        if len(block) > self._max_record:
            return None, f"record of {len(block)} bytes, more than {self._max_record}"
        if self._process is noop:
            return block, None
        try:
            data = self._process(block)
            if not isinstance(data, (bytes, bytearray, memoryview)):
                raise TypeError(f"the processor returned {type(data).__name__}, not bytes")
            return bytes(data), None
        except Exception as error:  # the processor is the caller's: whatever it raises is told, never hidden
            return None, f"{type(error).__name__}: {error}"[:_LONGEST_FAILURE]

    def record(self, path: Path, cid: Cid, kept: bytes) -> Output:
        """The record whose block was kept."""
        kind, rest = kept[:1], kept[1:]
        if kind == _OUTPUT:
            return Output(path, cid, rest)
        if kind == _FAILURE:
            return Output(path, cid, None, rest.decode("utf-8", "replace"))
        return Output(path, cid, *self.outcome(rest))


def raw_block(kept: bytes) -> bytes:
    """The block of a node or commit that was kept; what cannot be one comes back as nothing."""
    return kept[1:] if kept[:1] == _RAW else b""
