"""A daemon without its servers: store, ingest and backfill against some upstreams, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

from indexer.backfill import Backfill
from indexer.config import Settings
from indexer.identity.http import HttpClient
from indexer.identity.resolver import Resolver
from indexer.ingest import Ingest
from indexer.ingest.filters import Filters
from indexer.pool import Pool
from indexer.store.codecs import Mode
from indexer.store.database import Database
from indexer.store.events import EventLog
from indexer.store.writer import Writer


class Node:
    """``async with Node(folder, tables) as node:``; ``tables`` are settings as in the TOML file."""

    db: Database
    writer: Writer
    ingest: Ingest
    backfill: Backfill
    log: EventLog

    def __init__(self, folder: Path, tables: dict[str, Any]) -> None:
        network = {"allow_private": True, **tables.get("network", {})}
        disk = {"soft_floor_mib": 0, "hard_floor_mib": 0, **tables.get("disk", {})}
        tables = {**tables, "network": network, "disk": disk}
        self.settings = Settings(data_dir=folder, **tables)
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        settings, stack = self.settings, self._stack
        mode = Mode(ephemeral=settings.ephemeral.enabled, blocks=settings.store.blocks)
        self.db = Database.open(settings.data_dir / "db", memory_mib=32, mode=mode)
        stack.callback(self.db.close)
        self.writer = Writer(self.db, settings)
        await self.writer.start()
        stack.push_async_callback(self.writer.stop)
        pool = Pool(settings.verifiers)
        stack.push_async_callback(pool.stop)
        http = await stack.enter_async_context(HttpClient(settings.network))
        resolver = Resolver(http, settings)
        stack.push_async_callback(resolver.close)
        filters = Filters.of(settings.filter)
        self.ingest = Ingest(self.db, self.writer, pool, resolver, filters, settings)
        self.backfill = Backfill(
            self.db,
            self.writer,
            pool,
            resolver,
            http,
            settings,
            drain=self.ingest.drain,
            woken=self.ingest.wake,
        )
        self.ingest.share_hosts(self.backfill.tools.hosts)
        self.log = EventLog(self.db, self.writer)
        for part in (self.backfill, self.ingest):
            self._tasks.append(asyncio.create_task(part.run()))
            stack.push_async_callback(part.stop)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        await asyncio.gather(*self._tasks)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition on the store or the parts; raises what made a part fail."""
        while not condition():
            for task in self._tasks:
                if task.done():
                    await task
            await asyncio.sleep(0.01)

    def events(self) -> list[Any]:
        """The whole log."""
        events: list[Any] = []
        at = self.log.floor
        while page := self.log.read(at, 1000):
            events += page
            at = page[-1].id + 1
        return events

    def seqs(self) -> list[int]:
        """The stored cursor of each upstream, in the order of the settings."""
        return [self.db.cursor(f"upstream/{name}") or 0 for name in self.settings.upstreams]
