"""`/filter` of the management API: what is followed and which collections are kept.

Owns the request's form: a list replaces, an object patches (`{"app.bsky.*": true, "x.y.z": false}`). The
stored rows stand above the settings. Collections that were left out so far make the followed repositories
queue for a fetch; collections no longer kept make them incomplete. One change at a time: what is read,
patched, stored and told to ingest is one step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web

from indexer.errors import RequestError, SyntaxInvalid
from indexer.ingest.filters import LISTS, Filters
from indexer.serve.http_errors import json_response
from indexer.store.codecs import SyncState, did_range
from indexer.store.keyspaces import FILTER

if TYPE_CHECKING:
    from indexer.serve.services import Services
    from indexer.store.transaction import Transaction

_FIELDS: Final = ("mode", *LISTS)
_MAX_ITEMS: Final = 100_000
_STEP: Final = 500


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
        """Stores new filters, tells ingest, queues what they affect."""
        services, body = self._services, await request.read()

        def change(tx: Transaction) -> tuple[Filters, Filters]:
            stored = _rows(tx)
            old = services.filters.with_rows(stored)
            new = patched(old, body)
            _store(tx, set(stored), set(new.rows()))
            return old, new

        async with self._turn:
            old, new = await services.writer.run("filter_patch", change)
            if services.ingest is not None:
                services.ingest.set_filters(new)
            queued = 0
            if new.collections != old.collections and not services.db.mode.ephemeral:
                queued = await self._revisit(refetch=new.widens(old), whole=not new.collections)
        return json_response({**_shown(new), "queued": queued})

    async def _revisit(self, *, refetch: bool, whole: bool) -> int:
        """Marks every followed repository after a change of collections, some hundred rows a unit."""
        changed, after = 0, ""
        while rows := self._services.db.repos(after=after, limit=_STEP):
            after = rows[-1][0]
            dids = [did for did, row in rows if row.tracked]

            def mark(tx: Transaction, dids: list[str] = dids) -> int:
                return sum(_mark(tx, did, refetch=refetch, whole=whole) for did in dids)

            changed += await self._services.writer.run("filter_revisit", mark)
            await asyncio.sleep(0)
        if refetch and self._services.backfill is not None:
            self._services.backfill.wake()
        return changed if refetch else 0


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


def _mark(tx: Transaction, did: str, *, refetch: bool, whole: bool) -> bool:
    """An account that is not active is fetched when it is again: its state says so, nothing is due."""
    row = tx.repo(did)
    if row is None or not row.tracked:
        return False
    if not whole:
        row = row._replace(complete=False)
    if refetch:
        due = tx.now_us if row.status.active else 0
        state = SyncState.DESYNCHRONIZED if row.rev else SyncState.PENDING
        row = row._replace(state=state, due=due, attempt=0)
    tx.set_repo(did, row)
    return row.due > 0
