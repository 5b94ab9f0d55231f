"""The one place where parts are built, started, drained and stopped.

Owns the order of start and stop and the tasks of the background parts; signals are the command's. A
part whose task ends unexpectedly takes the daemon down with an error: what is half alive loses events
silently. Queries are answered as soon as the store is open; background work begins after that. Runs on
one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self, TypeAlias

import structlog

from indexer.atproto.types import Did
from indexer.backfill import Backfill
from indexer.cas import FsBlobStore
from indexer.config import Settings
from indexer.crawl.service import Crawler
from indexer.errors import IndexerError, WriterPoisoned
from indexer.identity.http import HttpClient
from indexer.identity.proxies import Proxies
from indexer.identity.resolver import Resolver
from indexer.ingest import Ingest
from indexer.ingest.audit import Auditor
from indexer.ingest.filters import Filters
from indexer.ingest.revisit import Revisit
from indexer.memory import limit_arenas
from indexer.pool import Pool
from indexer.serve.listener import expect_free_addresses
from indexer.serve.management import ManagementServer
from indexer.serve.public import PublicServer
from indexer.serve.services import Services
from indexer.store.archives import Archives
from indexer.store.backup import remove_staging
from indexer.store.codecs import Mode
from indexer.store.database import Database
from indexer.store.events import EventLog
from indexer.store.gc import BlocksGcWorker
from indexer.store.refcounts import CheckpointWorker
from indexer.store.restore import expect_own
from indexer.store.retention import RetentionWorker
from indexer.store.writer import Writer

log = structlog.get_logger()

#: Longest that all parts together may take to drain before they are cancelled, in seconds; then the
#: writer commits what it has. So a stop is done within 10.
DRAIN_S = 5.0

StoreWorker: TypeAlias = CheckpointWorker | BlocksGcWorker | RetentionWorker | Archives | Auditor | Revisit


class Daemon:
    """``async with Daemon(settings) as daemon:`` runs every part; leaving it drains and closes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._failed: asyncio.Future[None]
        self._stop_by = 0.0  # loop time at which draining ends; 0 while the daemon runs
        self._listening = asyncio.Event()
        self.db: Database
        self.writer: Writer
        self.ingest: Ingest
        self.backfill: Backfill
        self.crawler: Crawler
        self.services: Services
        self.public: PublicServer
        self.management: ManagementServer

    async def __aenter__(self) -> Self:
        self._failed = asyncio.get_running_loop().create_future()
        try:
            await self._start()
        except asyncio.CancelledError:
            log.info("stopping", why="a signal came during the start")
            await self._close()
            log.info("stopped")
            raise
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        log.info("stopping")
        await self._close()
        log.info("stopped", head=self.writer.head)

    async def _close(self) -> None:
        self._stop_by = asyncio.get_running_loop().time() + DRAIN_S
        await self._stack.aclose()

    async def _start(self) -> None:
        settings = self.settings
        expect_free_addresses(settings)  # before there is a database that nobody wanted
        self._open_store()
        self._stack.push_async_callback(self.writer.stop)
        self._spawn("writer", self._until_writer_closes)
        verifiers = Pool(settings.verifiers, settings.ingest.verify_timeout)
        limits = settings.backfill
        workers = Pool(limits.memory_workers, limits.verify_timeout)
        apart = limits.disk_workers if limits.memory_workers else 0
        disk_workers = Pool(apart, limits.verify_timeout) if apart else None
        for pool in (verifiers, workers, disk_workers):
            if pool is not None:
                self._on_stop(pool.stop)
        proxies = Proxies(limits.proxies, limits.proxy_rest) if limits.proxies else None
        http = await self._stack.enter_async_context(HttpClient(settings.network, proxies=proxies))
        resolver = Resolver(http, settings)
        filters = Filters.of(settings.filter).with_rows(self.db.filters())
        revisit = Revisit(self.db, self.writer, settings)
        # The writer syncs: queries do not wait for the disk. What is asked of it now comes before all else.
        begun = asyncio.create_task(self.writer.start()), asyncio.create_task(revisit.adopt(filters))
        self._stack.push_async_callback(_cancelled, *begun)
        self.ingest = Ingest(self.db, self.writer, verifiers, resolver, filters, settings, http=http)
        archives = await self._open_archives()
        self.backfill = Backfill(
            self.db, self.writer, workers, resolver, http, settings,
            drain=self.ingest.drain, woken=self.ingest.wake, archives=archives, bans=self.ingest.bans,
            disk_pool=disk_workers,
        )  # fmt: skip
        self.ingest.share_hosts(self.backfill.tools.hosts)
        self.crawler = Crawler(
            self.db, self.writer, http, resolver, self.backfill.tools.hosts, self.ingest, settings
        )
        store_workers: dict[str, StoreWorker] = {
            "checkpoint": CheckpointWorker(self.db, self.writer, settings.gc),
            "blocks_gc": BlocksGcWorker(self.db, self.writer, settings.gc),
            "retention": RetentionWorker(self.db, self.writer, settings),
            "archives": archives,
            "filter": revisit,
        }
        if settings.audit.repos_per_minute and not settings.ephemeral.enabled:
            store_workers["audit"] = Auditor(self.db, self.writer, workers, settings)
        self.services = Services(
            self.db, self.writer, EventLog(self.db, self.writer), resolver, workers, filters, settings,
            revisit, self.ingest, self.backfill, store_workers, archives, verifiers, self.crawler,
            hosts=self.backfill.hosts, disk_pool=disk_workers,
        )  # fmt: skip
        for name, worker in store_workers.items():
            self._spawn(name, worker.run)
        self._spawn("backfill", self.backfill.run, self.backfill.stop)
        self._spawn("ingest", self.ingest.run, self.ingest.stop)
        self._spawn("crawler", self.crawler.run, self.crawler.stop)
        await self._listen()
        await asyncio.gather(*begun)
        self._listening.set()
        await verifiers.warm()  # not before: its processes' imports compete for the cores

    def _open_store(self) -> None:
        settings = self.settings
        mode = Mode(ephemeral=settings.ephemeral.enabled, blocks=settings.store.blocks)
        expect_own(settings.data_dir)
        limit_arenas(settings.malloc_arenas)
        self.db = Database.open(settings.data_dir / "db", memory_mib=settings.memory_mib, mode=mode)
        self._stack.callback(self.db.close)
        remove_staging(settings.data_dir)
        self.writer = Writer(self.db, settings)

    async def _until_writer_closes(self) -> None:
        """Ends with the error of a commit that failed: nothing more can be kept."""
        error = await self.writer.wait_closed()
        if error is not None:
            raise error

    async def _open_archives(self) -> Archives:
        level = self.settings.archive.zstd_level
        blobs = await asyncio.to_thread(FsBlobStore, self.settings.data_dir / "cas", level=level)
        return Archives(self.db, self.writer, blobs, self.settings)

    async def _listen(self) -> None:
        self.public = PublicServer(self.services)
        await self.public.start()
        self._on_stop(self.public.stop)
        self.management = ManagementServer(self.services, self.public)
        await self.management.start()
        self._on_stop(self.management.stop)
        log.info("listening", public=self.public.url, management=self.management.url)

    def _on_stop(self, stop: Callable[[], Awaitable[None]]) -> None:
        """Registers a part's stop, in reverse order of start, within what is left of the time."""

        async def within_the_time() -> None:
            left = max(0.2, self._stop_by - asyncio.get_running_loop().time())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop(), left)

        self._stack.push_async_callback(within_the_time)

    def _spawn(
        self, name: str, run: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Runs a part as a task, once queries are answered. One that ends before the daemon stops is a
        failure, error or not."""

        async def watched() -> None:
            await self._listening.wait()
            try:
                await run()
                if not self._stop_by:
                    raise IndexerError(f"the part {name} ended by itself")
            except Exception as error:
                log.error(
                    "part_failed", part=name, error=str(error), exc_info=not isinstance(error, IndexerError)
                )
                if not self._failed.done():
                    self._failed.set_exception(_cause_of(error))

        task = asyncio.create_task(watched(), name=name)

        async def end() -> None:
            task.cancel()
            await asyncio.wait([task])

        self._on_stop(end)
        if stop is not None:
            self._on_stop(stop)

    @property
    def public_url(self) -> str:
        return self.public.url

    @property
    def management_url(self) -> str:
        return self.management.url

    async def add_repos(self, dids: Sequence[Did]) -> None:
        """Follows repositories from now on and queues them for a fetch."""
        await self.backfill.add(dids)

    async def wait_connected(self, timeout: float) -> None:
        """Waits until every upstream that is not switched off is connected; raises `IndexerError` when it
        takes longer."""
        async with asyncio.timeout(timeout) as limit:
            try:
                while any(source["enabled"] and not source["connected"] for source in self.ingest.status()):
                    await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                if limit.expired():
                    raise IndexerError(f"no connection to the upstreams within {timeout:g} s") from None
                raise

    async def wait_failed(self, timeout: float | None = None) -> None:
        """Raises what makes a part fail; returns after ``timeout`` seconds without a failure."""
        await asyncio.wait([self._failed], timeout=timeout)
        if self._failed.done():
            await self._failed


def _cause_of(error: Exception) -> Exception:
    """What went wrong: a part that meets a closed writer may be quicker than the writer's own."""
    cause = error.__cause__
    return cause if isinstance(error, WriterPoisoned) and isinstance(cause, Exception) else error


async def _cancelled(*tasks: asyncio.Task[None]) -> None:
    """Ends tasks that may be under way, whatever comes of them."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
