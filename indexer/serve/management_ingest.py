"""`/firehose` and `/ingestion` of the management API: upstreams, their cursors, and what stands still.

Owns the form of these requests, which is that of hydrant where it has them. What changes is `Sources`'s;
the pause of a part is stored in one batch and then told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import orjson
from aiohttp import web

from indexer.errors import RequestError
from indexer.ingest.controls import BACKFILL, CRAWLER, FIREHOSE, PARTS, change_paused, paused_parts
from indexer.ingest.sources import MAX_SEQ, Sources
from indexer.serve.http_errors import json_response, ready
from indexer.serve.xrpc.params import Params

if TYPE_CHECKING:
    from indexer.serve.services import Services

T = TypeVar("T")
_FLAGS: Final = ("is_pds", "running", "failing", "throttled", "connected", "enabled", "persisted")
#: Where following may go on, besides at a number.
_PLACES: Final[Mapping[str, int | None]] = {"oldest": 0, "live": None}
_ACCEPT: Final = "accept"


class IngestRoutes:
    """Handlers of `/firehose` and `/ingestion`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._pausing = asyncio.Lock()

    def add_to(self, app: web.Application) -> None:
        router = app.router
        router.add_get("/firehose/sources", self.list_sources)
        router.add_get("/firehose/source", self.show_source)
        router.add_post("/firehose/sources", self.add_source)
        router.add_delete("/firehose/sources", self.remove_source)
        router.add_get("/firehose/cursors", self.cursors)
        router.add_post("/firehose/cursors", self.set_cursor)
        router.add_delete("/firehose/cursors", self.reset_cursor)
        router.add_post("/firehose/compare", self.compare)
        router.add_get("/ingestion", self.ingestion)
        router.add_patch("/ingestion", self.patch_ingestion)

    @property
    def _sources(self) -> Sources:
        return ready(self._services.ingest, "ingest does not run").sources

    # ---- upstreams

    async def list_sources(self, request: web.Request) -> web.StreamResponse:
        """All upstreams; `host`, `url` and flags choose among them."""
        params = Params(request.query)
        host, url = params.optional("host"), params.optional("url")
        flags = {name: params.flag(name) for name in _FLAGS if params.optional(name) is not None}
        return json_response(
            [
                source
                for source in self._sources.status()
                if all(source[name] is wanted for name, wanted in flags.items())
                and url in (None, source["url"], source["name"])
                and host in (None, urlsplit(source["url"]).hostname)
            ]
        )

    async def show_source(self, request: web.Request) -> web.StreamResponse:
        """One upstream, by `url`."""
        sources = self._sources
        return json_response(sources.describe(sources.find(Params(request.query).required("url"))))

    async def add_source(self, request: web.Request) -> web.StreamResponse:
        """`{"url", "is_pds"?, "cursor"?}`: 201 for a new one, 200 for one that is connected anew."""
        body = await read_object(request, ("url", "is_pds", "cursor"))
        cursor = _cursor(body["cursor"]) if "cursor" in body else None
        live = "cursor" in body and cursor is None
        change = self._sources.add(_url(body), is_pds=_is_pds(body) or False, cursor=cursor)
        added = await whole(change)
        if live and not added.new:
            await whole(self._sources.set_cursor(added.name, None))
        sources = self._sources
        answer = sources.describe(sources.find(added.name))
        return json_response(answer, status=201 if added.new else 200)

    async def remove_source(self, request: web.Request) -> web.StreamResponse:
        """`{"url", "is_pds"?}`; ``forget=true``: its cursor and counts go too."""
        params = Params(request.query)
        forget = params.flag("forget")
        body = await read_object(request, ("url", "is_pds"), params.optional("url"))
        removed = await whole(self._sources.remove(_url(body), is_pds=_is_pds(body), forget=forget))
        return json_response(
            {"name": removed.name, "persisted": not removed.from_settings, "forgotten": forget}
        )

    # ---- cursors

    async def cursors(self, _request: web.Request) -> web.StreamResponse:
        """The stored cursor of each upstream, and how its numbering goes on."""
        shown = ("name", "url", "is_pds", "cursor", "seq", "renumbered")
        return json_response([{name: source[name] for name in shown} for source in self._sources.status()])

    async def set_cursor(self, request: web.Request) -> web.StreamResponse:
        """`{"url" or "key", "cursor"}`: a number, "oldest", "live", or "accept" for a new numbering."""
        body = await read_object(request, ("url", "key", "is_pds", "cursor"))
        if "cursor" not in body:
            raise RequestError('cursor is required: a number, "oldest", "live" or "accept"')
        url, is_pds = _url(body), _is_pds(body)
        if body["cursor"] == _ACCEPT:
            cursor: int | None = await whole(self._sources.accept(url, is_pds=is_pds))
        else:
            cursor = _cursor(body["cursor"])
            await whole(self._sources.set_cursor(url, cursor, is_pds=is_pds))
        return json_response({"name": self._sources.find(url, is_pds).name, "cursor": cursor})

    async def reset_cursor(self, request: web.Request) -> web.StreamResponse:
        """`{"key" or "url"}`: following begins anew with the oldest message that the upstream retains."""
        body = await read_object(request, ("url", "key", "is_pds"), Params(request.query).optional("url"))
        name = await whole(self._sources.set_cursor(_url(body), 0, is_pds=_is_pds(body)))
        return json_response({"name": name, "cursor": 0})

    async def compare(self, request: web.Request) -> web.StreamResponse:
        """`{"url"}`: what the upstream lists is compared with what we hold, as after a possible loss."""
        body = await read_object(request, ("url", "is_pds"))
        if self._services.db.mode.ephemeral:
            raise RequestError("nothing is fetched in ephemeral mode", status=501, name="NotSupported")
        name = await self._sources.compare_revs(_url(body), is_pds=_is_pds(body))
        return json_response({"name": name, "compare_revs": self._sources.revs.status(name)}, status=202)

    # ---- pauses

    async def ingestion(self, _request: web.Request) -> web.StreamResponse:
        """Which parts go on."""
        return json_response(_shown(paused_parts(self._services.db)))

    async def patch_ingestion(self, request: web.Request) -> web.StreamResponse:
        """`{"crawler"?: bool, "firehose"?: bool, "backfill"?: bool}`, kept over restarts."""
        body = await read_object(request, PARTS)
        if not body or not all(isinstance(value, bool) for value in body.values()):
            raise RequestError(f"an object of {', '.join(PARTS)} to true or false is wanted")
        return json_response(_shown(await whole(self._pause(body))))

    async def _pause(self, runs: Mapping[str, bool]) -> frozenset[str]:
        """Stores the change and tells the parts, one request after another; those that stand still."""
        services = self._services
        async with self._pausing:
            off = await services.writer.run("ingestion", lambda tx: change_paused(tx, runs))
            if services.ingest is not None:
                await services.ingest.sources.pause(FIREHOSE in off)
            if services.backfill is not None:
                services.backfill.pause(BACKFILL in off)
            if services.crawler is not None:
                services.crawler.pause(CRAWLER in off)
            return off


