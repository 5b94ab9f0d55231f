"""`/crawler` of the management API: the lists of accounts that are read, and where their sweeps are.

Owns the form of these requests, which is that of hydrant where it has them. What changes is the crawler's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aiohttp import web

from indexer.config import CRAWLER_MODES
from indexer.errors import RequestError
from indexer.serve.http_errors import json_response, ready
from indexer.serve.management_ingest import read_object, whole
from indexer.serve.xrpc.params import Params

if TYPE_CHECKING:
    from indexer.serve.services import CrawlerLike, Services

_FIELDS = ("url", "key", "mode")
_CURSOR = ("name", "url", "mode", "cursor", "collection", "pages", "next_us")


class CrawlerRoutes:
    """Handlers of `/crawler`."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def add_to(self, app: web.Application) -> None:
        router = app.router
        router.add_get("/crawler/sources", self.list_sources)
        router.add_post("/crawler/sources", self.add_source)
        router.add_delete("/crawler/sources", self.remove_source)
        router.add_get("/crawler/cursors", self.cursors)
        router.add_delete("/crawler/cursors", self.reset_cursor)

    @property
    def _crawler(self) -> CrawlerLike:
        return ready(self._services.crawler, "the crawler does not run")

    async def list_sources(self, _request: web.Request) -> web.StreamResponse:
        """All sources with what they gave."""
        return json_response(self._crawler.sources())

    async def add_source(self, request: web.Request) -> web.StreamResponse:
        """`{"url", "mode"?}`: 201 for a new one, 200 for one that is crawled already."""
        crawler, body = self._crawler, await read_object(request, _FIELDS)
        added = await whole(crawler.add(_url(body), _mode(body)))
        return json_response(crawler.targets.describe(added.target), status=201 if added.new else 200)

    async def remove_source(self, request: web.Request) -> web.StreamResponse:
        """`{"url", "mode"?}`, or `url` in the query."""
        crawler = self._crawler
        body = await read_object(request, _FIELDS, Params(request.query).optional("url"))
        removed = await whole(crawler.remove(_url(body), _mode(body)))
        return json_response({"name": removed.name, "persisted": not removed.from_settings})

    async def cursors(self, _request: web.Request) -> web.StreamResponse:
        """Where the sweep of each source is."""
        return json_response([{name: source[name] for name in _CURSOR} for source in self._crawler.sources()])

    async def reset_cursor(self, request: web.Request) -> web.StreamResponse:
        """`{"key" or "url", "mode"?}`: a new sweep begins now."""
        crawler = self._crawler
        body = await read_object(request, _FIELDS, Params(request.query).optional("url"))
        target = await whole(crawler.reset(_url(body), _mode(body)))
        return json_response(crawler.targets.describe(target))


def _url(body: Mapping[str, Any]) -> str:
    url = body.get("url", body.get("key"))
    if not isinstance(url, str) or not url:
        raise RequestError("url: the address of a source is wanted, as https://host or mode::https://host")
    return url


def _mode(body: Mapping[str, Any]) -> str | None:
    mode = body.get("mode")
    if mode is not None and mode not in CRAWLER_MODES:
        raise RequestError(f"mode must be one of {', '.join(CRAWLER_MODES)}")
    return str(mode) if mode is not None else None
