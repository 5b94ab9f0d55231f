"""The guard for outbound URLs (sync.md §6, api.md).

Owns the decision whether a URL may be fetched and whether an address may be dialled. The address is
judged as resolved, at dial time, by `GuardedResolver`, so a name that changes its mind between the
check and the connection gains nothing. `check_url` and `is_public_address` are pure; the resolver runs
on the event loop.
"""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from indexer.config import NetworkSettings, parse_override
from indexer.errors import ConfigError, UrlRefused

_MAX_URL = 8192
_DEFAULT_PORTS = (80, 443)
_SCHEMES = {"http": ("https", "http"), "ws": ("wss", "ws")}

_REFUSED_V4 = [
    IPv4Network(net)
    for net in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
        "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
        "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
]  # fmt: skip
_GLOBAL_V6 = IPv6Network("2000::/3")
# Inside it: protocol assignments (Teredo among them), documentation, and 6to4, which wraps any IPv4 address.
_REFUSED_V6 = [IPv6Network(net) for net in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]


def is_public_address(address: str) -> bool:
    """Whether ``address`` (a literal, IPv4 or IPv6) belongs to the public internet."""
    try:
        ip: IPv4Address | IPv6Address = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv4Address):
        return not any(ip in net for net in _REFUSED_V4)
    return ip in _GLOBAL_V6 and not any(ip in net for net in _REFUSED_V6)


def _is_literal(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _numeric_host(host: str) -> bool:
    """``127.1``, ``2130706433``, ``0x7f.1``: forms that name lookups turn into an address."""
    last = host.rstrip(".").rpartition(".")[2]
    return last.isdigit() or last.lower().startswith("0x")


def check_url(url: str | URL, network: NetworkSettings, *, kind: str = "http") -> URL:
    """The parsed URL when it may be fetched; raises `UrlRefused` saying why not.

    ``kind`` is ``http`` (https; http only on private networks) or ``ws`` (wss; ws likewise).
    """
    text = str(url)
    try:
        parsed = URL(url) if isinstance(url, str) else url
        host, port = parsed.raw_host, parsed.port
    except (ValueError, TypeError) as error:
        raise UrlRefused(f"not a URL: {text[:120]!r}") from error
    secure, plain = _SCHEMES[kind]
    problem = None
    if len(text) > _MAX_URL:
        problem = f"it is longer than {_MAX_URL} characters"
    elif parsed.scheme != secure and not (parsed.scheme == plain and network.allow_private):
        problem = f"its scheme must be {secure}"
    elif parsed.raw_user is not None or parsed.raw_password is not None:
        problem = "it carries credentials"
    elif not host or port is None or "%" in host:
        problem = "it has no usable host"
    elif not network.allow_private:
        problem = _private_problem(host, port)
    if problem is not None:
        raise UrlRefused(f"refused URL {text[:120]!r}: {problem}")
    return parsed


def _private_problem(host: str, port: int) -> str | None:
    if port not in _DEFAULT_PORTS:
        return f"port {port} is not 80 or 443 (network.allow_private permits any)"
    if (_is_literal(host) and not is_public_address(host)) or (not _is_literal(host) and _numeric_host(host)):
        return f"address {host} is not public (network.allow_private permits it)"
    return None


def parse_connect_to(items: list[str]) -> dict[tuple[str, int], tuple[str, int]]:
    """``host:port=address:port`` entries as a table; raises `ConfigError` naming a malformed one."""
    try:
        return dict(map(parse_override, items))
    except ValueError as error:
        raise ConfigError(f"network.connect_to: {error}") from error


class GuardedResolver(AbstractResolver):
    """Name lookup for connections: overrides first, then only addresses that may be dialled."""

    def __init__(self, network: NetworkSettings, inner: AbstractResolver | None = None) -> None:
        self._overrides = parse_connect_to(network.connect_to)
        self._allow_private = network.allow_private
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses to dial; raises `UrlRefused` when every one is private, or none can be asked for."""
        override = self._overrides.get((host.rstrip(".").lower(), port))
        if override is not None:
            return [_result(host, *override)]
        if self._inner is None:
            self._inner = ThreadedResolver()  # wants a running loop
        try:
            results = await self._inner.resolve(host, port, family)
        except UnicodeError as error:  # an empty label, or one that is too long
            raise UrlRefused(f"{host[:120]!r} is not a name that can be looked up") from error
        if not results:
            raise OSError(None, f"no address for {host}")
        if self._allow_private:
            return results
        public = [result for result in results if is_public_address(result["host"])]
        if not public:
            raise UrlRefused(f"{host} resolves to {results[0]['host']}, which is not a public address")
        return public

    async def addresses(self, host: str, port: int) -> list[tuple[str, int]]:
        """Where to dial ``host:port``, for connections that are not made through `HttpClient`."""
        if _is_literal(host):
            if not self._allow_private and not is_public_address(host):
                raise UrlRefused(f"{host} is not a public address")
            return [(host, port)]
        return [(result["host"], result["port"]) for result in await self.resolve(host, port)]

    async def close(self) -> None:
        if self._inner is not None:
            await self._inner.close()


def _result(hostname: str, host: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return {"hostname": hostname, "host": host, "port": port, "family": family, "proto": 0, "flags": flags}
