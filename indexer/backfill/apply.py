"""A verified repository into the store.

Owns the units of work that put a repository's records there. Each unit checks first that the repository
is still the one the job claimed (epoch, state, tracked): a wipe or a break in between ends the job. Leaves
out fetching and what happens to failures. Event loop only; blocks are read from the spooled CAR, as many as
one unit takes.

The first unit clears `complete` and raises `min_rev` to what is about to be written; the last one sets
`complete`, rev, root and commit, and makes the repository synced when no frame waits for it. Otherwise it
leaves `Work.DRAIN`, and the ingest side replays the frames.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Final, NamedTuple

from indexer.atproto.types import Did, Path
from indexer.backfill.diff import StoredRecord, WantsCollection, diff, joined
from indexer.backfill.queue import CLAIMED_DUE
from indexer.backfill.rows import Asked, back_again, claimed, known_identity
from indexer.backfill.verify import IndexEntry, Verified, read_index
from indexer.errors import FetchError
from indexer.identity.resolver import Identity
from indexer.repo.ranges import Range
from indexer.store.archives import Archived
from indexer.store.codecs import OVERSIZE, RepoRow, SyncState, Work
from indexer.store.database import Database
from indexer.store.transaction import CountedBlocks, NewRecord, Transaction
from indexer.store.writer import Writer

#: Blocks are read together unless so many times their bytes lie between the first and the last.
_SPARSE: Final = 4
#: A block of so many bytes is written once, under however many keys it stands. Of each a number is kept, 4 %
#: of the CAR at most; writing smaller ones again costs no more than some rows do.
_LARGE: Final = 2048


@dataclass(frozen=True, slots=True)
class Plan:
    """One verified repository on its way into the store."""

    did: Did
    epoch: int
    verified: Verified
    car: FilePath | bytes
    index: FilePath | bytes
    wants: WantsCollection | None  # None: every collection
    identity: Identity
    asked: Asked | None  # None: the CAR is not from the account's own PDS
    mark: str = ""  # stays in the row as its error
    archived: Archived | None = None  # the CAR in the archive, where there is one
    ranges: tuple[Range, ...] = ()  # that the CAR is complete in; empty: it is the whole repository


class Bounds(NamedTuple):
    """Of one unit: ``changes`` in number, and ``bytes`` of their blocks (a single block may be larger)."""

    changes: int
    bytes: int


class Applied(NamedTuple):
    """How an apply went. ``row``: the last one written, None when the repository is no longer the job's."""

    row: RepoRow | None
    changes: int


async def apply_repo(db: Database, writer: Writer, plan: Plan, bounds: Bounds) -> Applied:
    """Writes what differs from the stored repository, in units within ``bounds``, each durable in turn."""
    steps = diff(read_index(plan.index), stored_pages(db, plan.did, bounds.changes, plan.ranges), plan.wants)
    changes = 0
    first = True
    # A few records take one unit, as a rule, after which nothing is to be remembered.
    counted = CountedBlocks(plan.verified.records) if plan.verified.records > bounds.changes else None
    with CarBlocks(plan.car) as blocks:
        for part, last in joined(steps, bounds.changes, bounds.bytes):
            unit = Unit(plan, blocks.read(part.puts), part.deletes, first, last, counted)
            row = await writer.run("backfill_apply", unit)
            if row is None or last:
                return Applied(row, changes + (0 if row is None else part.size))
            changes += part.size
            first = False
    raise AssertionError("there is always a last unit")


