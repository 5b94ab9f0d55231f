"""What the parts of the crawler share: one value, built by `Crawler`.

Owns the tallies' names and the length of a wait. Event loop only.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from indexer.atproto.types import Micros
from indexer.backfill.hosts import Hosts
from indexer.config import CrawlerSettings, Settings
from indexer.identity.http import HttpClient
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


def tally(tx: Transaction, outcome: str, number: int = 1) -> None:
    if number:
        tx.add_count(TALLY + outcome, number)
