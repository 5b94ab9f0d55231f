"""What a changed filter means for the repositories that are held: a round through all of them.

Owns the plan of the round, a row that is written in the batch which stores the filter, and the steps that
carry it out: repositories of wider collections are queued for a fetch, narrower collections make them
incomplete and, on request, delete what is no longer kept; excluded ones rest until they are included again.
A step handles a bounded number of rows and moves the plan's position in its own batch, so a kill at any
moment costs nothing but the rest of a step, and a newer change starts the round again with what both ask.
Leaves out what filters mean (`filters`) and how they are asked for. On the writer's loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import IntFlag
from functools import partial
from typing import Final, NamedTuple

import structlog

from indexer.atproto.types import Did, Micros, Path
from indexer.config import Settings
from indexer.errors import WriterPoisoned
from indexer.ingest.filters import Filters
from indexer.store.codecs import RepoRow, SyncState, Work
from indexer.store.database import Database
from indexer.store.keyspaces import CURSORS
from indexer.store.transaction import Transaction
from indexer.store.worker import Worker
from indexer.store.writer import Writer

#: Rows of `cursors`: the round under way, and the filter that the last start or change left in force.
PLAN: Final = "filter/revisit"
IN_FORCE: Final = "filter/in_force"
_RETRY_S: Final = 5.0  # after a failed step

log = structlog.get_logger(__name__)


class Task(IntFlag):
    """What a round is about."""

    REFETCH = 1  # collections are kept that were left out before
    COLLECTIONS = 2  # other collections than before, whether more or fewer
    PURGE = 4  # what is not wanted any more is deleted
    EXCLUDE = 8  # accounts were excluded
    INCLUDE = 16  # accounts were excluded and are not any more


class Plan(NamedTuple):
    """A round: what for, where it goes on, what came of it so far."""

    task: int
    did: Did = ""  # rows up to it are done
    path: Path = ""  # of the repository after ``did``: records below it are purged
    queued: int = 0
    purged: int = 0


class Progress(NamedTuple):
    done: bool
    queued: int
    purged: int


NOTHING_TO_DO: Final = Progress(True, 0, 0)


def planned(tx: Transaction) -> Plan | None:
    """The round that is under way."""
    row = tx.position(PLAN)
    return None if row is None else Plan(*row)


def plan(tx: Transaction, old: Filters, new: Filters, *, purge: bool = False) -> bool:
    """Puts ``new`` in force, with a round where repositories that are held may be affected; whether so."""
    tx.set_cursor(IN_FORCE, [list(item) for item in new.rows()])
    before = planned(tx)
    task = task_of(old, new, purge=purge) | (0 if before is None else before.task)
    if task:
        tx.set_cursor(PLAN, list(Plan(task)))
    return bool(task)


def task_of(old: Filters, new: Filters, *, purge: bool) -> int:
    """What changing ``old`` to ``new`` asks of repositories that are held; 0 when nothing."""
    task = Task.PURGE if purge else Task(0)
    if set(new.collections) != set(old.collections):
        task |= Task.COLLECTIONS
    if new.widens(old):
        task |= Task.REFETCH
    if new.excludes - old.excludes:
        task |= Task.EXCLUDE
    if old.excludes - new.excludes:
        task |= Task.INCLUDE
    return int(task)


def revisited(row: RepoRow, excluded: bool, whole: bool, task: int, now_us: Micros) -> RepoRow:
    """A followed repository's row under the new filter; ``whole``: all collections are kept.

    An account that is not active is fetched when it is again: its state says so, nothing is due.
    """
    if excluded:
        return _stale(row)._replace(due=0, work=0) if task & Task.EXCLUDE else row
    if task & Task.COLLECTIONS and not whole:
        row = row._replace(complete=False)
    again = row.state is SyncState.SYNCED and task & Task.REFETCH
    # A fetch under way was begun under the old filter.
    if again or (row.state is SyncState.BACKFILLING and task & Task.COLLECTIONS):
        row = _stale(row)._replace(due=0, attempt=0)
    rests = row.state in (SyncState.PENDING, SyncState.DESYNCHRONIZED) and not row.due
    # What waits for an identity gets its fetch planned once that is known (`machine.drained`).
    planned_later = not again and row.work & (Work.RESOLVE | Work.DRAIN)
    wanted = task & (Task.COLLECTIONS | Task.INCLUDE) and row.status.active
    return row._replace(due=now_us) if rests and wanted and not planned_later else row


def _stale(row: RepoRow) -> RepoRow:
    """The row with its content out of date, where it was up to date or about to be."""
    if row.state in (SyncState.SYNCED, SyncState.BACKFILLING):
        return row._replace(state=SyncState.DESYNCHRONIZED if row.rev else SyncState.PENDING)
    return row


class Revisit(Worker):
    """Carries rounds out, one after another; what a kill left is gone on with at the start."""

    name = "filter"

    def __init__(self, db: Database, writer: Writer, settings: Settings) -> None:
        super().__init__(db, writer, settings.gc)
        self._ephemeral = settings.ephemeral.enabled
        self._settled = Filters.of(settings.filter)
        self._woken = asyncio.Event()
        self._woken.set()
        self._held = asyncio.Lock()
        self._stepped = asyncio.Event()  # another one after every step
        self._last = NOTHING_TO_DO

    @property
    def stats(self) -> dict[str, int]:
        """How far the round is, or how the last one ended."""
        last = self._last
        return {
            "passes": self.passes,
            "failures": self.failures,
            "under_way": int(not last.done),
            "queued": last.queued,
            "purged": last.purged,
        }

    async def adopt(self, filters: Filters) -> None:
        """At the start: a filter that the settings changed meanwhile is a change like others."""

        def compare(tx: Transaction) -> None:
            rows = tx.position(IN_FORCE)
            old = filters if rows is None else Filters().with_rows([(kind, item) for kind, item in rows])
            if rows is None or old != filters:
                self.plan(tx, old, filters)

        await self._writer.run("filter_adopt", compare)
        self._woken.set()

    def plan(self, tx: Transaction, old: Filters, new: Filters, *, purge: bool = False) -> bool:
        """`plan`, but for ephemeral mode: there is nothing held that a filter could affect."""
        if not self._ephemeral:
            return plan(tx, old, new, purge=purge)
        tx.set_cursor(IN_FORCE, [list(item) for item in new.rows()])
        return False

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """While a change is stored and told, no step runs; it is taken up at the end."""
        async with self._held:
            yield
            # What was decided under the old filter is stored by now, so that the round meets it.
            await self._writer.run("filter_barrier", lambda tx: None)
        self._woken.set()

    async def progress(self, wait_s: float) -> Progress:
        """How far the round is, at its end or after so many seconds."""
        try:
            async with asyncio.timeout(wait_s):
                while self._stored() is not None:
                    await self._stepped.wait()
        except TimeoutError:
            pass
        now = self._stored()
        return self._last if now is None else Progress(False, now.queued, now.purged)

    def _stored(self) -> Plan | None:
        row = self._db.get(CURSORS, PLAN)
        return None if row is None else Plan(*row)

    async def _wait(self) -> None:
        await self._woken.wait()
        self._woken.clear()

    async def run_once(self) -> Progress:
        """The round that is planned, to its end."""
        async with self._turn:
            try:
                while await self._step():
                    pass
            except WriterPoisoned:
                raise
            except Exception:
                asyncio.get_running_loop().call_later(_RETRY_S, self._woken.set)
                raise
            return self._last

    async def _step(self) -> bool:
        """One batch; false when no round is left."""
        async with self._held:
            now = self._stored()
            if now is None:
                return False
            self.passes += 1
            started = time.perf_counter()
            limit = self._pace.rows
            dids = [did for did, _ in self._db.repos(after=now.did, limit=limit)]
            work = partial(self._round, now=now, dids=dids, limit=limit)
            looked = await self._pace.step(self._writer, "filter_revisit", work, started)
            self._stepped.set()
            self._stepped = asyncio.Event()
        if self._last.done:
            log.info("filter_revisited", queued=self._last.queued, purged=self._last.purged)
        await self._pace.rest(self._pace.took, looked)
        return True

    def _round(self, tx: Transaction, now: Plan, dids: list[Did], limit: int) -> int:
        """Handles up to ``limit`` rows from the plan's position on; gives how many it looked at."""
        filters = self._settled.with_rows(self._db.filters())
        looked = 0
        for did in dids:
            if looked >= limit:
                break
            now, more = _handled(tx, did, filters, now, limit - looked - 1)
            looked += 1 + more
            if now.did != did:  # the purge of this one goes on with the next step
                break
        done = not dids
        tx.set_cursor(PLAN, None if done else list(now))
        self._last = Progress(done, now.queued, now.purged)
        return looked


