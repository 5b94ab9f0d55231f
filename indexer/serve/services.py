"""What the servers are given: one frozen value, typed by protocols where a part is above the store.

Tests build it from a store alone; the daemon fills in every part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from indexer.atproto.types import Did, Handle
from indexer.backfill.host_book import HostBook
from indexer.config import Settings
from indexer.crawl.targets import Added, Target, Targets
from indexer.ingest.filters import Filters
from indexer.ingest.revisit import Revisit
from indexer.ingest.sources import Sources
from indexer.pool import Pool
from indexer.store.archives import Archives
from indexer.store.database import Database
from indexer.store.events import EventLog
from indexer.store.writer import Writer


class ResolverLike(Protocol):
    """What queries ask of the identity resolver."""

    async def resolve_handle(self, handle: Handle, /) -> Did: ...

    async def verified_handle(self, did: Did, /) -> Handle: ...


class IngestLike(Protocol):
    """The firehose side, as far as it is looked at and told of new filters."""

    def status(self) -> Sequence[Mapping[str, Any]]: ...

    def set_filters(self, filters: Filters, /) -> None: ...

    @property
    def sources(self) -> Sources: ...

    @property
    def clock_problem(self) -> str | None: ...


class BackfillLike(Protocol):
    """The fetching side."""

    async def add(self, dids: Sequence[Did], /, *, again: bool = False) -> list[Did]: ...

    def wake(self) -> None: ...

    def pause(self, paused: bool, /) -> None: ...

    def status(self) -> Mapping[str, Any]: ...


class CrawlerLike(Protocol):
    """The side that looks for accounts."""

    async def add(self, url: str, mode: str | None = None) -> Added: ...

    async def remove(self, url: str, mode: str | None = None) -> Target: ...

    async def reset(self, url: str, mode: str | None = None) -> Target: ...

    @property
    def targets(self) -> Targets: ...

    def pause(self, paused: bool, /) -> None: ...

    def look_again(self) -> None: ...

    def sources(self) -> list[dict[str, Any]]: ...

    def status(self) -> Mapping[str, Any]: ...


class WorkerLike(Protocol):
    """A background worker of the store."""

    async def run_once(self) -> object: ...

    @property
    def stats(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that the servers read from or act on. Parts that are not running are None."""

    db: Database
    writer: Writer
    log: EventLog
    resolver: ResolverLike
    pool: Pool
    filters: Filters
    settings: Settings
    #: Carries changed filters to the repositories that are held.
    revisit: Revisit
    ingest: IngestLike | None = None
    backfill: BackfillLike | None = None
    #: "checkpoint", "blocks_gc", "retention", "archives", "audit", "filter"
    workers: Mapping[str, WorkerLike] = field(default_factory=dict)
    archives: Archives | None = None
    verifiers: Pool | None = None
    crawler: CrawlerLike | None = None
    #: What is known of hosts, and said of them.
    hosts: HostBook | None = None
    disk_pool: Pool | None = None

    @property
    def pools(self) -> dict[str, Pool]:
        """The pools of processes that there are, by their names for people."""
        named = {"workers": self.pool, "disk_workers": self.disk_pool, "verifiers": self.verifiers}
        return {name: pool for name, pool in named.items() if pool is not None}

    def current_filters(self) -> Filters:
        """The filters in force: what was stored over what is set."""
        return self.filters.with_rows(self.db.filters())
