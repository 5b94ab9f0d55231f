"""Audits: a repository's tree rebuilt from the index and held against its signed commit.

`audit` looks at one repository; `Auditor` does so for a few repositories a minute, in the order of their
DIDs from a random place on, counts what came of it (``audit/<outcome>``) and is loud about a mismatch:
an index that contradicts its commit is a fault of ours. Rows are read from one snapshot in small steps on
the loop; the tree grows by a page of them at a time in a worker process, so that memory does not depend on
how large the repository is.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Final, NamedTuple

import structlog

from indexer.atproto.cid import format_cid
from indexer.atproto.types import Cid, Did, Path
from indexer.config import Settings
from indexer.errors import MstError, RequestError
from indexer.ingest.rebuild import OUTCOMES, Finding, Outcome, Signature, grown, inspect, no_tree
from indexer.pool import Pool
from indexer.store.codecs import RepoRow
from indexer.store.database import Database, Snapshot
from indexer.store.keyspaces import RECORDS, REPOS
from indexer.store.worker import Worker
from indexer.store.writer import Writer

_STEP_ROWS: Final = 2_000  # read before others get their turn on the loop
_PAGE_STEPS: Final = 10  # read before they go to the worker: 5 MiB
_SCANNED_ROWS: Final = 500  # repositories looked at to find one to audit
_DID_CHARACTERS: Final = "234567abcdefghijklmnopqrstuvwxyz"
_COUNTS: Final = "audit/"

log = structlog.get_logger(__name__)


class Audit(NamedTuple):
    """One audited repository, with printable CIDs. ``signature`` is "unchecked" while no key is known."""

    did: Did
    outcome: Outcome
    message: str
    rev: str
    data: str  # the root that the commit was signed with, by the row
    rebuilt: str  # empty when no tree can be made of the rows
    signature: Signature
    records: int


async def audit(db: Database, pool: Pool, did: Did) -> Audit:
    """Audit one repository. Raises `RequestError` (`RepoNotFound`, `RepoIncomplete`) for one that cannot be
    audited. Call it on the writer's loop."""
    records, tree = 0, no_tree()
    finding: Finding | None = None
    with db.snapshot(REPOS, RECORDS) as snapshot:
        row = _auditable(snapshot.repo(did), did)
        async for paths, cids in _pages(snapshot, did):
            records += len(paths)
            try:
                if finding is None:
                    tree = await pool.run(grown, tree, paths, cids)
            except MstError as error:
                finding = Finding("tree", f"the index holds what no tree can: {error}", "unchecked", b"")
    if finding is None:
        finding = await pool.run(inspect, did, row, tree)
    rebuilt = format_cid(finding.root) if finding.root else ""
    return Audit(
        did, finding.outcome, finding.message, row.rev, format_cid(row.data), rebuilt,
        finding.signature, records,
    )  # fmt: skip


def _auditable(row: RepoRow | None, did: Did) -> RepoRow:
    if row is None or (not row.tracked and not row.rev):
        raise RequestError(f"repository {did} is not indexed here", status=404, name="RepoNotFound")
    if not row.complete or not row.commit:
        raise RequestError(f"repository {did} is not held completely", name="RepoIncomplete")
    return row


async def _pages(snapshot: Snapshot, did: Did) -> AsyncIterator[tuple[list[Path], list[Cid]]]:
    """Paths and CIDs of all records, in tree order."""
    paths: list[Path] = []
    cids: list[Cid] = []
    start: Path | None = None
    while rows := snapshot.records(did, start=start, limit=_STEP_ROWS):
        for path, row in rows:
            paths.append(path)
            cids.append(row.cid)
        start = paths[-1] + "\0"
        if len(paths) >= _STEP_ROWS * _PAGE_STEPS:
            yield paths, cids
            paths, cids = [], []
        await asyncio.sleep(0)
    if paths:
        yield paths, cids


class Auditor(Worker):
    """Audits repositories one after another, `audit.repos_per_minute` of them."""

    name = "audit"

    def __init__(self, db: Database, writer: Writer, pool: Pool, settings: Settings) -> None:
        super().__init__(db, writer, settings.gc)
        self._pool = pool
        self._rate = settings.audit.repos_per_minute
        # Restarts begin anywhere, so that no part of the index goes unlooked at for long.
        self._after = "did:plc:" + "".join(random.choices(_DID_CHARACTERS, k=24))

    @property
    def interval(self) -> float:
        return 60.0 / self._rate

    @property
    def stats(self) -> dict[str, int]:
        """Repositories by what came of them, kept over restarts."""
        counts = self._db.counts(_COUNTS)
        found = {name: counts.get(_COUNTS + name, 0) for name in (*OUTCOMES, "skipped")}
        return {"passes": self.passes, "failures": self.failures, **found}

    async def run_once(self) -> Audit | None:
        """Audit the next repository; None when there is none, or it cannot be audited."""
        async with self._turn:
            self.passes += 1
            did = self._next()
            if did is None:
                return None
            try:
                found = await audit(self._db, self._pool, did)
            except RequestError as error:
                await self._count("skipped")
                log.debug("audit_skipped", did=did, reason=error.name)
                return None
            await self._count(found.outcome)
            _report(found)
            return found

    def _next(self) -> Did | None:
        """The next complete repository; None when none is among the next so many."""
        rows = self._db.repos(after=self._after, limit=_SCANNED_ROWS)
        if len(rows) < _SCANNED_ROWS:  # around the end
            rows += self._db.repos(limit=_SCANNED_ROWS - len(rows))
        for did, row in rows:
            self._after = did
            if row.complete and row.commit:
                return did
        return None

    async def _count(self, outcome: str) -> None:
        await self._writer.run(self.name, lambda tx: tx.add_count(_COUNTS + outcome, 1))


def _report(found: Audit) -> None:
    if found.outcome == "ok":
        return
    if found.outcome == "signature":  # a key that changed since is no fault of ours
        log.warning("audit_signature", did=found.did, rev=found.rev, message=found.message)
        return
    log.error(
        "audit_mismatch", did=found.did, rev=found.rev, outcome=found.outcome, message=found.message,
        advice="the index contradicts its commit: run `indexer db check`, then resync the repository",
    )  # fmt: skip