def _handled(tx: Transaction, did: Did, filters: Filters, now: Plan, limit: int) -> tuple[Plan, int]:
    """One repository: the plan after it, and how many rows were looked at besides its own."""
    row = tx.repo(did)
    if row is None:
        return now._replace(did=did, path=""), 0
    excluded = filters.is_excluded(did)
    if row.tracked and not now.path:
        new = revisited(row, excluded, not filters.collections, now.task, tx.now_us)
        if new != row:
            tx.set_repo(did, new)
        if excluded and now.task & Task.EXCLUDE:
            tx.drop_buffered(did)
        now = now._replace(queued=now.queued + (new.due > 0 and new.due != row.due))
    if not now.task & Task.PURGE:
        return now._replace(did=did, path=""), 0
    if excluded:
        wiped = _wiped(tx, did)
        return now._replace(did=did, path="", purged=now.purged + wiped), wiped
    return _purged(tx, did, filters, now, limit)


def _wiped(tx: Transaction, did: Did) -> int:
    """Ends what is held of an excluded account; its row stays followed, for when it is included again."""
    row = tx.repo(did)
    records = sum(tx.did_counts(did).values())
    if row is None or not (row.rev or tx.records(did, limit=1)):
        return 0
    tx.wipe_repo(did, row.status)
    fresh = tx.repo(did)
    if fresh is not None and row.tracked:
        tx.set_repo(did, fresh._replace(tracked=True))
    return records


def _purged(tx: Transaction, did: Did, filters: Filters, now: Plan, limit: int) -> tuple[Plan, int]:
    """Deletes records of collections that are not kept and tells the log; wanted ones are leapt over."""
    row = tx.repo(did)
    rev = "" if row is None else row.rev or row.min_rev
    at, looked, purged = now.path, 0, 0
    while looked < max(1, limit):
        page = tx.records(did, start=at or None, limit=1)
        if not page:
            return now._replace(did=did, path="", purged=now.purged + purged), looked
        looked += 1
        collection = page[0][0].partition("/")[0]
        at = collection + "0"  # "0" is what follows "/"
        if filters.wants_collection(collection):
            continue
        left = max(1, limit - looked)
        rows = tx.records(did, start=page[0][0], stop=at, limit=left)
        for path, _ in rows:
            tx.delete_record(did, path, rev, live=False)
        looked, purged = looked + len(rows), purged + len(rows)
        at = at if len(rows) < left else rows[-1][0]
    return now._replace(path=at, purged=now.purged + purged), looked
