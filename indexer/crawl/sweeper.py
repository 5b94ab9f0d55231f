"""One page of one source or host: asked for, read, carried out.

Owns the meaning of answers and what failures do: a host in trouble is asked again later where the sweep
stopped, a list that is none ends the sweep. Leaves out whose turn it is. Event loop only.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Sequence
from typing import Final

import structlog

from indexer.atproto.types import Nsid
from indexer.crawl.found import FoundUnit, Lister, MoveUnit, pieces
from indexer.crawl.pages import (
    BY_COLLECTION,
    HOSTS,
    HostPage,
    RepoPage,
    page_url,
    read_hosts,
    read_repos,
)
from indexer.crawl.sweep import (
    DONE,
    ENDLESS,
    MALFORMED,
    REFUSED,
    UNSUPPORTED,
    EndlessList,
    Sweep,
    begun,
    ended,
    looked_for,
    moved,
    next_collection,
)
from indexer.crawl.targets import Target, Targets, host_url
from indexer.crawl.tools import HOST, LISTED, WITHOUT, CrawlTools, expect_able, tally
from indexer.errors import FetchError, FetchRefused, StoreError, UrlRefused
from indexer.identity.http import Response
from indexer.ingest.filters import Filters
from indexer.store.codecs import after_prefix
from indexer.store.database import Database
from indexer.store.keyspaces import COUNTS, CRAWL, REPOS
from indexer.store.transaction import Transaction

log = structlog.get_logger()

#: Accounts handled in one step on the writer, between which others have their turn.
STEP: Final = 250
#: Answers that will not change: the host has no such list.
_NO_LIST: Final = frozenset((404, 405, 501))
#: Collections that are looked at to find those of a ``ns.*``: strangers make up collections.
_SCANNED: Final = 100_000
#: Time until a source for which there is nothing to look for is looked at again, in seconds.
IDLE_S: Final = 5.0


def nothing_to_find(filters: Filters) -> str:
    """Why no list can tell anything; "" when one can."""
    if filters.mode == "filter" and not filters.signals:
        return "filter.mode is filter and filter.signals is empty: nothing is looked for"
    return ""


def collections_of(db: Database, filters: Filters, most: int) -> list[Nsid]:
    """The collections that accounts are looked for by, in order: ``ns.*`` stands for those that were seen."""
    patterns = filters.signals if filters.mode == "filter" else filters.collections or ("*",)
    exact = {pattern for pattern in patterns if not pattern.endswith("*")}
    seen: dict[Nsid, int] = {}
    for pattern in patterns:
        if pattern.endswith("*"):
            start = f"records/{pattern[:-1]}".encode()
            for name, count in db.scan(COUNTS, start, after_prefix(start), limit=_SCANNED):
                seen[name.removeprefix("records/")] = count
    room = max(0, most - len(exact))
    largest = heapq.nlargest(room, (name for name in seen if name not in exact), key=seen.__getitem__)
    return sorted(exact)[:most] if not room else sorted(exact.union(largest))


class Sweeper:
    """``turn(target)`` reads one page; gives the seconds after which the next may be read."""

    def __init__(self, tools: CrawlTools, targets: Targets) -> None:
        self._tools = tools
        self._targets = targets
        self.found = 0  # accounts that are new, since the start

    async def turn(self, target: Target) -> float:
        """One page. Raises for our own store alone."""
        try:
            if not await self._begun(target):
                return IDLE_S
            return await self._page(target)
        except UrlRefused as error:
            return await self._end(target, REFUSED, str(error))
        except FetchRefused as error:
            if error.status in _NO_LIST:
                return await self._end(target, UNSUPPORTED, str(error))
            return await self._malformed(target, str(error))
        except EndlessList as error:
            return await self._end(target, ENDLESS, str(error))
        except ValueError as error:
            return await self._malformed(target, str(error))
        except StoreError:
            raise
        except FetchError as error:
            return await self._failed(target, error)
        except Exception as error:  # a fault of ours; the sweep stands in the store and would end each start
            log.error("crawl_page_failed", source=target.name, exc_info=error)
            return await self._failed(target, error)

    # ---- the sweep

    async def _begun(self, target: Target) -> bool:
        """Whether a sweep is under way; begins the one that is due."""
        tools, sweep = self._tools, target.sweep
        filters = tools.filters
        asked = looked_for(filters)
        if sweep.started_us and sweep.asked == asked:
            return True
        collections = self._collections(target)
        target.note = self._idle(target, collections)
        if target.note:
            return False
        new = begun(sweep, tools.clock(), asked, collections)
        await tools.writer.run("crawl_begin", lambda tx: tx.set_crawl_row(*target.key, list(new)))
        target.sweep = new
        log.info("crawl_begun", source=target.name)
        return True

    def idle_note(self, target: Target) -> str:
        """Why nothing would be looked for, also if the host could be asked; "" when something would."""
        if target.sweep.started_us and target.sweep.asked == looked_for(self._tools.filters):
            return ""
        return self._idle(target, self._collections(target))

    def _idle(self, target: Target, collections: Sequence[Nsid]) -> str:
        note = nothing_to_find(self._tools.filters)
        if not note and target.mode == BY_COLLECTION and not collections:
            note = "no collection was seen yet that the filter names"
        return note

    def _collections(self, target: Target) -> Sequence[Nsid]:
        if target.mode != BY_COLLECTION:
            return ()
        return collections_of(self._tools.db, self._tools.filters, self._tools.limits.max_collections)

    async def _page(self, target: Target) -> float:
        limits, sweep = self._tools.limits, target.sweep
        response = await self._get(
            target, page_url(target.url, target.mode, sweep.cursor, sweep.collection, limits.page_size)
        )
        page = read_hosts(response.body) if target.mode == HOSTS else read_repos(response.body)
        listed = len(page.hosts) if isinstance(page, HostPage) else len(page.repos)
        most = limits.host_pages if target.kind == HOST else limits.max_pages
        after: Sweep | None = moved(sweep, page.cursor, listed + page.garbage, most)
        noted = {"pages": 1, "listed": listed, "garbage": page.garbage}
        if not page.cursor and after is not None:
            later = next_collection(after, self._collections(target)) if sweep.collection else None
            after = later or self._ended(after, DONE)
            noted |= {DONE: 1} if later is None else {}
        assert after is not None
        if isinstance(page, HostPage):
            await self._take_hosts(target, page, after, noted)
        else:
            await self._take_repos(target, page, after, noted)
        target.failures, target.error = 0, ""
        self._reread(target)
        return 1.0 / limits.pages_per_s

    def _ended(self, sweep: Sweep, outcome: str) -> Sweep:
        tools = self._tools
        return ended(sweep, outcome, tools.clock(), int(tools.limits.interval * 1e6))

    def _reread(self, target: Target) -> None:
        """What the steps stored is what holds."""
        target.sweep = Sweep.of(self._tools.db.get(CRAWL, target.key))

    # ---- the question

    async def _get(self, target: Target, url: str) -> Response:
        """The answer to a page's question."""
        max_bytes = self._tools.limits.max_page_kib << 10
        return await self._tools.ask(target.host, url, max_bytes=max_bytes, expect=_expect_good)

    # ---- what a page tells

    async def _take_repos(self, target: Target, page: RepoPage, after: Sweep, noted: dict[str, int]) -> None:
        tools, before = self._tools, target.sweep
        lister = Lister(target.url, target.mode, tools.filters, target.kind == HOST)
        dids = [listed.did for listed in page.repos]
        rows = tools.db.multi_get(REPOS, dids)
        now = tools.clock()
        ahead = int(tools.settings.ingest.max_future * 1e6)
        entries = zip(page.repos, rows, strict=True)
        finding = lister.decide(entries, self._without(dids), now + ahead)
        parts = pieces(finding, STEP)
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            unit = FoundUnit(
                target.key, before, after if last else None, part, lister, tools.applier,
                tools.db.mode.ephemeral, noted if last else {},
            )  # fmt: skip
            new = await tools.writer.run("crawl_page", unit)
            if new is None:
                return
            self.found += new
            await asyncio.sleep(0)

    def _without(self, dids: Sequence[str]) -> set[str]:
        """Those that are known to hold no signal, for as long as that is believed."""
        tools = self._tools
        if tools.filters.mode == "full":
            return set()
        now, asked = tools.clock(), looked_for(tools.filters)
        rows = tools.db.multi_get(CRAWL, [(WITHOUT, did) for did in dids])
        return {did for did, row in zip(dids, rows, strict=True) if row and row[0] > now and row[1] == asked}

    async def _take_hosts(self, target: Target, page: HostPage, after: Sweep, noted: dict[str, int]) -> None:
        tools, before = self._tools, target.sweep
        urls, refused = [], 0
        for name in page.hosts:
            try:
                urls.append(host_url(name, tools))
            except UrlRefused:
                refused += 1
        seen, most, seed = before.started_us, tools.limits.max_hosts, target.name

        def store(tx: Transaction) -> list[str]:
            if not MoveUnit(target.key, before, after, noted)(tx):
                return []
            kept = []
            for url in dict.fromkeys(urls):
                row = tx.crawl_row(LISTED, url)
                if row is None and tx.count(f"crawl/{LISTED}") >= most:
                    tally(tx, "hosts_left_out")
                elif row is None or row[0] == seed:
                    tx.set_crawl_row(LISTED, url, [seed, seen])
                    tally(tx, "hosts", int(row is None))
                    kept.append(url)
            tally(tx, "hosts_refused", refused)
            return kept

        for url in await tools.writer.run("crawl_hosts", store):
            self._targets.add_host(url, seed)
        if not page.cursor:
            await self._targets.drop_hosts(seed, seen)

    # ---- failures

    async def _failed(self, target: Target, error: Exception) -> float:
        """The sweep stays where it is."""
        target.failures += 1
        target.error = str(error)[:300]
        wait = self._tools.wait_s(target.failures, getattr(error, "retry_after", None))
        log.info("crawl_postponed", source=target.name, reason=target.error, retry_in_s=round(wait, 1))
        await self._tools.writer.run("crawl_failed", lambda tx: tally(tx, "page_failed"))
        return wait

    async def _malformed(self, target: Target, why: str) -> float:
        """Once or twice a host may stumble; then its list is none."""
        if target.failures + 1 >= self._tools.limits.page_tries:
            return await self._end(target, MALFORMED, why)
        return await self._failed(target, ValueError(why))

    async def _end(self, target: Target, outcome: str, why: str) -> float:
        """A sweep that the host makes impossible."""
        log.warning("crawl_ended", source=target.name, outcome=outcome, reason=why[:300])
        target.failures, target.error = 0, why[:300]
        after = self._ended(target.sweep, outcome)
        unit = MoveUnit(target.key, target.sweep, after, {outcome: 1})
        await self._tools.writer.run("crawl_end", unit)
        self._reread(target)
        return 0.0


def _expect_good(response: Response) -> None:
    """Raises what an answer other than 200 means."""
    expect_able(response)
    status = response.status
    if status != 200:
        name, message = response.xrpc_error()
        raise FetchRefused(f"it answered {status} {name} {message[:200]}".strip(), status=status, name=name)
