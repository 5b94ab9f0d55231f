"""What the backfill did since its start, for `/stats`. Plain numbers; event loop only."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

#: Seconds over which the record rate is measured.
RATE_WINDOW_S = 10


class Stats:
    """Counters of one process; what must survive a restart is counted in the store."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = clock()
        self._seconds: deque[tuple[int, int]] = deque()
        self.done = 0
        self.records = 0  # of verified repositories
        self.changes = 0  # of them, what was written
        self.bytes = 0  # fetched
        self.failed: Counter[str] = Counter()
        self.parts = 0  # fetched in place of whole repositories
        self.whole: Counter[str] = Counter()  # why a whole one was fetched where a part was enough

    def fetched(self, size: int) -> None:
        self.bytes += size

    def applied(self, records: int, changes: int) -> None:
        """A repository is complete."""
        self.done += 1
        self.records += records
        self.changes += changes
        second = int(self._clock())
        if self._seconds and self._seconds[-1][0] == second:
            records += self._seconds.pop()[1]
        self._seconds.append((second, records))
        self._trim()

    def records_per_s(self) -> float:
        """Mean over the last seconds."""
        self._trim()
        span = min(float(RATE_WINDOW_S), max(1.0, self._clock() - self._started))
        return sum(records for _, records in self._seconds) / span

    def _trim(self) -> None:
        oldest = int(self._clock()) - RATE_WINDOW_S
        while self._seconds and self._seconds[0][0] <= oldest:
            self._seconds.popleft()
