"""The one HTTP client for what lies outside: guarded, bounded, redirects followed by hand.

Owns connections, time and body limits, egress proxies and the translation of foreign errors. Knows nothing
of what is fetched. Runs on the event loop; one instance for the daemon, entered as an async context manager.
"""

from __future__ import annotations

import asyncio
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from time import time
from typing import NamedTuple

import aiohttp
import orjson
from yarl import URL

from indexer.config import NetworkSettings
from indexer.errors import FetchRefused, FetchTransient, UrlRefused
from indexer.identity.guard import GuardedResolver, check_url
from indexer.identity.proxies import Proxies, Proxy

MAX_REDIRECTS = 5
MAX_CONNECTIONS = 512
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_CHUNK = 1 << 16
#: Most that is decompressed at one time.
_PIECE = 1 << 18
#: The reason of a request that no proxy carried: nothing is known of the host.
PROXY = "proxy"
#: A ``ratelimit-reset`` from here on is a moment (Unix time), below it a number of seconds.
_UNIX_TIMES_FROM = 1e9
#: Nobody waits as long as some hosts ask; those who do wait have bounds of their own.
_LONGEST_WAIT_S = 1e9
_USER_AGENT = "atproto-indexer"


#: Called with the URL that is requested next.
Dial = Callable[[URL], Awaitable[None]]


class Response(NamedTuple):
    """A complete answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str

    @property
    def retry_after(self) -> float | None:
        """Seconds that the host asks us to wait, None when it does not say."""
        return asked_wait(self.headers)

    def xrpc_error(self) -> tuple[str, str]:
        """Name and message of an XRPC error body; empty where it is something else."""
        try:
            body = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return "", ""
        if not isinstance(body, dict):
            return "", ""
        name, message = body.get("error"), body.get("message")
        return name if isinstance(name, str) else "", message if isinstance(message, str) else ""


class StreamResponse(NamedTuple):
    """An answer whose body is still to be read: ``chunks`` is good for one pass inside the context."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]
    url: str


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The ``retry-after`` header (seconds or a date) as seconds from now; None when absent or garbage."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:20]), _LONGEST_WAIT_S)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, TypeError, OverflowError):
        return None


