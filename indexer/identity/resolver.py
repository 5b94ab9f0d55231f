"""Identities by DID, cached: who signs, where the repository is, which handle is claimed.

Owns the caches (positive and negative, both bounded), the joining of concurrent requests for one DID,
and the two-way check of handles. Fetching is `documents` and `handles`. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from time import monotonic, time
from typing import Generic, NamedTuple, TypeVar

from indexer.atproto.types import Did, DidKey, Handle, Micros
from indexer.config import IdentitySettings, Settings
from indexer.errors import IdentityError, IdentityGone, IdentityUnavailable
from indexer.identity.cache import TtlCache
from indexer.identity.documents import DocumentSource
from indexer.identity.handles import HandleLookup
from indexer.identity.http import HttpClient
from indexer.identity.paces import HostPaces

INVALID_HANDLE = "handle.invalid"
#: Longer than any request may take, in seconds.
_LONGEST_FLIGHT_S = 3600.0
#: Most of a failure's message that is kept.
MAX_MESSAGE = 300

T = TypeVar("T")


class Identity(NamedTuple):
    """What a DID document says today. ``handle`` is a claim (empty when there is none).

    ``fetched_at`` is when it was asked for: the answer holds for whatever came in before that.
    """

    did: Did
    handle: Handle
    signing_key: DidKey
    pds: str
    fetched_at: Micros


class Resolver:
    """Resolves DIDs and handles; every method but `cached` and `purge` may wait for the network."""

    def __init__(
        self, http: HttpClient, settings: Settings, *, clock: Callable[[], float] = monotonic
    ) -> None:
        limits = settings.identity
        paces = HostPaces(limits)
        self._documents = DocumentSource(http, settings, paces, clock=clock)
        self._identities = _Flights(self._fetch, limits, clock)
        shared_s = settings.ingest.refresh_interval
        lookup = HandleLookup(http, settings, paces).lookup
        self._handles = _Flights(lookup, limits, clock, shared_s)

    async def resolve(self, did: Did, *, refresh: bool = False) -> Identity:
        """The identity of ``did``; ``refresh`` asks again although the cache knows an answer.

        Raises `IdentityGone` (an authoritative no: 404, 410, no usable document, key or PDS) or
        `IdentityUnavailable` (no answer now).
        """
        return await self._identities.get(did, refresh=refresh)

    def cached(self, did: Did) -> Identity | None:
        """What is known without asking, None when nothing is or it was a failure."""
        return self._identities.cached(did)

    def purge(self, did: Did) -> None:
        """Forgets ``did`` and whom its handle names, failures included; an answer under way is not kept."""
        known = self._identities.cached(did)
        if known is not None and known.handle:
            self._handles.purge(known.handle)
        self._identities.purge(did)

    async def resolve_handle(self, handle: Handle, *, refresh: bool = False) -> Did:
        """The DID that ``handle`` names (one direction only); raises as `resolve`.

        Also with ``refresh`` an answer is shared for `ingest.refresh_interval`: any account may claim any
        handle, and have its domain asked.
        """
        return await self._handles.get(handle.lower(), refresh=refresh)

    def handle_wait_s(self, handle: Handle, since: Micros) -> float:
        """Seconds until `resolve_handle` gives an answer that was asked for after ``since``."""
        return self._handles.wait_s(handle.lower(), since)

    async def verified_handle(self, did: Did) -> Handle:
        """The handle that ``did`` claims and that names it back, else ``handle.invalid``."""
        try:
            claimed = (await self.resolve(did)).handle
            if claimed and await self.resolve_handle(claimed) == did:
                return claimed
        except IdentityError:
            pass
        return INVALID_HANDLE

    def stats(self) -> dict[str, int]:
        """Sizes, for the metrics."""
        return {
            "identities": len(self._identities),
            "handles": len(self._handles),
            "in_flight": self._identities.in_flight + self._handles.in_flight,
        }

    async def close(self) -> None:
        """Ends what is under way."""
        await self._identities.close()
        await self._handles.close()

    async def _fetch(self, did: Did) -> Identity:
        asked_at = int(time() * 1_000_000)
        document = await self._documents.fetch(did)
        if document.signing_key is None:
            raise IdentityGone(f"{did}: its DID document has no usable #atproto key")
        if document.pds is None:
            raise IdentityGone(f"{did}: its DID document has no usable #atproto_pds")
        return Identity(did, document.handle or "", document.signing_key, document.pds, asked_at)


class _Flights(Generic[T]):
    """A cache in front of ``fetch`` in which one request serves everybody who asks meanwhile."""

    def __init__(
        self,
        fetch: Callable[[str], Awaitable[T]],
        limits: IdentitySettings,
        clock: Callable[[], float],
        shared_s: float = 0.0,
    ) -> None:
        self._fetch = fetch
        self._shared_s = shared_s  # an answer is not asked for again before
        self._begun: TtlCache[str, Micros] = TtlCache(limits.cache_entries, clock=clock)
        self._limits = limits
        self._known: TtlCache[str, T] = TtlCache(limits.cache_entries, clock=clock)
        self._failed: TtlCache[str, IdentityError] = TtlCache(limits.cache_entries, clock=clock)
        self._current: dict[str, asyncio.Task[T]] = {}
        self._tasks: set[asyncio.Task[T]] = set()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    def cached(self, key: str) -> T | None:
        return self._known.get(key)

    def wait_s(self, key: str, since: Micros) -> float:
        """Seconds until an answer can be had whose request began at ``since`` or later."""
        begun = self._begun.get(key)
        if begun is None or begun >= since:
            return 0.0
        left = self._shared_s - (time() - begun / 1e6)
        return max(self._shared_s if key in self._current else 0.001, left)

    def purge(self, key: str) -> None:
        begun = self._begun.get(key)
        if begun is not None:  # shared for the rest of its time
            known = self._known.get(key)
            if known is not None:
                self._known.put(key, known, max(0.0, self._shared_s - (time() - begun / 1e6)))
            return
        self._known.drop(key)
        self._failed.drop(key)
        self._current.pop(key, None)  # those who wait still get their answer; it is not kept

    async def get(self, key: str, *, refresh: bool) -> T:
        if not refresh or (self._begun.get(key) is not None and key not in self._current):
            known = self._known.get(key)
            if known is not None:
                return known
            failure = self._failed.get(key)
            if failure is not None:
                raise copy.copy(failure)  # its own traceback for each caller
        flight = self._current.get(key)
        if flight is None:
            flight = asyncio.create_task(self._fly(key))
            self._current[key] = flight
            self._tasks.add(flight)
            flight.add_done_callback(self._landed)
        try:
            # Shielded: a caller that gives up does not take the answer from the others.
            return await asyncio.shield(flight)
        except IdentityError as error:
            raise copy.copy(error) from error

    async def _fly(self, key: str) -> T:
        task, begun = asyncio.current_task(), int(time() * 1e6)
        try:
            if self._shared_s:
                self._begun.put(key, begun, _LONGEST_FLIGHT_S)
            value = await self._fetch(key)
        except IdentityError as error:
            if self._current.get(key) is task:
                self._remember_failure(key, error)
            raise
        else:
            if self._current.get(key) is task:
                self._known.put(key, value, self._limits.ttl)
                self._failed.drop(key)
            return value
        finally:
            if self._shared_s:
                self._begun.put(key, begun, self._shared_s)
            if self._current.get(key) is task:
                del self._current[key]

    def _remember_failure(self, key: str, error: IdentityError) -> None:
        if not isinstance(error, IdentityUnavailable):
            self._known.drop(key)
        elif self._known.get(key) is not None:
            return  # a refresh that found nobody at home: the last answer is still believed
        self._failed.put(key, _remembered(error), max(self._limits.error_ttl, self._shared_s))

    def _landed(self, task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also when every caller has left

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _remembered(error: IdentityError) -> IdentityError:
    """The failure without traceback and causes, whose frames would keep whole answers alive."""
    kept = copy.copy(error)
    kept.args = (str(error)[:MAX_MESSAGE],)
    return kept
