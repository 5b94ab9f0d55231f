"""`com.atproto.sync.getHostStatus` and `listHosts`: the hosts that this index takes accounts from."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from indexer.backfill.host_book import HostBook, HostInfo, host_name
from indexer.errors import RequestError
from indexer.serve.http_errors import json_response, ready
from indexer.serve.xrpc.access import Context
from indexer.serve.xrpc.params import Params

MAX_HOSTS = 1000


async def get_host_status(context: Context, params: Params, _request: web.Request) -> web.StreamResponse:
    """One host, by ``hostname``."""
    host, book = host_name(params.required("hostname")), _book(context)
    if not book.known(host):
        raise RequestError(f"nothing is known of {host}", name="HostNotFound")
    return json_response(_shown(book.info(host)))


async def list_hosts(context: Context, params: Params, _request: web.Request) -> web.StreamResponse:
    """A page of the hosts, in the order of their names."""
    limit, cursor = params.integer("limit", 200, 1, MAX_HOSTS), params.optional("cursor") or ""
    found = _book(context).page(cursor, limit + 1)
    answer: dict[str, Any] = {"hosts": [_shown(info) for info in found[:limit]]}
    if len(found) > limit:
        answer["cursor"] = found[limit - 1].host
    return json_response(answer)


def _book(context: Context) -> HostBook:
    return ready(context.services.hosts, "nothing is fetched here")


def _shown(info: HostInfo) -> dict[str, Any]:
    seq = {} if info.seq is None else {"seq": info.seq}
    return {"hostname": info.host, **seq, "accountCount": info.accounts, "status": info.status}
