"""One HTTP listener: binds, tells where it is, stops; and whose address a request comes from.

Owns the aiohttp runner and site of an application. Leaves routes to the two servers.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from aiohttp import web

from indexer.config import parse_bind
from indexer.errors import ConfigError

#: Time that running answers get when the listener stops, in seconds.
_SHUTDOWN_S = 3.0
_LINE_BYTES = 8190


class Listener:
    """An application on an ``address:port``; ``setting`` names it in errors."""

    def __init__(self, app: web.Application, bind: str, setting: str, *, max_line: int = _LINE_BYTES) -> None:
        self._bind = bind
        self._setting = setting
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=_SHUTDOWN_S,
            max_line_size=max(max_line, _LINE_BYTES),
        )

    async def start(self) -> None:
        """Listens; raises `ConfigError` when the address cannot be had."""
        host, port = parse_bind(self._bind)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self._runner.cleanup()
            busy = error.errno == errno.EADDRINUSE
            why = "another program listens there" if busy else (error.strerror or str(error))
            raise ConfigError(
                f"cannot listen on {self._bind}: {why}; choose another {self._setting}"
            ) from error

    async def stop(self) -> None:
        """Closes the socket, gives running answers a moment, ends the rest."""
        await self._runner.cleanup()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port in use, after `start`."""
        name = self._runner.addresses[0]
        return name[0], name[1]

    @property
    def url(self) -> str:
        """The base URL for a client on this machine."""
        host, port = self.address
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1"
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def client_address(request: web.BaseRequest, trusted_proxies: Sequence[str]) -> str:
    """The address that the request comes from: the last one in X-Forwarded-For that no trusted proxy has."""
    address = request.remote or ""
    networks = _networks(tuple(trusted_proxies))
    if not networks:
        return address
    hops = [
        hop.strip() for value in request.headers.getall("X-Forwarded-For", []) for hop in value.split(",")
    ]
    while hops and _within(address, networks):
        address = hops.pop()
    return address


@lru_cache(maxsize=8)
def _networks(items: tuple[str, ...]) -> tuple[IPv4Network | IPv6Network, ...]:
    try:
        return tuple(ip_network(item, strict=False) for item in items)
    except ValueError as error:
        raise ConfigError(f"setting public.trusted_proxies: {error}") from error


def _within(address: str, networks: tuple[IPv4Network | IPv6Network, ...]) -> bool:
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)
