"""Errors as HTTP answers: every one is XRPC-shaped, `{"error": name, "message": text}`.

Owns the middleware that turns our exceptions, aiohttp's (404, 405, 413, …) and surprises (500, logged)
into that shape, and that bounds how long a query may take. Leaves the meaning of an error to who raised it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from math import inf
from typing import Any, NamedTuple, TypeVar

import orjson
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from indexer.errors import (
    BadInput,
    FetchError,
    IdentityGone,
    IdentityUnavailable,
    RequestError,
    StoreError,
)

T = TypeVar("T")
log = structlog.get_logger(__name__)


#: HTTP errors that aiohttp raises by itself → the name in our shape
_NAMES = {
    400: "InvalidRequest",
    401: "AuthenticationRequired",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    413: "PayloadTooLarge",
    415: "UnsupportedMediaType",
    426: "UpgradeRequired",
}
#: What else an answer of a status says
_HEADERS = {
    426: {"Upgrade": "websocket", "Connection": "Upgrade"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}


def ready(part: T | None, otherwise: str) -> T:
    """A part of the daemon that a request needs; `RequestError` (503) where it is not there."""
    if part is None:
        raise RequestError(otherwise, status=503, name="NotReady")
    return part


def json_response(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """``value`` as a JSON answer."""
    return web.Response(
        body=orjson.dumps(value), status=status, content_type="application/json", headers=headers
    )


def error_response(
    status: int, name: str, message: str, headers: dict[str, str] | None = None
) -> web.Response:
    """An XRPC-shaped error."""
    return json_response({"error": name, "message": message}, status=status, headers=headers)


def as_response(error: Exception) -> web.Response:
    """The answer to an exception: bad input is the caller's, everything else ours (and logged)."""
    match error:
        case RequestError():
            return error_response(error.status, error.name, str(error), _HEADERS.get(error.status))
        case web.HTTPRequestEntityTooLarge():
            return error_response(413, "PayloadTooLarge", error.text or error.reason)
        case web.HTTPException():
            name = _NAMES.get(error.status, error.reason.replace(" ", ""))
            kept = {key: error.headers[key] for key in ("Allow",) if key in error.headers}
            return error_response(error.status, name, error.reason, kept)
        case BadInput():
            return error_response(400, "InvalidRequest", str(error))
        case IdentityGone():
            return error_response(400, "RepoNotFound", "the identity could not be resolved")
        case IdentityUnavailable() | FetchError():
            log.warning("upstream_failure", error=str(error), reason=error.reason)
            return error_response(502, "UpstreamFailure", "another server did not answer as it should")
        case TimeoutError():
            return error_response(504, "RequestTimeout", "the query took longer than it may")
        case StoreError():
            log.error("query_store_error", error=str(error), reason=error.reason)
            return error_response(500, "InternalServerError", "the store failed")
        case _:
            log.error("query_failed", exc_info=error)
            return error_response(500, "InternalServerError", "internal error")


def errors_middleware(timeout: float, unbounded: frozenset[str] = frozenset()) -> Middleware:
    """Middleware: errors in our shape, and a time limit for all but the ``unbounded`` routes."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = request.path if resource is None else resource.canonical
        limit = None if route in unbounded else timeout
        try:
            async with asyncio.timeout(limit):
                return await handler(request)
        except Exception as error:
            return as_response(error)

    return middleware


class Terms(NamedTuple):
    """How long a reader may take, in seconds: for one piece, and for all. ``rate`` is the least mean rate in
    bytes a second, over the time that we wait for the reader and beyond one piece's time."""

    piece: float
    total: float = inf
    rate: float = 0.0


class Patience:
    """Waits for one reader, within the terms."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._clock = asyncio.get_running_loop().time
        self._ends = self._clock() + terms.total
        self._sent = 0
        self._waited = 0.0

    async def wait(self, writing: Coroutine[Any, Any, None], size: int) -> None:
        """Raises TimeoutError when the reader takes longer than it may."""
        began = self._clock()
        self._sent += size
        left = min(self._terms.piece, self._ends - began)
        if self._terms.rate:
            left = min(left, self._terms.piece + self._sent / self._terms.rate - self._waited)
        async with asyncio.timeout(max(left, 0.0)):
            await writing
        self._waited += self._clock() - began


async def send_pieces(
    request: web.Request,
    response: web.StreamResponse,
    pieces: AsyncGenerator[bytes, None],
    terms: Terms,
) -> web.StreamResponse:
    """Streams an answer. Its status is on its way, so a failure can only cut the connection, which the
    reader sees as an incomplete body; so does one who is slower than the terms allow."""
    await response.prepare(request)
    patience = Patience(terms)
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                await patience.wait(response.write(piece), len(piece))
        await patience.wait(response.write_eof(), 0)
    except ConnectionError:
        pass
    except Exception as error:
        report = log.error if isinstance(error, StoreError) else log.warning
        report("answer_cut_short", path=request.path, error=str(error) or type(error).__name__)
        if request.transport is not None:
            request.transport.abort()
    return response
