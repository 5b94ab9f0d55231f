"""A queue of repositories with due work: bounded, paced, and refilled from the rows.

Owns which repository is worked on when: the waits, the repetition after a failure, and the bound on what
is in memory. The work itself is a flag in a repository's row, so nothing is lost by a kill or by the bound:
at the bound those with the longest waits leave, and rounds through the rows give everybody a turn. Leaves
out what the work is. Event loop only.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Final, NamedTuple, Self

import structlog

from indexer.atproto.types import Did
from indexer.config import IngestSettings
from indexer.errors import IndexerError, StoreError
from indexer.ingest.turns import Postponed
from indexer.store.codecs import Work
from indexer.store.database import Database

log = structlog.get_logger()

_SCAN_ROWS: Final = 500
#: Rows looked at before the work found is begun, and seconds between two looks while the queue is full.
_PASS_ROWS: Final = 20_000
_PASS_S: Final = 10.0
_IDLE_S: Final = 60.0


class Waits(NamedTuple):
    """Between tries, in seconds: the first, and the longest; a host may ask for up to ``asked``."""

    first: float
    longest: float
    asked: float

    @classmethod
    def of(cls, settings: IngestSettings) -> Self:
        return cls(settings.work_retry_min, settings.work_retry_max, settings.retry_after_max)

    def after(self, error: Exception, attempt: int) -> float:
        """The wait after the failure number ``attempt`` in a row, from 0."""
        wait: float = min(self.longest, self.first * 2.0 ** min(attempt, 16))
        return max(wait, min(self.asked, getattr(error, "retry_after", None) or 0.0))


class _Due(NamedTuple):
    at: float  # loop time
    number: int
    did: Did
    attempt: int


class DueQueue:
    """Calls ``work_off`` for repositories whose row has one of ``flags``, ``concurrency`` at a time.

    ``work_off`` gives the seconds until it can go on, None when it is done; what it raises has it called
    again, after ever longer waits. ``without_row`` gives up to so many DIDs behind one that have work though
    they have no row.
    """

    def __init__(
        self,
        db: Database,
        flags: Work,
        work_off: Callable[[Did], Awaitable[float | None]],
        *,
        limit: int,
        concurrency: int,
        waits: Waits,
        without_row: Callable[[Did, int], list[Did]] = lambda _after, _limit: [],
    ) -> None:
        self._waits = waits
        self._without_row = without_row
        self._db = db
        self._flags = flags
        self._work_off = work_off
        self._limit = limit
        self._waiting: dict[Did, _Due] = {}
        self._working: set[Did] = set()
        self._again: set[Did] = set()  # woken while worked on
        self._soonest: list[_Due] = []  # heaps; entries that `_waiting` does not hold are void
        self._longest: list[tuple[float, int, _Due]] = []
        self._numbers = count()
        self._woken = asyncio.Event()
        self._permits = asyncio.Semaphore(concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        # Rounds through the rows: whether one is due, how far it is, whether work was left out meanwhile.
        self._unread = True
        self._after: Did = ""
        self._rows_done = False  # of the round: what has no row comes last
        self._left_out = False
        self._next_pass = 0.0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._working)

    def add(self, did: Did, *, fresh: bool = True) -> bool:
        """The repository's row has due work, committed by now; false when there is no room.

        ``fresh``: it was not in the row before, so that a wait that no failure caused is cut short.
        """
        if did in self._working:
            if fresh:
                self._again.add(did)
            return True
        waiting = self._waiting.get(did)
        if waiting is not None:
            if fresh and not waiting.attempt and waiting.at > asyncio.get_running_loop().time():
                self._put(did, 0.0, 0)
            return True
        if len(self) >= self._limit and not self._evict():
            self._left_out = self._unread = True
            return False
        self._put(did, 0.0, 0)
        return True

    def _evict(self) -> bool:
        """Makes room: who has the longest wait leaves, its row remembers. False when nobody waits."""
        now = asyncio.get_running_loop().time()
        while self._longest:
            due = self._longest[0][2]
            if self._waiting.get(due.did) is due:
                if due.at <= now:
                    return False
                del self._waiting[due.did]
                self._left_out = self._unread = True
                heapq.heappop(self._longest)
                return True
            heapq.heappop(self._longest)
        return False

    async def run(self) -> None:
        """Works until cancelled; begins with what the rows hold from before."""
        try:
            while True:
                if self._pass_in() <= 0:
                    await self._scan()
                await self._dispatch()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _pass_in(self) -> float:
        """Seconds until the rows are to be looked at."""
        if not self._unread:
            return _IDLE_S
        if len(self) * 2 <= self._limit:
            return 0.0
        return self._next_pass - asyncio.get_running_loop().time()

    async def _scan(self) -> None:
        """Goes on with the round through the rows, until the queue takes no more."""
        seen = 0
        while seen < _PASS_ROWS:
            page = self._page()
            for did, has_work in page:
                if has_work and not self.add(did, fresh=False):
                    self._next_pass = asyncio.get_running_loop().time() + _PASS_S
                    return
                self._after = did
            if not page:
                self._after, self._rows_done = "", not self._rows_done
                if not self._rows_done:
                    self._unread, self._left_out = self._left_out, False
                    break
            seen += len(page)
            await asyncio.sleep(0)
        self._next_pass = asyncio.get_running_loop().time() + _PASS_S

    def _page(self) -> list[tuple[Did, bool]]:
        """The next of the round, and whether they have work."""
        if self._rows_done:
            return [(did, True) for did in self._without_row(self._after, _SCAN_ROWS)]
        rows = self._db.repos(after=self._after, limit=_SCAN_ROWS)
        return [(did, bool(row.work & self._flags) and row.tracked) for did, row in rows]

    async def _dispatch(self) -> None:
        """Starts what is due; waits until something becomes due or is added."""
        self._woken.clear()
        loop = asyncio.get_running_loop()
        while self._soonest and self._soonest[0].at <= loop.time():
            await self._permits.acquire()
            due = heapq.heappop(self._soonest)
            if self._waiting.get(due.did) is not due:
                self._permits.release()
                continue
            del self._waiting[due.did]
            self._working.add(due.did)
            task = asyncio.create_task(self._work(due))
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        wait = min(self._soonest[0].at - loop.time() if self._soonest else _IDLE_S, self._pass_in())
        try:
            async with asyncio.timeout(max(0.0, wait)):
                await self._woken.wait()
        except TimeoutError:
            pass

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._permits.release()

    def _put(self, did: Did, wait: float, attempt: int) -> None:
        at = asyncio.get_running_loop().time() + wait
        due = _Due(at, next(self._numbers), did, attempt)
        self._waiting[did] = due
        if len(self._longest) > 2 * len(self._waiting) + _SCAN_ROWS:  # mostly void
            self._soonest = sorted(self._waiting.values())
            self._longest = sorted((-item.at, item.number, item) for item in self._waiting.values())
        else:
            heapq.heappush(self._soonest, due)
            heapq.heappush(self._longest, (-at, due.number, due))
        self._woken.set()

    async def _work(self, due: _Due) -> None:
        did, attempt = due.did, 0
        self._again.discard(did)
        try:
            wait = await self._work_off(did)
        except Postponed as postponed:
            wait, attempt = postponed.wait_s, due.attempt
        except Exception as error:
            wait, attempt = self._waits.after(error, due.attempt), due.attempt + 1
            if isinstance(error, IndexerError) and not isinstance(error, StoreError):
                log.info("due_work_postponed", did=did, reason=str(error)[:500], retry_in_s=wait)
            else:
                log.error("due_work_failed", did=did, error=str(error)[:500], retry_in_s=wait, exc_info=error)
        finally:
            self._working.discard(did)
        if did in self._again and not attempt:
            wait = 0.0
        self._again.discard(did)
        if wait is not None:
            self._put(did, wait, attempt)


class _Asked(NamedTuple):
    at: float  # loop time
    failures: int  # in a row


class Pace:
    """When a question about an account was last asked, and how often it failed; the newest ``limit``."""

    def __init__(self, interval_s: float, limit: int) -> None:
        self._interval_s = interval_s
        self._limit = limit
        self._asked: OrderedDict[tuple[Did, Work], _Asked] = OrderedDict()

    def wait_s(self, did: Did, question: Work) -> float:
        """Seconds until the question may be asked again."""
        before = self._asked.get((did, question))
        if before is None:
            return 0.0
        return max(0.0, before.at + self._interval_s - asyncio.get_running_loop().time())

    def ask(self, did: Did, question: Work) -> int:
        """The question is asked now; how often in a row it failed before."""
        key = (did, question)
        failures = self._asked[key].failures if key in self._asked else 0
        self._asked[key] = _Asked(asyncio.get_running_loop().time(), failures + 1)
        self._asked.move_to_end(key)
        while len(self._asked) > self._limit:
            self._asked.popitem(last=False)
        return failures

    def answered(self, did: Did, question: Work) -> None:
        """The question that was asked has its answer."""
        key = (did, question)
        if key in self._asked:
            self._asked[key] = self._asked[key]._replace(failures=0)
