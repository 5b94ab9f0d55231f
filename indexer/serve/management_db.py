"""`/db` of the management API: run a worker now, compact, look at the store's figures."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

from indexer.errors import RequestError
from indexer.serve import health
from indexer.serve.http_errors import json_response
from indexer.store.keyspaces import KEYSPACES

if TYPE_CHECKING:
    from indexer.serve.services import Services


class DatabaseRoutes:
    """Handlers of `/db`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._compacting = asyncio.Lock()

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/db/stats", self.stats)
        app.router.add_post("/db/checkpoint", self.checkpoint)
        app.router.add_post("/db/compact", self.compact)

    async def stats(self, _request: web.Request) -> web.StreamResponse:
        """The store by keyspace, and its workers."""
        services = self._services
        return json_response({**health.store(services), "workers": health.workers(services)})

    async def checkpoint(self, _request: web.Request) -> web.StreamResponse:
        """Folds the reference log now."""
        worker = self._services.workers.get("checkpoint")
        if worker is None:
            raise RequestError("the checkpoint worker does not run", status=503, name="NotReady")
        report = await worker.run_once()
        return json_response({"report": health.plain(report)})

    async def compact(self, _request: web.Request) -> web.StreamResponse:
        """Compacts every keyspace, one after another, off the loop; answers bytes before and after."""
        if self._compacting.locked():
            raise RequestError("a compaction runs already", status=409, name="Busy")
        async with self._compacting:
            before = health.store(self._services)["totals"]
            for keyspace in KEYSPACES.values():
                await asyncio.to_thread(self._services.db.compact, keyspace)
            return json_response({"before": before, "after": health.store(self._services)["totals"]})
