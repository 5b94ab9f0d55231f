"""Fetching of DID documents: did:plc from the directories, did:web from its host (sync.md §6).

Owns URLs, the meaning of statuses, failover between directories and the pace of requests. Keeps no
document; the caches are `resolver`'s. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from time import monotonic

import orjson

from indexer.atproto.did_document import DidDocument, parse_did_document
from indexer.atproto.syntax import is_handle
from indexer.atproto.types import Did
from indexer.config import Settings
from indexer.errors import (
    DidDocumentInvalid,
    FetchRefused,
    FetchTransient,
    IdentityGone,
    IdentityUnavailable,
    UrlRefused,
)
from indexer.identity.cache import Pace
from indexer.identity.http import Dial, HttpClient, Response
from indexer.identity.paces import HostPaces

_plc = re.compile(r"did:plc:[a-z2-7]{24}").fullmatch
_local_web = re.compile(r"localhost(?:%3[aA]([1-9][0-9]{0,4}))?").fullmatch
_HEADERS = {"Accept": "application/did+ld+json, application/json"}


class _Directory:
    """One PLC directory: its own pace, and until when it is asked after the others."""

    __slots__ = ("last_until", "pace", "url")

    def __init__(self, url: str, per_s: float) -> None:
        self.url = url.rstrip("/")
        self.pace = Pace(per_s)
        self.last_until = 0.0


class DocumentSource:
    """Asks for one document at a time; raises `IdentityGone` or `IdentityUnavailable`."""

    def __init__(
        self,
        http: HttpClient,
        settings: Settings,
        paces: HostPaces,
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._http = http
        self._clock = clock
        self._allow_private = settings.network.allow_private
        self._max_bytes = settings.identity.max_body_kib * 1024
        self._directories = [_Directory(url, settings.plc.max_requests_per_s) for url in settings.plc_urls]
        self._failover_time = settings.plc.failover_time
        # Apart: hosts that take their time hold up no account of a directory.
        self._plc_permits = asyncio.Semaphore(settings.identity.concurrency)
        self._web_permits = asyncio.Semaphore(settings.identity.concurrency)
        self._max_pause_s = settings.plc.max_pause
        self._paces = paces

    async def fetch(self, did: Did) -> DidDocument:
        """The document of ``did``, known to be its own."""
        if did.startswith("did:plc:"):
            return await self._fetch_plc(did)
        url = web_url(did, allow_local=self._allow_private)
        try:
            return self._document(did, await self._get(did, url, self._web_permits, self._paces.dial))
        except UrlRefused as error:
            # A host that leads somewhere else has not answered; one that is not public never will.
            redirected = bool(error.url)
            raise (IdentityUnavailable if redirected else IdentityGone)(f"{did}: {error}") from error

    async def _fetch_plc(self, did: Did) -> DidDocument:
        """From the first directory that answers; a no of one is final, nonsense is no answer."""
        if _plc(did) is None:
            raise IdentityGone(f"not a did:plc: {did[:80]!r}")
        failure: IdentityUnavailable | None = None
        now = self._clock()
        for directory in sorted(self._directories, key=lambda one: one.last_until > now):
            try:
                return await self._ask(directory, did)
            except UrlRefused as error:
                failure = failure or IdentityUnavailable(f"plc_urls: {error}")
            except IdentityUnavailable as error:
                failure = failure or error
            directory.last_until = self._clock() + self._failover_time
        raise failure or IdentityUnavailable("no PLC directory is configured (plc_urls)")

    async def _ask(self, directory: _Directory, did: Did) -> DidDocument:
        await directory.pace.wait()
        response = await self._get(did, f"{directory.url}/{did}", self._plc_permits)
        if response.status == 429:
            asked = response.retry_after
            directory.pace.pause(min(1.0 if asked is None else asked, self._max_pause_s))
        document = self._document(did, response)
        directory.last_until = 0.0
        return document

    async def _get(
        self, did: Did, url: str, permits: asyncio.Semaphore, before: Dial | None = None
    ) -> Response:
        try:
            async with permits:
                return await self._http.get(url, max_bytes=self._max_bytes, headers=_HEADERS, before=before)
        except (FetchTransient, FetchRefused) as error:
            raise IdentityUnavailable(f"{did}: {error}") from error

    def _document(self, did: Did, response: Response) -> DidDocument:
        """What the answer says: a document, an authoritative no, or nothing that can be used."""
        message = f"{did}: status {response.status} from {response.url}"
        if response.status in (404, 410):
            raise IdentityGone(message, tombstone=response.status == 410)
        if response.status != 200:
            raise IdentityUnavailable(message)
        try:
            return parse_did_document(orjson.loads(response.body), did, allow_http=self._allow_private)
        except (orjson.JSONDecodeError, DidDocumentInvalid) as error:
            raise IdentityUnavailable(f"{did}: no document of it from {response.url}: {error}") from error


def web_url(did: Did, *, allow_local: bool) -> str:
    """Where the document of a did:web is; `IdentityGone` for forms and methods that atproto has not."""
    host = did.removeprefix("did:web:")
    local = _local_web(host)
    if host == did:
        raise IdentityGone(f"the DID method is not supported: {did[:80]!r}")
    if local is not None and allow_local:
        return f"http://localhost:{local[1] or 80}/.well-known/did.json"
    if host != host.lower():  # or one host would have as many accounts as it has spellings
        raise IdentityGone(f"a did:web must be in lower case: {did[:80]!r}")
    if not is_handle(host):  # a handle is a hostname of at least two labels: no path, no port, no address
        raise IdentityGone(f"a did:web must be a plain hostname: {did[:80]!r}")
    return f"https://{host}/.well-known/did.json"
