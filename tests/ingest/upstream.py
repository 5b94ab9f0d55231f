"""An upstream that does as it is told: what it sends to each connection, what it lists. For tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

LIST_REPOS = "/xrpc/com.atproto.sync.listRepos"
SUBSCRIBE = "/xrpc/com.atproto.sync.subscribeRepos"


class Scripted:
    """``answer`` gives the frames for a connection's cursor; connections then stay open, or are closed."""

    def __init__(self) -> None:
        self.url = ""
        self.cursors: list[str | None] = []
        self.answer: Callable[[str | None], Sequence[bytes]] = lambda _cursor: ()
        self.close_after = False
        self.pages: dict[str, tuple[int, Any]] = {"": (200, {"repos": []})}  # by cursor
        self.listed: list[str] = []
        self._sockets: set[web.WebSocketResponse] = set()

    async def subscribe(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        cursor = request.query.get("cursor")
        self.cursors.append(cursor)
        self._sockets.add(socket)
        try:
            for frame in self.answer(cursor):
                await socket.send_bytes(frame)
            if not self.close_after:
                await socket.receive()
            await socket.close()
        except ConnectionError:
            pass
        finally:
            self._sockets.discard(socket)
        return socket

    async def list_repos(self, request: web.Request) -> web.Response:
        cursor = request.query.get("cursor", "")
        self.listed.append(cursor)
        status, body = self.pages[cursor]
        return web.json_response(body, status=status)

    async def send(self, frame: bytes) -> None:
        """To whoever is connected."""
        for socket in list(self._sockets):
            await socket.send_bytes(frame)

    async def drop(self) -> None:
        """Closes every connection."""
        for socket in list(self._sockets):
            await socket.close()


@asynccontextmanager
async def scripted() -> AsyncIterator[Scripted]:
    made = Scripted()
    app = web.Application()
    app.router.add_get(SUBSCRIBE, made.subscribe)
    app.router.add_get(LIST_REPOS, made.list_repos)
    runner = web.AppRunner(app, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"ws://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield made
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw(talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[str]:
    """A TCP server that talks as it likes; its WebSocket URL."""
    writers: list[asyncio.StreamWriter] = []

    async def kept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass

    server = await asyncio.start_server(kept, "127.0.0.1", 0)
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await server.wait_closed()
