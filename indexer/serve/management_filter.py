"""`/filter` of the management API: what is followed and which collections are kept.

Owns the request's form: a list replaces, an object patches (`{"app.bsky.*": true, "x.y.z": false}`). The
stored rows stand above the settings. One change at a time: what is read, patched, stored and told to ingest
is one step, and the round through the repositories that it affects (`revisit`) is planned in the same batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web

from indexer.errors import RequestError, SyntaxInvalid
from indexer.ingest.filters import LISTS, Filters
from indexer.ingest.revisit import NOTHING_TO_DO
from indexer.serve.http_errors import json_response
from indexer.serve.xrpc.params import Params
from indexer.store.codecs import did_range
from indexer.store.keyspaces import FILTER

if TYPE_CHECKING:
    from indexer.serve.services import Services
    from indexer.store.transaction import Transaction

_FIELDS: Final = ("mode", *LISTS)
_MAX_ITEMS: Final = 100_000


class FilterRoutes:
    """Handlers of `/filter`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._turn = asyncio.Lock()

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/filter", self.show)
        app.router.add_patch("/filter", self.patch)

    async def show(self, _request: web.Request) -> web.StreamResponse:
        return json_response(_shown(self._services.current_filters()))

    async def patch(self, request: web.Request) -> web.StreamResponse:
        """Stores new filters, tells ingest; the answer says what became of the repositories so far."""
        services, body = self._services, await request.read()
        purge = Params(request.query).flag("purge")
        round_ = services.revisit

        def change(tx: Transaction) -> tuple[Filters, bool]:
            stored = _rows(tx)
            old = services.filters.with_rows(stored)
            new = patched(old, body)
            _store(tx, set(stored), set(new.rows()))
            return new, round_.plan(tx, old, new, purge=purge)

        async with self._turn, round_.changing():
            new, affects = await services.writer.run("filter_patch", change)
            if services.ingest is not None:
                services.ingest.set_filters(new)
            if services.crawler is not None:
                services.crawler.look_again()
        wait = services.settings.filter.answer_wait
        done, queued, purged = await round_.progress(wait) if affects else NOTHING_TO_DO
        if queued and services.backfill is not None:
            services.backfill.wake()
        return json_response({**_shown(new), "done": done, "queued": queued, "purged": purged})


def patched(old: Filters, body: bytes) -> Filters:
    """``old`` changed as the body says; `RequestError` names the field at fault."""
    try:
        changes = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(changes, dict) or not changes:
        raise RequestError(f"the body must be an object with any of {', '.join(_FIELDS)}")
    if unknown := sorted(set(changes) - set(_FIELDS)):
        raise RequestError(f"unknown field: {unknown[0]}")
    lists = {name: _patched_list(name, getattr(old, name), changes.get(name, {})) for name in LISTS}
    try:
        return Filters.checked(changes.get("mode", old.mode), **lists)
    except SyntaxInvalid as error:
        raise RequestError(str(error)) from error


def _patched_list(name: str, old: Collection[str], change: Any) -> list[str]:
    if isinstance(change, list):
        items = change
    elif isinstance(change, dict) and all(isinstance(keep, bool) for keep in change.values()):
        kept = [item for item in old if change.get(item, True)]
        items = kept + [item for item, keep in change.items() if keep and item not in old]
        if name == "collections" and old and not items:
            raise RequestError(
                "nothing would be left of collections, and an empty list keeps all of them; if that is meant,"
                " replace it by [] (`indexer filter set collections --clear`)"
            )
    else:
        raise RequestError(f"{name} must be a list, or an object of items to true (keep) or false (drop)")
    if not all(isinstance(item, str) for item in items):
        raise RequestError(f"the items of {name} must be strings")
    if len(items) > _MAX_ITEMS:
        raise RequestError(f"{name} must hold at most {_MAX_ITEMS} items")
    return items


def _shown(filters: Filters) -> dict[str, Any]:
    return {
        "mode": filters.mode,
        "signals": list(filters.signals),
        "collections": list(filters.collections),
        "excludes": sorted(filters.excludes),
    }


def _rows(tx: Transaction) -> list[tuple[str, str]]:
    """The stored rows, with what earlier units of the same commit changed."""
    return [
        FILTER.key.decode(key) for kind in _FIELDS for key, _ in tx.raw_scan(FILTER.name, *did_range(kind))
    ]


def _store(tx: Transaction, stored: set[tuple[str, str]], wanted: set[tuple[str, str]]) -> None:
    for kind, item in stored - wanted:
        tx.drop_filter(kind, item)
    for kind, item in wanted - stored:
        tx.set_filter(kind, item)
