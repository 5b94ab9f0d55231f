"""Faults on the wire: which requests meet one, and how its answer goes out.

Owns the middleware of every server of the network, and the ways to send badly: slowly, not to the end,
without end, not in HTTP. One event loop.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from random import Random
from typing import TYPE_CHECKING, Final

from aiohttp import web
from aiohttp.typedefs import Middleware

from indexer.simulator.account import Account
from indexer.simulator.fault_answers import KINDS, Answer, Case
from indexer.simulator.fault_cars import Subject
from indexer.simulator.faults import (
    BY_COLLECTION,
    DESCRIBE,
    DOCUMENT,
    GET_BLOCKS,
    GET_RECORD,
    GET_REPO,
    LATEST,
    LIST_HOSTS,
    LIST_REPOS,
    OTHER,
    RESOLVE_HANDLE,
    STATUS,
    WELL_KNOWN,
)

if TYPE_CHECKING:
    from indexer.simulator.network import SimulatedNetwork

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: The host of faults that befall the names of accounts, whichever server answers.
NAMES: Final = "names"
#: Whether the answer must come in one piece, because a fault works on it.
WHOLE: ContextVar[bool] = ContextVar("whole", default=False)
_ROUTES: Final = {
    "/xrpc/com.atproto.sync.getRepo": GET_REPO,
    "/xrpc/com.atproto.sync.getRecord": GET_RECORD,
    "/xrpc/com.atproto.sync.getBlocks": GET_BLOCKS,
    "/xrpc/com.atproto.sync.getRepoStatus": STATUS,
    "/xrpc/com.atproto.sync.getLatestCommit": LATEST,
    "/xrpc/com.atproto.sync.listRepos": LIST_REPOS,
    "/xrpc/com.atproto.sync.listReposByCollection": BY_COLLECTION,
    "/xrpc/com.atproto.sync.listHosts": LIST_HOSTS,
    "/xrpc/com.atproto.repo.describeRepo": DESCRIBE,
    "/xrpc/com.atproto.identity.resolveHandle": RESOLVE_HANDLE,
    "/.well-known/atproto-did": WELL_KNOWN,
    "/.well-known/did.json": DOCUMENT,
}
#: Its faults are the stream's own.
_STREAM: Final = "/xrpc/com.atproto.sync.subscribeRepos"
_TURN_S: Final = 0.02
_CHUNK: Final = 1 << 16


def host_name(request: web.Request) -> str:
    """The name that a request asks for, without its port."""
    host = request.host or ""
    return host.rpartition(":")[0] or host


def faulty(network: SimulatedNetwork, host: str) -> Middleware:
    """Middleware of ``host``: a request that meets a fault gets the fault's answer."""

    @web.middleware
    async def act(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == _STREAM:
            return await handler(request)
        route = _route(request.path, host)
        blamed = NAMES if request.path.startswith("/.well-known/") else host
        account = _account(network, request, route)
        did = account.did if account else ""
        case: Case | None = None
        for planned in network.faults.striking(blamed, route, did):
            make = KINDS[planned.fault.kind].make
            if make is None:
                continue
            if case is None:
                case = await _case(network, request, handler, route, account)
            answer = make(case, planned.fault.value)
            if answer is not None:
                planned.fire(blamed)
                return await _deliver(request, answer)
        return await handler(request)

    return act


def _route(path: str, host: str) -> str:
    return _ROUTES.get(path, DOCUMENT if host == "plc" else OTHER)


def _account(network: SimulatedNetwork, request: web.Request, route: str) -> Account | None:
    """Whom the request is about, as far as this network knows them."""
    accounts = network.world.accounts
    if route == DOCUMENT:
        return accounts.get(request.path[1:]) or accounts.get("did:web:" + request.host.replace(":", "%3A"))
    if route in (WELL_KNOWN, RESOLVE_HANDLE):
        handle = host_name(request) if route == WELL_KNOWN else request.query.get("handle", "")
        return network.by_handle(handle)
    return accounts.get(request.query.get("repo" if route == DESCRIBE else "did", ""))


async def _case(
    network: SimulatedNetwork, request: web.Request, handler: Handler, route: str, account: Account | None
) -> Case:
    """The request with its honest answer."""
    token = WHOLE.set(True)
    try:
        honest = await handler(request)
    except web.HTTPException as refusal:
        honest = refusal
    finally:
        WHOLE.reset(token)
    body = honest.body if isinstance(honest, web.Response) and isinstance(honest.body, bytes) else b""
    subject = None
    if account is not None:
        rng = Random(f"{network.config.seed}/{sum(network.faults.fired.values())}")
        subject = Subject(account, list(network.world.accounts.values()), rng, None)
    return Case(str(request.url), route, honest.status, body, honest.content_type, subject)


async def _deliver(request: web.Request, answer: Answer) -> web.StreamResponse:
    """Sends an answer in its own way; a client that leaves ends it."""
    if answer.raw:
        return await _deliver_raw(request, answer)
    response = web.StreamResponse(status=answer.status, headers=dict(answer.headers))
    response.content_type = answer.kind
    if answer.length is not None:
        response.content_length = answer.length
    await response.prepare(request)
    await _send(response, answer.body, answer.rate)
    if answer.end == "complete":
        await response.write_eof()
    elif answer.end == "endless":
        while True:  # ends with the connection
            await response.write(bytes(_CHUNK))
    elif answer.end == "stall":
        await asyncio.get_running_loop().create_future()  # cancelled with the connection
    else:
        _reset(request)
    return response


async def _send(response: web.StreamResponse, body: bytes, rate: float) -> None:
    if not rate:
        await response.write(body)
        return
    size = max(1, int(rate * _TURN_S))
    for start in range(0, len(body), size):
        await response.write(body[start : start + size])
        await asyncio.sleep(size / rate)


async def _deliver_raw(request: web.Request, answer: Answer) -> web.StreamResponse:
    if request.transport is not None and answer.body:
        request.transport.write(answer.body)
        request.transport.close()
        return web.Response()
    if answer.end == "stall":
        await asyncio.get_running_loop().create_future()
    _reset(request)
    return web.Response()


def _reset(request: web.Request) -> None:
    """Ends the connection without a goodbye."""
    if request.transport is None:
        return
    sock = request.transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()
