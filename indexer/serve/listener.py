"""One HTTP listener: binds, lets connections in, tells where it is, stops; and whose address a request has.

Owns the aiohttp runner of an application, the bound on open connections, and the time that one may take
to ask its first question. Leaves routes to the two servers. One event loop.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, cast

from aiohttp import web
from aiohttp.typedefs import Handler

from indexer.config import ListenerSettings, Settings, parse_bind
from indexer.errors import ConfigError

#: Time that running answers get when the listener stops, in seconds.
_SHUTDOWN_S = 3.0
_LINE_BYTES = 8190
_BACKLOG = 128
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\nRetry-After: 1\r\n\r\n"
)


class Gate:
    """How many connections are open, in total and by address."""

    def __init__(self, limits: ListenerSettings) -> None:
        self._limits = limits
        self._open: Counter[str] = Counter()
        self.refused = 0

    @property
    def header_timeout(self) -> float:
        return self._limits.header_timeout

    def enter(self, address: str) -> bool:
        """Whether one more connection of ``address`` is let in. Trusted proxies speak for many."""
        share = self._limits.max_connections_per_address
        is_full = self._open.total() >= self._limits.max_connections
        if not is_full and self._open[address] >= share:
            is_full = not _within(address, _networks(tuple(self._limits.trusted_proxies)))
        if is_full:
            self.refused += 1
            return False
        self._open[address] += 1
        return True

    def leave(self, address: str) -> None:
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


class Connection(web.RequestHandler):
    """A connection that the gate has let in, closed when its first request does not come in time.

    Later requests have the keep-alive time of aiohttp, headers included.
    """

    __slots__ = ("_address", "_gate", "_late")

    def __init__(self, server: web.Server, gate: Gate, **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._gate = gate
        self._address: str | None = None
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if peer else ""
        if not self._gate.enter(address):
            transport.write(_FULL)
            transport.close()
            return
        self._address = address
        self._late = asyncio.get_running_loop().call_later(self._gate.header_timeout, transport.abort)
        super().connection_made(transport)

    def asked(self) -> None:
        """The first request's headers are here."""
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def data_received(self, data: bytes) -> None:
        if self._address is not None:
            super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._address is not None:
            self.asked()
            self._gate.leave(self._address)
            super().connection_lost(exc)


@web.middleware
async def _note_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    if isinstance(request.protocol, Connection):
        request.protocol.asked()
    return await handler(request)


class Listener:
    """An application on an ``address:port``; ``setting`` names it in errors."""

    def __init__(
        self,
        app: web.Application,
        bind: str,
        setting: str,
        limits: ListenerSettings,
        *,
        max_line: int = _LINE_BYTES,
    ) -> None:
        self._bind = bind
        self._setting = setting
        self.gate = Gate(limits)
        self._options: dict[str, Any] = {
            "access_log": None,
            "max_line_size": max(max_line, _LINE_BYTES),
            "keepalive_timeout": limits.idle_timeout,
        }
        app.middlewares.insert(0, _note_request)
        self._runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=_SHUTDOWN_S, **self._options)
        self._server: asyncio.Server | None = None
        self._name: tuple[str, int] | None = None

    async def start(self) -> None:
        """Listens; raises `ConfigError` when the address cannot be had."""
        host, port = parse_bind(self._bind)
        await self._runner.setup()
        try:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(self._connection, host, port, backlog=_BACKLOG)
            self._name = self._server.sockets[0].getsockname()[:2]
        except OSError as error:
            await self.stop()
            raise _refused(self._bind, self._setting, error) from error

    async def stop(self) -> None:
        """Closes the socket, gives running answers a moment, ends the rest."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()

    def _connection(self) -> Connection:
        assert self._runner.server is not None
        return Connection(self._runner.server, self.gate, **self._options)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port in use, after `start`."""
        assert self._name is not None
        return self._name

    @property
    def url(self) -> str:
        """The base URL for a client on this machine."""
        host, port = self.address
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1"
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def expect_free_addresses(settings: Settings) -> None:
    """Raises `ConfigError` when an address of the settings cannot be listened on now."""
    for setting in ("public", "management", "metrics"):
        bind = getattr(settings, setting).bind
        if bind:
            expect_free(bind, f"{setting}.bind")


def expect_free(bind: str, setting: str) -> None:
    """Raises `ConfigError`, which names the ``setting``, when the ``address:port`` cannot be had now."""
    host, port = parse_bind(bind)
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        raise _refused(bind, setting, error) from error


def _refused(bind: str, setting: str, error: OSError) -> ConfigError:
    busy = error.errno == errno.EADDRINUSE
    why = "another program listens there" if busy else (error.strerror or str(error))
    return ConfigError(f"cannot listen on {bind}: {why}; choose another {setting}")


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
