"""The public server: XRPC queries, streams, `/health` and `/stats`. Reads only.

Owns the routes of the public listener and the parts behind them (queries, stream hub).
"""

from __future__ import annotations

from aiohttp import web

from indexer.serve import health
from indexer.serve.http_errors import errors_middleware, json_response
from indexer.serve.listener import Listener
from indexer.serve.services import Services
from indexer.serve.stream import StreamHub
from indexer.serve.xrpc.dispatch import QUERIES, STREAMED, Xrpc

#: Queries take no body worth the name.
_MAX_BODY = 65_536
#: What `GET /` tells somebody who looks in.
_ENDPOINTS = {
    "/xrpc/{method}": f"AT Protocol queries: {', '.join(QUERIES)}",
    "/stream": "WebSocket: every change of a record or account, by cursor",
    "/health": "whether the indexer works",
    "/stats": "figures",
}


class PublicServer:
    """``await start()``, ``url``, ``await stop()``."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.xrpc = Xrpc(services)
        self.streams = StreamHub(services)
        settings = services.settings
        self.listener = Listener(
            self._app(),
            settings.public.bind,
            "public.bind",
            settings.public,
            max_line=settings.stream.max_options_kib << 10,
        )

    async def start(self) -> None:
        """Listens; raises `ConfigError` when the address cannot be had."""
        await self.listener.start()
        self.streams.start()

    async def stop(self) -> None:
        """Says goodbye to stream readers, lets running answers end, closes."""
        await self.streams.stop()
        await self.listener.stop()

    @property
    def address(self) -> tuple[str, int]:
        return self.listener.address

    @property
    def url(self) -> str:
        return self.listener.url

    def _app(self) -> web.Application:
        timeout = self.services.settings.public.request_timeout
        app = web.Application(
            middlewares=[errors_middleware(timeout, STREAMED | {"/stream"})], client_max_size=_MAX_BODY
        )
        app.router.add_get("/", self._index)
        app.router.add_get("/stream", self.streams.handle)
        app.router.add_get("/xrpc/_health", self._version)
        app.router.add_route("*", "/xrpc/{method}", self.xrpc.handle)
        app.router.add_get("/health", self._health)
        app.router.add_get("/stats", self._stats)
        app.on_response_prepare.append(self.xrpc.on_prepare)
        return app

    async def _index(self, _request: web.Request) -> web.StreamResponse:
        return json_response({"name": "indexer", "version": health.VERSION, "endpoints": _ENDPOINTS})

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        summary = health.summary(self.services)
        return json_response(summary, status=200 if summary["status"] == "ok" else 503)

    async def _stats(self, _request: web.Request) -> web.StreamResponse:
        return json_response(health.statistics(self.services, self.streams, self.xrpc))

    async def _version(self, _request: web.Request) -> web.StreamResponse:
        return json_response({"version": health.VERSION})
