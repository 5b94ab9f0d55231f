"""The recount: one walk over every keyspace, from which every guarantee of the store is judged.

Memory does not grow with the rows: a repository is settled when its rows end, references go through
`Demand`, and of the totals only those by collection are kept. What is wrong goes to `Findings`, in words
or to be set right. Reads one snapshot; any thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, Final

from indexer.atproto.types import Did
from indexer.errors import StoreCorrupt
from indexer.store import keyspaces
from indexer.store.codecs import (
    OVERSIZE,
    Event,
    Mode,
    RecordRow,
    RepoRow,
    after_prefix,
    decode_event,
    did_range,
    encode_cid_key,
)
from indexer.store.counts import EXACT, TALLIES, repo_names
from indexer.store.demand import BlockKey, Demand
from indexer.store.event_check import LogOrder
from indexer.store.findings import Findings
from indexer.store.host_rows import ALL_COUNTED
from indexer.store.keyspaces import (
    ARCHIVES,
    COUNTS,
    CURSORS,
    EVENTS,
    PENDING,
    RECORDS,
    REFLOG,
    REPOS,
    RESYNC_BUFFER,
    STRANGERS,
)
from indexer.store.reads import Reads

_KNOWN_LIVES: Final = 65_536
_BY_REPO: Final = ("did/", "buffer/did:")  # totals that are settled repository by repository


class Recount:
    """Call `rows`, `references` and `totals`, in this order."""

    def __init__(self, reads: Reads, mode: Mode, did: Did | None, findings: Findings) -> None:
        self.reads = reads
        self.mode = mode
        self.did = did
        self.findings = findings
        self.bounds = (None, None) if did is None else did_range(did)
        self._sums: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.undecodable = 0  # events
        self._lives: dict[Did, int | None] = {}
        self._settled = 0  # totals that were compared with the rows of their repository
        self._tallies = [kind for kind in TALLIES if reads.get(CURSORS, kind.counted) == ALL_COUNTED]
        self._exact = (*EXACT, *(kind.prefix for kind in self._tallies))
        self._demand = Demand(reads, findings, self.bounds, self._references)

    # ---- rows against rows

    def rows(self) -> None:
        """Look at every row but those that count; hear what they refer to."""
        self._repos()
        self._pending()
        self._events()
        self._records()
        self._buffers()
        self._archives()
        self._strangers()
        self._log()

    def _repos(self) -> None:
        for did, row in self._repo_rows():
            self.seen["repos"] += 1
            for name in repo_names(row):
                self._sums[name] += 1
            self._sums.update(name for kind in self._tallies if (name := kind.name_of(row)))
            if row.due and self.reads.raw_get(PENDING.name, PENDING.key.encode((row.due, did))) is None:
                self.findings.problem(f"pending: {did} is due at {row.due} but not queued")

    def _repo_rows(self) -> Iterator[tuple[Did, RepoRow]]:
        if self.did is None:
            yield from self.reads.scan(REPOS)
        elif (row := self.reads.repo(self.did)) is not None:
            yield self.did, row

    def _pending(self) -> None:
        for (due, did), _ in self.reads.scan(PENDING):
            if self.did in (None, did):
                row = self.reads.repo(did)
                if row is None or row.due != due:
                    said = row.due if row else None
                    self.findings.problem(f"pending: {did} is queued for {due}, its row says {said}")

    def _life(self, did: Did) -> int | None:
        """The epoch of the repository, None when it has no row."""
        if did not in self._lives:
            if len(self._lives) >= _KNOWN_LIVES:
                self._lives.clear()
            row = self.reads.repo(did)
            self._lives[did] = None if row is None else row.epoch
        return self._lives[did]

    def _current(self, did: Did, epoch: int) -> bool:
        return epoch == (self._life(did) or 0)

    def _owned(self, what: str, did: Did) -> None:
        """Content belongs to a repository that has a row."""
        if self._life(did) is None:
            self.findings.problem(f"repos: {did} has {what}, but no row")
            self.seen["strays"] += 1

    def _owned_blocks(self, did: Did) -> None:
        if self._life(did) is None and not any(
            True for _ in self.reads.scan(RECORDS, *did_range(did), limit=1)
        ):
            self._owned("blocks", did)

    # ---- events

    def _events(self) -> None:
        order = LogOrder(self.reads, self.findings)
        for event in self._event_rows(order):
            self.seen["events"] += 1
            order.event(event)
            if self.did not in (None, event.did):
                continue  # the epochs of others are not read
            if self._current(event.did, event.epoch):
                if event.cid is not None:
                    self._demand.refer(encode_cid_key((event.did, event.cid)))
            elif self.reads.get(CURSORS, keyspaces.WIPE + event.did) is None:
                self.findings.problem(
                    f"events: {event.id} is of epoch {event.epoch} of {event.did}, with no wipe under way"
                )
        order.done()
        if self.did is None:
            self._sums["events"] = self.seen["events"]

    def _event_rows(self, order: LogOrder | None = None) -> Iterator[Event]:
        for event_id, raw in self.reads.scan(EVENTS):
            try:
                yield decode_event(event_id, raw)
            except Exception as error:
                if order is not None:
                    order.undecodable(event_id)
                    self.undecodable += 1
                    self.findings.problem(f"events: row {event_id} does not decode: {error}")

    # ---- records, buffered frames, archives

    def _records(self) -> None:
        for did, rows in groupby(self.reads.scan(RECORDS, *self.bounds), key=_owner):
            self._owned("records", did)
            by_collection, oversize = self._records_of(did, rows)
            for collection, served in by_collection.items():
                self._sums["records"] += served
                self._sums[f"records/{collection}"] += served
            self._settle(f"did/{did}/", by_collection)
            repo = self.reads.repo(did) if oversize else None
            if repo is not None and repo.complete:
                self.findings.problem(f"repos: {did} is marked complete but dropped an oversize record")
        if self.mode.ephemeral and self.seen["records"]:
            self.findings.problem(f"records: {self.seen['records']} rows in an ephemeral database")

    def _records_of(
        self, did: Did, rows: Iterable[tuple[tuple[Did, str], RecordRow]]
    ) -> tuple[Counter[str], bool]:
        """The served records of a repository by collection, and whether an oversize one was dropped."""
        by_collection: Counter[str] = Counter()
        oversize = False
        for (_, path), row in rows:
            self.seen["records"] += 1
            if row.flags & OVERSIZE:
                oversize = True
            else:
                self._demand.refer(encode_cid_key((did, row.cid)))
            if row.served:
                by_collection[path.partition("/")[0]] += 1
        return by_collection, oversize

    def _buffers(self) -> None:
        for did, rows in groupby(self.reads.scan(RESYNC_BUFFER, *self.bounds), key=_owner):
            found: Counter[str] = Counter()
            for _, row in rows:
                found.update(frames=1, bytes=len(row.data))
                if not row.vouched:
                    found.update(unproven_frames=1, unproven_bytes=len(row.data))
            for name, number in found.items():
                self._sums[f"buffer/{name}"] += number
            self._settle(f"buffer/{did}/", found)

    def _archives(self) -> None:
        for _, row in self.reads.scan(ARCHIVES, *self.bounds):
            self._sums["archives"] += 1
            self._sums["archives/bytes"] += row.size

    def _strangers(self) -> None:
        for (_, source), _ in self.reads.scan(STRANGERS, *self.bounds):
            self._sums[f"strangers/{source}"] += 1

    # ---- references

    def _log(self) -> None:
        """The rows that are not folded are consecutive from the checkpoint on; there are no others."""
        position = self.reads.cursor(keyspaces.CHECKPOINT) or 0
        if position < 0:
            self.findings.problem(
                f"cursors: row {keyspaces.CHECKPOINT!r} holds {position}, no row of the log"
            )
        folded: list[int] = []  # the first and the last
        expected = position
        for row, changes in self.reads.scan(REFLOG):
            if row < position:
                folded[1:] = [row]
                continue
            if row != expected:
                self.findings.problem(f"reflog: rows {expected} to {row - 1} are missing")
            expected = row + 1
            for did, epoch, cids in changes:
                if self.did in (None, did) and self._current(did, epoch):
                    for cid, delta in cids.items():
                        self._demand.change(encode_cid_key((did, cid)), delta)
        if folded:
            self.findings.folded_rows(folded[0], folded[-1], position)

    def references(self) -> None:
        """Counts against references, and blocks against both."""
        if not self.mode.blocks:
            return
        self._demand.compare_counts()
        if self.findings.wants_blocks:
            self._demand.compare_blocks(self._owned_blocks)
        self.seen["blocks"] = self._demand.blocks_seen

    def _references(self) -> Iterator[BlockKey]:
        """Every reference, again."""
        for (did, _), row in self.reads.scan(RECORDS, *self.bounds):
            if not row.flags & OVERSIZE:
                yield encode_cid_key((did, row.cid))
        for event in self._event_rows():
            mine = self.did in (None, event.did)
            if event.cid is not None and mine and self._current(event.did, event.epoch):
                yield encode_cid_key((event.did, event.cid))

    # ---- totals

    def _settle(self, prefix: str, recounted: Counter[str]) -> None:
        """Compare the totals of one repository, of which every row was seen."""
        stored = dict(self.reads.scan(COUNTS, prefix.encode(), after_prefix(prefix.encode())))
        self._settled += len(stored)
        for name in sorted(stored.keys() | {prefix + name for name in recounted}):
            self._total(name, stored.get(name, 0), recounted[name.removeprefix(prefix)])

    def _total(self, name: str, stored: object, recounted: int) -> None:
        if not isinstance(stored, int):
            raise StoreCorrupt(f"counts: row {name!r} holds {stored!r} where a number belongs")
        if stored != recounted:
            self.findings.wrong_total(name, stored, recounted)

    def totals(self) -> None:
        """Totals of everything, and those of repositories that have no rows to settle them with."""
        by_repo = 0
        for name, stored in self._totals():
            if name.startswith(_BY_REPO):
                by_repo += 1
            elif self.did is None and name.startswith(self._exact):
                self._total(name, stored, self._sums.pop(name, 0))
        if self.did is None:
            for name, recounted in sorted(self._sums.items()):
                self._total(name, 0, recounted)
        if by_repo != self._settled:
            self._strays()

    def _totals(self) -> Iterator[tuple[str, int]]:
        if self.did is None:
            yield from self.reads.scan(COUNTS)
        else:
            for prefix in (f"did/{self.did}/".encode(), f"buffer/{self.did}/".encode()):
                yield from self.reads.scan(COUNTS, prefix, after_prefix(prefix))

    def _strays(self) -> None:
        """More totals are stored than were settled: those whose repository has no such rows."""
        for name, stored in self._totals():
            if name.startswith(_BY_REPO):
                records = name.startswith("did/")
                owner = name.split("/")[1] if records else name.removeprefix("buffer/").rpartition("/")[0]
                keyspace = RECORDS if records else RESYNC_BUFFER
                if next(self.reads.raw_scan(keyspace.name, *did_range(owner)), None) is None:
                    self._total(name, stored, 0)


def _owner(row: tuple[tuple[Any, ...], object]) -> Did:
    """The DID with which the row's key begins."""
    did: Did = row[0][0]
    return did
