"""Egress proxies: whose turn it is, and which to leave out for a while.

Owns the order and the health of the proxies, which is judged by failures alone. Leaves out the requests
(`http`). The clock is handed in; event loop only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from yarl import URL

#: Failures in a row, whoever may be at fault, after which a proxy rests; one out of reach rests at once.
_FAILURES: Final = 5
_FIRST_REST_S: Final = 5.0


@dataclass(slots=True)
class Proxy:
    """One of them. ``url`` may carry credentials, ``name`` does not."""

    url: URL
    name: str
    used: int = 0
    failures: int = 0  # in a row
    rests: int = 0  # in a row
    not_before: float = 0.0


class Proxies:
    """They take turns; one that fails is left out, ever longer up to ``longest_s``."""

    def __init__(
        self, urls: Sequence[str], longest_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        parsed = [URL(url) for url in dict.fromkeys(urls)]
        self._all = [Proxy(url, str(url.origin()) if url.user is None else _bare(url)) for url in parsed]
        self._longest_s = longest_s
        self._clock = clock
        self._next = 0

    def __len__(self) -> int:
        return len(self._all)

    def turn(self) -> Iterator[Proxy]:
        """Those to try for one request: healthy ones in their order; else the one that rests least."""
        first = self._next
        self._next = (first + 1) % len(self._all)
        now = self._clock()
        around = self._all[first:] + self._all[:first]
        healthy = [proxy for proxy in around if proxy.not_before <= now]
        yield from healthy or [min(around, key=lambda proxy: proxy.not_before)]

    def worked(self, proxy: Proxy) -> None:
        """A host answered through it."""
        proxy.used += 1
        proxy.failures = proxy.rests = 0
        proxy.not_before = 0.0

    def failed(self, proxy: Proxy, *, unreachable: bool) -> None:
        """No answer came through it; ``unreachable``: the proxy itself did not do its work."""
        proxy.failures += 1
        if unreachable or proxy.failures >= _FAILURES:
            proxy.rests += 1
            rest = min(self._longest_s, _FIRST_REST_S * 2.0 ** min(proxy.rests - 1, 30))
            proxy.not_before = self._clock() + rest

    def status(self) -> list[dict[str, Any]]:
        """For `/stats`."""
        now = self._clock()
        return [
            {
                "proxy": proxy.name,
                "answers": proxy.used,
                "failures": proxy.failures,
                "rests_s": round(max(0.0, proxy.not_before - now), 1),
            }
            for proxy in self._all
        ]


def _bare(url: URL) -> str:
    return str(url.with_user(None).with_password(None).origin())
