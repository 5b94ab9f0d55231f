"""Blocks that wait for their place in the tree: what is kept of each, and the memory that keeps them.

A record's block is put through the processor when it arrives, so that only its output waits. What looks like
a tree node may be one, or a record: it stays raw until the walk reaches it. A processor's failure is kept
instead of its output and comes out with the record. The disk that keeps more than memory does is
`indexer.store.spill`'s; both are a `BlockStore`. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Final, NamedTuple, Protocol, cast

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

    def put_sections(
        self, data: bytes, cids: Sequence[Cid], starts: Sequence[int], ends: Sequence[int]
    ) -> None:
        """As `put_many`, for blocks that lie in ``data``, in order and each right behind its CID."""

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

    def put_many(self, blocks: Sequence[tuple[Cid, bytes]]) -> None:
        """Keeps the blocks; of two under one CID the first."""
        known = self._blocks
        fresh = dict(blocks)
        if not known.keys().isdisjoint(fresh):
            fresh = {cid: kept for cid, kept in fresh.items() if cid not in known}
        known.update(fresh)
        self.size += sum(map(len, fresh.values())) + BLOCK_OVERHEAD * len(fresh)

    def put_sections(
        self, data: bytes, cids: Sequence[Cid], starts: Sequence[int], ends: Sequence[int]
    ) -> None:
        """`put_many` of the blocks at these places."""
        blocks = [data[start:end] for start, end in zip(starts, ends, strict=True)]
        self.put_many(list(zip(cids, blocks, strict=True)))

    def get_many(self, cids: Sequence[Cid]) -> list[bytes | None]:
        """What was put under each, None for what was not."""
        return list(map(self._blocks.get, cids))

    def reset(self) -> None:
        """Empties the store."""
        self._blocks = {}
        self.size = 0

    def drain(self, least: int) -> Iterator[list[tuple[Cid, bytes]]]:
        """Takes everything out in the order in which it came, in batches of at least ``least`` bytes."""
        left = list(self._blocks.items())
        left.reverse()
        self.reset()
        batch: list[tuple[Cid, bytes]] = []
        size = 0
        while left:
            batch.append(left.pop())
            size += len(batch[-1][1])
            if size >= least:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


class Keeping:
    """What is kept of a block: the processor and the limit on a record.

    Without a processor that is the block. With one it is a letter, for what follows: the block of what may be
    a node, the processor's output, or why it failed.
    """

    __slots__ = ("_max_record", "_plain", "_process")

    def __init__(self, process: Processor, max_record: int) -> None:
        self._process = process
        self._plain = process is noop
        self._max_record = max_record

    @property
    def plain(self) -> bool:
        """Whether blocks are kept as they are."""
        return self._plain

    def keep(self, cids: Sequence[Cid], blocks: Sequence[bytes], commit: Cid) -> Sequence[bytes]:
        """What is kept of blocks that come before their places are known; ``commit`` is none of a record."""
        if self._plain:
            return blocks
        return [
            _RAW + block if block.startswith(NODE_START) or cid == commit else self._processed(block)
            for cid, block in zip(cids, blocks, strict=True)
        ]

    def raw(self, kept: bytes) -> bytes:
        """The block of a node or commit that was kept; what cannot be one comes back as nothing."""
        if self._plain:
            return kept
        return kept[1:] if kept[:1] == _RAW else b""

    def outputs(self, paths: Sequence[Path], cids: Sequence[Cid], blocks: Sequence[bytes]) -> list[Output]:
        """The records with these blocks; `outcome` for many."""
        if self._plain and max(map(len, blocks), default=0) <= self._max_record:
            return list(map(_made, zip(paths, cids, blocks, repeat(None), strict=False)))
        rows = zip(paths, cids, map(self.outcome, blocks), strict=True)
        return [Output(path, cid, data, error) for path, cid, (data, error) in rows]

    def records(self, paths: Sequence[Path], cids: Sequence[Cid], kept: Sequence[bytes]) -> list[Output]:
        """The records of which this was kept."""
        if self._plain:
            return self.outputs(paths, cids, kept)
        return list(map(self._record, paths, cids, kept))

    def outcome(self, block: bytes) -> tuple[bytes | None, str | None]:
        """(what the processor made of a record, None) or (None, why there is nothing)."""
        if len(block) > self._max_record:
            return None, f"record of {len(block)} bytes, more than {self._max_record}"
        if self._plain:
            return block, None
        try:
            data = self._process(block)
            if not isinstance(data, (bytes, bytearray, memoryview)):
                raise TypeError(f"the processor returned {type(data).__name__}, not bytes")
            return bytes(data), None
        except Exception as error:  # the processor is the caller's: whatever it raises is told, never hidden
            return None, f"{type(error).__name__}: {error}"[:_LONGEST_FAILURE]

    def _processed(self, block: bytes) -> bytes:
        data, error = self.outcome(block)
        return _FAILURE + (error or "").encode() if data is None else _OUTPUT + data

    def _record(self, path: Path, cid: Cid, kept: bytes) -> Output:
        kind, rest = kept[:1], kept[1:]
        if kind == _OUTPUT:
            return Output(path, cid, rest)
        if kind == _FAILURE:
            return Output(path, cid, None, rest.decode("utf-8", "replace"))
        return Output(path, cid, *self.outcome(rest))


#: `Output._make` without the call of a function: a tuple of four to an `Output`.
_made: Final = cast("Callable[[tuple[Path, Cid, bytes, None]], Output]", partial(tuple.__new__, Output))
