"""A daemon without its servers and with a crawler, for tests; and the simulated network that it crawls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from indexer.crawl.service import Crawler
from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.store.codecs import SyncState
from tests.ingest.node import Node

FAST = {"retry_min": 0.02, "retry_max": 0.05, "pages_per_s": 1000.0}


class CrawlNode(Node):
    """As `Node`; ``crawler`` runs with the other parts."""

    crawler: Crawler

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        tools = self.backfill.tools
        self.crawler = Crawler(
            self.db, self.writer, tools.http, tools.resolver, tools.hosts, self.ingest, self.settings
        )
        self._tasks.append(asyncio.create_task(self.crawler.run()))
        self._stack.push_async_callback(self.crawler.stop)
        return self

    def source(self, name: str = "") -> dict[str, Any]:
        """The status of one source; without a name of the only one."""
        found = [item for item in self.crawler.sources() if name in ("", item["name"])]
        assert len(found) == 1, found
        return found[0]

    def total(self, outcome: str) -> int:
        return self.db.count(f"crawler/{outcome}")

    def ended(self, outcome: str = "done", times: int = 1) -> bool:
        return self.total(outcome) >= times

    def synced(self, dids: set[str]) -> bool:
        """Whether all of these are fetched."""
        rows = [self.db.repo(did) for did in dids]
        return all(row is not None and row.state is SyncState.SYNCED for row in rows)

    def known(self) -> set[str]:
        return {did for did, _ in self.db.repos(limit=100_000)}


@asynccontextmanager
async def network(**config: Any) -> AsyncIterator[SimulatedNetwork]:
    """A quiet network of accounts with a past."""
    net = SimulatedNetwork(
        SimConfig(
            **({"seed": 7, "accounts": 0, "history_accounts": 12, "history_records": 4, "rate": 0} | config)
        )
    )
    await net.start()
    try:
        yield net
    finally:
        await net.stop()


def node(
    folder: Path, net: SimulatedNetwork, sources: list[str], *, mode: str = "full", **tables: Any
) -> CrawlNode:
    """A node that crawls; ``tables`` are more settings."""
    crawler = {**FAST, "sources": sources, **tables.pop("crawler", {})}
    filters = {"mode": mode, **tables.pop("filter", {})}
    settings = {
        "upstreams": [], "plc_urls": [net.plc_url], "verifiers": 0, "backfill": {"concurrency": 4},
        "hosts": {"requests_per_s": 0}, "crawler": crawler, "filter": filters, **tables,
    }  # fmt: skip
    return CrawlNode(folder, settings)


def dids_of(net: SimulatedNetwork, pds: int | None = None) -> set[str]:
    return {did for did, account in net.world.accounts.items() if pds in (None, account.pds)}
