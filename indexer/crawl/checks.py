"""Accounts of which a list does not tell whether they hold a collection that is looked for.

Owns the questions to their PDSes (describeRepo) and what the answers do: an account with a signal is queued,
one without is remembered for a while. What waits stands in the store, so that a kill loses no account;
a window of it is in memory, by host; the book of hosts says how fast one may be asked. Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog

from indexer.atproto.types import Did, Micros
from indexer.backfill.hosts import host_of
from indexer.backfill.queue import Entry, ReadyQueue
from indexer.backfill.rows import RequestUnit
from indexer.crawl.pages import describe_url, read_collections
from indexer.crawl.sweep import looked_for
from indexer.crawl.sweeper import nothing_to_find
from indexer.crawl.tools import TALLY, WAITING, WITHOUT, CrawlTools, expect_able, tally
from indexer.errors import (
    FetchError,
    FetchRefused,
    IdentityError,
    IdentityGone,
    IndexerError,
    StoreError,
)
from indexer.store.codecs import did_range, encode_pair
from indexer.store.keyspaces import CRAWL
from indexer.store.transaction import Transaction

log = structlog.get_logger()

_WINDOW: Final = 500
_LOW_WATER: Final = 100
#: Time between two looks for accounts that became due, in seconds.
_POLL_S: Final = 1.0
_MAX_BODY: Final = 256 << 10
#: Rows without a signal that are looked at, in one step, whether they are believed any longer.
_SWEEP_STEP: Final = 500
#: Hosts that are to be left alone for longer than this have their accounts put off.
_POSTPONE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class SettleUnit:
    """An account waits no longer. ``found``: it is queued; else it is remembered until ``believed_us``, for
    what was looked for, unless that is 0."""

    did: Did
    outcome: str
    found: bool
    ephemeral: bool
    believed_us: Micros
    asked: str
    most: int

    def __call__(self, tx: Transaction) -> bool:
        if tx.crawl_row(WAITING, self.did) is None:
            return False
        tx.set_crawl_row(WAITING, self.did, None)
        tally(tx, self.outcome)
        if self.found:
            new = [] if tx.repo(self.did) is not None else [self.did]
            queued = RequestUnit(new, frozenset(), self.ephemeral, again=False, asked=None)(tx)
            tally(tx, "found", len(queued))
            return bool(queued)
        if self.believed_us and tx.count(f"crawl/{WITHOUT}") < self.most:
            tx.set_crawl_row(WITHOUT, self.did, [self.believed_us, self.asked])
        return False


class Checks:
    """``run`` asks about what waits."""

    def __init__(self, tools: CrawlTools) -> None:
        self._tools = tools
        self._ready = ReadyQueue(_WINDOW)
        self._busy: dict[Did, asyncio.Task[None]] = {}
        self._after = ""  # the last account that was read into the window
        self._read_again_at = 0.0
        self._woken = asyncio.Event()
        self.paused = False

    def wake(self) -> None:
        """Something waits, or may go on."""
        self._read_again_at = 0.0
        self._woken.set()

    def status(self) -> dict[str, int]:
        """Figures for `/stats`."""
        db = self._tools.db
        return {
            "waiting": db.count(f"crawl/{WAITING}"),
            "asking": len(self._busy),
            "remembered": db.count(f"crawl/{WITHOUT}"),
        }

    async def run(self) -> None:
        """Until cancelled; a failure of our own store ends it."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._forget_old(), name="crawl-forget")
            while True:
                self._woken.clear()
                if not self.paused:
                    await self._postpone()
                    self._start(tasks)
                try:
                    async with asyncio.timeout(_POLL_S):
                        await self._woken.wait()
                except TimeoutError:
                    pass

    async def _postpone(self) -> None:
        """Puts off the accounts of hosts that are left alone, so that they do not fill the window."""
        hosts = self._tools.hosts
        for host in filter(None, self._ready.hosts()):
            wait = self._tools.settings.hosts.recheck if hosts.held(host) else hosts.penalty_s(host)
            if wait > _POSTPONE_S and (entries := self._ready.pop_host(host, _WINDOW)):
                await self._later([entry.did for entry in entries], wait)

    def _start(self, tasks: asyncio.TaskGroup) -> None:
        """Asks about as many as may be asked about."""
        if len(self._ready) < _LOW_WATER:
            self._refill()
        while len(self._busy) < self._tools.limits.checks:
            entry = self._ready.pop(self._tools.hosts.free)
            if entry is None:
                return
            task = tasks.create_task(self._work(entry), name=f"crawl-check {entry.did}")
            self._busy[entry.did] = task
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._busy = {did: busy for did, busy in self._busy.items() if busy is not task}
        self._woken.set()

    def _refill(self) -> None:
        """Reads on among what waits, from the front again once the end is reached."""
        loop_time = time.monotonic()
        if loop_time < self._read_again_at:
            return
        first, stop = did_range(WAITING)
        start = encode_pair((WAITING, self._after)) + b"\0" if self._after else first
        rows = list(self._tools.db.scan(CRAWL, start, stop, limit=_WINDOW))
        now = self._tools.clock()
        for (_, did), (due, _failures) in rows:
            if due <= now and did not in self._busy and did not in self._ready:
                self._ready.add(Entry(due, did, self._host_hint(did)))
        if len(rows) < _WINDOW:
            self._after = ""
            self._read_again_at = loop_time + _POLL_S
        else:
            self._after = rows[-1][0][1]

    def _host_hint(self, did: Did) -> str:
        identity = self._tools.resolver.cached(did)
        return "" if identity is None else host_of(identity.pds)

    # ---- one account

    async def _work(self, entry: Entry) -> None:
        did, tools = entry.did, self._tools
        filters = tools.filters
        if nothing_to_find(filters):
            await self._settle(did, "gone")
            return
        try:
            if tools.db.repo(did) is not None or filters.is_excluded(did):
                await self._settle(did, "gone")
            elif filters.mode == "full":
                await self._settle(did, "with_signal", found=True)
            else:
                await self._ask(entry)
        except IdentityGone:
            await self._settle(did, "gone", believed=True)
        except FetchRefused as error:  # the account's own host's word: it has nothing for us
            final = error.status in (400, 404, 410)
            await (self._settle(did, "without_signal", believed=True) if final else self._again(did, error))
        except StoreError:
            raise
        except (FetchError, IdentityError, ValueError) as error:
            await self._again(did, error)
        except Exception as error:  # a fault of ours; it stands in the store and would end each start
            log.error("crawl_check_failed", did=did, exc_info=error)
            await self._again(did, error)

    async def _ask(self, entry: Entry) -> None:
        tools, did = self._tools, entry.did
        pds = (await tools.resolver.resolve(did)).pds
        host = host_of(pds)
        if tools.hosts.held(host):
            await self._later([did], tools.settings.hosts.recheck)
        elif not tools.hosts.free(host):
            self._ready.add(entry._replace(host=host))
        else:
            asked = looked_for(tools.filters)
            collections = read_collections(await self._described(pds, host, did), did)
            found = any(map(tools.filters.signals_match, collections))
            await self._settle(
                did, "with_signal" if found else "without_signal", found=found, believed=True, asked=asked
            )

    async def _described(self, pds: str, host: str, did: Did) -> bytes:
        response = await self._tools.ask(
            host, describe_url(pds, did), max_bytes=_MAX_BODY, expect=expect_able
        )
        status = response.status
        if status != 200:
            name, _ = response.xrpc_error()
            raise FetchRefused(f"describeRepo answered {status} {name}", status=status, name=name)
        return response.body

    async def _settle(
        self, did: Did, outcome: str, *, found: bool = False, believed: bool = False, asked: str = ""
    ) -> None:
        tools = self._tools
        until = tools.clock() + int(tools.limits.check_ttl * 1e6) if believed and not found else 0
        asked = asked or looked_for(tools.filters)
        unit = SettleUnit(
            did, outcome, found, tools.db.mode.ephemeral, until, asked, tools.limits.max_checked
        )
        await tools.writer.run("crawl_settle", unit)

    async def _again(self, did: Did, error: Exception) -> None:
        """Asked later; after many failures not at all, until a list has it again."""
        row = self._tools.db.get(CRAWL, (WAITING, did))
        failures = (row[1] if row else 0) + 1
        if isinstance(error, IdentityError):  # a directory's trouble says nothing about the account
            failures = min(failures, self._tools.limits.check_tries - 1)
        elif failures >= self._tools.limits.check_tries:
            await self._settle(did, "unanswered")
            return
        wait = self._tools.wait_s(max(failures, 1), getattr(error, "retry_after", None))
        if not isinstance(error, IndexerError):
            log.info("crawl_check_postponed", did=did, reason=str(error)[:200])
        await self._later([did], wait, failures)

    async def _later(self, dids: Sequence[Did], wait: float, failures: int | None = None) -> None:
        """They are asked about in ``wait`` seconds; ``failures`` where that changed."""
        due = self._tools.clock() + int(wait * 1e6)

        def step(tx: Transaction) -> None:
            for did in dids:
                row = tx.crawl_row(WAITING, did)
                if row is not None:
                    tx.set_crawl_row(WAITING, did, [due, row[1] if failures is None else failures])

        await self._tools.writer.run("crawl_later", step)

    # ---- what was found without a signal

    async def _forget_old(self) -> None:
        """Drops rows that are believed no longer, in small steps."""
        pause = max(60.0, self._tools.limits.check_ttl / 10)
        while True:
            after = ""
            while (after := await self._forget_step(after)) != "":
                await asyncio.sleep(0.05)
            await asyncio.sleep(pause)

    async def _forget_step(self, after: Did) -> Did:
        first, stop = did_range(WITHOUT)
        start = encode_pair((WITHOUT, after)) + b"\0" if after else first
        rows: list[Any] = list(self._tools.db.scan(CRAWL, start, stop, limit=_SWEEP_STEP))
        now, asked = self._tools.clock(), looked_for(self._tools.filters)
        old = [key[1] for key, row in rows if row[0] <= now or row[1] != asked]

        def drop(tx: Transaction) -> None:
            for did in old:
                tx.set_crawl_row(WITHOUT, did, None)

        if old:
            await self._tools.writer.run("crawl_forget", drop)
        return rows[-1][0][1] if len(rows) == _SWEEP_STEP else ""


def tallies(counts: dict[str, int]) -> dict[str, int]:
    """The crawler's tallies by their short names."""
    return {name.removeprefix(TALLY): count for name, count in counts.items()}
