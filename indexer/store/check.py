"""The integrity check: every guarantee of the store, recounted from the rows and told in words.

Blocks exist and hash to their CID; references, totals and `pending` equal a recount; event ids lie
between floor and head without gaps, with strictly increasing times. Changes nothing. Reads one snapshot, so
it speaks of one moment and may run beside the writer in a thread; its memory does not grow with the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeAlias

from indexer.atproto.types import Did
from indexer.errors import StoreCorrupt
from indexer.store.codecs import Mode
from indexer.store.database import Database
from indexer.store.findings import Findings
from indexer.store.reads import Reads
from indexer.store.recount import Recount

#: Called now and then with the rows read so far and about how many there are.
Progress: TypeAlias = Callable[[int, int], None]
_PROGRESS_ROWS: Final = 5000


class Report(NamedTuple):
    """``repairable`` of the problems are counts and references, which `repair` sets right."""

    problems: list[str]
    repos: int
    records: int
    blocks: int
    events: int
    repairable: int = 0

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


def rows_to_read(db: Database) -> int:
    """About how many rows a check of everything reads, when nothing is wrong."""
    rows = {name: figures["rows"] for name, figures in db.stats().items()}
    once = ("repos", "pending", "resync_buffer", "archives", "events", "records", "reflog", "blocks")
    return sum(rows[name] for name in once) + 2 * (rows["counts"] + rows["block_refs"])


def check(db: Database, did: Did | None = None, *, progress: Progress | None = None) -> Report:
    """Verify every guarantee, of one repository when ``did`` is given. Call it on the writer's loop."""
    with db.snapshot() as snapshot:
        reads = snapshot if progress is None else _Told(snapshot, rows_to_read(db), progress)
        return check_reads(reads, db.mode, did)


def check_reads(reads: Reads, mode: Mode, did: Did | None = None) -> Report:
    """As `check`, of a snapshot that was taken on the writer's loop; any thread."""
    findings = Findings()
    try:
        recount = Recount(reads, mode, did, findings)
        recount.rows()
        recount.references()
        recount.totals()
    except StoreCorrupt as error:
        findings.problem(str(error))
        return Report(findings.problems, 0, 0, 0, 0, findings.repairable)
    seen = recount.seen
    if did is not None and not (seen["repos"] or seen["strays"]):
        findings.problem(f"repos: {did} is unknown here: it has no row, no record and no block")
    return Report(
        findings.problems, seen["repos"], seen["records"], seen["blocks"], seen["events"], findings.repairable
    )
