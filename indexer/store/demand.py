"""References, recounted: what records and events refer to, against what is counted and what is stored.

Two multisets of blocks are compared by sums of salted hashes, bucket by bucket, so that memory does not
grow with records or blocks: a sound database takes one walk over its rows. Only buckets whose sums differ
are counted row by row, in partitions. What the log has not folded is kept, which folds bound. Any thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b, sha256
from typing import Final, TypeAlias

from indexer.atproto.types import Did
from indexer.store.codecs import decode_cid_key
from indexer.store.findings import Findings
from indexer.store.keyspaces import BLOCK_REFS, BLOCKS, GC_QUEUE
from indexer.store.reads import Reads

#: A key of `blocks`, as bytes: DID, 0x00, CID.
BlockKey: TypeAlias = bytes

_BUCKETS: Final = 4096
_PARTITION_ROWS: Final = 1_000_000


class Tally:
    """A multiset of keys as a sum of hashes by bucket: equal multisets give equal sums, and others do so
    with the probability of a guess of 128 random bits."""

    __slots__ = ("_salt", "rows", "sums")

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        self.sums = [0] * _BUCKETS
        self.rows = [0] * _BUCKETS

    def add(self, key: BlockKey, times: int = 1) -> None:
        number = int.from_bytes(blake2b(key, digest_size=16, salt=self._salt).digest())
        bucket = number % _BUCKETS
        self.sums[bucket] += number * times
        self.rows[bucket] += 1

    def bucket(self, key: BlockKey) -> int:
        return int.from_bytes(blake2b(key, digest_size=16, salt=self._salt).digest()) % _BUCKETS


class Demand:
    """What is referred to (`refer`, once for each reference) and what the rows say of it.

    ``again`` gives all of those references a second time, for buckets that differ.
    """

    def __init__(
        self,
        reads: Reads,
        findings: Findings,
        bounds: tuple[bytes | None, bytes | None],
        again: Callable[[], Iterable[BlockKey]],
    ) -> None:
        self._reads = reads
        self._findings = findings
        self._bounds = bounds
        self._again = again
        salt = os.urandom(16)
        self._referred = Tally(salt)
        self._counted = Tally(salt)
        self._differ: frozenset[int] = frozenset()
        self.logged: dict[BlockKey, int] = {}  # changes that are not folded
        self.blocks_seen = 0

    def refer(self, key: BlockKey) -> None:
        """A record or an event refers to the block."""
        self._referred.add(key)

    def change(self, key: BlockKey, delta: int) -> None:
        """The log has a change of the block's count."""
        self.logged[key] = self.logged.get(key, 0) + delta

    # ---- counts

    def compare_counts(self) -> None:
        """Tell every block whose count is not the number of its references."""
        for key, count in self._counts(self._zero_row):
            if count:
                self._counted.add(key, count)
        referred, counted = self._referred, self._counted
        differ = [bucket for bucket in range(_BUCKETS) if referred.sums[bucket] != counted.sums[bucket]]
        self._differ = frozenset(differ)
        for part in self._partitions(differ):
            self._compare_exactly(part)

    def _zero_row(self, key: BlockKey) -> None:
        self._findings.zero_row(*decode_cid_key(key))

    def _partitions(self, buckets: list[int]) -> Iterator[frozenset[int]]:
        part, rows = set[int](), 0
        for bucket in buckets:
            more = self._referred.rows[bucket] + self._counted.rows[bucket]
            if part and rows + more > _PARTITION_ROWS:
                yield frozenset(part)
                part, rows = set(), 0
            part.add(bucket)
            rows += more
        if part:
            yield frozenset(part)

    def _compare_exactly(self, buckets: frozenset[int]) -> None:
        bucket = self._referred.bucket
        referred: dict[BlockKey, int] = {}
        for key in self._again():
            if bucket(key) in buckets:
                referred[key] = referred.get(key, 0) + 1
        counted = {key: count for key, count in self._counts() if count and bucket(key) in buckets}
        for key in sorted(referred.keys() | counted.keys()):
            if referred.get(key, 0) != counted.get(key, 0):
                did, cid = decode_cid_key(key)
                self._findings.wrong_count(did, cid, counted.get(key, 0), referred.get(key, 0))
        if self._findings.wants_blocks:
            for key in referred:
                self._demanded(key, self._reads.raw_get(BLOCKS.name, key))
            for key, _ in self._reads.raw_scan(BLOCKS.name, *self._bounds):
                if bucket(key) in buckets and key not in referred and key not in counted:
                    self._loose(key)

    def _counts(self, zero_row: Callable[[BlockKey], None] | None = None) -> Iterator[tuple[BlockKey, int]]:
        """The effective count of every block that has a row or an unfolded change, in key order."""
        pending = sorted(self.logged.items(), reverse=True)
        for key, raw in self._reads.raw_scan(BLOCK_REFS.name, *self._bounds):
            while pending and pending[-1][0] < key:
                yield pending.pop()
            count = self._count(key, raw)
            if zero_row is not None and not count:
                zero_row(key)
            if pending and pending[-1][0] == key:
                count += pending.pop()[1]
            yield key, count
        yield from reversed(pending)

    def _count(self, key: BlockKey, raw: bytes) -> int:
        """What a row says; no number says nothing, which is a wrong count then."""
        try:
            count = BLOCK_REFS.value.decode(raw)
        except Exception:
            return 0
        return count if isinstance(count, int) else 0

    # ---- blocks

    def compare_blocks(self, owned: Callable[[Did], None]) -> None:
        """Tell every block that is missing, rotten, or there for no reason; ``owned`` hears each DID once.

        What differed in its counts was looked at there.
        """
        last = b""
        bucket = self._referred.bucket
        for key, count, block in _joined(self._counts(), self._reads.raw_scan(BLOCKS.name, *self._bounds)):
            owner = key[: key.find(b"\0")]
            if owner != last:
                owned(decode_cid_key(key)[0])
                last = owner
            if self._differ and bucket(key) in self._differ:
                continue
            if count > 0:
                self._demanded(key, block)
            elif block is not None:
                self._loose(key)

    def _demanded(self, key: BlockKey, block: bytes | None) -> None:
        self.blocks_seen += 1
        did, cid = decode_cid_key(key)
        if block is None:
            self._findings.problem(f"blocks: {cid.hex()} of {did} is missing")
        elif sha256(block).digest() != cid[4:]:
            self._findings.problem(f"blocks: {cid.hex()} of {did} does not hash to its CID")

    def _loose(self, key: BlockKey) -> None:
        """A block that nothing refers to must be on its way out: queued, or in the unfolded log."""
        if key not in self.logged and self._reads.raw_get(GC_QUEUE.name, key) is None:
            did, cid = decode_cid_key(key)
            self._findings.problem(f"blocks: {cid.hex()} of {did} is neither counted nor queued")


def _joined(
    counts: Iterator[tuple[BlockKey, int]], blocks: Iterator[tuple[BlockKey, bytes]]
) -> Iterator[tuple[BlockKey, int, bytes | None]]:
    """Counts and blocks by their keys, each of which comes in order."""
    block = next(blocks, None)
    for key, count in counts:
        while block is not None and block[0] < key:
            yield block[0], 0, block[1]
            block = next(blocks, None)
        if block is not None and block[0] == key:
            yield key, count, block[1]
            block = next(blocks, None)
        else:
            yield key, count, None
    while block is not None:
        yield block[0], 0, block[1]
        block = next(blocks, None)
