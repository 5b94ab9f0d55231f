"""The management server: everything that changes something, `/metrics`, `/readyz`.

Owns the routes of the management listener and who may use it: loopback only, unless `management.token` is
set, which every request must then carry. A web page must not reach it through its reader's browser: no CORS,
requests with a foreign `Origin` are refused, and without a token the `Host` must be this machine.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from indexer.errors import ConfigError, RequestError
from indexer.serve import health
from indexer.serve.http_errors import error_response, errors_middleware, json_response
from indexer.serve.listener import Listener
from indexer.serve.management_archive import ARCHIVE, ArchiveRoutes
from indexer.serve.management_crawler import CrawlerRoutes
from indexer.serve.management_db import DatabaseRoutes
from indexer.serve.management_debug import DebugRoutes
from indexer.serve.management_filter import FilterRoutes
from indexer.serve.management_ingest import IngestRoutes
from indexer.serve.management_pds import PdsRoutes
from indexer.serve.management_repos import RepoRoutes
from indexer.serve.management_verify import VERIFY, VerifyRoutes
from indexer.serve.metrics import CONTENT_TYPE, Metrics

if TYPE_CHECKING:
    from indexer.serve.public import PublicServer
    from indexer.serve.services import Services

#: Largest request body: some 100,000 DIDs.
_MAX_BODY = 8 << 20
#: Answers that take as long as they need.
_UNBOUNDED = frozenset(
    {"/repos", "/repos/resync", "/filter", "/db/checkpoint", "/db/compact", "/db/backup", ARCHIVE, VERIFY}
)


class ManagementServer:
    """``await start()``, ``url``, ``await stop()``. ``public`` lends its figures to `/metrics`."""

    def __init__(self, services: Services, public: PublicServer | None = None) -> None:
        self.services = services
        settings = services.settings
        streams, xrpc = (public.streams, public.xrpc) if public else (None, None)
        self._metrics = Metrics(services, streams, xrpc)
        self._listener = Listener(self._app(), settings.management.bind, "management.bind", settings.public)
        self._scraped = (
            Listener(self._metrics_app(), settings.metrics.bind, "metrics.bind", settings.public)
            if settings.metrics.bind
            else None
        )

    async def start(self) -> None:
        """Listens; raises `ConfigError` when an address cannot be had."""
        await self._listener.start()
        if self._scraped is not None:
            try:
                await self._scraped.start()
            except ConfigError:
                await self._listener.stop()
                raise

    async def stop(self) -> None:
        """Lets running answers end, closes."""
        await self._listener.stop()
        if self._scraped is not None:
            await self._scraped.stop()

    @property
    def address(self) -> tuple[str, int]:
        return self._listener.address

    @property
    def url(self) -> str:
        return self._listener.url

    @property
    def metrics_url(self) -> str:
        """Where `/metrics` is, on its own listener when it has one."""
        return f"{(self._scraped or self._listener).url}/metrics"

    def _app(self) -> web.Application:
        settings = self.services.settings
        guard = Guard(settings.management.token)
        app = web.Application(
            middlewares=[errors_middleware(settings.public.request_timeout, _UNBOUNDED), guard.middleware],
            client_max_size=_MAX_BODY,
        )
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._exposition)
        RepoRoutes(self.services).add_to(app)
        ArchiveRoutes(self.services).add_to(app)
        VerifyRoutes(self.services).add_to(app)
        FilterRoutes(self.services).add_to(app)
        DatabaseRoutes(self.services).add_to(app)
        IngestRoutes(self.services).add_to(app)
        PdsRoutes(self.services).add_to(app)
        CrawlerRoutes(self.services).add_to(app)
        DebugRoutes(self.services).add_to(app)
        return app

    def _metrics_app(self) -> web.Application:
        app = web.Application(middlewares=[errors_middleware(self.services.settings.public.request_timeout)])
        app.router.add_get("/metrics", self._exposition)
        return app

    async def _ready(self, _request: web.Request) -> web.StreamResponse:
        reasons = health.not_ready(self.services)
        return json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)

    async def _exposition(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})


class Guard:
    """Who may manage."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    @property
    def middleware(self) -> Middleware:
        """The check as a middleware of an application."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            origin = request.headers.get("Origin")
            if origin is not None and urlsplit(origin).netloc != request.host:
                raise RequestError("web pages may not manage the indexer", status=403, name="Forbidden")
            if self._token:
                if not self._is_known(request.headers.get("Authorization", "")):
                    return error_response(
                        401,
                        "AuthenticationRequired",
                        "the management token is required",
                        {"WWW-Authenticate": 'Bearer, Basic realm="indexer"'},
                    )
            elif not _is_this_machine(request.host):
                raise RequestError("the Host header names another machine", status=403, name="Forbidden")
            return await handler(request)

        return middleware

    def _is_known(self, header: str) -> bool:
        scheme, _, credentials = header.partition(" ")
        given = credentials.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() == "basic":
            try:
                user, _, given = base64.b64decode(given, validate=True).partition(b":")
            except binascii.Error:
                return False
            known = hmac.compare_digest(user, b"admin")
        else:
            known = scheme.lower() == "bearer"
        return hmac.compare_digest(given, self._token) and known


def _is_this_machine(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