def reset_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Seconds until a rate limit's window ends, by ``ratelimit-reset``; None when that is not given.

    PDSes send a moment in Unix time, the IETF draft a number of seconds.
    """
    value = headers.get("ratelimit-reset", "").strip()
    if not (value.isascii() and value.isdigit() and len(value) < 16):
        return None
    reset = float(value)
    return max(0.0, reset - now_s) if reset >= _UNIX_TIMES_FROM else reset


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """The wait that a refusal asks for, in whichever of its forms."""
    wait = retry_after(headers)
    return reset_s(headers, time()) if wait is None else wait


class HttpClient:
    """GET with limits. ``tls`` is a context of one's own, for networks with a private authority; ``proxies``
    carry the requests that ask for it."""

    def __init__(
        self,
        network: NetworkSettings,
        *,
        tls: ssl.SSLContext | None = None,
        proxies: Proxies | None = None,
    ) -> None:
        self.network = network
        self.resolver = GuardedResolver(network)
        self.proxies = proxies
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._through: aiohttp.ClientSession | None = None  # the proxies

    async def __aenter__(self) -> HttpClient:
        self._session = self._opened(self.resolver)
        if self.proxies:
            # Dials proxies alone, which may be private: targets are judged, and given to them as addresses.
            self._through = self._opened(None)
        return self

    def _opened(self, resolver: GuardedResolver | None) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            resolver=resolver,
            limit=MAX_CONNECTIONS,
            ssl=self._tls if self._tls is not None else True,
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"User-Agent": _USER_AGENT},
            skip_auto_headers=("Accept-Encoding",),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.network.connect_timeout),
        )

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        sessions = self._session, self._through
        self._session = self._through = None
        for session in sessions:
            if session is not None:
                await session.close()

    async def get(
        self,
        url: str,
        *,
        max_bytes: int,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        before: Dial | None = None,
    ) -> Response:
        """The answer to a GET, whatever its status, redirects followed.

        Raises `UrlRefused` (the guard), `FetchTransient` (connection, time) or `FetchRefused` (body
        beyond ``max_bytes``, too many redirects). ``timeout`` covers everything, in seconds. ``before`` is
        awaited before each request, those of redirects included.
        """
        stream = self.stream(url, max_bytes=max_bytes, timeout=timeout, headers=headers, before=before)
        async with stream as response:
            body = b"".join([chunk async for chunk in response.chunks])
            return Response(response.status, response.headers, body, response.url)

    @asynccontextmanager
    async def stream(
        self,
        url: str,
        *,
        max_bytes: int,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        wire_bytes: int | None = None,
        gzip: bool = False,
        proxied: bool = False,
        before: Dial | None = None,
    ) -> AsyncIterator[StreamResponse]:
        """As `get`, but the body arrives in chunks; reading it raises the same errors.

        ``gzip``: the host may compress it; then ``wire_bytes`` may come over the wire (None: ``max_bytes``)
        and ``max_bytes`` out of it. ``proxied``: through one of the proxies, if there are any.
        """
        seconds = self.network.timeout if timeout is None else timeout
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                sent = dict(headers or {})
                if gzip:
                    sent["Accept-Encoding"] = "gzip"
                through = proxied and bool(self.proxies)
                response, served = await self._follow(url, sent, proxied=through, before=before)
                try:
                    found = {name.lower(): value for name, value in response.headers.items()}
                    chunks = _body(response, served, max_bytes, wire_bytes or max_bytes, gzip)
                    yield StreamResponse(response.status, found, chunks, str(served))
                finally:
                    response.close()
        except TimeoutError as error:
            if not limit.expired():  # the caller's own, thrown in here
                raise
            raise FetchTransient(
                f"no complete answer within {seconds:g} s: {url}", reason="timeout"
            ) from error

    async def _follow(
        self, url: str, sent: dict[str, str], *, proxied: bool, before: Dial | None
    ) -> tuple[aiohttp.ClientResponse, URL]:
        """The answer at the end of the redirects, and where that is."""
        target = check_url(url, self.network)
        request = self._request_proxied if proxied else self._request
        asked: URL | None = None
        for _ in range(MAX_REDIRECTS + 1):
            if before is not None:
                await before(target)
            try:
                response = await request(target, sent)
            except UrlRefused as error:
                raise error if asked is None else error.met_at(asked) from None
            if response.status not in _REDIRECTS or "Location" not in response.headers:
                return response, target
            response.close()
            try:
                next_target = check_url(_join(target, response.headers["Location"]), self.network)
            except UrlRefused as error:
                raise error.met_at(target) from None
            if next_target.origin() != target.origin():
                sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
            asked, target = target, next_target
        raise FetchRefused(
            f"more than {MAX_REDIRECTS} redirects: {url}", status=response.status, name="TooManyRedirects"
        ).met_at(target)

    async def _request(self, target: URL, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        if self._session is None:
            raise RuntimeError("HttpClient is used outside of its context")
        try:
            return await self._session.get(target, headers=headers, allow_redirects=False)
        except aiohttp.InvalidURL as error:
            raise _unusable(target, error) from error
        except (aiohttp.ClientError, OSError) as error:  # first: an error about a certificate is a ValueError
            raise _transient(target, error) from error
        except ValueError as error:  # a host that cannot be looked up: an empty label, or one too long
            raise _unusable(target, error) from error

    async def _request_proxied(self, target: URL, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """By the next proxy that does its work; it is given the address that the guard judged, no name."""
        if self._through is None or self.proxies is None:
            raise RuntimeError("HttpClient is used outside of its context")
        host, port = target.raw_host or "", target.port or 443
        try:
            address, dialled = (await self.resolver.addresses(host, port))[0]
        except OSError as error:
            raise _transient(target, error) from error
        direct = target.with_host(address).with_port(dialled)
        sent = {**headers, "Host": target.raw_authority} if direct != target else dict(headers)
        failure = FetchTransient(f"no proxy carries requests: {target}", reason=PROXY)
        for proxy in self.proxies.turn():
            try:
                response = await self._through.get(
                    direct, headers=sent, allow_redirects=False, proxy=proxy.url,
                    server_hostname=host if target.scheme == "https" else None,
                )  # fmt: skip
            except (aiohttp.ClientError, OSError) as error:
                if not self._blamed(proxy, error):
                    raise _transient(target, error) from error
                failure = FetchTransient(f"the proxy {proxy.name} failed: {_named(error)}", reason=PROXY)
            else:
                self.proxies.worked(proxy)
                return response
        raise failure

    def _blamed(self, proxy: Proxy, error: Exception) -> bool:
        """Whether the proxy is at fault, so that another one may be tried."""
        refused = isinstance(error, aiohttp.ClientHttpProxyError) and error.status not in (502, 503, 504)
        own = refused or isinstance(error, aiohttp.ClientProxyConnectionError)
        if self.proxies is not None:
            self.proxies.failed(proxy, unreachable=own)
        return own


def _named(error: Exception) -> str:
    return (
        f"it answered {error.status}" if isinstance(error, aiohttp.ClientHttpProxyError) else "no connection"
    )


def _join(base: URL, location: str) -> URL:
    try:
        return base.join(URL(location))
    except ValueError as error:
        raise UrlRefused(f"redirect to something that is not a URL: {location[:120]!r}") from error


def _unusable(url: object, error: Exception) -> UrlRefused:
    return UrlRefused(f"refused URL {str(url)[:120]!r}: {str(error)[:200]}")


def _transient(url: object, error: Exception) -> FetchTransient:
    if isinstance(error, TimeoutError):
        return FetchTransient(f"timed out: {url}", reason="timeout").met_at(url)
    return FetchTransient(f"fetch failed: {url}: {str(error) or type(error).__name__}").met_at(url)


async def _body(
    response: aiohttp.ClientResponse, url: URL, max_bytes: int, wire_bytes: int, gzip: bool
) -> AsyncIterator[bytes]:
    """The body as it arrives; more than ``max_bytes`` of it is refused as soon as that is known."""
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    packed = gzip and encoding in ("gzip", "x-gzip")
    if not packed and encoding not in ("", "identity"):
        raise FetchTransient(f"unasked Content-Encoding: {url}", reason="encoding").met_at(url)
    limit = wire_bytes if packed else min(wire_bytes, max_bytes)

    def too_large(size: int) -> FetchRefused:
        message = f"the body is larger than {size} bytes: {url}"
        return FetchRefused(message, status=response.status, name="TooLarge").met_at(url)

    if (response.content_length or 0) > limit:
        raise too_large(limit)
    try:
        wire = _counted(response, limit, too_large)
        if not packed:
            async for chunk in wire:
                yield chunk
            return
        received = 0
        async for chunk in _unpacked(wire, url):
            received += len(chunk)
            if received > max_bytes:
                raise too_large(max_bytes)
            yield chunk
    except (aiohttp.ClientError, OSError) as error:
        raise _transient(url, error) from error


async def _counted(
    response: aiohttp.ClientResponse, limit: int, too_large: Callable[[int], FetchRefused]
) -> AsyncIterator[bytes]:
    """What comes over the wire, up to ``limit`` bytes."""
    received = 0
    async for chunk in response.content.iter_chunked(_CHUNK):
        received += len(chunk)
        if received > limit:
            raise too_large(limit)
        yield chunk


async def _unpacked(wire: AsyncIterator[bytes], url: URL) -> AsyncIterator[bytes]:
    """A gzip body, in pieces that are bounded whatever it unfolds to."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        async for chunk in wire:
            while chunk:
                if unpacker.eof:
                    raise FetchTransient(f"bytes behind the end of the gzip body: {url}", reason="encoding")
                piece = unpacker.decompress(chunk, _PIECE)
                chunk = unpacker.unconsumed_tail or unpacker.unused_data
                if piece:
                    yield piece
        rest = unpacker.flush()
    except zlib.error as error:
        raise FetchTransient(f"the gzip body is damaged: {url}", reason="encoding").met_at(url) from error
    if rest:
        yield rest
    if not unpacker.eof:
        raise FetchTransient(f"the gzip body ends too early: {url}").met_at(url)
