"""The crawler as one part: whose turn it is, how many at once, and when all of it stands still.

Owns the order of turns (a heap of when each source or host is due), the pauses (operator, full queue) and the
figures. Pages are `sweeper`'s, questions about accounts `checks`'s, sources `targets`'s. Event loop only.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, Final

import structlog

from indexer.backfill.hosts import Hosts
from indexer.config import Settings
from indexer.crawl.checks import Checks, tallies
from indexer.crawl.sweep import looked_for
from indexer.crawl.sweeper import IDLE_S, Sweeper
from indexer.crawl.targets import Added, Target, Targets
from indexer.crawl.tools import TALLY, WAITING, CrawlTools
from indexer.identity.http import HttpClient
from indexer.identity.resolver import Resolver
from indexer.ingest import Ingest
from indexer.ingest.controls import CRAWLER, paused_parts
from indexer.store.codecs import encode_due
from indexer.store.database import Database
from indexer.store.keyspaces import PENDING
from indexer.store.writer import Writer

log = structlog.get_logger()

#: Time between two looks at a full queue, and at one with room, which others than the crawler fill too; and
#: until a host that is busy is looked at again; in seconds.
_FULL_S: Final = 1.0
_ROOM_S: Final = 10.0
_BUSY_S: Final = 0.25
_LONGEST_S: Final = 60.0


class Crawler:
    """``run`` sweeps the sources; the other methods change them."""

    def __init__(
        self,
        db: Database,
        writer: Writer,
        http: HttpClient,
        resolver: Resolver,
        hosts: Hosts,
        ingest: Ingest,
        settings: Settings,
        **clocks: Callable[[], Any],
    ) -> None:
        self._tools = CrawlTools(db, writer, http, resolver, hosts, ingest.applier, settings, **clocks)
        self._ingest = ingest
        self.targets = Targets(self._tools)
        self._checks = Checks(self._tools)
        self._sweeper = Sweeper(self._tools, self.targets)
        self._heap: list[tuple[float, int, int, Target]] = []
        self._numbers = count()
        self._running = 0
        self._woken = asyncio.Event()
        self._held = CRAWLER in paused_parts(db)
        self._full = False
        self._room = 0  # accounts that may be found until the queue is looked at again
        self._looked_at = float("-inf")
        self._asked = ""
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    # ---- life

    async def run(self) -> None:
        """Until `stop`; raises what is wrong with our own state."""
        if self._stopping:
            return
        self._task = asyncio.current_task()
        try:
            if self.targets.gone:
                await self.targets.forget_gone()
                self._ingest.sources.wake_unheard()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._checks.run(), name="crawl-checks")
                await self._sweep(tasks)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from group

    async def stop(self) -> None:
        """Ends `run`; what was read of a page that is not stored is read again after a restart."""
        self._stopping = True
        task = self._task
        if task is not None and not task.done() and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait([task])

    def pause(self, paused: bool, /) -> None:
        """Asks for nothing more, or goes on; storing the decision is the caller's."""
        self._held = self._checks.paused = paused
        self._checks.wake()
        self._woken.set()

    def look_again(self) -> None:
        """Other things may be looked for now."""
        self._woken.set()

    # ---- turns

    async def _sweep(self, tasks: asyncio.TaskGroup) -> None:
        self._checks.paused = self._held
        while True:
            self._woken.clear()
            self._plan_all()
            wait = IDLE_S
            if not self._held:
                wait = await self._start_due(tasks)
            try:
                async with asyncio.timeout(wait):
                    await self._woken.wait()
            except TimeoutError:
                pass

    def _plan_all(self) -> None:
        """Every target gets its turn: at the start, and when something else is looked for."""
        asked = looked_for(self._tools.filters)
        if asked != self._asked:
            self._asked = asked
            planned: Iterable[Target] = self.targets
        else:
            planned = self.targets.fresh
        for target in planned:
            self._plan(target, 0.0)
        self.targets.fresh = []

    def _plan(self, target: Target, wait: float) -> None:
        """Its next turn comes in ``wait`` seconds, or when its next sweep is due."""
        sweep, now = target.sweep, asyncio.get_running_loop().time()
        if not sweep.started_us and sweep.next_us and sweep.asked == self._asked:
            wait = max(wait, (sweep.next_us - self._tools.clock()) / 1e6)
        target.serial += 1
        target.not_before = now + wait
        heapq.heappush(self._heap, (target.not_before, next(self._numbers), target.serial, target))

    async def _start_due(self, tasks: asyncio.TaskGroup) -> float:
        """Starts the turns that are due; seconds until the next one is."""
        while self._heap and self._running < self._tools.limits.concurrency:
            if not await self._has_room():
                return _FULL_S
            now = asyncio.get_running_loop().time()
            at, _, serial, target = self._heap[0]
            if serial != target.serial or not self.targets.is_current(target) or not target.enabled:
                heapq.heappop(self._heap)
            elif at > now:
                return min(at - now, IDLE_S)
            else:
                heapq.heappop(self._heap)
                self._start(tasks, target)
        return IDLE_S

    def _start(self, tasks: asyncio.TaskGroup, target: Target) -> None:
        hosts = self._tools.hosts
        if hosts.held(target.host):
            target.note = f"the host is held back: {hosts.held(target.host)}"
            self._plan(target, _LONGEST_S)
        elif target.running or not hosts.free(target.host):
            rest_s = hosts.penalty_s(target.host)
            if rest_s and not target.running:
                target.note = self._sweeper.idle_note(target) or hosts.rest_note(target.host)
            self._plan(target, min(max(rest_s, _BUSY_S), _LONGEST_S))
        else:
            self._running += 1
            target.note = ""
            target.task = tasks.create_task(self._turn(target), name=f"crawl {target.name}")

    async def _turn(self, target: Target) -> None:
        wait = _BUSY_S
        before = self._sweeper.found
        try:
            wait = await self._sweeper.turn(target)
        finally:
            self._running -= 1
            target.task = None
            self._room -= self._sweeper.found - before
            if self.targets.is_current(target):
                self._plan(target, wait)
            self._checks.wake()
            self._woken.set()

    # ---- a full queue

    async def _has_room(self) -> bool:
        """Whether more accounts may be found. A full queue has to fall to half before that is so again."""
        now = asyncio.get_running_loop().time()
        if self._room > 0 and not self._full and now - self._looked_at < _ROOM_S:
            return True
        if now - self._looked_at < _FULL_S:
            return False
        most = self._tools.limits.max_queued
        queued = await asyncio.to_thread(self._queued, most)
        self._looked_at = now
        was, self._full = self._full, queued >= (max(1, most // 2) if self._full else most)
        if was != self._full:
            log.info("crawler_paused" if self._full else "crawler_resumed", queued=queued, bound=most)
        self._room = most - queued
        return not self._full

    def _queued(self, most: int) -> int:
        """Repositories that are due and accounts that are to be asked about, up to ``most``.

        What was put off does not count: a host that rests must not keep others from being crawled.
        """
        db = self._tools.db
        queued = db.count(f"crawl/{WAITING}") + self._ingest.due
        for _ in db.raw_scan(PENDING.name, None, encode_due((self._tools.clock() + 1, ""))):
            queued += 1
            if queued >= most:
                break
        return queued

    # ---- changes

    async def add(self, url: str, mode: str | None = None) -> Added:
        """Crawls a source from now on; see `Targets.add`."""
        added = await self.targets.add(url, mode)
        self._now(added.target)
        return added

    async def remove(self, url: str, mode: str | None = None) -> Target:
        """Crawls a source no longer; see `Targets.remove`."""
        removed = await self.targets.remove(url, mode)
        self._ingest.sources.wake_unheard()
        return removed

    async def reset(self, url: str, mode: str | None = None) -> Target:
        """Begins the source's sweep anew, now."""
        target = await self.targets.reset(url, mode)
        for item in (target, *(host for host in self.targets.hosts.values() if host.seed == target.name)):
            self._now(item)
        return target

    def _now(self, target: Target) -> None:
        if self.targets.is_current(target) and not target.running:
            self._plan(target, 0.0)
        self._woken.set()

    # ---- what is told

    def sources(self) -> list[dict[str, Any]]:
        """One entry for each source."""
        return [self.targets.describe(target) for target in self.targets.sources.values()]

    def status(self) -> dict[str, Any]:
        """Figures for `/stats` and `/metrics`."""
        targets = list(self.targets)
        return {
            "sources": len(self.targets.sources),
            "hosts": len(self.targets.hosts),
            "sweeping": sum(target.sweep.started_us > 0 for target in targets),
            "failing": sum(target.failures > 0 for target in targets),
            "running": self._running,
            "paused": "operator" if self._held else "queue" if self._full else "",
            **self._checks.status(),
            "totals": tallies(self._tools.db.counts(TALLY)),
        }