class CarBlocks:
    """Blocks out of a CAR, of a file those that lie together with one read: a mapped file would count as
    memory as far as it was touched. Large ones are given out by one `read` only. A context manager."""

    def __init__(self, car: FilePath | bytes) -> None:
        self._held = car if isinstance(car, bytes) else b""
        self._file = None if isinstance(car, bytes) else car.open("rb", buffering=0)
        self._given: set[int] = set()  # where large blocks begin that an earlier unit has written

    def __enter__(self) -> CarBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, entries: Sequence[IndexEntry]) -> list[NewRecord]:
        """The records; an oversize one without its block, which is not stored, and one whose block was given
        already without it too."""
        spans = {
            start: end
            for _path, _cid, start, end, flags in entries
            if not flags & OVERSIZE and start not in self._given
        }
        blocks = self._blocks(spans)
        self._given.update(start for start, end in spans.items() if end - start >= _LARGE)
        return [(path, cid, blocks.get(start, b""), flags) for path, cid, start, _end, flags in entries]

    def _blocks(self, spans: Mapping[int, int]) -> dict[int, bytes]:
        """Blocks by where they begin, from beginnings and ends."""
        if not spans:
            return {}
        first, last = min(spans), max(spans.values())
        if last - first > _SPARSE * (sum(spans.values()) - sum(spans)):
            return {start: self._bytes(start, end) for start, end in spans.items()}
        data = self._bytes(first, last)
        return {start: data[start - first : end - first] for start, end in spans.items()}

    def _bytes(self, start: int, end: int) -> bytes:
        if self._file is None:
            data = self._held[start:end]
        else:
            data = os.pread(self._file.fileno(), end - start, start)
        if len(data) < end - start:
            raise FetchError(f"the spooled CAR ends before offset {end}", reason="spool")
        return data


def stored_pages(
    db: Database, did: Did, size: int, ranges: Sequence[Range] = ()
) -> Iterator[list[StoredRecord]]:
    """The repository's stored rows, of ``ranges`` if there are any, in key order. While it is backfilling
    nobody else writes them."""
    bounds: Sequence[tuple[str | None, str | None]] = ranges or [(None, None)]
    for start, stop in bounds:
        while page := db.records(did, start=start, stop=stop, limit=size):
            yield page
            start = page[-1][0] + "\0"


@dataclass(frozen=True, slots=True)
class Unit:
    """One step of an apply, to be run by the writer."""

    plan: Plan
    puts: list[NewRecord]
    deletes: list[Path]
    first: bool
    last: bool
    counted: CountedBlocks | None

    def __call__(self, tx: Transaction) -> RepoRow | None:
        """The row after the step; None, and nothing written, when the job is obsolete."""
        plan = self.plan
        row = claimed(tx, plan.did, plan.epoch)
        if row is None:
            return None
        did, rev = plan.did, plan.verified.rev
        tx.put_records(did, rev, self.puts, live=False, counted=self.counted)
        for path in self.deletes:
            tx.delete_record(did, path, rev, live=False)
        if self.first:
            # A mark says that a repository below `min_rev` was accepted; its own rev is the bound now.
            row = row._replace(complete=False, min_rev=rev if plan.mark else max(row.min_rev, rev))
        if self.last:
            row = known_identity(tx, did, row, plan.identity)
            if not row.status.active:
                row = back_again(tx, did, row, plan.asked)
            row = finished(row, plan, waiting=tx.buffer_size(did)[0] > 0, now_us=tx.now_us)
            count_done(tx, plan)
            if plan.archived is not None:
                plan.archived.hold(tx, did, rev)
        if self.first or self.last:
            tx.set_repo(did, row)
        return row


def finished(row: RepoRow, plan: Plan, *, waiting: bool, now_us: int) -> RepoRow:
    """The row once all records are in; ``waiting``: frames of the repository wait to be replayed."""
    verified = plan.verified
    row = row._replace(
        complete=plan.wants is None and not verified.oversize, sparse=bool(plan.ranges),
        rev=verified.rev, data=verified.data, commit=verified.commit_block,
        error=plan.mark, attempt=0,
    )  # fmt: skip
    if row.min_rev > row.rev:  # newer frames were dropped meanwhile: their buffer was full
        return row._replace(state=SyncState.DESYNCHRONIZED, due=now_us, error="buffer_overflow")
    if waiting:
        return row._replace(due=CLAIMED_DUE, work=row.work | Work.DRAIN)
    return row._replace(state=SyncState.SYNCED, due=0)


def count_done(tx: Transaction, plan: Plan) -> None:
    tx.add_count("backfill/done/below_min_rev" if plan.mark else "backfill/done/ok", 1)
    if plan.verified.flagged:
        tx.add_count("backfill/record/flagged", plan.verified.flagged)
