"""Ingest as one part: built, run, told of new filters, asked for its state, stopped.

Owns the tasks of the upstreams as a whole (`sources`), of due work and of the look at the disk, and how they
end: a task that fails takes the others and the caller of `run` with it, the daemon in the end, because
its restart finds all that was due in the rows. Event loop only.
"""

from __future__ import annotations

import asyncio
import shutil
from typing import Any

import structlog

from indexer.atproto.types import Did
from indexer.config import Settings
from indexer.identity.http import HttpClient
from indexer.identity.resolver import Resolver
from indexer.ingest.answers import Answers
from indexer.ingest.apply import Applier
from indexer.ingest.bans import Bans
from indexer.ingest.drain import Drainer
from indexer.ingest.filters import Filters
from indexer.ingest.handles import HandleWork
from indexer.ingest.identities import QUESTIONS, DueWork
from indexer.ingest.sources import Sources
from indexer.ingest.strangers import Strangers
from indexer.ingest.tools import IngestTools, Routes
from indexer.ingest.turns import HostManners
from indexer.pool import Pool
from indexer.store.codecs import Work
from indexer.store.database import Database
from indexer.store.writer import Writer

log = structlog.get_logger()

#: Time between two looks at the free space, in seconds.
DISK_CHECK_S = 5.0


class Ingest:
    """Follows the upstreams of the settings and those that were added (`sources`)."""

    def __init__(
        self,
        db: Database,
        writer: Writer,
        pool: Pool,
        resolver: Resolver,
        filters: Filters,
        settings: Settings,
        *,
        http: HttpClient | None = None,
    ) -> None:
        self._own_http = http is None
        self._http = http or HttpClient(settings.network)
        self._settings = settings
        routes = Routes(settings.identity.cache_entries)
        self._space = asyncio.Event()
        self._space.set()
        #: Hosts of which nothing is taken.
        self.bans = Bans(db)
        tools = IngestTools(db, writer, pool, resolver, self._http, settings, routes, self._space, self.bans)
        self.applier = Applier(
            filters.with_rows(db.filters()), tools, self._wake, ephemeral=db.mode.ephemeral
        )
        answers = Answers(tools, self.applier)
        self._drainer = Drainer(tools, self.applier, answers)
        self._routes = routes
        strangers = Strangers(tools, self.applier, answers)
        self._questions = DueWork(tools, answers, self._drainer, strangers)
        self._due = self._questions.queue
        self._handles = HandleWork(tools, answers).queue
        self._db = db
        self._clock_watch = tools.clock_watch
        self.sources = Sources(tools, self.applier, self._http.resolver.addresses)
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def filters(self) -> Filters:
        return self.applier.filters

    def share_hosts(self, hosts: HostManners) -> None:
        """What fetches and due work learn of hosts counts for both."""
        self._questions.turns.manners = hosts

    def set_filters(self, filters: Filters) -> None:
        """From the next frame on; storing them is the caller's."""
        self.applier.filters = filters

    def wake(self, did: Did) -> None:
        """A fetch changed the repository, maybe to an older rev; its row may have work that is due."""
        self._routes.forget(did)
        row = self._db.repo(did)
        if row is not None and row.work:
            self._wake(did, row.work & ~Work.DRAIN, row.work)

    def _wake(self, did: Did, work: int, fresh: int) -> None:
        if work & QUESTIONS:
            self._due.add(did, fresh=bool(fresh & QUESTIONS))
        if work & Work.VERIFY_HANDLE:
            self._handles.add(did, fresh=bool(fresh & Work.VERIFY_HANDLE))

    async def run(self) -> None:
        """Follows every upstream until `stop`; raises what ends one of the parts."""
        if self._stopping:  # told before it began
            return
        self._task = asyncio.current_task()
        try:
            if self._own_http:
                async with self._http:
                    await self._follow()
            else:
                await self._follow()
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        except BaseExceptionGroup as group:
            raise _first_of(group) from group

    async def _follow(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._due.run(), name="ingest-due")
            tasks.create_task(self._handles.run(), name="ingest-handles")
            tasks.create_task(self._watch_disk(), name="ingest-disk")
            tasks.create_task(self.sources.run(), name="ingest-sources")

    async def _watch_disk(self) -> None:
        """Below the hard floor nothing more is taken in, until there is room again."""
        floor = self._settings.disk.hard_floor_mib << 20
        while True:
            free = shutil.disk_usage(self._settings.data_dir).free
            if free >= floor:
                self._space.set()
            elif self._space.is_set():
                self._space.clear()
                log.error("ingest_paused", free_mib=free >> 20, floor_mib=floor >> 20)
            await asyncio.sleep(DISK_CHECK_S)

    async def stop(self) -> None:
        """Ends `run`. What was received and is not committed comes again after a restart."""
        self._stopping = True
        task = self._task
        if task is not None and not task.done() and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait([task])

    async def drain(self, did: Did) -> bool:
        """Replays the frames that wait for a repository which has just been fetched and applied.

        True when it is synced (or broken anew); raises `IdentityUnavailable` when a frame needs an
        identity that cannot be had now.
        """
        try:
            return await self._drainer.drain(did)
        finally:
            self.wake(did)

    def status(self) -> list[dict[str, Any]]:
        """One entry for each upstream."""
        return self.sources.status()

    @property
    def clock_problem(self) -> str | None:
        """Why our clock seems to be wrong; None while it does not."""
        return self._clock_watch.problem

    @property
    def due(self) -> int:
        """Repositories whose due work is in memory."""
        return len(self._due) + len(self._handles)


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that began it, out of groups within groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
