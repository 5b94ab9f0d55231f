"""How far the backfill is: what waits, how fast it goes, and when it will be done.

Owns the census of the durable queue, taken again and again in small steps (never more than a twentieth of the
time), and the pace at which repositories leave it. Between two takes of the census what left since is
subtracted. Only reads; event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from indexer.atproto.types import Did, Micros
from indexer.backfill.hosts import HELD
from indexer.backfill.queue import CLAIMED_DUE, EXPLICIT_LEAD
from indexer.backfill.rows import is_waiting
from indexer.ingest.account import reason_of
from indexer.store.codecs import RepoRow, encode_due
from indexer.store.database import Database
from indexer.store.keyspaces import PENDING, REPOS
from indexer.store.writer import clock_us

#: Rows of the queue that are looked at in one turn.
_STEP: Final = 250
#: A census takes at most one part in so many of the time, and is not taken again within the shortest wait.
_SHARE: Final = 20
_SHORTEST_S: Final = 1.0
#: The pace is a mean over so many slots of so many seconds, the present busy time at most.
_SLOT_S: Final = 10
_SLOTS: Final = 60
#: The first few that leave in a busy time say little of it; they are taken to have had so long at least.
_EARLY_S: Final = 5.0
_LEAST_S: Final = 1.0
#: Who is to be tried again within this time belongs to what is going on: a host asked for patience. Longer
#: waits are of repositories and hosts that fail, and have no end that could be foretold.
_SOON_S: Final = 600.0


class Census(NamedTuple):
    """Who waits for a fetch. ``due``: now, those being worked on included; ``later``: after a failure;
    ``held``: of a host from which nothing is fetched. Times in µs since 1970, 0 when there is none."""

    due: int = 0
    later: int = 0
    held: int = 0
    oldest_due: Micros = 0
    next_due: Micros = 0  # of those that wait for later
    soon: int = 0  # of those that wait for later: that the forecast counts
    last_soon: Micros = 0
    left: int = 0  # repositories that had left the queue when it was taken

    def with_rows(self, rows: Sequence[tuple[Micros, RepoRow]], now: Micros, rate: float) -> Census:
        """With further rows of the queue, in its order; ``rate`` is how many leave it a second.

        Those for later whose time comes before all before them are done, or within `_SOON_S`, are `soon`.
        """
        due, later, held, oldest, following, soon, last_soon, left = self
        for at, row in rows:
            if reason_of(row.error) in HELD:
                held += 1
            elif at > now:
                later += 1
                following = min(following or at, at)
                if at <= now + 1e6 * max(_SOON_S, (due + soon) / rate if rate else 0.0):
                    soon, last_soon = soon + 1, at
            else:
                due += 1
                if at != CLAIMED_DUE:
                    asked = asked_at(at, now)
                    oldest = min(oldest or asked, asked)
        return Census(due, later, held, oldest, following, soon, last_soon, left)


def asked_at(due: Micros, now: Micros) -> Micros:
    """When a repository became due, also one that stands in front because somebody asked for it."""
    return due + EXPLICIT_LEAD if due < now - EXPLICIT_LEAD // 2 else due


class Pace:
    """Repositories that leave the queue, by time.

    A busy time lasts as long as something waits, so that a silence that a host asks for is part of it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slots: deque[tuple[int, int]] = deque()
        self._began: float | None = None  # of the present busy time
        self._before = 0.0  # the pace of the one before
        self._known = 0.0  # what was measured last
        self._working = 0
        #: How many have left since the start.
        self.left = 0

    @property
    def busy(self) -> bool:
        """Whether anything waits or is worked on."""
        return self._began is not None

    def begin(self) -> None:
        """One is being worked on."""
        if self._began is None:
            self._began = self._clock()
            self._slots.clear()
        self._working += 1

    def end(self, *, left: bool) -> None:
        """It is no longer; ``left`` when the queue has one less that is due or will be soon."""
        self._working -= 1
        if left:
            self.left += 1
            slot = int(self._clock()) // _SLOT_S
            count = self._slots.pop()[1] if self._slots and self._slots[-1][0] == slot else 0
            self._slots.append((slot, count + 1))

    def rest(self) -> None:
        """Nothing waits, or nothing may be fetched: unless something is still worked on, what follows is
        another busy time."""
        if not self._working:
            self._before = self.per_s()
            self._began = None

    def per_s(self) -> float:
        """The mean over the present busy time, its last ten minutes at most; 0.0 before anything ever left.

        At its beginning the pace of the one before; where nothing left for long, what that allows.
        """
        if self._began is None:
            return self._before
        now = self._clock()
        first = int(now) // _SLOT_S - _SLOTS + 1
        while self._slots and self._slots[0][0] < first:
            self._slots.popleft()
        span = now - max(self._began, first * _SLOT_S)
        if self._before and span < _EARLY_S:
            return self._before
        left = sum(count for _slot, count in self._slots)
        if left:
            self._known = left / max(span, _LEAST_S)
            return self._known
        return min(self._known, 1 / span) if span > 0 else self._known


class Progress:
    """The census and the pace together."""

    def __init__(self, db: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._db = db
        self._clock = clock
        self.pace = Pace(clock)
        self.census = Census()

    async def run(self) -> None:
        """Takes the census again and again, until cancelled."""
        while True:
            begun = self._clock()
            await self.take()
            await asyncio.sleep(max(_SHORTEST_S, _SHARE * (self._clock() - begun)))

    async def take(self) -> None:
        """Looks at the whole queue once."""
        now, rate = clock_us(), self.pace.per_s()
        census = Census(left=self.pace.left)
        start = b""
        while keys := [key for key, _ in self._db.scan(PENDING, start, None, limit=_STEP)]:
            rows = self._db.multi_get(REPOS, [did for _, did in keys])
            waiting = [
                (due, row) for (due, _), row in zip(keys, rows, strict=True) if row and is_waiting(row)
            ]
            census = census.with_rows(waiting, now, rate)
            start = encode_due(keys[-1]) + b"\0"
            await asyncio.sleep(0)
        self.census = census
        if not census.due and not census.soon:
            self.pace.rest()

    def has_left(self, did: Did) -> bool:
        """Whether a repository waits for no other fetch, or for one that is far off."""
        row = self._db.repo(did)
        return row is None or not is_waiting(row) or row.due > clock_us() + _SOON_S * 1e6

    def due(self) -> int:
        """Repositories that are due now, by the last census and what left since."""
        return max(0, self.census.due - (self.pace.left - self.census.left))

    def eta_s(self) -> float | None:
        """Seconds until all that is due, or will be soon, is done at the present pace.

        None where there is no such thing, or nothing has left yet.
        """
        census, rate = self.census, self.pace.per_s()
        waiting = census.due + census.soon - (self.pace.left - census.left)
        if waiting <= 0 or not rate:
            return None
        return max(waiting / rate, (census.last_soon - clock_us()) / 1e6)

    def status(self, *, paused: bool) -> dict[str, Any]:
        """Figures for `/stats`; nobody knows how long a pause lasts."""
        census, due, eta = self.census, self.due(), None if paused else self.eta_s()
        return {
            "due": due,
            "later": census.later,
            "held": census.held,
            "oldest_due_us": (census.oldest_due or None) if due else None,
            "next_due_us": census.next_due or None,
            "repos_per_s": round(self.pace.per_s(), 2) if self.pace.busy else 0.0,
            "eta_s": None if eta is None else round(eta, 1),
        }
