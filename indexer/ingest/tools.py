"""What the parts of ingest share: one value, built by `Ingest`, and a bounded table of signing keys.

Owns no behaviour but the table's. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from time import time
from typing import NamedTuple

from indexer.atproto.syntax import tid_from_micros
from indexer.atproto.types import Did, DidKey, Rev
from indexer.config import Settings
from indexer.identity.http import HttpClient
from indexer.identity.resolver import Resolver
from indexer.ingest.bans import Bans
from indexer.ingest.clock import ClockWatch
from indexer.ingest.verify import VerifyLimits
from indexer.pool import Pool
from indexer.store.codecs import RepoRow
from indexer.store.database import Database
from indexer.store.writer import Writer

#: The highest clock id in a TID.
_LAST_CLOCK = 1023


class Route(NamedTuple):
    """What the intake knows of a followed repository. ``rev``: frames up to it are applied; ``whole``: the
    tree that it stands at was verified as a whole."""

    key: DidKey
    rev: Rev
    whole: bool


class Routes:
    """Signing keys by DID, so that not every frame reads a row; emptied when full, corrected by steps."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[Did, Route] = {}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, did: Did) -> Route | None:
        return self._known.get(did)

    def put(self, did: Did, row: RepoRow) -> None:
        if len(self._known) >= self._limit and did not in self._known:
            self._known.clear()
        self._known[did] = Route(row.signing_key, row.rev, not row.sparse)

    def forget(self, did: Did) -> None:
        self._known.pop(did, None)


@dataclass(frozen=True, slots=True)
class IngestTools:
    """The parts of the daemon that ingest works with."""

    db: Database
    writer: Writer
    pool: Pool
    resolver: Resolver
    http: HttpClient
    settings: Settings
    routes: Routes
    #: Set while the disk has room above the hard floor.
    space: asyncio.Event
    bans: Bans
    #: DIDs of which an `#identity` came in since their identity was last asked for.
    hints: set[Did] = field(default_factory=set)
    #: Those among them that somebody with authority over the account sent: they need not wait.
    urgent: set[Did] = field(default_factory=set)
    clock: Callable[[], float] = time
    clock_watch: ClockWatch = field(default_factory=ClockWatch)

    def hint(self, did: Did, *, urgent: bool) -> None:
        """Notes that an answer under way about ``did`` may be out of date."""
        if len(self.hints) < self.settings.ingest.work_repos:
            self.hints.add(did)
            if urgent:
                self.urgent.add(did)

    def unhint(self, did: Did) -> None:
        """An answer that is asked for from now on is as new as the hint."""
        self.hints.discard(did)
        self.urgent.discard(did)

    def limits(self) -> VerifyLimits:
        """Bounds for frames that are verified now."""
        newest = int((self.clock() + self.settings.ingest.max_future) * 1_000_000)
        # In ephemeral mode any commit may become the base of what follows.
        return VerifyLimits(tid_from_micros(newest, _LAST_CLOCK), valid_base=not self.db.mode.ephemeral)
