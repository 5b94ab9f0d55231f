"""What goes wrong in a chaos run, and when: every kind of lie and every fault of the servers, from one seed.

Owns the order, the lanes and hosts, and the proof that all of it happened: what was planned and did not
happen fails the run. One event loop.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from random import Random
from typing import Any

from indexer.simulator.account import ACTIVE
from indexer.simulator.fault_answers import KINDS as FAULT_KINDS
from indexer.simulator.faults import (
    DNS,
    DOCUMENT,
    GET_REPO,
    LIST_REPOS,
    STATUS,
    WELL_KNOWN,
    Fault,
    Planned,
)
from indexer.simulator.lie_base import Kind
from indexer.simulator.lie_kinds import KINDS
from tests.chaos.network import HOSTS, ChaosNetwork

#: Holds a lane up until it came three times in one life, which those of a storm are too short for.
STUCK = "frame_stuck"
#: After these a lane's numbers mean something else: they come when all counters have been read.
RENUMBERING = ("reset_told", "reset_silent", "error_future")
#: Told to open sockets only, so that no replay repeats them: each once more when nobody is killed.
SOCKETS = tuple(
    kind.name for kind in KINDS.values() if kind.tell.__module__.endswith("lie_sockets")
    and kind.name not in RENUMBERING
)  # fmt: skip
#: What a fault takes, where the usual value is too long to wait for.
_VALUES = {
    "rate_limited_retry_after": 1, "rate_limited_reset": 1, "unavailable_retry_after": 1, "slow": 4096,
}  # fmt: skip
#: What is asked of the servers, by weight: a fault of documents keeps everything else from being asked.
_ROUTES = (DOCUMENT, GET_REPO, GET_REPO, GET_REPO, STATUS, STATUS, STATUS, WELL_KNOWN, DNS)
#: Of the active faults, so many may lie on the way to everything else.
_DOCUMENTS = 4
#: Faults that hold at one time, and the chance of each request that one suits.
_ACTIVE = 24
_CHANCE = 0.5
_MOST_TIMES = 2
_TURN_S = 2.0
#: Accounts that a lie looks at for one that fits, beside the one that the network chose.
_TRIES = 5
#: Records of an account whose tree has several layers.
_ROOMY = 20


class Plan:
    """The rest of what is to go wrong. ``lanes`` are those that the daemon follows."""

    def __init__(self, network: ChaosNetwork, lanes: list[str], rng: Random) -> None:
        self.network = network
        self.lanes = lanes
        self.told: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()  # attempts for which nobody was there
        self._rng = rng
        self._lies: deque[str] = deque()
        self._faults: deque[str] = deque()  # kinds
        self._active: dict[Planned, float] = {}  # → until when, on the monotonic clock
        self.rounds = 0
        self._next_round()

    # -- lies

    def fair(self) -> list[int]:
        """Every lie that is refused once, each of an account of its own; the ids in the ledger.

        Nothing excuses these: the accounts are synced, and nobody else tells anything of them.
        """
        taken: set[str] = set()
        told = []
        for kind in KINDS.values():
            if not any(name.startswith("reject/") for name in kind.expect) or kind.name in (*SOCKETS, STUCK):
                continue
            lie = self._of_somebody(kind, taken)
            if lie is not None:
                told.append(int(lie["id"]))
        return told

    def _of_somebody(self, kind: Kind, taken: set[str], tries: int = 1000) -> dict[str, Any] | None:
        lane = self._lane(kind)
        if kind.needs == "nobody":
            return self.network.lie(kind.name, [lane])
        inactive = kind.needs == "inactive"
        world = self.network.world
        accounts = [did for did, account in world.accounts.items() if (account.status != ACTIVE) == inactive]
        self._rng.shuffle(accounts)
        # Those with many records first: a tree must have room for what is wrong with it.
        accounts.sort(key=lambda did: len(world.accounts[did].records) < _ROOMY)
        for did in accounts[:tries]:
            if did not in taken and (lie := self.network.lie(kind.name, [lane], did)) is not None:
                taken.add(did)
                return lie
        return None

    def lie(self) -> None:
        """Tells the next lie of the plan; one for which nobody is there is put off."""
        if not self._lies:
            self._next_round()
        name = self._lies.popleft()
        lane = self._lane(KINDS[name])
        if self.network.lie(name, [lane]) is None and self._of_somebody(KINDS[name], set(), _TRIES) is None:
            self.failed[name] += 1
            self._lies.append(name)
        else:
            self.told[name] += 1

    def _next_round(self) -> None:
        """All lies once, in another order each time."""
        self.rounds += 1
        names = [name for name in KINDS if name not in (*RENUMBERING, STUCK)]
        self._rng.shuffle(names)
        self._lies.extend(names)

    def _lane(self, kind: Kind) -> str:
        if kind.needs == "foreign":
            return self._rng.choice([lane for lane in self.lanes if lane.startswith("pds")])
        return self._rng.choice(self.lanes)

    # -- faults of the servers

    def _fault(self, kind: str) -> Fault:
        """One fault at whichever host is asked next what it suits, of all that is asked in such a run."""
        suited = [route for route in _ROUTES if route in FAULT_KINDS[kind].routes]
        if not suited:  # seldom asked: whoever does meets it
            return Fault("*", kind, LIST_REPOS, times=1)
        route = self._rng.choice(suited)
        times = self._rng.randint(1, _MOST_TIMES)
        host = "names" if route == DNS else "*"
        return Fault(host, kind, route, times=times, chance=_CHANCE, value=_VALUES.get(kind))

    def waits_for(self, route: str) -> bool:
        """Whether a fault waits for somebody to ask on this route."""
        return any(planned.left and planned.fault.route == route for planned in self._active)

    def pump(self) -> None:
        """Faults that have happened make room for others, as do those that met nobody in their turn."""
        faults, now = self.network.faults, time.monotonic()
        for planned, until in list(self._active.items()):
            if planned.left and until > now:
                continue
            del self._active[planned]
            faults.remove(planned.number)
            if planned.left:
                self._faults.append(planned.fault.kind)
        if not self._faults and not self._active:
            self._refill()
        for kind in self._next_kinds():
            fault = self._fault(kind)
            routes = [planned.fault.route for planned in self._active]
            if fault.route != DOCUMENT or routes.count(DOCUMENT) < _DOCUMENTS:
                self._faults.remove(kind)
                self._active[faults.add(fault)] = now + _TURN_S

    def _next_kinds(self) -> list[str]:
        """As many as there is room for; those that never happened first."""
        fired = {kind for _, kind in self.network.faults.fired}
        waiting = sorted(self._faults, key=lambda kind: kind in fired)
        return waiting[: _ACTIVE - len(self._active)]

    def _refill(self) -> None:
        """Every kind of fault once, those that are seldom asked for first."""
        kinds = sorted(FAULT_KINDS)
        self._rng.shuffle(kinds)
        kinds.sort(key=lambda kind: FAULT_KINDS[kind].routes != {LIST_REPOS})
        self._faults.extend(kinds)

    def calm(self) -> None:
        """No more faults."""
        self.network.faults.clear()

    # -- proof

    @property
    def complete(self) -> bool:
        return not self.missing()

    def missing(self) -> list[str]:
        """What was planned and has not happened."""
        lies = self.network.lies.told
        fired = {kind for _, kind in self.network.faults.fired}
        return [f"lie {name}" for name in KINDS if name not in (*RENUMBERING, STUCK) and not lies[name]] + [
            f"fault {kind}" for kind in sorted(FAULT_KINDS) if kind not in fired
        ]

    def hosts(self) -> dict[str, int]:
        """Host → how many faults happened there."""
        found: Counter[str] = Counter()
        for (host, _), count in self.network.faults.fired.items():
            found[host] += count
        return dict(sorted(found.items()))


def followed() -> list[str]:
    """Both relays, and one PDS directly."""
    assert HOSTS > 1
    return ["relay0", "relay1", "pds0"]
