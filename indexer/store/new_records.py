"""The records of a repository that is fetched for the first time, stored in bulk.

Rows, blocks, counts and events of many new records at once, at a fraction of what one by one costs. Their
references need no log: where nothing of a life waits to be folded, its counts are raised in their rows
in the same batch. The part of the transaction behind `Transaction.put_records`, and what several of them,
which put one repository there in turn, remember of each other. On the writer's loop.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TypeAlias

from indexer.atproto.types import Cid, Did, Nsid, Path, Rev
from indexer.store import codecs
from indexer.store.codecs import CREATE, LIVE, RECORD, did_range, pack, unpack
from indexer.store.keyspaces import BLOCK_REFS, RECORDS
from indexer.store.overlay import MISSING
from indexer.store.side_verbs import SideVerbs

NewRecord: TypeAlias = tuple[Path, Cid, bytes, int]  # path, CID, block, flags

#: A number out of a CID's hash.
_NUMBER: Final = struct.Struct("<4xQ24x")
#: Bits of the filter for each record, or up to twice as many, and bytes of it at most.
_BITS: Final = 32
_FILTER_BYTES: Final = 1 << 20


class CountedBlocks:
    """The blocks that one apply has referenced so far, in units that come one after the other while nobody
    else writes to the repository. Where no block of it was counted before, only these can be: the counts of
    all others need not be looked for in the store. A Bloom filter with one hash: it may take a block for one
    of them, never the other way round."""

    __slots__ = ("_bits", "_mask", "alone")

    def __init__(self, records: int) -> None:
        size = 1 << (max(1, min(records * _BITS // 8, _FILTER_BYTES)) - 1).bit_length()
        self._bits = bytearray(size)
        self._mask = size * 8 - 1
        #: Whether no block was counted before the first of them; None until that was looked at.
        self.alone: bool | None = None

    def add(self, cids: Sequence[Cid]) -> set[Cid]:
        """Those that may have been added before; they are now, all of them."""
        bits, mask = self._bits, self._mask
        again = set()
        for cid, (number,) in zip(cids, _NUMBER.iter_unpack(b"".join(cids)), strict=True):
            at = number & mask
            bit = 1 << (at & 7)
            if bits[at >> 3] & bit:
                again.add(cid)
            else:
                bits[at >> 3] |= bit
        return again


class NewRecords(SideVerbs):
    """References, and records of which none is stored."""

    __slots__ = ()

    def ref(self, did: Did, epoch: int, cid: Cid, delta: int) -> None:
        """Change a block's count. A sum of zero is logged too: the fold must look at the block."""
        life = (did, epoch)
        cids = self._refs.get(life)
        if cids is None:
            cids = self._refs[life] = {}
        old = cids.get(cid)
        if old is None:
            self._undo.append((cids, cid, MISSING))
            cids[cid] = delta
        else:
            self._undo.append((cids, cid, old))
            cids[cid] = old + delta

    def _counted_before(self, did: Did, cids: Sequence[Cid], counted: CountedBlocks) -> set[Cid] | None:
        """Those of ``cids`` that may have a count already; None: any of them may."""
        if counted.alone is None:
            counted.alone = self._none_counted(did)
        return counted.add(cids) if counted.alone else None

    def _none_counted(self, did: Did) -> bool:
        """Whether no block of the repository has a count, nor will have one by what is logged."""
        life, (start, stop) = (did, self._epoch(did)), did_range(did)
        if self._refs.get(life) or not self._state.refs.folded(life):
            return False
        if any(start <= key < stop for key in self._rows[BLOCK_REFS.name]):
            return False
        return next(self._db.raw_scan(BLOCK_REFS.name, start, stop), None) is None

    def _put_new(
        self, did: Did, rev: Rev, records: Sequence[NewRecord], live: bool, counted: CountedBlocks | None
    ) -> bool:
        """Store records of which none is; false, with nothing stored, when that is not so."""
        if self._ephemeral or not records:
            return False
        cids = [record[1] for record in records]
        if set(map(len, cids)) != {codecs.CID_BYTES}:
            if counted is not None:
                counted.alone = False
            return False  # a CID that is none is refused where it is put alone
        # Also of those that go in one by one after all: they are counted then, too.
        known = None if counted is None or not self._keep_blocks else self._counted_before(did, cids, counted)
        if any(record[3] for record in records):
            return False
        prefix, tail = f"{did}\0".encode(), rev.encode()
        rows = {prefix + record[0].encode(): b"\0" + record[1] + tail for record in records}
        first, last = min(rows), max(rows)
        if did not in self._cleared and next(self._db.raw_scan(RECORDS.name, first, last + b"\0"), None):
            return False
        if len(rows) < len(records) or not self.add_all(self._record_rows, rows):
            return False
        epoch = self._epoch(did)
        if self._keep_blocks:
            blocks = {prefix + record[1]: record[2] for record in records if record[2]}
            self._keep_all(did, epoch, cids, blocks, known)
        self._create_events(did, epoch, rev, records, live)
        self.ops += len(records)
        return True

    def _keep_all(
        self, did: Did, epoch: int, cids: Sequence[Cid], blocks: dict[bytes, bytes], known: set[Cid] | None
    ) -> None:
        """The blocks of new records, each referenced by its row and by its event."""
        references = dict.fromkeys(cids, 2)
        if len(references) < len(cids):
            references = {cid: 2 * count for cid, count in Counter(cids).items()}
        if self._state.refs.folded((did, epoch)):
            self._count_at_once(did, epoch, references, known)
        elif not self.add_all(self._refs.setdefault((did, epoch), {}), references):
            for cid, delta in references.items():
                self.ref(did, epoch, cid, delta)
        self.write_all(self._block_rows, blocks)
        self.ops += len(cids)
        self.size += sum(map(len, blocks.values())) + 200 * len(cids)

    def _count_at_once(
        self, did: Did, epoch: int, references: Mapping[Cid, int], known: set[Cid] | None
    ) -> None:
        """Raise the counts of blocks in their rows, past the log. Only for a life of which nothing that is
        committed waits to be folded: a fold that has read its counts already would undo this. What this group
        logs of it comes on top."""
        prefix = did.encode() + b"\0"
        added = {prefix + cid: delta for cid, delta in references.items()}
        perhaps = list(added) if known is None else [prefix + cid for cid in known]
        for key, count in self._stored_counts(did, perhaps):
            added[key] += count
            if added[key] <= 0:  # it was negative, a fault of our own: zeros are for the fold to judge
                cid = Cid(key[len(prefix) :])
                self.ref(did, epoch, cid, references[cid])
                del added[key]
        self.write_all(self._rows[BLOCK_REFS.name], {key: pack(count) for key, count in added.items()})
        self.ops += len(added)

    def _stored_counts(self, did: Did, keys: Sequence[bytes]) -> Iterator[tuple[bytes, int]]:
        """Those of a repository's counts that have a row, here or in the store."""
        if not keys:
            return
        name = BLOCK_REFS.name
        pending = self._rows[name]
        here = pending.keys() & set(keys)
        for key in here:
            row = pending[key]
            if row is not None:
                yield key, unpack(row)
        if did in self._cleared or not next(self._db.raw_scan(name, min(keys), max(keys) + b"\0"), None):
            return
        left = [key for key in keys if key not in here]
        for key, row in zip(left, self._db.raw_multi_get(name, left), strict=True):
            if row is not None:
                yield key, unpack(row)

    def _create_events(
        self, did: Did, epoch: int, rev: Rev, records: Sequence[NewRecord], live: bool
    ) -> None:
        head = LIVE if live else RECORD
        start = max(self._clock(), self._last_time + 1)
        append = self._events.append
        counts: dict[Nsid, int] = {}
        for now, (path, cid, _, _) in enumerate(records, start):
            collection, _, rkey = path.partition("/")
            append(pack((head, now, did, epoch, rev, collection, rkey, CREATE, cid)))
            counts[collection] = counts.get(collection, 0) + 1
        self._last_time = start + len(records) - 1
        for collection, count in counts.items():
            self.add(self._did_counts, (did, collection), count)
        self.ops += len(records)
        self.size += 150 * len(records)
