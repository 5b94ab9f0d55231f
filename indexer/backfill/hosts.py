"""Politeness towards hosts: how many fetches at once, and how long to leave one alone.

Owns the counts and penalties of every host in use, and the arithmetic of waiting: backoff and the
rate-limit headers. No I/O and no timers: the clock is handed in. Event loop only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from indexer.identity.http import reset_s

#: Failures in a row after which a host as a whole is left alone, not just the repository that met them.
FAULTS_BEFORE_PENALTY = 3
#: Hosts remembered; beyond it those that it costs least to forget go, a part of them at once.
MAX_HOSTS = 10_000
_KEPT = 0.75


def host_of(url: str) -> str:
    """``host`` or ``host:port`` of an origin, lower case; "" for an unknown one."""
    return urlsplit(url).netloc.lower()


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


def exhausted_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Seconds until a host's allowance returns, when a good answer says that none is left."""
    used_up = headers.get("ratelimit-remaining", "").strip() == "0"
    return reset_s(headers, now_s) if used_up else None


@dataclass(slots=True)
class _Host:
    active: int = 0
    faults: int = 0
    not_before: float = 0.0


class Hosts:
    """Who is being fetched from, and who is to be left alone until when."""

    def __init__(self, per_host: int, minimum: float, maximum: float, clock: Callable[[], float]) -> None:
        self._per_host = per_host
        self._minimum = minimum
        self._maximum = maximum
        self._clock = clock
        self._hosts: dict[str, _Host] = {}

    def free(self, host: str) -> bool:
        """Whether a fetch from ``host`` may begin now."""
        state = self._hosts.get(host)
        return state is None or (state.active < self._per_host and state.not_before <= self._clock())

    def penalty_s(self, host: str) -> float:
        """Seconds for which ``host`` is still to be left alone; 0 when it is not."""
        state = self._hosts.get(host)
        return 0.0 if state is None else max(0.0, state.not_before - self._clock())

    def take(self, host: str) -> None:
        """A fetch begins."""
        self._state(host).active += 1

    def release(self, host: str) -> None:
        """A fetch ended, whichever way."""
        self._state(host).active -= 1

    def success(self, host: str, *, pause: float | None = None) -> None:
        """The host answered; ``pause`` when it also said that its allowance is used up."""
        state = self._state(host)
        state.faults = 0
        if pause:
            state.not_before = max(state.not_before, self._clock() + min(pause, self._maximum))

    def fault(
        self, host: str, *, jitter: float, retry_after: float | None = None, limited: bool = False
    ) -> None:
        """The host failed. A rate limit counts at once, other faults after a few in a row."""
        state = self._state(host)
        state.faults += 1
        over = state.faults - (0 if limited else FAULTS_BEFORE_PENALTY)
        if retry_after is None and over <= 0:
            return
        pause = backoff_s(over, self._minimum, self._maximum, jitter=jitter, retry_after=retry_after)
        state.not_before = max(state.not_before, self._clock() + pause)

    def status(self) -> dict[str, int]:
        """Numbers for ``/stats``."""
        now = self._clock()
        return {
            "active": sum(state.active > 0 for state in self._hosts.values()),
            "penalized": sum(state.not_before > now for state in self._hosts.values()),
        }

    def _state(self, host: str) -> _Host:
        state = self._hosts.get(host)
        if state is None:
            if len(self._hosts) >= MAX_HOSTS:
                self._forget()
            state = self._hosts[host] = _Host()
        return state

    def _forget(self) -> None:
        """Makes room for many: first the hosts without a penalty, then those whose penalty ends first.

        A host that is being fetched from stays: its slots are counted here. Those are bounded by the fetches.
        """
        now = self._clock()
        idle = [(host, state) for host, state in self._hosts.items() if not state.active]
        idle.sort(key=lambda item: (max(item[1].not_before, now), item[1].faults))
        for host, _ in idle[: len(self._hosts) - int(MAX_HOSTS * _KEPT)]:
            del self._hosts[host]