async def whole(change: Coroutine[Any, Any, T]) -> T:
    """A change that goes on to its end where the one who asked for it does not wait so long."""
    return await asyncio.shield(asyncio.ensure_future(change))


def _shown(paused: frozenset[str]) -> dict[str, bool]:
    return {part: part not in paused for part in PARTS}


async def read_object(
    request: web.Request, fields: tuple[str, ...], url: str | None = None
) -> dict[str, Any]:
    """The request's JSON object with none but these fields; ``url`` stands in for an absent body."""
    raw = await request.read()
    if not raw and url is not None:
        return {"url": url}
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError(f"the body must be an object with any of {', '.join(fields)}")
    if unknown := sorted(set(body) - set(fields)):
        raise RequestError(f"unknown field: {unknown[0]}")
    return body


def _url(body: Mapping[str, Any]) -> str:
    url = body.get("url", body.get("key"))
    if not isinstance(url, str) or not url:
        raise RequestError("url: the address of an upstream is wanted, as wss://host")
    return url


def _is_pds(body: Mapping[str, Any]) -> bool | None:
    value = body.get("is_pds")
    if value is not None and not isinstance(value, bool):
        raise RequestError("is_pds must be true or false")
    return value


def _cursor(value: Any) -> int | None:
    """A sequence number, or a place by name; None is the live tail."""
    if isinstance(value, str) and value in _PLACES:
        return _PLACES[value]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEQ:
        raise RequestError('cursor must be a sequence number, "oldest" or "live"')
    return value
