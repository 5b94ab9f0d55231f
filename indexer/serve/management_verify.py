"""`/repos/{did}/verify` of the management API: a repository's tree rebuilt and compared with its commit."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from aiohttp import web

from indexer.ingest.audit import audit
from indexer.serve.http_errors import json_response
from indexer.serve.xrpc import access
from indexer.serve.xrpc.params import checked_did

if TYPE_CHECKING:
    from indexer.serve.services import Services

VERIFY: Final = "/repos/{did}/verify"
_AT_ONCE: Final = 2


class VerifyRoutes:
    """The handler of `/repos/{did}/verify`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._slots = asyncio.Semaphore(_AT_ONCE)

    def add_to(self, app: web.Application) -> None:
        app.router.add_post(VERIFY, self.verify)

    async def verify(self, request: web.Request) -> web.StreamResponse:
        """What the audit finds; a mismatch is an answer, not an error."""
        services = self._services
        access.require_records(services)
        did = checked_did(request.match_info["did"])
        async with self._slots:
            found = await audit(services.db, services.pool, did)
        return json_response(found._asdict())
