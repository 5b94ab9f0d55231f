"""Handles to DIDs: DNS TXT first, then the well-known file (sync.md §6).

Owns the lookup of one handle in one direction; that the DID claims the handle back is `resolver`'s.
Runs on the event loop.
"""

from __future__ import annotations

import asyncio

import dns.asyncresolver
import dns.exception
import dns.rdatatype
import dns.resolver

from indexer.atproto.syntax import is_did, is_handle
from indexer.atproto.types import Did, Handle
from indexer.config import Settings, parse_bind
from indexer.errors import (
    ConfigError,
    FetchRefused,
    FetchTransient,
    IdentityGone,
    IdentityUnavailable,
    UrlRefused,
)
from indexer.identity.http import HttpClient
from indexer.identity.paces import PACED, HostPaces

MAX_BODY_BYTES = 2048
_REFUSED_TLDS = frozenset(("alt", "arpa", "example", "internal", "invalid", "local", "localhost", "onion"))
_DEVELOPMENT_TLD = "test"  # in no public DNS: only a server of one's own is asked


def _nameserver(address: str) -> dns.asyncresolver.Resolver | None:
    """A resolver that asks ``address`` (``address:port``), the system's when empty; None without either."""
    try:
        if not address:
            return dns.asyncresolver.Resolver()
        host, port = parse_bind(address)
        resolver = dns.asyncresolver.Resolver(configure=False)
        resolver.port = port  # before the servers: they take it over when they are set
        resolver.nameservers = [host]
    except dns.resolver.NoResolverConfiguration:
        return None
    except ValueError as error:
        raise ConfigError(f"network.dns_server: {error}") from error
    return resolver


class HandleLookup:
    """Finds the DID that a handle names; raises `IdentityGone` or `IdentityUnavailable`."""

    def __init__(self, http: HttpClient, settings: Settings, paces: HostPaces) -> None:
        self._http = http
        self._paces = paces
        self._allow_private = settings.network.allow_private
        self._dns = _nameserver(settings.network.dns_server)
        self._dns_timeout = settings.identity.dns_timeout
        self._system_dns = not settings.network.dns_server
        self._permits = asyncio.Semaphore(settings.identity.concurrency)

    async def lookup(self, handle: Handle) -> Did:
        """The DID of ``handle`` by its own domain's word. DNS wins; several different DIDs there are a no."""
        handle = handle.lower()
        tld = handle.rpartition(".")[2]
        if not is_handle(handle):
            raise IdentityGone(f"not a handle: {handle[:80]!r}")
        if tld in _REFUSED_TLDS or (tld == _DEVELOPMENT_TLD and not self._allow_private):
            raise IdentityGone(f"handles under .{tld} are not resolved: {handle}")
        try:
            await self._paces.turn(handle)  # its name servers are a stranger's choice too
        except FetchTransient as error:
            raise IdentityUnavailable(f"{handle}: {error}", reason=PACED) from error
        async with self._permits:
            return await self._lookup(handle, ask_dns=not (self._system_dns and tld == _DEVELOPMENT_TLD))

    async def _lookup(self, handle: Handle, *, ask_dns: bool) -> Did:
        dns_failure: IdentityUnavailable | None = None
        try:
            did = await self._from_dns(handle) if ask_dns else None
            if did is not None:
                return did
        except IdentityUnavailable as error:
            dns_failure = error
        try:
            return await self._from_web(handle)
        except (IdentityGone, IdentityUnavailable) as error:
            if dns_failure is None:
                raise
            # Without an answer from DNS the web's no is not the last word.
            raise dns_failure from error

    async def _from_dns(self, handle: Handle) -> Did | None:
        if self._dns is None:
            return None
        try:
            answer = await self._dns.resolve(
                f"_atproto.{handle}.", dns.rdatatype.TXT, lifetime=self._dns_timeout, search=False
            )
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return None
        except (dns.exception.DNSException, OSError, ValueError) as error:
            raise IdentityUnavailable(f"DNS has no answer for {handle}: {error}", reason="dns") from error
        texts = [b"".join(record.strings) for record in answer]
        found = {text[4:].decode("ascii", "replace").strip() for text in texts if text.startswith(b"did=")}
        if not found:
            return None
        if len(found) > 1:
            raise IdentityGone(f"DNS names {len(found)} different DIDs for {handle}")
        return _checked(found.pop(), handle)

    async def _from_web(self, handle: Handle) -> Did:
        try:
            return await self._well_known(f"https://{handle}/.well-known/atproto-did", handle)
        except IdentityUnavailable:
            if not self._allow_private:
                raise
        # A development host rarely speaks TLS.
        return await self._well_known(f"http://{handle}/.well-known/atproto-did", handle)

    async def _well_known(self, url: str, handle: Handle) -> Did:
        try:
            response = await self._http.get(url, max_bytes=MAX_BODY_BYTES, before=self._paces.dial)
        except FetchTransient as error:
            raise IdentityUnavailable(f"{handle}: {error}") from error
        except (FetchRefused, UrlRefused) as error:
            raise IdentityGone(f"{handle}: {error}") from error
        if 200 <= response.status < 300:
            return _checked(response.body.decode("utf-8", "replace").strip(), handle)
        message = f"{handle}: status {response.status} from {response.url}"
        if response.status >= 500 or response.status == 429:
            raise IdentityUnavailable(message)
        raise IdentityGone(message)


def _checked(did: str, handle: Handle) -> Did:
    if not is_did(did):
        raise IdentityGone(f"{handle} names something that is not a DID: {did[:80]!r}")
    return did
