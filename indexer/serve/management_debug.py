"""`/debug` of the management API: refused frames, and rows of any keyspace, as they are stored.

Reads only, a bounded piece at a time, off the loop. Keyspaces, keys and values are shown by their table.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from indexer.atproto.syntax import check_did
from indexer.errors import RequestError
from indexer.ingest import quarantine
from indexer.serve.http_errors import json_response
from indexer.serve.xrpc.params import Params, whole_number
from indexer.store.codecs import after_prefix
from indexer.store.keyspaces import KEYSPACES, QUARANTINE, Keyspace

if TYPE_CHECKING:
    from indexer.serve.services import Services

_MAX_ROWS: Final = 1_000
_SHOWN: Final = 2_000
_MAX_KEY: Final = 8_192


class DebugRoutes:
    """Handlers of `/debug`."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/debug/quarantine", self.list_refused)
        app.router.add_get("/debug/quarantine/{id}", self.show_refused)
        app.router.add_get("/debug/iter", self.rows)
        app.router.add_get("/debug/get", self.row)

    async def list_refused(self, request: web.Request) -> web.StreamResponse:
        """Refused frames, newest first: `did`, `reason`, `source`, `limit`, `cursor`."""
        params = Params(request.query)
        wanted = quarantine.Wanted(
            params.optional("did", check_did), params.optional("reason"), params.optional("source")
        )
        before = params.optional_integer("cursor")
        limit = params.integer("limit", 100, 1, quarantine.MAX_PAGE)
        found = await asyncio.to_thread(
            quarantine.list_refused, self._services.db, wanted, before=before, limit=limit
        )
        answer: dict[str, Any] = {"entries": [quarantine.summary(*entry) for entry in found.entries]}
        if found.cursor is not None:
            answer["cursor"] = str(found.cursor)
        return json_response(answer)

    async def show_refused(self, request: web.Request) -> web.StreamResponse:
        """One refused frame, decoded as far as it can be; its bytes with ``raw=true``."""
        number = whole_number("id", request.match_info["id"])
        row = self._services.db.get(QUARANTINE, number)
        if row is None:
            message = f"no refused frame has the number {number}; older ones leave when the ring is full"
            raise RequestError(message, status=404, name="NotFound")
        if Params(request.query).flag("raw"):
            return web.Response(body=row.data, content_type="application/octet-stream")
        return json_response(await asyncio.to_thread(quarantine.details, number, row))

    async def rows(self, request: web.Request) -> web.StreamResponse:
        """Rows of a keyspace in the order of their keys: `keyspace`, `prefix`, `cursor` (hex), `limit`."""
        params = Params(request.query)
        keyspace = _keyspace(params)
        prefix = _key(params, "prefix") or b""
        cursor = params.optional("cursor")
        start = prefix if cursor is None else _unhex("cursor", cursor) + b"\0"
        limit = params.integer("limit", 100, 1, _MAX_ROWS)
        rows = await asyncio.to_thread(self._rows, keyspace, max(start, prefix), after_prefix(prefix), limit)
        answer: dict[str, Any] = {"keyspace": keyspace.name, "rows": rows}
        if len(rows) == limit:
            answer["cursor"] = rows[-1]["key_hex"]
        return json_response(answer)

    def _rows(
        self, keyspace: Keyspace[Any, Any], start: bytes, stop: bytes | None, limit: int
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for key, value in self._services.db.raw_scan(keyspace.name, start, stop):
            rows.append(_described(keyspace, key, value))
            if len(rows) == limit:
                break
        return rows

    async def row(self, request: web.Request) -> web.StreamResponse:
        """One row: `keyspace`, `key` (as text) or `key_hex`."""
        params = Params(request.query)
        keyspace = _keyspace(params)
        key = _key(params, "key")
        if key is None:
            raise RequestError("parameter key or key_hex is required")
        value = self._services.db.raw_get(keyspace.name, key)
        if value is None:
            raise RequestError(f"{keyspace.name} has no such row", status=404, name="NotFound")
        return json_response(_described(keyspace, key, value))


def _keyspace(params: Params) -> Keyspace[Any, Any]:
    name = params.required("keyspace")
    if name not in KEYSPACES:
        raise RequestError(f"parameter keyspace: one of {', '.join(KEYSPACES)} is wanted")
    return KEYSPACES[name]


def _key(params: Params, name: str) -> bytes | None:
    """A key or the beginning of one: as text, with a NUL where the parts of a key meet, or as hex."""
    text, digits = params.optional(name), params.optional(f"{name}_hex")
    if text is not None and digits is not None:
        raise RequestError(f"parameters {name} and {name}_hex exclude each other")
    if digits is not None:
        return _unhex(f"{name}_hex", digits)
    return None if text is None else text.encode("utf-8", "surrogateescape")[:_MAX_KEY]


def _unhex(name: str, digits: str) -> bytes:
    try:
        return bytes.fromhex(digits)[:_MAX_KEY]
    except ValueError as error:
        raise RequestError(f"parameter {name}: hexadecimal digits are wanted") from error


def _described(keyspace: Keyspace[Any, Any], key: bytes, value: bytes) -> dict[str, Any]:
    """A row for people; one that does not decode says so."""
    row: dict[str, Any] = {"key_hex": key.hex(), "bytes": len(value)}
    try:
        shown = keyspace.show(keyspace.key.decode(key), keyspace.value.decode(value))
    except Exception as error:  # a damaged row is what such a look is for
        return {**row, "problem": f"does not decode: {error}"[:_SHOWN], "value_hex": value[:_SHOWN].hex()}
    return {**row, "row": shown[:_SHOWN]}
