"""Turns with the hosts that due work asks: so many questions at one time, and rests after failures.

Owns slots by place (a host, its domain, a kind of question), who is next when one gets free, and rests. What
cannot begin is put off without holding anything, so that no host, however slow, holds up the others. Leaves
out what is asked. Event loop only.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Final, NamedTuple, Protocol

from indexer.atproto.types import Did
from indexer.errors import IndexerError

#: Wait of one that nobody called meanwhile, in seconds, and how many a second come back beyond it.
_PARKED_S: Final = 30.0
_BACK_PER_S: Final = 20.0
_LOOKED_AT: Final = 16
#: Before the names of places that are hosts.
_HOST: Final = "host "


class HostManners(Protocol):
    """What the fetches know of hosts, and are told of them."""

    def penalty_s(self, host: str) -> float: ...
    def success(self, host: str) -> None: ...
    def fault(
        self, host: str, *, jitter: float, retry_after: float | None, limited: bool, error: str
    ) -> None: ...


class Place(NamedTuple):
    """Something that takes ``most`` questions at one time."""

    name: str
    most: int


class Postponed(IndexerError):
    """Nothing failed: a question is to be asked in ``wait_s`` seconds."""

    reason = "postponed"

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"to be asked in {wait_s:.1f} s")
        self.wait_s = wait_s


@dataclass(slots=True)
class _Taken:
    taken: int = 0
    failures: int = 0  # in a row, those while it rests not counted
    not_before: float = 0.0  # loop time
    parked: OrderedDict[Did, None] = field(default_factory=OrderedDict)

    def idle(self, now: float) -> bool:
        return not self.taken and not self.parked and self.not_before <= now


class Turns:
    """``call`` is told of a repository whose place is free. ``retry_s``: first and longest rest."""

    def __init__(self, call: Callable[[Did], object], retry_s: tuple[float, float], limit: int) -> None:
        self._call = call
        self._retry_s = retry_s
        self._limit = limit
        self._places: OrderedDict[str, _Taken] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def wait_s(self, did: Did, places: Sequence[Place]) -> float:
        """0.0 when the question may begin; else it is parked, and due again after so many seconds."""
        now = asyncio.get_running_loop().time()
        for place in places:
            state = self._state(place.name)
            rest = max(0.0, state.not_before - now)
            if rest or state.taken >= place.most:
                behind = len(state.parked) / _BACK_PER_S
                state.parked[did] = None
                return rest + behind if rest else _PARKED_S + behind
        for place in places:
            self._state(place.name).parked.pop(did, None)
        return 0.0

    @contextmanager
    def taken(self, places: Sequence[Place]) -> Iterator[None]:
        """A question is under way; whoever is next at its places is called when it ends."""
        states = [self._state(place.name) for place in places]
        for state in states:
            state.taken += 1
        try:
            yield
        finally:
            for state in states:
                state.taken -= 1
                if state.parked:
                    did, _ = state.parked.popitem(last=False)
                    self._call(did)

    def answered(self, name: str) -> None:
        """The place gave an answer."""
        state = self._state(name)
        state.failures, state.not_before = 0, 0.0

    def failed(self, name: str, retry_after: float | None = None) -> None:
        """The place gave none: it rests, ever longer. What else is under way there tells nothing new."""
        state, now = self._state(name), asyncio.get_running_loop().time()
        if state.not_before > now and retry_after is None:
            return
        first, longest = self._retry_s
        rest = min(longest, first * 2.0 ** min(state.failures, 16))
        state.failures += 1
        state.not_before = max(state.not_before, now + max(rest, min(longest, retry_after or 0.0)))

    def _state(self, name: str) -> _Taken:
        state = self._places.get(name)
        if state is None:
            state = self._places[name] = _Taken()
            if len(self._places) > self._limit:
                self._forget()
        else:
            self._places.move_to_end(name)
        return state

    def _forget(self) -> None:
        """Drops idle places among those that were not used for longest."""
        now = asyncio.get_running_loop().time()
        oldest = [name for name, _ in zip(self._places, range(_LOOKED_AT), strict=False)]
        for name in oldest:
            if self._places[name].idle(now):
                del self._places[name]


class HostTurns(Turns):
    """Turns with hosts, whose failures the fetches hear of too, once `manners` is set."""

    manners: HostManners | None = None

    def wait_s(self, did: Did, places: Sequence[Place]) -> float:
        wait = super().wait_s(did, places)
        if self.manners is None or wait:
            return wait
        rests = [self.manners.penalty_s(host) for place in places if (host := host_in(place))]
        return max((rest for rest in rests if isfinite(rest)), default=0.0)

    def told(self, host: str, error: Exception | None) -> None:
        """What came of a question to ``host``."""
        if error is None:
            self.answered(_HOST + host)
            if self.manners is not None:
                self.manners.success(host)
            return
        asked: float | None = getattr(error, "retry_after", None)
        self.failed(_HOST + host, asked)
        if self.manners is not None:
            limited = getattr(error, "reason", "") == "rate_limited"
            self.manners.fault(
                host, jitter=random.random(), retry_after=asked, limited=limited, error=str(error)
            )


def host_place(host: str, most: int) -> Place:
    """The place of one host."""
    return Place(_HOST + host, most)


def host_in(place: Place) -> str:
    """The host whose place it is; "" for another kind of place."""
    return place.name.removeprefix(_HOST) if place.name.startswith(_HOST) else ""
