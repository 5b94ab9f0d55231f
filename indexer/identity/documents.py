"""Fetching of DID documents: did:plc from the directories, did:web from its host (sync.md §6).

Owns URLs, the meaning of statuses, failover between directories and the pace of requests. Keeps no
document; the caches are `resolver`'s. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import re

import orjson

from indexer.atproto.did_document import DidDocument, parse_did_document
from indexer.atproto.syntax import is_handle
from indexer.atproto.types import Did
from indexer.config import Settings
from indexer.errors import (
    DidDocumentInvalid,
    FetchRefused,
    FetchTransient,
    IdentityError,
    IdentityGone,
    IdentityUnavailable,
    UrlRefused,
)
from indexer.identity.cache import Pace, TtlCache
from indexer.identity.http import HttpClient, Response

#: Longest time that one answer of a directory can hold back the next request, in seconds.
_MAX_PAUSE_S = 60.0
#: Requests a second to one did:web host, whoever makes us ask: a flood of hints must not become one on it.
WEB_REQUESTS_PER_S = 5.0
_WEB_HOSTS, _WEB_PACE_S = 4096, 60.0
_plc = re.compile(r"did:plc:[a-z2-7]{24}").fullmatch
_local_web = re.compile(r"localhost(?:%3[aA]([1-9][0-9]{0,4}))?").fullmatch
_HEADERS = {"Accept": "application/did+ld+json, application/json"}


class DocumentSource:
    """Asks for one document at a time; raises `IdentityGone` or `IdentityUnavailable`."""

    def __init__(self, http: HttpClient, settings: Settings) -> None:
        self._http = http
        self._allow_private = settings.network.allow_private
        self._max_bytes = settings.identity.max_body_kib * 1024
        self._directories = [url.rstrip("/") for url in settings.plc_urls]
        self._permits = asyncio.Semaphore(settings.identity.concurrency)
        self._plc_pace = Pace(settings.plc.max_requests_per_s)
        self._host_paces: TtlCache[str, Pace] = TtlCache(_WEB_HOSTS)

    async def fetch(self, did: Did) -> DidDocument:
        """The document of ``did``, known to be its own."""
        if did.startswith("did:plc:"):
            return await self._fetch_plc(did)
        url = web_url(did, allow_local=self._allow_private)
        await self._host_pace(did).wait()
        try:
            return await self._fetch(did, url)
        except UrlRefused as error:
            raise IdentityGone(f"{did}: {error}") from error

    def _host_pace(self, did: Did) -> Pace:
        pace = self._host_paces.get(did)
        if pace is None:
            pace = Pace(WEB_REQUESTS_PER_S)
            self._host_paces.put(did, pace, _WEB_PACE_S)
        return pace

    async def _fetch_plc(self, did: Did) -> DidDocument:
        if _plc(did) is None:
            raise IdentityGone(f"not a did:plc: {did[:80]!r}")
        failure: IdentityError | None = None
        for directory in self._directories:
            await self._plc_pace.wait()
            problem: IdentityError
            try:
                return await self._fetch(did, f"{directory}/{did}")
            except UrlRefused as error:
                problem = IdentityUnavailable(f"plc_urls: {error}")
            except (_Unusable, IdentityUnavailable) as error:
                problem = error
            # A mirror that answers nonsense must not speak for one that does not answer now.
            if failure is None or isinstance(failure, _Unusable):
                failure = problem
        raise failure or IdentityUnavailable("no PLC directory is configured (plc_urls)")

    async def _fetch(self, did: Did, url: str) -> DidDocument:
        try:
            async with self._permits:
                response = await self._http.get(url, max_bytes=self._max_bytes, headers=_HEADERS)
        except FetchTransient as error:
            raise IdentityUnavailable(f"{did}: {error}") from error
        except FetchRefused as error:
            raise _Unusable(f"{did}: {error}") from error
        if response.status == 200:
            return self._parse(did, response)
        raise self._no_document(did, response)

    def _parse(self, did: Did, response: Response) -> DidDocument:
        try:
            return parse_did_document(orjson.loads(response.body), did, allow_http=self._allow_private)
        except (orjson.JSONDecodeError, DidDocumentInvalid) as error:
            raise _Unusable(f"{did}: {error}") from error

    def _no_document(self, did: Did, response: Response) -> IdentityError:
        message = f"{did}: status {response.status} from {response.url}"
        if response.status in (404, 410):
            return IdentityGone(message, tombstone=response.status == 410)
        if response.status == 429 and did.startswith("did:plc:"):
            asked = response.retry_after
            self._plc_pace.pause(min(1.0 if asked is None else asked, _MAX_PAUSE_S))
        return IdentityUnavailable(message)


class _Unusable(IdentityGone):
    """A 200 that is no document of this DID: a no, though not the directory's own no."""


def web_url(did: Did, *, allow_local: bool) -> str:
    """Where the document of a did:web is; `IdentityGone` for forms and methods that atproto has not."""
    host = did.removeprefix("did:web:")
    local = _local_web(host)
    if host == did:
        raise IdentityGone(f"the DID method is not supported: {did[:80]!r}")
    if local is not None and allow_local:
        return f"http://localhost:{local[1] or 80}/.well-known/did.json"
    if not is_handle(host):  # a handle is a hostname of at least two labels: no path, no port, no address
        raise IdentityGone(f"a did:web must be a plain hostname: {did[:80]!r}")
    return f"https://{host}/.well-known/did.json"
