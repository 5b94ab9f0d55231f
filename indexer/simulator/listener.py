"""One HTTP listener on loopback: a wanted port when it is free, any other when it is not.

Owns the aiohttp runner. One event loop.
"""

from __future__ import annotations

from aiohttp import web


class Listener:
    def __init__(self, runner: web.AppRunner, host: str, port: int) -> None:
        self._runner = runner
        self.host = host
        self.port = port

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @classmethod
    async def open(cls, app: web.Application, host: str, port: int, *, exact: bool = False) -> Listener:
        """Listens on the port, or on any free one when it is taken and need not be ``exact``."""
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError:
            if exact or not port:
                await runner.cleanup()
                raise
            await web.TCPSite(runner, host, 0).start()
        return cls(runner, host, runner.addresses[-1][1])

    async def close(self) -> None:
        await self._runner.cleanup()
