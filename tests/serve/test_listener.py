"""The listener under the loop that the daemon runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from aiohttp import web

from indexer.config import ListenerSettings
from indexer.serve.listener import Listener


async def _answer() -> bytes:
    async def handle(_request: web.Request) -> web.Response:
        return web.Response(text="here")

    app = web.Application()
    app.router.add_get("/", handle)
    listener = Listener(app, "127.0.0.1:0", "public.bind", ListenerSettings())
    await listener.start()
    try:
        reader, writer = await asyncio.open_connection(*listener.address)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(5):
            answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer
    finally:
        await listener.stop()


def _uvloop() -> asyncio.AbstractEventLoop:
    loop: asyncio.AbstractEventLoop = pytest.importorskip("uvloop").new_event_loop()
    return loop


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, _uvloop])
def test_it_answers_on_each_event_loop(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        assert runner.run(_answer()).endswith(b"here")
