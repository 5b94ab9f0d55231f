"""The pace of requests that strangers can cause: by host, and by the domain that the host belongs to.

Owns turns and their bound: nobody waits long for one, since waiting would take the place of others. Whoever
is dialled counts, at the end of a redirect too. Runs on the event loop.
"""

from __future__ import annotations

from typing import Final

from yarl import URL

from indexer.config import IdentitySettings
from indexer.errors import FetchTransient
from indexer.identity.cache import Pace, TtlCache
from indexer.identity.domains import domain_of

#: The reason of what was not asked because it was nobody's turn.
PACED: Final = "paced"
_ENTRIES: Final = 8192
#: An idle host is forgotten after as many seconds; its pace has long recovered by then.
_KEPT_S: Final = 60.0
#: Longest wait for a turn, in seconds; beyond it the request is to be tried later.
_LONGEST_S: Final = 5.0


class HostPaces:
    """`turn` before each request."""

    def __init__(self, limits: IdentitySettings) -> None:
        self._host_per_s = limits.web_requests_per_s
        self._domain_per_s = limits.domain_requests_per_s
        self._shared = frozenset(domain.lower() for domain in limits.shared_domains)
        self._paces: TtlCache[str, Pace] = TtlCache(_ENTRIES)

    async def dial(self, target: URL) -> None:
        """As `turn`, for a URL that is requested next."""
        await self.turn(target.raw_host or "")

    async def turn(self, host: str) -> None:
        """Returns when ``host`` may be asked; raises `FetchTransient` when that is too far off."""
        host = host.lower()
        paces = [self._pace(f"host {host}", self._host_per_s)]
        domain = domain_of(host)
        if domain not in self._shared:
            paces.append(self._pace(f"domain {domain}", self._domain_per_s))
        left = max(pace.wait_s() for pace in paces)
        if left > _LONGEST_S:
            raise FetchTransient(f"{host} is asked too much at the moment", retry_after=left, reason=PACED)
        for pace in paces:
            await pace.wait()

    def _pace(self, name: str, per_s: float) -> Pace:
        pace = self._paces.get(name)
        if pace is None:
            pace = Pace(per_s, burst=per_s)
        self._paces.put(name, pace, _KEPT_S)
        return pace
