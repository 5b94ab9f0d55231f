"""`/xrpc/{method}`: from a method's name to its query, with CORS and the errors of the protocol.

Owns the table of queries. Unknown methods answer 501 `MethodNotImplemented`, other verbs than GET on a
known one 405.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from indexer.errors import RequestError
from indexer.serve.http_errors import error_response
from indexer.serve.services import Services
from indexer.serve.xrpc import hosts, records, sync
from indexer.serve.xrpc.access import Context, Slots
from indexer.serve.xrpc.params import Params
from indexer.serve.xrpc.trees import Trees

Query = Callable[[Context, Params, web.Request], Awaitable[web.StreamResponse]]

QUERIES: Final[dict[str, Query]] = {
    "com.atproto.repo.getRecord": records.get_record,
    "com.atproto.repo.listRecords": records.list_records,
    "com.atproto.repo.describeRepo": records.describe_repo,
    "com.atproto.sync.getRepo": sync.get_repo,
    "com.atproto.sync.getRecord": sync.get_record,
    "com.atproto.sync.getBlocks": sync.get_blocks,
    "com.atproto.sync.getLatestCommit": sync.get_latest_commit,
    "com.atproto.sync.getRepoStatus": sync.get_repo_status,
    "com.atproto.sync.listRepos": sync.list_repos,
    "com.atproto.sync.getHostStatus": hosts.get_host_status,
    "com.atproto.sync.listHosts": hosts.list_hosts,
}
#: Queries that bound their own time, piece by piece.
STREAMED: Final = frozenset({"/xrpc/com.atproto.sync.getRepo"})

_CORS: Final = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": "*",
}
_PREFLIGHT: Final = {
    **_CORS,
    "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS",
    "Access-Control-Allow-Headers": "*",
    "Access-Control-Max-Age": "86400",
}


class Xrpc:
    """The queries of one server, with what they share."""

    def __init__(self, services: Services) -> None:
        limits = services.settings.xrpc
        self.trees = Trees(
            services.pool,
            cache_bytes=limits.tree_cache_mib << 20,
            max_records=limits.rebuild_max_records,
        )
        self.answers: Counter[tuple[str, int]] = Counter()
        self._context = Context(
            services, self.trees, Slots(limits.max_concurrent, limits.max_concurrent_per_address)
        )

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers one query."""
        method = request.match_info["method"]
        if request.method == "OPTIONS":
            return web.Response(status=204, headers=_PREFLIGHT)
        query = QUERIES.get(method)
        if query is None:
            raise RequestError(f"method {method} is not served here", status=501, name="MethodNotImplemented")
        if request.method not in ("GET", "HEAD"):
            return error_response(
                405, "InvalidRequest", f"{method} is a query: use GET", {"Allow": "GET, HEAD, OPTIONS"}
            )
        return await query(self._context, Params(request.query), request)

    async def on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """Signal of the application: any origin may read XRPC answers; each is counted."""
        method = request.match_info.get("method")
        if method is not None:
            response.headers.update(_CORS)
            self.answers[method if method in QUERIES else "unknown", response.status] += 1
