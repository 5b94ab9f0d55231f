"""The backfill as a whole: takes due repositories from the queue and runs a job for each.

Owns the workers, the refilling of the window of due repositories, the pauses (host left alone, disk
nearly full), the storing of what was seen of hosts, and the way in for explicit requests. The queue itself
is durable (`queue`), so stopping or dying at any moment loses nothing. One task plus one for each job, all
on the event loop.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import structlog

from indexer.atproto.types import Did, Micros
from indexer.backfill.budget import ByteBudget
from indexer.backfill.fetch import Spool
from indexer.backfill.holds import HoldUnit, Releases
from indexer.backfill.hops import relay_origin
from indexer.backfill.host_book import HostBook
from indexer.backfill.hosts import Hosts, Views, host_of
from indexer.backfill.job import Job, Tools
from indexer.backfill.progress import Progress
from indexer.backfill.queue import Entry, ReadPosition, ReadyQueue, explicit_due
from indexer.backfill.rows import PostponeUnit, RequestUnit, is_waiting
from indexer.backfill.sparse import Sparse
from indexer.backfill.stats import Stats
from indexer.config import Settings
from indexer.identity.http import HttpClient
from indexer.identity.resolver import Resolver
from indexer.ingest.bans import Bans
from indexer.ingest.controls import BACKFILL, paused_parts
from indexer.ingest.filters import Filters
from indexer.pool import Pool
from indexer.store.archives import Archives
from indexer.store.codecs import RepoRow, encode_due
from indexer.store.database import Database
from indexer.store.host_rows import ACCOUNTS
from indexer.store.keyspaces import HOSTS, PENDING, REPOS
from indexer.store.writer import Writer, clock_us

log = structlog.get_logger()

#: Rows of the queue read at once.
PAGE = 250
#: Fewer than this in memory that could begin, and more is read.
LOW_WATER = 250
#: Repositories whose accounts are counted by host in one unit.
COUNTED_AT_ONCE = 2000
#: Rows that become due without our being told are found after this long.
POLL_S = 0.5
OVERLAP_US: Micros = 60_000_000
REWIND_US: Micros = 60_000_000
#: Requests and postponements written in one unit.
STEP = 500
#: Hosts that are to be left alone for longer than this have their repositories put off in the queue.
POSTPONE_S = 5.0
#: Time between two looks for such hosts.
POSTPONE_EVERY_S = 0.25


class Backfill:
    """Fetches what is due. ``drain(did)`` replays a repository's waiting frames and may make it synced."""

    def __init__(
        self,
        db: Database,
        writer: Writer,
        pool: Pool,
        resolver: Resolver,
        http: HttpClient,
        settings: Settings,
        *,
        drain: Callable[[Did], Awaitable[object]],
        woken: Callable[[Did], None],
        jitter: Callable[[], float] = random.random,
        archives: Archives | None = None,
        bans: Bans | None = None,
        disk_pool: Pool | None = None,
    ) -> None:
        limits = settings.backfill
        self._db = db
        self._writer = writer
        self._settings = settings
        self._hosts = Hosts(
            settings, views=Views(partial(db.get, HOSTS), lambda host: db.count(ACCOUNTS + host))
        )
        self._releases = Releases(db, writer, self._hosts)
        #: What an operator says of hosts, and is told of them.
        self.hosts = HostBook(db, writer, self._hosts, bans or Bans(db), self._releases.add)
        self._stats = Stats(time.monotonic)
        self._progress = Progress(db)
        self._budget = ByteBudget(limits.inflight_mib << 20)
        self._parsed = ByteBudget(limits.parsed_mib << 20)
        self._http = http
        self._spool = Spool(settings.data_dir / "spool")
        #: What jobs work with.
        self.tools = Tools(
            db, writer, pool, disk_pool or pool, resolver, http, settings, self._hosts, self._budget,
            self._parsed, self._spool, self._stats, relay_origin(settings.upstreams), drain, woken,
            self._filters, jitter, archives, Sparse(http, self._hosts, limits),
        )  # fmt: skip
        self._resolver = resolver
        self._ready = ReadyQueue(limits.window)
        self._first = False  # something was asked for that belongs in front
        self._position = ReadPosition(overlap_us=OVERLAP_US, rewind_us=REWIND_US)
        self._jobs: dict[Did, asyncio.Task[str | None]] = {}
        self._asked_again: set[Did] = set()  # they wait for another job, once theirs has ended
        self._postpone_at = 0.0
        self._read_again_at = 0.0  # after the queue was read to its end
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._stopping = False
        self._paused = ""
        self._held = BACKFILL in paused_parts(db)
        self._filter_rows: list[tuple[str, str]] | None = None
        self._filtered = Filters()

    # ---- the way in

    async def add(self, dids: Sequence[Did], /, *, again: bool = False) -> list[Did]:
        """Follows ``dids`` and fetches them before everything else; gives those for which that changed
        something. Synced ones are left alone unless ``again``."""
        acted: list[Did] = []
        ephemeral, now = self._settings.ephemeral.enabled, clock_us()
        for start in range(0, len(dids), STEP):
            unit = RequestUnit(dids[start : start + STEP], frozenset(self._jobs), ephemeral, again, now)
            changed = await self._writer.run("backfill_request", unit)
            self._asked_again.update(did for did in changed if did in self._jobs)
            acted += changed
        self.wake()
        return acted

    def wake(self) -> None:
        """Something became due that may belong in front: the queue is read from there, now."""
        self._first = True
        self._position.rewind()
        self._read_again_at = 0.0
        self._wake.set()

    # ---- life

    async def run(self) -> None:
        """Works until `stop`; raises what is wrong with our own state."""
        self._spool.prepare()
        helpers = [asyncio.create_task(work()) for work in self._helpers()]
        for helper in helpers:
            helper.add_done_callback(self._helper_ended)
        try:
            while not self._stopping:
                self._wake.clear()
                if not self._settings.ephemeral.enabled:
                    await self._dispatch()
                if self._failure is not None:
                    raise self._failure
                await self._sleep()
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            await self._cancel_jobs()
        await self.hosts.save()

    def _helpers(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        return [self._look_after_hosts, self._releases.run, self._progress.run]

    async def _look_after_hosts(self) -> None:
        """Counts accounts by host, and deleted ones, where that was never done; then stores what is seen of
        hosts."""
        while not await self._writer.run("host_accounts", lambda tx: tx.count_homes(COUNTED_AT_ONCE)):
            await asyncio.sleep(0)
        while not await self._writer.run("deleted_accounts", lambda tx: tx.count_deleted(COUNTED_AT_ONCE)):
            await asyncio.sleep(0)
        while True:
            await asyncio.sleep(self._settings.hosts.save_interval)
            await self.hosts.save()

    def _helper_ended(self, helper: asyncio.Task[None]) -> None:
        if not helper.cancelled() and (error := helper.exception()) is not None:
            self._failure = error
            self._wake.set()

    async def stop(self) -> None:
        """Ends `run` and cuts off what is under way; it begins again with the next start."""
        self._stopping = True
        self._wake.set()
        await self._cancel_jobs()

    def pause(self, paused: bool, /) -> None:
        """Begins no more fetches, or goes on; storing the decision is the caller's."""
        self._held = paused
        self.wake()

    async def _sleep(self) -> None:
        try:
            async with asyncio.timeout(min(POLL_S, max(0.01, self._hosts.soonest_s(self._ready.hosts())))):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _cancel_jobs(self) -> None:
        jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    # ---- from the queue to the workers

    async def _dispatch(self) -> None:
        """Starts jobs while there are free workers and due repositories."""
        if not self._has_space() or self._held:
            self._progress.pace.rest()
            return
        if time.monotonic() >= self._postpone_at:
            await self._postpone()
            self._postpone_at = time.monotonic() + POSTPONE_EVERY_S
        if self._first:
            self._first = False
            self._read_first()
        if not self._ready.startable(self._hosts.free, LOW_WATER):
            await self._refill()
        while self._has_worker() and not self._stopping:
            entry = self._ready.pop(self._hosts.free)
            if entry is not None:
                self._start(entry)
            elif not await self._refill():
                return

    def _has_worker(self) -> bool:
        """Whether one more job may run. A job that waits for a silent host gives its place away; there are
        never more than twice as many as are set."""
        most, running = self._settings.backfill.concurrency, len(self._jobs)
        if running < most:
            return True
        since = asyncio.get_running_loop().time() - self._settings.backfill.stalled_after
        return running < most + min(most, self._budget.stalled(since))

    def _read_first(self) -> None:
        """What was asked for explicitly goes into the window at once, also into a full one."""
        stop = encode_due((explicit_due(clock_us()) + 1, ""))
        self._take_in([key for key, _ in self._db.scan(PENDING, None, stop, limit=PAGE)], always=True)

    async def _refill(self) -> bool:
        """Reads on in the queue until enough could begin, the window is full or the queue is read; true when
        it got more. What a host has beyond its part of the window is read again when that is used up."""
        for host in self._ready.crowded():
            if (place := self._ready.left_out(host)) is not None:
                self._position.back_to(place)
                self._read_again_at = 0.0
        if time.monotonic() < self._read_again_at:
            return False
        before, now = len(self._ready), clock_us()
        stop = encode_due((now + 1, ""))
        least = max(1, min(PAGE, self._ready.limit // 8))
        while (room := self._ready.room) >= least:
            page = min(PAGE, room)
            start = encode_due(self._position.start(now))
            keys = [key for key, _ in self._db.scan(PENDING, start, stop, limit=page)]
            await self._put_off(self._take_in(keys))
            if len(keys) < page:
                self._position.pass_end(now)
                self._read_again_at = time.monotonic() + POLL_S
                break
            self._position.page_end(keys[-1])
            enough = 1 if self._has_worker() else LOW_WATER
            if self._first or self._ready.startable(self._hosts.free, enough):
                break
            await asyncio.sleep(0)
        return len(self._ready) > before

    def _take_in(self, keys: list[tuple[Micros, Did]], *, always: bool = False) -> dict[str, list[Did]]:
        """Puts those of a page that are to be fetched into the window; gives those of hosts that rest."""
        resting: dict[str, list[Did]] = {}
        unknown = [key for key in keys if key[1] not in self._jobs and key[1] not in self._ready]
        rows = self._db.multi_get(REPOS, [did for _, did in unknown])
        for (due, did), row in zip(unknown, rows, strict=True):
            if row is not None and is_waiting(row):
                host = self._host_hint(did, row)
                if host and not always and self._hosts.penalty_s(host) > POSTPONE_S:
                    resting.setdefault(host, []).append(did)
                else:
                    self._ready.add(Entry(due, did, host), always=always)
        return resting

    async def _put_off(self, resting: dict[str, list[Did]]) -> None:
        """What was read of hosts that rest is due when they may be asked again, and its rows say so."""
        hosts = self._hosts
        for host, dids in resting.items():
            cached = {did: self._resolver.cached(did) for did in dids}
            known = {did: identity for did, identity in cached.items() if identity is not None}
            if reason := hosts.held(host):
                unit: HoldUnit | PostponeUnit = HoldUnit(dids, host, reason, self._recheck(), known)
            else:
                due = clock_us() + int(hosts.penalty_s(host) * 1e6)
                unit = PostponeUnit(dids, due, hosts.rest_note(host), known)
            await self._writer.run("backfill_put_off", unit)

    def _recheck(self) -> Micros:
        return clock_us() + int(self._settings.hosts.recheck * 1e6)

    def _host_hint(self, did: Did, row: RepoRow) -> str:
        """The host that a job will ask first, as far as that is known without asking anybody."""
        relay = host_of(self.tools.relay) if self._settings.backfill.source == "relay" else ""
        if relay and not self._hosts.held(relay):
            return relay
        identity = self._resolver.cached(did)
        return host_of(identity.pds if identity is not None else row.pds)

    async def _postpone(self) -> None:
        """Puts off the repositories of hosts that are left alone, so that they do not fill the window. Those
        of a banned relay may be had from their own hosts."""
        for host in self._ready.hosts():
            held = bool(host) and self._hosts.held(host)
            if held and host == host_of(self.tools.relay):
                for entry in self._ready.pop_host(host, len(self._ready)):
                    self._ready.add(entry._replace(host=""), always=True)
            elif held or (host and self._hosts.penalty_s(host) > POSTPONE_S):
                while entries := self._ready.pop_host(host, STEP):
                    await self._put_off({host: [entry.did for entry in entries]})

    def _start(self, entry: Entry) -> None:
        """One job a repository at a time: what it writes rests on being the only one."""
        task = asyncio.create_task(self._work(entry.did), name=f"backfill {entry.did}")
        self._progress.pace.begin()
        self._jobs[entry.did] = task
        task.add_done_callback(partial(self._ended, entry))

    def _ended(self, entry: Entry, task: asyncio.Task[str | None]) -> None:
        did, busy = entry.did, None if task.cancelled() else task.result()
        del self._jobs[did]
        if busy is not None:  # not before: the window holds none that is worked on
            self._ready.add(entry._replace(host=busy), always=True)
        if did in self._asked_again:  # the queue was read past it meanwhile
            self._asked_again.discard(did)
            self.wake()
        self._wake.set()

    async def _work(self, did: Did) -> str | None:
        """The host that is busy, when the repository is to be started again; None when the job is done."""
        left, busy = False, None
        try:
            busy = await Job(self.tools, did).run()
            left = busy is None and self._progress.has_left(did)
        except Exception as error:  # our own state: `run` raises it and the daemon goes down
            self._failure = error
        finally:
            self._progress.pace.end(left=left)
        return busy

    def _has_space(self) -> bool:
        """Whether the disk has room above the soft floor."""
        free = shutil.disk_usage(self._db.path).free
        low = free < self._settings.disk.soft_floor_mib << 20
        if low and not self._paused:
            log.warning("backfill_paused", free_mib=free >> 20, floor_mib=self._settings.disk.soft_floor_mib)
        self._paused = "disk" if low else ""
        return not low

    def _filters(self) -> Filters:
        """What is kept now; made anew where the stored filters have changed."""
        rows = self._db.filters()
        if rows != self._filter_rows:
            self._filter_rows = rows
            self._filtered = Filters.of(self._settings.filter).with_rows(rows)
        return self._filtered

    # ---- what is told

    def status(self) -> dict[str, Any]:
        """Figures for `/stats`; the length of the queue is the store's to tell."""
        stats, paused = self._stats, "operator" if self._held else self._paused
        return {
            "ready": len(self._ready),
            "in_flight": len(self._jobs),
            "in_flight_bytes": self._budget.used,
            "parsed_bytes": self._parsed.used,
            **self._progress.status(paused=bool(paused)),
            "done": stats.done,
            "failed": dict(stats.failed),
            "parts": stats.parts,
            "whole": dict(stats.whole),
            "records": stats.records,
            "changes": stats.changes,
            "records_per_s": round(stats.records_per_s(), 1),
            "bytes": stats.bytes,
            "hosts": self._hosts.status(),
            "proxies": self._http.proxies.status() if self._http.proxies else [],
            "paused": paused,
        }
