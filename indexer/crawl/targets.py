"""What is crawled: the sources of the settings, those added at run time, and the hosts that sources listed.

Owns their rows (`sources` for the operator's word, `crawl` for the positions and the listed hosts) and the
changes of them. Leaves out when they are asked. Event loop only.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

import structlog

from indexer.atproto.types import Micros
from indexer.backfill.hosts import host_of
from indexer.config import parse_crawler_source
from indexer.crawl.pages import HOSTS as HOSTS_MODE
from indexer.crawl.pages import LIST_REPOS
from indexer.crawl.sweep import Sweep
from indexer.crawl.tools import HOST, LISTED, SOURCE, CrawlTools, tally
from indexer.errors import RequestError, UrlRefused
from indexer.identity.guard import check_url, is_public_address
from indexer.ingest import unheard
from indexer.ingest.account import LIST_PREFIX
from indexer.store.codecs import SourceRow, did_range
from indexer.store.keyspaces import CRAWL, SOURCES
from indexer.store.transaction import Transaction

log = structlog.get_logger()

#: Kind of the rows of `sources`.
KIND: Final = "crawler"
_STEP: Final = 500
_HOSTNAME: Final = re.compile(r"[a-z0-9.-]{1,253}(:\d{1,5})?|\[[0-9a-f:.]{2,45}\](:\d{1,5})?")


@dataclass(slots=True, eq=False)
class Target:
    """A source, or a host that one listed. ``serial`` rises with each change of when it is due."""

    kind: str
    name: str
    mode: str
    url: str
    from_settings: bool = False
    enabled: bool = True
    seed: str = ""  # of a host: the source that listed it
    sweep: Sweep = field(default_factory=Sweep)
    failures: int = 0
    error: str = ""
    note: str = ""  # why nothing is looked for, or its host is not asked
    not_before: float = 0.0  # loop time
    serial: int = 0
    task: asyncio.Task[None] | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.name

    @property
    def host(self) -> str:
        return host_of(self.url)

    @property
    def running(self) -> bool:
        return self.task is not None and not self.task.done()


class Added(NamedTuple):
    """The source that is crawled now; ``new`` when it was not before."""

    target: Target
    new: bool


def source_name(url: str, mode: str | None = None) -> str:
    """``mode::origin``; raises `RequestError`. ``mode`` for a URL that carries none."""
    try:
        found, origin = parse_crawler_source(url if mode is None or "::" in url else f"{mode}::{url}")
    except ValueError as error:
        raise RequestError(f"url: {error}") from error
    if mode is not None and found != mode:
        raise RequestError(f"mode: {mode} and {found} are both given")
    return f"{found}::{origin}"


def host_url(hostname: str, tools: CrawlTools) -> str:
    """The origin of a listed host; raises `UrlRefused`. A private one may speak http, where it is allowed."""
    if not _HOSTNAME.fullmatch(hostname):
        raise UrlRefused(f"refused host: {hostname[:120]!r} is no name")
    network = tools.settings.network
    bare = re.sub(r":\d+$", "", hostname).strip("[]")
    literal = re.fullmatch(r"[0-9.]+|.*:.*", bare) is not None
    here = bare == "localhost" or (literal and not is_public_address(bare))
    scheme = "http" if network.allow_private and here else "https"
    return str(check_url(f"{scheme}://{hostname}", network).origin())


class Targets:
    """All of them by name. ``changed`` is called with one whose turn may have come."""

    def __init__(self, tools: CrawlTools) -> None:
        self._tools = tools
        self.sources: dict[str, Target] = {}
        self.hosts: dict[str, Target] = {}
        self._turn = asyncio.Lock()
        self.fresh: list[Target] = []  # hosts that were not among them before
        self.gone: list[str] = []  # sources that left the settings while nothing ran
        db = tools.db
        stored = {key[1]: row for key, row in db.scan(SOURCES, *did_range(KIND))}
        for name in dict.fromkeys(map(source_name, tools.limits.sources)):
            row = stored.pop(name, None)
            self._put(name, from_settings=True, enabled=row is None or row.enabled)
        for name, row in stored.items():
            if row.added:
                self._put(name, from_settings=False, enabled=row.enabled)
        self._load()

    def _load(self) -> None:
        db = self._tools.db
        for (_, name), row in db.scan(CRAWL, *did_range(SOURCE)):
            if name in self.sources:
                self.sources[name].sweep = Sweep.of(row)
            else:
                self.gone.append(name)
        sweeps = {key[1]: row for key, row in db.scan(CRAWL, *did_range(HOST))}
        for (_, url), row in db.scan(CRAWL, *did_range(LISTED)):
            if row[0] in self.sources:
                self.add_host(url, row[0]).sweep = Sweep.of(sweeps.get(url))

    def _put(self, name: str, *, from_settings: bool, enabled: bool) -> Target:
        mode, url = parse_crawler_source(name)
        target = Target(SOURCE, name, mode, url, from_settings, enabled)
        self.sources[name] = target
        return target

    def __iter__(self) -> Iterator[Target]:
        yield from self.sources.values()
        yield from self.hosts.values()

    def is_current(self, target: Target) -> bool:
        """Whether it is still to be crawled."""
        known = self.sources if target.kind == SOURCE else self.hosts
        seed = self.sources.get(target.seed) if target.kind == HOST else target
        return known.get(target.name) is target and seed is not None and seed.enabled

    # ---- hosts

    def add_host(self, url: str, seed: str) -> Target:
        """A listed host among the targets; the one that is there, if it is."""
        known = self.hosts.get(url)
        if known is None:
            known = self.hosts[url] = Target(HOST, url, LIST_REPOS, url, seed=seed)
            self.fresh.append(known)
        return known

    async def drop_hosts(self, seed: str, seen_before: Micros | None = None) -> int:
        """Forgets the hosts that ``seed`` listed; with a time those that it no longer lists."""
        urls = [
            url
            for (_, url), row in self._tools.db.scan(CRAWL, *did_range(LISTED))
            if row[0] == seed and (seen_before is None or row[1] < seen_before)
        ]
        for start in range(0, len(urls), _STEP):
            part = urls[start : start + _STEP]

            def drop(tx: Transaction, part: list[str] = part) -> None:
                for url in part:
                    tx.set_crawl_row(LISTED, url, None)
                    tx.set_crawl_row(HOST, url, None)

            for url in part:
                await self._halt(self.hosts.pop(url, None))
            await self._tools.writer.run("crawl_hosts", drop)
        return len(urls)

    # ---- changes

    async def add(self, url: str, mode: str | None = None) -> Added:
        """Crawls ``url`` from now on, also after a restart. Raises `RequestError`."""
        name = source_name(url, mode)
        self._check(name)
        async with self._turn:
            target = self.sources.get(name)
            new = target is None
            if target is None and len(self.sources) >= self._tools.limits.max_sources:
                bound = self._tools.limits.max_sources
                raise RequestError(f"{bound} sources are crawled already (crawler.max_sources)", status=409)
            from_settings = target is not None and target.from_settings

            def store(tx: Transaction) -> None:
                if from_settings:
                    tx.drop_source(KIND, name)
                else:
                    tx.set_source(KIND, name, SourceRow(True, True, tx.now_us))
                if name.startswith(LIST_REPOS):
                    unheard.cancel(tx, LIST_PREFIX + parse_crawler_source(name)[1])

            await self._tools.writer.run("crawler_source_add", store)
            target = target or self._put(name, from_settings=False, enabled=True)
            target.enabled = True
            log.info("crawler_source_added", source=name, new=new)
            return Added(target, new)

    def _check(self, name: str) -> None:
        try:
            check_url(parse_crawler_source(name)[1], self._tools.settings.network)
        except UrlRefused as error:
            raise RequestError(f"url: {error}", name="UrlRefused") from error

    async def remove(self, url: str, mode: str | None = None) -> Target:
        """Crawls it no longer, also after a restart; its position goes, its words on accounts count no more.

        One of the settings stays listed, switched off. Raises `RequestError` for one that is not known.
        """
        async with self._turn:
            target = self.find(url, mode)
            target.enabled = False
            await self._halt(target)
            await self.drop_hosts(target.name)

            def store(tx: Transaction) -> None:
                if target.from_settings:
                    tx.set_source(KIND, target.name, SourceRow(False, False, tx.now_us))
                else:
                    tx.drop_source(KIND, target.name)
                _forget(target.name, tx)

            await self._tools.writer.run("crawler_source_remove", store)
            target.sweep = Sweep()
            if not target.from_settings:
                del self.sources[target.name]
            log.info("crawler_source_removed", source=target.name)
            return target

    async def reset(self, url: str, mode: str | None = None) -> Target:
        """A new sweep begins, now; so it does for the hosts that the source listed."""
        async with self._turn:
            target = self.find(url, mode)
            hosts = [host for host in self.hosts.values() if host.seed == target.name]
            for item in (target, *hosts):
                await self._halt(item)
            keys = [item.key for item in (target, *hosts)]
            for start in range(0, len(keys), _STEP):
                await self._tools.writer.run("crawler_reset", partial(_reset, keys[start : start + _STEP]))
            for item in (target, *hosts):
                item.sweep, item.failures, item.error, item.not_before = Sweep(), 0, "", 0.0
            return target

    async def forget_gone(self) -> None:
        """What is kept of sources that left the settings goes."""
        for name in self.gone:
            await self.drop_hosts(name)
            await self._tools.writer.run("crawler_source_gone", partial(_forget, name))
        self.gone = []

    async def _halt(self, target: Target | None) -> None:
        """Ends what runs for it."""
        if target is not None and target.task is not None and target.task is not asyncio.current_task():
            target.task.cancel()
            await asyncio.wait([target.task])

    # ---- what is told

    def find(self, url: str, mode: str | None = None) -> Target:
        """By name (``mode::https://…``) or address; `RequestError` when there is none, or more than one."""
        if "::" in url or mode is not None:
            name = source_name(url, mode)
            found = [self.sources[name]] if name in self.sources else []
        else:
            origin = parse_crawler_source(source_name(url))[1]
            found = [target for target in self.sources.values() if target.url == origin]
        if len(found) > 1:
            raise RequestError(f"{url} is crawled in several modes; say which as mode::url", status=409)
        if not found:
            raise RequestError(f"no such source of the crawler: {url}", status=404, name="SourceNotFound")
        return found[0]

    def describe(self, target: Target) -> dict[str, Any]:
        """What is known of a source."""
        sweep = target.sweep
        hosts = sum(host.seed == target.name for host in self.hosts.values())
        return {
            "name": target.name,
            "url": target.url,
            "mode": target.mode,
            "persisted": not target.from_settings,
            "enabled": target.enabled,
            "running": target.running,
            "sweeping": sweep.started_us > 0,
            "started_us": sweep.started_us or None,
            "next_us": None if sweep.started_us else sweep.next_us,
            "cursor": sweep.cursor or None,
            "collection": sweep.collection or None,
            "pages": sweep.pages,
            "listed": sweep.listed,
            "found": sweep.found,
            "last_outcome": sweep.outcome or None,
            "last_ended_us": sweep.ended_us or None,
            "failures": target.failures,
            "error": target.error or None,
            "note": target.note or None,
        } | ({"hosts": hosts} if target.mode == HOSTS_MODE else {})  # fmt: skip


def _forget(name: str, tx: Transaction) -> None:
    """Where its sweep is, and what it said of accounts."""
    tx.set_crawl_row(SOURCE, name, None)
    if name.startswith(LIST_REPOS):
        unheard.plan(tx, LIST_PREFIX + parse_crawler_source(name)[1])


def _reset(keys: list[tuple[str, str]], tx: Transaction) -> None:
    for kind, name in keys:
        tx.set_crawl_row(kind, name, None)
    tally(tx, "resets")
