"""The one HTTP client for what lies outside: guarded, bounded, redirects followed by hand.

Owns connections, time and body limits and the translation of foreign errors. Knows nothing of what
is fetched. Runs on the event loop; one instance for the daemon, entered as an async context manager.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
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

MAX_REDIRECTS = 5
MAX_CONNECTIONS = 512
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_CHUNK = 1 << 16
#: A ``ratelimit-reset`` from here on is a moment (Unix time), below it a number of seconds.
_UNIX_TIMES_FROM = 1e9
_USER_AGENT = "atproto-indexer"


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
    if value.isascii() and value.isdigit() and len(value) < 10:
        return float(value)
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
    """GET with limits. ``tls`` is a context of one's own, for networks with a private authority."""

    def __init__(self, network: NetworkSettings, *, tls: ssl.SSLContext | None = None) -> None:
        self.network = network
        self.resolver = GuardedResolver(network)
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpClient:
        connector = aiohttp.TCPConnector(
            resolver=self.resolver,
            limit=MAX_CONNECTIONS,
            ssl=self._tls if self._tls is not None else True,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"User-Agent": _USER_AGENT},
            skip_auto_headers=("Accept-Encoding",),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.network.connect_timeout),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def get(
        self,
        url: str,
        *,
        max_bytes: int,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """The answer to a GET, whatever its status, redirects followed.

        Raises `UrlRefused` (the guard), `FetchTransient` (connection, time) or `FetchRefused` (body
        beyond ``max_bytes``, too many redirects). ``timeout`` covers everything, in seconds.
        """
        async with self.stream(url, max_bytes=max_bytes, timeout=timeout, headers=headers) as response:
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
    ) -> AsyncIterator[StreamResponse]:
        """As `get`, but the body arrives in chunks; reading it raises the same errors."""
        seconds = self.network.timeout if timeout is None else timeout
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                response = await self._follow(url, headers)
                try:
                    found = {name.lower(): value for name, value in response.headers.items()}
                    yield StreamResponse(
                        response.status, found, _body(response, max_bytes), str(response.url)
                    )
                finally:
                    response.close()
        except TimeoutError as error:
            if not limit.expired():  # the caller's own, thrown in here
                raise
            raise FetchTransient(
                f"no complete answer within {seconds:g} s: {url}", reason="timeout"
            ) from error

    async def _follow(self, url: str, headers: Mapping[str, str] | None) -> aiohttp.ClientResponse:
        target = check_url(url, self.network)
        sent = dict(headers or {})
        asked: URL | None = None
        for _ in range(MAX_REDIRECTS + 1):
            try:
                response = await self._request(target, sent)
            except UrlRefused as error:
                raise error if asked is None else error.met_at(asked) from None
            if response.status not in _REDIRECTS or "Location" not in response.headers:
                return response
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


async def _body(response: aiohttp.ClientResponse, max_bytes: int) -> AsyncIterator[bytes]:
    """The body as it arrives; more than ``max_bytes`` of it is refused as soon as that is known."""
    if response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
        raise FetchTransient(f"unasked Content-Encoding: {response.url}", reason="encoding").met_at(
            response.url
        )
    too_large = FetchRefused(
        f"the body is larger than {max_bytes} bytes: {response.url}", status=response.status, name="TooLarge"
    ).met_at(response.url)
    if (response.content_length or 0) > max_bytes:
        raise too_large
    received = 0
    try:
        async for chunk in response.content.iter_chunked(_CHUNK):
            received += len(chunk)
            if received > max_bytes:
                raise too_large
            yield chunk
    except (aiohttp.ClientError, OSError) as error:
        raise _transient(response.url, error) from error
