"""`/repos/{did}/archive` of the management API: the CARs that were kept of a repository, as fetched.

Owns the form of these answers. The bytes come from the byte store, which verifies what it reads: a
damaged file breaks the answer off. Reads go to threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from aiohttp import web

from indexer.atproto.syntax import check_tid
from indexer.errors import RequestError
from indexer.serve.http_errors import Terms, json_response, ready, send_pieces
from indexer.serve.xrpc.params import Params, checked_did

if TYPE_CHECKING:
    from indexer.serve.services import Services
    from indexer.store.archives import Archive, Archives

ARCHIVE: Final = "/repos/{did}/archive"
_PIECE: Final = 1 << 20


class ArchiveRoutes:
    """Handlers of `/repos/{did}/archive` and `/repos/{did}/archives`."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def add_to(self, app: web.Application) -> None:
        app.router.add_get(ARCHIVE, self.content)
        app.router.add_get("/repos/{did}/archives", self.listed)

    async def listed(self, request: web.Request) -> web.StreamResponse:
        """What is archived of a repository, newest first."""
        did = checked_did(request.match_info["did"])
        return json_response({"did": did, "archives": [_described(row) for row in self._archives.of(did)]})

    async def content(self, request: web.Request) -> web.StreamResponse:
        """The newest archived CAR, or that of a ``rev``."""
        did, archives = checked_did(request.match_info["did"]), self._archives
        rev = Params(request.query).optional("rev", check_tid)
        archive = next((row for row in archives.of(did) if rev in (None, row.rev)), None)
        if archive is None:
            what = f"no CAR of {did}" + (f" at {rev}" if rev else "")
            raise RequestError(f"{what} is archived; see archive.cars", status=404, name="ArchiveNotFound")
        response = web.StreamResponse(
            headers={
                "Content-Type": "application/vnd.ipld.car",
                "Content-Length": str(archive.size),
                "ETag": f'"{archive.digest.hex()}"',
            }
        )
        file = await archives.open(archive)
        try:
            terms = Terms(self._services.settings.public.request_timeout)
            return await send_pieces(request, response, _pieces(file), terms)
        finally:
            await asyncio.to_thread(file.close)

    @property
    def _archives(self) -> Archives:
        return ready(self._services.archives, "no archive is open")


async def _pieces(file: BinaryIO) -> AsyncGenerator[bytes, None]:
    while piece := await asyncio.to_thread(file.read, _PIECE):
        yield piece


def _described(archive: Archive) -> dict[str, Any]:
    return {
        "rev": archive.rev,
        "time_us": archive.time_us,
        "bytes": archive.size,
        "sha256": archive.digest.hex(),
    }
