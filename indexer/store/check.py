"""The integrity check: every guarantee of the store, recounted from the rows.

Blocks exist and hash to their CID; references, totals and `pending` equal a recount; event ids lie
between floor and head with strictly increasing times. Reads one snapshot, so it speaks of one moment
and may run beside the writer in a thread. Works in partitions, so that its memory
does not grow with the log.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeAlias
from zlib import crc32

from indexer.atproto.types import Cid, Did
from indexer.errors import StoreCorrupt
from indexer.store import keyspaces
from indexer.store.codecs import (
    OVERSIZE,
    Event,
    Mode,
    RecordRow,
    RepoRow,
    decode_event,
    did_range,
    encode_u64,
)
from indexer.store.counts import EXACT, repo_names
from indexer.store.database import Database
from indexer.store.keyspaces import (
    ARCHIVES,
    BLOCK_REFS,
    BLOCKS,
    COUNTS,
    CURSORS,
    EVENTS,
    GC_QUEUE,
    PENDING,
    RECORDS,
    REFLOG,
    REPOS,
    RESYNC_BUFFER,
)
from indexer.store.reads import Reads

Mine: TypeAlias = Callable[[Did], bool]
#: Called now and then with the rows read so far and about how many there are.
Progress: TypeAlias = Callable[[int, int], None]
_PROGRESS_ROWS: Final = 5000
_PARTITION_ROWS: Final = 1_000_000
_MAX_PROBLEMS: Final = 1000


class Report(NamedTuple):
    problems: list[str]
    repos: int
    records: int
    blocks: int
    events: int

    @property
    def clean(self) -> bool:
        return not self.problems


class _Told(Reads):
    """Reads that tell how far they are."""

    __slots__ = ("_done", "_progress", "_reads", "_total")

    def __init__(self, reads: Reads, total: int, progress: Progress) -> None:
        self._reads = reads
        self._total = total
        self._progress = progress
        self._done = 0

    def raw_get(self, name: str, key: bytes) -> bytes | None:
        return self._reads.raw_get(name, key)

    def raw_scan(
        self, name: str, start: bytes | None, stop: bytes | None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        for row in self._reads.raw_scan(name, start, stop, reverse):
            self._done += 1
            if self._done % _PROGRESS_ROWS == 0:
                self._progress(self._done, self._total)
            yield row


class Recount:
    """One walk over everything; what differs is told by `problem`, `wrong_count` and `wrong_total`."""

    def __init__(self, reads: Reads, mode: Mode, did: Did | None) -> None:
        self.reads = reads
        self.mode = mode
        self.did = did
        self.bounds = (None, None) if did is None else did_range(did)
        self.problems: list[str] = []
        self.epochs: dict[Did, int] = {}  # of repositories that were ever wiped
        self.totals: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.undecodable = 0  # events

    def problem(self, text: str) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)

    def run(self) -> Report:
        self.repos()
        self.pending()
        self.events()
        self.records()
        self.buffers()
        self.archives()
        if self.mode.blocks:
            for part in range(parts := self._parts()):
                self.references(part, parts)
        self.counts()
        seen = self.seen
        return Report(self.problems, seen["repos"], seen["records"], seen["blocks"], seen["events"])

    def _parts(self) -> int:
        return 1 + (self.seen["events"] + self.seen["records"]) // _PARTITION_ROWS

    # ---- rows against rows

    def repos(self) -> None:
        for did, row in self._repo_rows():
            self.seen["repos"] += 1
            if row.epoch:
                self.epochs[did] = row.epoch
            for name in repo_names(row):
                self.totals[name] += 1
            if row.due and self.reads.raw_get(PENDING.name, PENDING.key.encode((row.due, did))) is None:
                self.problem(f"pending: {did} is due at {row.due} but not queued")

    def _repo_rows(self) -> Iterator[tuple[Did, RepoRow]]:
        if self.did is None:
            yield from self.reads.scan(REPOS)
        elif (row := self.reads.repo(self.did)) is not None:
            yield self.did, row

    def pending(self) -> None:
        for (due, did), _ in self.reads.scan(PENDING):
            if self.did in (None, did):
                row = self.reads.repo(did)
                if row is None or row.due != due:
                    self.problem(
                        f"pending: {did} is queued for {due}, its row says {row.due if row else None}"
                    )

    def events(self) -> None:
        last_time, last_id = 0, 0
        floor = self.reads.cursor(keyspaces.FLOOR) or 1
        head, _ = self.reads.get(CURSORS, keyspaces.HEAD) or (1, 0)
        for event in self._events():
            self.seen["events"] += 1
            if not floor <= event.id < head:
                self.problem(f"events: id {event.id} is outside floor {floor} and head {head}")
            if event.time_us <= last_time:
                self.problem(f"events: time of {event.id} is not after that of {last_id}")
            last_time, last_id = event.time_us, event.id
            if self.did not in (None, event.did):
                continue  # the epochs of others are not read
            if not self._current(event) and self.reads.get(CURSORS, keyspaces.WIPE + event.did) is None:
                self.problem(
                    f"events: {event.id} is of epoch {event.epoch} of {event.did}, with no wipe under way"
                )
        if self.did is None:
            self.totals["events"] = self.seen["events"]

    def _events(self) -> Iterator[Event]:
        for event_id, raw in self.reads.scan(EVENTS):
            try:
                yield decode_event(event_id, raw)
            except Exception as error:
                self.undecodable += 1
                self.problem(f"events: row {event_id} does not decode: {error}")

    def _current(self, event: Event) -> bool:
        return event.epoch == self.epochs.get(event.did, 0)

    def records(self) -> None:
        oversize: set[Did] = set()
        for (did, path), row in self._record_rows():
            self.seen["records"] += 1
            if row.flags & OVERSIZE:
                oversize.add(did)
            if row.served:
                collection = path.partition("/")[0]
                for name in ("records", f"records/{collection}", f"did/{did}/{collection}"):
                    self.totals[name] += 1
        for did in sorted(oversize):
            repo = self.reads.repo(did)
            if repo is not None and repo.complete:
                self.problem(f"repos: {did} is marked complete but dropped an oversize record")
        if self.mode.ephemeral and self.seen["records"]:
            self.problem(f"records: {self.seen['records']} rows in an ephemeral database")

    def _record_rows(self) -> Iterator[tuple[tuple[Did, str], RecordRow]]:
        return self.reads.scan(RECORDS, *self.bounds)

    def buffers(self) -> None:
        for (did, _, _, _), (_, data) in self.reads.scan(RESYNC_BUFFER, *self.bounds):
            for name in (f"buffer/{did}", "buffer"):
                self.totals[f"{name}/frames"] += 1
                self.totals[f"{name}/bytes"] += len(data)

    def archives(self) -> None:
        for _, row in self.reads.scan(ARCHIVES, *self.bounds):
            self.totals["archives"] += 1
            self.totals["archives/bytes"] += row.size

    # ---- references and blocks

    def references(self, part: int, parts: int) -> None:
        """Recount one partition of the repositories and look at every block that is demanded."""

        def mine(did: Did) -> bool:
            return self.did in (None, did) and (parts == 1 or crc32(did.encode()) % parts == part)

        wanted: Counter[tuple[Did, Cid]] = Counter()
        for (did, _), row in self._record_rows():
            if mine(did) and not row.flags & OVERSIZE:
                wanted[did, row.cid] += 1
        for event in self._events():
            if event.cid is not None and mine(event.did) and self._current(event):
                wanted[event.did, event.cid] += 1
        counted = self._counted(mine)
        for did, cid in sorted(wanted.keys() | counted.keys()):
            if wanted[did, cid] != counted[did, cid]:
                self.wrong_count(did, cid, counted[did, cid], wanted[did, cid])
        for did, cid in wanted:
            self._block(did, cid)
        self._unreferenced(mine, wanted)

    def wrong_count(self, did: Did, cid: Cid, counted: int, referred: int) -> None:
        self.problem(
            f"references: block {cid.hex()} of {did} is counted {counted} times, referred to {referred} times"
        )

    def _counted(self, mine: Mine) -> Counter[tuple[Did, Cid]]:
        counted: Counter[tuple[Did, Cid]] = Counter()
        for (did, cid), count in self.reads.scan(BLOCK_REFS, *self.bounds):
            if mine(did):
                counted[did, cid] += count
        position = self.reads.cursor(keyspaces.CHECKPOINT) or 0
        for _, changes in self.reads.scan(REFLOG, encode_u64(position)):
            for did, epoch, cids in changes:
                if mine(did) and epoch == self.epochs.get(did, 0):
                    for cid, delta in cids.items():
                        counted[did, cid] += delta
        return counted

    def _block(self, did: Did, cid: Cid) -> None:
        self.seen["blocks"] += 1
        block = self.reads.block(did, cid)
        if block is None:
            self.problem(f"blocks: {cid.hex()} of {did} is missing")
        elif hashlib.sha256(block).digest() != cid[4:]:
            self.problem(f"blocks: {cid.hex()} of {did} does not hash to its CID")

    def _unreferenced(self, mine: Mine, wanted: Counter[tuple[Did, Cid]]) -> None:
        """A block that nothing refers to must be on its way out: queued, or in the unfolded log."""
        position = self.reads.cursor(keyspaces.CHECKPOINT) or 0
        logged = {
            (did, cid)
            for _, changes in self.reads.scan(REFLOG, encode_u64(position))
            for did, _, cids in changes
            if mine(did)
            for cid in cids
        }
        for raw, _ in self.reads.raw_scan(BLOCKS.name, *self.bounds):
            key = BLOCKS.key.decode(raw)
            if not mine(key[0]) or key in wanted or key in logged:
                continue
            if self.reads.raw_get(GC_QUEUE.name, raw) is None:
                self.problem(f"blocks: {key[1].hex()} of {key[0]} is neither counted nor queued")

    # ---- totals

    def counts(self) -> None:
        names = EXACT if self.did is None else (f"did/{self.did}/", f"buffer/{self.did}/")
        stored = {name: count for name, count in self.reads.scan(COUNTS) if name.startswith(names)}
        for name in sorted(stored.keys() | {name for name in self.totals if name.startswith(names)}):
            if stored.get(name, 0) != self.totals[name]:
                self.wrong_total(name, stored.get(name, 0), self.totals[name])

    def wrong_total(self, name: str, stored: int, recounted: int) -> None:
        self.problem(f"counts: {name} says {stored}, a recount {recounted}")


def rows_to_read(db: Database) -> int:
    """About how many rows a check of everything reads."""
    rows = {name: figures["rows"] for name, figures in db.stats().items()}
    demanding = rows["events"] + rows["records"]
    parts = 1 + demanding // _PARTITION_ROWS
    once = sum(rows[name] for name in ("repos", "pending", "resync_buffer", "archives", "counts"))
    return once + demanding * (1 + parts) + (rows["block_refs"] + rows["reflog"] + rows["blocks"]) * parts


def check(db: Database, did: Did | None = None, *, progress: Progress | None = None) -> Report:
    """Verify every guarantee, of one repository when ``did`` is given. Call it on the writer's loop."""
    with db.snapshot() as snapshot:
        reads = snapshot if progress is None else _Told(snapshot, rows_to_read(db), progress)
        return check_reads(reads, db.mode, did)


def check_reads(reads: Reads, mode: Mode, did: Did | None = None) -> Report:
    """As `check`, of a snapshot that was taken on the writer's loop; any thread."""
    inspection = Recount(reads, mode, did)
    try:
        return inspection.run()
    except StoreCorrupt as error:
        inspection.problem(str(error))
        return Report(inspection.problems, 0, 0, 0, 0)
