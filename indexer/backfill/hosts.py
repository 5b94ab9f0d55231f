"""Politeness towards hosts: how many requests at once and a second, and how long to leave one alone.

Owns what is known in memory of the hosts in use: requests under way, tokens, faults, penalties, an
operator's word. Bounded: those that it costs least to forget go, and come back from their rows (``read``).
A host begins with few requests at once and gets more with each good answer, up to its tier. No I/O but
``read`` and ``accounts``, which look into the store; the clocks are handed in. Event loop only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal

from indexer.backfill.tiers import Tier, Tiers
from indexer.backfill.waits import Allowance, Bucket, backoff_s, limited_s
from indexer.config import Settings
from indexer.store.host_rows import NO_HOST, HostRow
from indexer.store.host_rows import host_of as host_of

Status = Literal["active", "idle", "offline", "throttled", "banned"]
#: Why repositories of a host are not fetched until an operator says otherwise.
BANNED: Final = "host_banned"
OVER_LIMIT: Final = "account_limit"
HELD: Final = (BANNED, OVER_LIMIT)

#: Requests at once to a host that has not shown yet that it answers.
_FIRST_WINDOW: Final = 2
#: What is kept of the table of hosts when it is full.
_KEPT: Final = 0.75
#: A good answer is noted in the row this often, in seconds.
_NOTED_S: Final = 3600.0
_ERROR_LENGTH: Final = 200
#: The longest time that is told, in seconds.
_ENDLESS_S: Final = 10 * 365 * 86400.0


@dataclass(slots=True)
class _Host:
    row: HostRow
    tier: Tier
    bucket: Bucket
    window: int
    active: int = 0
    not_before: float = 0.0
    paced: float = 0.0  # requests a second that what is left of its allowance lasts for; 0: no word
    paced_until: float = 0.0
    lies: int = 0  # repositories that did not verify, in a row
    whole_until: float = 0.0  # until then only whole repositories are asked for

    def rate(self, now: float) -> float:
        """Requests a second; 0 is no limit."""
        rate = self.tier.requests_per_s
        if self.paced and now < self.paced_until:
            return min(rate or self.paced, self.paced)
        return rate


def _nothing(_host: str) -> None:
    return None


def _none(_host: str) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Views:
    """What the store says of a host: its row, and how many accounts live on it."""

    read: Callable[[str], HostRow | None] = _nothing
    accounts: Callable[[str], int] = _none


@dataclass(slots=True)
class Hosts:
    """Who is being asked, and who is to be left alone until when."""

    settings: Settings
    clock: Callable[[], float] = time.monotonic
    views: Views = field(default_factory=Views)
    wall: Callable[[], float] = time.time
    tiers: Tiers = field(init=False)
    _hosts: dict[str, _Host] = field(init=False, default_factory=dict)
    _changed: dict[str, HostRow] = field(init=False, default_factory=dict)  # not stored yet

    def __post_init__(self) -> None:
        self.tiers = Tiers(self.settings)

    # ---- whether to ask

    def free(self, host: str) -> bool:
        """Whether a request to ``host`` may begin now."""
        return self._room(host) and self.wait_s(host) == 0.0

    def wait_s(self, host: str) -> float:
        """Seconds until pauses and rates let ``host`` be asked again; endless for a banned one."""
        state, now = self._state(host), self.clock()
        if state.row.banned:
            return float("inf")
        rate = state.rate(now)
        return max(0.0, state.not_before - now, state.bucket.wait_s(rate, now) if rate else 0.0)

    def _room(self, host: str) -> bool:
        state = self._state(host)
        return state.active < min(state.window, state.tier.fetches)

    def penalty_s(self, host: str) -> float:
        """Seconds for which ``host`` is still to be left alone: 0 when it is not, endless if banned."""
        state = self._state(host)
        return float("inf") if state.row.banned else max(0.0, state.not_before - self.clock())

    def rest_note(self, host: str) -> str:
        """Until when ``host`` is left alone, and why, in words; for one that rests."""
        row, now = self.row(host), self.wall()
        until = datetime.fromtimestamp(now + min(self.penalty_s(host), _ENDLESS_S), UTC)
        failed = row.error and row.until_us / 1e6 > now
        why = f": {row.error}" if failed else ", as it asked"
        return f"{host} is left alone until {until:%Y-%m-%dT%H:%M:%SZ}{why}"

    def held(self, host: str) -> str:
        """Why nothing new of ``host`` is to be fetched until an operator says otherwise; "" when it may."""
        state = self._state(host)
        if state.row.banned:
            return BANNED
        limit = state.tier.accounts
        return OVER_LIMIT if limit and self.views.accounts(host) > limit else ""

    def soonest_s(self, hosts: Iterable[str]) -> float:
        """Seconds until one of ``hosts`` that has room may be asked; endless when none is waited for."""
        return min((self.wait_s(host) for host in hosts if self._room(host)), default=float("inf"))

    # ---- what came of it

    def take(self, host: str) -> None:
        """A request begins."""
        self._state(host).active += 1
        self.pay(host)

    def join(self, host: str) -> bool:
        """One more request at once for a fetch under way, if there is room; each is paid for by `pay`."""
        room = self._room(host)
        if room:
            self._state(host).active += 1
        return room

    def pay(self, host: str) -> None:
        """A further request of a fetch under way begins."""
        state, now = self._state(host), self.clock()
        rate = state.rate(now)
        if rate:
            state.bucket.refill(rate, now)
            state.bucket.tokens -= 1.0

    def gives_parts(self, host: str) -> bool:
        """Whether parts of repositories may be asked for: nothing is known to the contrary."""
        return self.clock() >= self._state(host).whole_until

    def gives_whole_only(self, host: str) -> None:
        """Parts of repositories are not to be had from ``host``; that is tried again after a while."""
        self._state(host).whole_until = self.clock() + self.settings.backfill.sparse_recheck

    def release(self, host: str) -> None:
        """A request ended, whichever way."""
        self._state(host).active -= 1

    def success(self, host: str, *, pause: float | None = None, allowance: Allowance | None = None) -> None:
        """The host answered; ``pause`` when it also asks to be left alone, or its ``allowance`` says so."""
        state, now, wall = self._state(host), self.clock(), self.wall()
        if allowance is not None:
            pause = allowance.pause if pause is None else pause
            state.paced = allowance.requests_per_s or 0.0
            state.paced_until = now + min(allowance.reset_s, self.settings.backfill.retry_max)
        if pause:
            self._rest(state, pause)
        state.window = min(state.window + 1, max(state.tier.fetches, 1))
        row = state.row
        if row.faults or row.limits or wall - row.ok_us / 1e6 >= _NOTED_S:
            wall_us = int(wall * 1e6)
            self._note(
                host, state, row._replace(first_us=row.first_us or wall_us, ok_us=wall_us, faults=0, limits=0)
            )

    def fault(
        self,
        host: str,
        *,
        jitter: float,
        retry_after: float | None = None,
        limited: bool = False,
        error: str = "",
    ) -> None:
        """The host failed. A rate limit counts at once, other faults after a few in a row.

        What else is under way to a host that rests already tells nothing new.
        """
        state, maximum = self._state(host), self.settings.backfill.retry_max
        row, wall_us = state.row, int(self.wall() * 1e6)
        resting = state.not_before > self.clock()
        state.window = max(1, state.window // 2)
        faults = row.faults + (not resting)
        limits = row.limits if resting else row.limits + 1 if limited else 0
        if limited:
            first = self.settings.hosts.rate_limit_wait
            self._rest(state, limited_s(limits, first, maximum, jitter=jitter, asked=retry_after))
        elif retry_after is not None or faults > self.settings.hosts.faults:
            minimum = self.settings.backfill.retry_min
            over = faults - self.settings.hosts.faults
            self._rest(state, backoff_s(over, minimum, maximum, jitter=jitter, retry_after=retry_after))
        self._note(
            host,
            state,
            row._replace(
                first_us=row.first_us or wall_us, failed_us=wall_us, faults=faults, limits=limits,
                until_us=self._until_us(state), error=error[:_ERROR_LENGTH],
            ),
        )  # fmt: skip

    def proved(self, host: str) -> None:
        """A repository that the host served verified."""
        self._state(host).lies = 0

    def lied(self, host: str, *, jitter: float, error: str = "") -> None:
        """A repository that the host served is wrong, or beyond the limits. After a few in a row each one
        is a fault as well: answering is not enough."""
        state = self._state(host)
        state.lies += 1
        over = state.lies - self.settings.hosts.faults
        if over > 0:
            wait = backoff_s(
                over, self.settings.backfill.retry_min, self.settings.backfill.retry_max, jitter=jitter
            )
            self._rest(state, wait)
            state.window = 1
            row = state.row._replace(
                failed_us=int(self.wall() * 1e6), until_us=self._until_us(state), error=error[:_ERROR_LENGTH]
            )
            self._note(host, state, row)

    def _rest(self, state: _Host, pause: float) -> None:
        maximum = self.settings.backfill.retry_max * 1.1
        state.not_before = max(state.not_before, self.clock() + min(pause, maximum))

    def _until_us(self, state: _Host) -> int:
        left = state.not_before - self.clock()
        return int((self.wall() + left) * 1e6) if left > 0 else 0

    def _note(self, host: str, state: _Host, row: HostRow) -> None:
        state.row = row
        self._changed[host] = row

    # ---- rows

    def changed(self) -> dict[str, HostRow]:
        """What was seen since the last call and is to be stored."""
        found, self._changed = self._changed, {}
        return found

    def decided(self, host: str, row: HostRow) -> None:
        """An operator's word on ``host``, as stored."""
        state = self._state(host)
        if state.row.decided or row.decided:
            state.row = HostRow._make((*row[:6], *state.row[6:]))
            state.tier = self.tiers.of(host, state.row)

    def row(self, host: str) -> HostRow:
        """What is known of ``host``, also what is not stored yet."""
        state = self._hosts.get(host)
        if state is not None:
            return state.row
        return self._changed.get(host) or self.views.read(host) or NO_HOST

    def state_of(self, host: str, row: HostRow) -> Status:
        """The status of a host by its row, as `getHostStatus` names it."""
        now = self.wall()
        if row.banned:
            return "banned"
        limit = self.tiers.of(host, row).accounts
        if limit and self.views.accounts(host) > limit:
            return "throttled"
        if row.limits and row.until_us / 1e6 > now:
            return "throttled"
        if row.faults >= self.settings.hosts.faults or row.until_us / 1e6 > now:
            return "offline"
        return "idle" if now - row.ok_us / 1e6 > self.settings.hosts.idle_after else "active"

    def status(self) -> dict[str, int]:
        """Numbers for ``/stats``."""
        now = self.clock()
        return {
            "active": sum(state.active > 0 for state in self._hosts.values()),
            "penalized": sum(state.not_before > now for state in self._hosts.values()),
            "known": len(self._hosts),
        }

    # ---- the table

    def _state(self, host: str) -> _Host:
        state = self._hosts.get(host)
        if state is None:
            if len(self._hosts) >= self.settings.hosts.in_memory:
                self._forget()
            row = self._changed.get(host) or self.views.read(host) or NO_HOST
            tier, now = self.tiers.of(host, row), self.clock()
            state = _Host(row, tier, Bucket(max(1.0, tier.requests_per_s), now), _FIRST_WINDOW)
            left = row.until_us / 1e6 - self.wall()
            if left > 0:
                self._rest(state, left)
            self._hosts[host] = state
        return state

    def _forget(self) -> None:
        """Makes room for many: first the hosts without a penalty, then those whose penalty ends first.

        A host that is being asked stays: its requests are counted here. Those are bounded by the workers.
        """
        now = self.clock()
        idle = [(host, state) for host, state in self._hosts.items() if not state.active]
        idle.sort(key=lambda item: (max(item[1].not_before, now), item[1].row.faults))
        for host, _ in idle[: len(self._hosts) - int(self.settings.hosts.in_memory * _KEPT)]:
            del self._hosts[host]
