"""What the parts of the crawler share: one value, built by `Crawler`.

Owns the tallies' names, the length of a wait, and how a host is asked. Event loop only.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from indexer.atproto.types import Micros
from indexer.backfill.fetch import unable
from indexer.backfill.hops import Hops
from indexer.backfill.hosts import Hosts, host_of
from indexer.backfill.outcome import HOST_BUSY
from indexer.backfill.waits import allowance_of
from indexer.config import CrawlerSettings, Settings
from indexer.errors import FetchTransient
from indexer.identity.http import HttpClient, Response
from indexer.identity.resolver import Resolver
from indexer.ingest.apply import Applier
from indexer.ingest.filters import Filters
from indexer.store.database import Database
from indexer.store.transaction import Transaction
from indexer.store.writer import Writer, clock_us

#: Rows of `crawl`, by kind.
SOURCE, HOST, LISTED, WAITING, WITHOUT = "source", "host", "listed", "waiting", "without"
#: Tallies: this + what came of a page, a sweep or a question.
TALLY: Final = "crawler/"


@dataclass(frozen=True, slots=True)
class CrawlTools:
    """The parts of the daemon that the crawler works with."""

    db: Database
    writer: Writer
    http: HttpClient
    resolver: Resolver
    hosts: Hosts
    applier: Applier
    settings: Settings
    clock: Callable[[], Micros] = clock_us
    jitter: Callable[[], float] = random.random

    @property
    def limits(self) -> CrawlerSettings:
        return self.settings.crawler

    @property
    def filters(self) -> Filters:
        """The filters in force."""
        return self.applier.filters

    def wait_s(self, failures: int, asked: float | None = None) -> float:
        """Seconds to wait after failure number ``failures`` (from 1)."""
        limits = self.limits
        wait: float = min(limits.retry_max, limits.retry_min * 2.0 ** min(max(failures, 1) - 1, 30))
        return max(wait * (0.5 + self.jitter() / 2), min(asked or 0.0, limits.retry_max))

    async def ask(
        self, host: str, url: str, *, max_bytes: int, expect: Callable[[Response], None]
    ) -> Response:
        """The answer at ``url``; the host's manners are kept by the book of all hosts. ``expect`` raises what
        an answer means that will not do; a `FetchTransient` is the host's fault."""
        hosts = self.hosts
        hosts.take(host)
        try:
            async with Hops(hosts, (host,)) as hops:
                response = await self.http.get(url, max_bytes=max_bytes, before=hops)
            expect(response)
        except FetchTransient as error:
            if error.reason == HOST_BUSY:  # another one, to which it redirects
                raise
            limited = error.reason == "rate_limited"
            hosts.fault(
                host, jitter=self.jitter(), retry_after=error.retry_after, limited=limited, error=str(error)
            )
            raise
        finally:
            hosts.release(host)
        served = host_of(response.url)
        hosts.success(served, allowance=allowance_of(response.headers, time.time()))
        if served != host:
            hosts.success(host)
        return response


def expect_able(response: Response) -> None:
    """Raises `FetchTransient` where the host cannot answer now."""
    if problem := unable("it", response.status, response.retry_after):
        raise problem


def tally(tx: Transaction, outcome: str, number: int = 1) -> None:
    if number:
        tx.add_count(TALLY + outcome, number)
