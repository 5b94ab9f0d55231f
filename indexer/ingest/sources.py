"""The upstreams that are followed: from the settings, and those added or switched off at run time.

Owns their rows, their tasks, and every change of them while the daemon runs. Each upstream has a path to the
writer (`pipeline`), which lives as long as the upstream is followed, and a connection (`source`), which
comes and goes. A connection's task that fails is started again and counted, for nothing is lost with it; a
path that fails ends `run`, and the daemon with it: what it had on the way would be missing. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import structlog

from indexer.atproto.types import Seq
from indexer.config import upstream_address
from indexer.errors import RequestError, StoreError, UrlRefused
from indexer.identity.guard import check_url
from indexer.ingest import revs, unheard
from indexer.ingest.account import PDS_PREFIX
from indexer.ingest.apply import Applier
from indexer.ingest.controls import FIREHOSE, paused_parts
from indexer.ingest.pipeline import Pipeline
from indexer.ingest.position import cursor_name, time_name
from indexer.ingest.source import Backoff, Dial, Link, Source, Upstream
from indexer.ingest.tools import IngestTools
from indexer.store.codecs import SourceRow, did_range
from indexer.store.keyspaces import SOURCES
from indexer.store.transaction import Transaction

log = structlog.get_logger()

KIND: Final = "firehose"
MAX_SEQ: Final = (1 << 53) - 1


@dataclass(slots=True)
class Followed:
    """One upstream and what runs for it."""

    pipeline: Pipeline
    from_settings: bool
    enabled: bool
    link: Link = field(default_factory=Link)
    restarts: int = 0
    path: asyncio.Task[None] | None = None
    connection: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.pipeline.upstream.name

    @property
    def running(self) -> bool:
        return self.connection is not None and not self.connection.done()


class Added(NamedTuple):
    """The upstream that is followed now; ``new`` when it was not before."""

    name: str
    new: bool


class Sources:
    """``run`` follows them; the other methods change them, one after another."""

    def __init__(self, tools: IngestTools, applier: Applier, dial: Dial) -> None:
        self._tools = tools
        self._applier = applier
        self._dial = dial
        self._all: dict[str, Followed] = {}
        self.paused = FIREHOSE in paused_parts(tools.db)
        self._tasks: asyncio.TaskGroup | None = None
        self._turn = asyncio.Lock()
        self.revs = revs.RevComparison(tools, applier, _Urls(self._all))
        self._words = unheard.WordSweep(tools, applier)
        rows = {key[1]: row for key, row in tools.db.scan(SOURCES, *did_range(KIND))}
        for name in dict.fromkeys(tools.settings.upstreams):
            row = rows.pop(name, None)
            self._put(Upstream.parse(name), from_settings=True, enabled=row is None or row.enabled)
        for name, row in rows.items():
            if row.added:  # else it was switched off and has left the settings since
                self._put(Upstream.parse(name), from_settings=False, enabled=row.enabled)

    def _put(self, upstream: Upstream, *, from_settings: bool, enabled: bool) -> Followed:
        pipeline = Pipeline(upstream, self._tools, self._applier)
        pipeline.position.told = self.revs.wake
        followed = self._all[upstream.name] = Followed(pipeline, from_settings, enabled)
        return followed

    # ---- life

    async def run(self) -> None:
        """Follows every upstream until cancelled; raises what ends the path of one."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                for followed in self._all.values():
                    self._start(followed)
                tasks.create_task(self._words.run(), name="ingest-unheard")
                await self.revs.run()
            finally:
                self._tasks = None

    def _start(self, followed: Followed) -> None:
        """Starts what is to run for an upstream and does not."""
        if self._tasks is None:
            return
        if followed.path is None:
            followed.path = self._tasks.create_task(followed.pipeline.run(), name=f"ingest-{followed.name}")
        if followed.enabled and not self.paused and not followed.running:
            followed.connection = self._tasks.create_task(
                self._connect(followed), name=f"source-{followed.name}"
            )

    async def _connect(self, followed: Followed) -> None:
        """The connection, started again when it fails by a fault of ours; ends where there is no firehose."""
        settings = self._tools.settings
        backoff = Backoff(settings.ingest.reconnect_max)
        while True:
            pipeline = followed.pipeline
            source = Source(
                pipeline.upstream, pipeline, self._dial, settings.ingest, settings.network, followed.link
            )
            try:
                await source.run()
                return
            except StoreError:
                raise  # our own state: it takes the daemon down
            except Exception as error:
                followed.restarts += 1
                wait = backoff.next_wait()
                pipeline.closed("failed", f"{type(error).__name__}: {error}")
                log.error(
                    "source_task_failed", upstream=followed.name, restarts=followed.restarts,
                    retry_in_s=round(wait, 1), exc_info=error,
                )  # fmt: skip
                await asyncio.sleep(wait)

    async def _disconnect(self, followed: Followed) -> None:
        """Ends the connection and waits until all that came by it is committed."""
        connection, followed.connection = followed.connection, None
        if connection is not None and not connection.done():
            connection.cancel()
            await asyncio.wait([connection])
        followed.pipeline.parted()
        path = followed.path
        if path is None or path.done():
            return
        drained = asyncio.create_task(followed.pipeline.drained())
        try:
            # A path that fails commits nothing more: who waits for that alone would wait for ever.
            await asyncio.wait([drained, path], return_when=asyncio.FIRST_COMPLETED)
            if drained.done():
                await drained
        finally:
            drained.cancel()

    # ---- changes

    async def add(self, url: str, *, is_pds: bool = False, cursor: Seq | None = None) -> Added:
        """Follows ``url`` from now on, also after a restart; one that is followed is connected anew.

        Raises `UrlRefused` or `RequestError` for an address that cannot be one, and above the bound.
        """
        upstream = self._checked(url, is_pds=is_pds)
        async with self._turn:
            followed = self._all.get(upstream.name) or self._same_address(upstream)
            new = followed is None
            if followed is None:
                bound = self._tools.settings.ingest.max_sources
                if len(self._all) >= bound:
                    raise RequestError(
                        f"{bound} upstreams are followed already (ingest.max_sources)", status=409
                    )
            else:
                await self._disconnect(followed)
            name = upstream.name if followed is None else followed.name
            from_settings = followed is not None and followed.from_settings

            def store(tx: Transaction) -> None:
                if from_settings:
                    tx.drop_source(KIND, name)
                else:
                    tx.set_source(KIND, name, SourceRow(True, True, tx.now_us))
                unheard.cancel(tx, name)
                if cursor is not None:
                    _set_cursor(tx, name, cursor)

            await self._tools.writer.run("source_add", store)
            if followed is None:
                followed = self._put(upstream, from_settings=False, enabled=True)
            followed.enabled = True
            if new or cursor is not None:
                followed.pipeline.position.forget()
            self._start(followed)
            log.info("source_added", upstream=name, new=new)
            return Added(name, new)

    async def remove(self, url: str, *, is_pds: bool | None = None, forget: bool = False) -> Followed:
        """Follows it no longer, also after a restart; ``forget``: its cursor and counts go too. What it
        said of accounts counts no more.

        One of the settings stays listed, switched off. Raises `RequestError` for one that is not known.
        """
        async with self._turn:
            followed = self.find(url, is_pds)
            name = followed.name
            await self._disconnect(followed)

            def store(tx: Transaction) -> None:
                if followed.from_settings:
                    tx.set_source(KIND, name, SourceRow(False, False, tx.now_us))
                else:
                    tx.drop_source(KIND, name)
                revs.cancel(tx, name)
                unheard.plan(tx, name)
                if forget:
                    _forget(tx, name, self._tools.db.counts(f"ingest/{name}/"))

            await self._tools.writer.run("source_remove", store)
            self.wake_unheard()
            followed.enabled = False
            followed.pipeline.position.forget()
            if not followed.from_settings:
                del self._all[name]
                if followed.path is not None:
                    followed.path.cancel()
                    await asyncio.wait([followed.path])
            log.info("source_removed", upstream=name, forgotten=forget)
            return followed

    async def set_cursor(self, url: str, cursor: Seq | None, *, is_pds: bool | None = None) -> str:
        """The operator's decision where following goes on: at ``cursor``, at 0 for the oldest that is
        retained, None for the live tail. The connection is made anew. The upstream's name."""
        async with self._turn:
            followed = self.find(url, is_pds)
            await self._disconnect(followed)
            await self._store_cursor(followed, cursor)
            return followed.name

    async def accept(self, url: str, *, is_pds: bool | None = None) -> Seq:
        """Takes the new numbering of an upstream that left its old one for good; the cursor in it."""
        async with self._turn:
            followed = self.find(url, is_pds)
            position = followed.pipeline.position
            if position.accept() is None:
                raise RequestError(f"{followed.name} goes on with the numbering of its cursor", status=409)
            await self._disconnect(followed)
            cursor = position.accept()
            if cursor is None:  # what was on its way reached the old number: it is the new one, too
                cursor = position.stored
            await self._store_cursor(followed, cursor)
            return cursor

    async def _store_cursor(self, followed: Followed, cursor: Seq | None) -> None:
        name = followed.name
        await self._tools.writer.run("source_cursor", lambda tx: _set_cursor(tx, name, cursor))
        followed.pipeline.position.forget()
        log.warning("cursor_set", upstream=name, cursor=cursor)
        self._start(followed)

    async def compare_revs(self, url: str, *, is_pds: bool | None = None) -> str:
        """Has the upstream's revs compared with ours. The upstream's name."""
        async with self._turn:
            name = self.find(url, is_pds).name
            await self._tools.writer.run("compare_revs", lambda tx: revs.schedule(tx, name, "request"))
            self.revs.wake()
            return name

    def wake_unheard(self) -> None:
        """Words of somebody who is heard no longer were planned to be dropped."""
        self._words.wake()

    async def pause(self, paused: bool) -> None:
        """Ends every connection, or lets them be made again; storing the decision is the caller's."""
        async with self._turn:
            self.paused = paused
            for followed in list(self._all.values()):
                if paused:
                    await self._disconnect(followed)
                else:
                    self._start(followed)

    def _checked(self, url: str, *, is_pds: bool) -> Upstream:
        try:
            upstream_address(url)
        except ValueError as error:
            raise RequestError(f"url: {error}") from error
        if not url.isascii() or not url.isprintable():
            raise RequestError("url: it holds characters that no URL may hold")
        upstream = Upstream.of(url, is_pds=is_pds)
        try:
            check_url(upstream.url, self._tools.settings.network, kind="ws")
        except UrlRefused as error:
            raise RequestError(f"url: {error}", name="UrlRefused") from error
        return upstream

    def _same_address(self, upstream: Upstream) -> Followed | None:
        """The upstream that is followed under another spelling of the same address."""
        same = [item for item in self._all.values() if item.pipeline.upstream.url == upstream.url]
        for item in same:
            if item.pipeline.upstream.is_pds == upstream.is_pds:
                return item
        if same:
            kind = "a PDS" if not upstream.is_pds else "a relay"
            raise RequestError(f"{upstream.url} is followed as {kind}; remove that first", status=409)
        return None

    # ---- what is told

    def find(self, url: str, is_pds: bool | None = None) -> Followed:
        """By name (``pds::wss://…``) or address; `RequestError` when there is none, or more than one."""
        named = self._all.get(PDS_PREFIX + url if is_pds else url)
        if named is not None and is_pds in (None, named.pipeline.upstream.is_pds):
            return named
        bare = Upstream.parse(url).url
        found = [
            item
            for item in self._all.values()
            if item.pipeline.upstream.url == bare and is_pds in (None, item.pipeline.upstream.is_pds)
        ]
        if len(found) == 1:
            return found[0]
        if found:
            raise RequestError(f"{bare} is followed as a relay and as a PDS; say is_pds", status=409)
        others = [item.name for item in self._all.values() if item.pipeline.upstream.url == bare]
        hint = f"; it is followed as {others[0]}" if others else ""
        raise RequestError(f"no such upstream: {bare}{hint}", status=404, name="SourceNotFound")

    def status(self) -> list[dict[str, Any]]:
        """One entry for each upstream."""
        return [self.describe(followed) for followed in self._all.values()]

    def describe(self, followed: Followed) -> dict[str, Any]:
        """What is known of one."""
        status = followed.pipeline.status()
        if followed.enabled and not status["connected"] and not self._tools.space.is_set():
            floor = self._tools.settings.disk.hard_floor_mib
            status["error"] = f"the disk is nearly full: ingest needs {floor} MiB (disk.hard_floor_mib)"
        return {
            **status,
            "persisted": not followed.from_settings,
            "enabled": followed.enabled,
            "running": followed.running,
            "restarts": followed.restarts,
            **followed.link.status(),
            "compare_revs": self.revs.status(followed.name),
        }


class _Urls(Mapping[str, str]):
    """Addresses by name of the upstreams that are followed at the moment."""

    def __init__(self, followed: Mapping[str, Followed]) -> None:
        self._followed = followed

    def __getitem__(self, name: str) -> str:
        followed = self._followed[name]
        if not followed.enabled:
            raise KeyError(name)
        return followed.pipeline.upstream.url

    def __iter__(self) -> Iterator[str]:
        return (name for name, followed in self._followed.items() if followed.enabled)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _set_cursor(tx: Transaction, name: str, cursor: Seq | None) -> None:
    tx.set_cursor(cursor_name(name), cursor)
    tx.set_cursor(time_name(name), None)


def _forget(tx: Transaction, name: str, counts: Mapping[str, int]) -> None:
    _set_cursor(tx, name, None)
    for counted, number in counts.items():
        tx.add_count(counted, -number)
