"""The arithmetic of waiting: backoff, token buckets, and what a host's rate-limit headers ask for.

Pure; the clock is handed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from indexer.identity.http import reset_s

#: Below this part of its allowance a host is asked no faster than what is left of it lasts.
_SPARING_BELOW: Final = 0.25
#: Seconds of a rate that may come at once after a pause.
_BURST_S: Final = 1.0


def backoff_s(
    attempt: int, minimum: float, maximum: float, *, jitter: float, retry_after: float | None = None
) -> float:
    """Seconds to wait after failure number ``attempt`` (from 1): doubling, ``jitter`` in [0, 1) spreads it.

    Never shorter than what the host asked for, as long as that is within ``maximum``.
    """
    base = min(maximum, minimum * 2.0 ** min(max(attempt, 1) - 1, 40))
    wait = base * (0.5 + jitter / 2)
    if retry_after is not None:
        wait = max(wait, min(retry_after, maximum) * (1 + jitter / 10))
    return wait


def limited_s(attempt: int, minimum: float, maximum: float, *, jitter: float, asked: float | None) -> float:
    """Seconds to wait after refusal number ``attempt`` by a rate limit: what was asked for, else at least
    ``minimum``, doubling."""
    if asked is None:
        asked = minimum * 2.0 ** min(max(attempt, 1) - 1, 40)
    return min(asked, maximum) * (1 + jitter / 10)


class Allowance(NamedTuple):
    """What a host's answer says about its rate limit."""

    remaining: int
    reset_s: float
    limit: int  # 0 when it does not say

    @property
    def pause(self) -> float | None:
        """Seconds to leave the host alone, when nothing is left."""
        return None if self.remaining > 0 else self.reset_s

    @property
    def requests_per_s(self) -> float | None:
        """The rate at which what is left lasts; None while there is plenty, or nothing."""
        if self.remaining <= 0 or self.reset_s <= 0:
            return None
        if self.limit and self.remaining >= self.limit * _SPARING_BELOW:
            return None
        return self.remaining / self.reset_s


def allowance_of(headers: Mapping[str, str], now_s: float) -> Allowance | None:
    """By ``ratelimit-remaining``, ``-reset`` and ``-limit``; None where they are absent or nonsense."""
    remaining, reset = _whole(headers.get("ratelimit-remaining", "")), reset_s(headers, now_s)
    if remaining is None or reset is None:
        return None
    return Allowance(remaining, reset, _whole(headers.get("ratelimit-limit", "")) or 0)


def exhausted_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Seconds until a host's allowance returns, when a good answer says that none is left."""
    allowance = allowance_of(headers, now_s)
    return None if allowance is None else allowance.pause


def _whole(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else None


@dataclass(slots=True)
class Bucket:
    """Tokens that come back at a rate, which the caller knows; one request takes one."""

    tokens: float
    at: float

    def refill(self, rate: float, now: float) -> float:
        """The tokens that are there by ``now``."""
        self.tokens = min(max(1.0, rate * _BURST_S), self.tokens + (now - self.at) * rate)
        self.at = now
        return self.tokens

    def wait_s(self, rate: float, now: float) -> float:
        """Seconds until there is one."""
        return max(0.0, (1.0 - self.refill(rate, now)) / rate)
