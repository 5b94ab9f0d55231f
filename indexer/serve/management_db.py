"""`/db` of the management API: figures of the store, a worker's pass now, compaction, backups.

What takes long runs in a thread, one at a time; ingest and queries go on beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from indexer.errors import RequestError, StoreError
from indexer.serve import health
from indexer.serve.http_errors import json_response, ready
from indexer.store.backup import Backup, backup
from indexer.store.database import Database
from indexer.store.threads import in_thread
from indexer.store.upkeep import compact_all, describe

if TYPE_CHECKING:
    from indexer.serve.services import Services


class DatabaseRoutes:
    """Handlers of `/db`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._compacting = asyncio.Lock()
        self._backing_up = asyncio.Lock()

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/db/stats", self.stats)
        app.router.add_post("/db/checkpoint", self.checkpoint)
        app.router.add_post("/db/compact", self.compact)
        app.router.add_post("/db/backup", self.backup)

    async def stats(self, _request: web.Request) -> web.StreamResponse:
        """The store by keyspace, and its workers."""
        described = await asyncio.to_thread(describe, self._services.db)
        return json_response({**described, "workers": health.workers(self._services)})

    async def checkpoint(self, _request: web.Request) -> web.StreamResponse:
        """Folds the reference log now, instead of at the next interval."""
        worker = ready(self._services.workers.get("checkpoint"), "the checkpoint worker does not run")
        report = await worker.run_once()
        return json_response({"report": health.plain(report)})

    async def compact(self, _request: web.Request) -> web.StreamResponse:
        """Compacts every keyspace, one after another, off the loop; answers bytes before and after."""
        if self._compacting.locked():
            raise RequestError("a compaction runs already", status=409, name="Busy")
        async with self._compacting:
            before = health.store(self._services)["totals"]
            await asyncio.to_thread(compact_all, self._services.db)
            return json_response({"before": before, "after": health.store(self._services)["totals"]})

    async def backup(self, request: web.Request) -> web.StreamResponse:
        """Backs up into the new folder ``to`` of this machine: ``{"to": "/path"}``."""
        target = _target(await request.read())
        if self._backing_up.locked():
            raise RequestError("a backup runs already", status=409, name="Busy")
        async with self._backing_up, AsyncExitStack() as stack:
            if self._services.archives is not None:  # no archived file goes away meanwhile
                await stack.enter_async_context(self._services.archives.still())
            try:
                made = await in_thread(partial(_copy, self._services.db, target))
            except StoreError as error:
                raise RequestError(str(error), status=409, name="BackupFailed") from error
        return json_response(made._asdict())


def _copy(db: Database, target: Path, *, between: Callable[[], None]) -> Backup:
    """Between two files it is given up when nobody waits for it any more: the daemon stops."""
    return backup(db, target, progress=lambda _what, _done, _total: between())


def _target(body: bytes) -> Path:
    try:
        to = orjson.loads(body)["to"]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError('the body must be {"to": "/path/of/a/new/folder"}') from error
    if not isinstance(to, str) or not Path(to).is_absolute():
        raise RequestError("to: an absolute path is wanted")
    return Path(to)
