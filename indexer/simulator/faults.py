"""Faults on demand: which host does what wrong, to whom, how often; and the proof that it did.

Owns the plan, the dice and the counts. What a fault looks like on the wire is `fault_answers`' and
`names`', how it is sent `fault_delivery`'s. One event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from random import Random
from typing import Any

from indexer.simulator.account import ActionError

#: What may be asked of a host, by the name under which a fault can be aimed at it.
DOCUMENT, GET_REPO, GET_RECORD, GET_BLOCKS, STATUS, LATEST = (
    "document", "getRepo", "getRecord", "getBlocks", "getRepoStatus", "getLatestCommit",
)  # fmt: skip
LIST_REPOS, RESOLVE_HANDLE, WELL_KNOWN, DNS = "listRepos", "resolveHandle", "wellKnown", "dns"
BY_COLLECTION, LIST_HOSTS, DESCRIBE = "listReposByCollection", "listHosts", "describeRepo"
OTHER = "other"
ROUTES = (
    DOCUMENT, GET_REPO, GET_RECORD, GET_BLOCKS, STATUS, LATEST, LIST_REPOS, BY_COLLECTION, LIST_HOSTS,
    DESCRIBE, RESOLVE_HANDLE, WELL_KNOWN, DNS, OTHER,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong at a host.

    ``host``: ``plc``, ``relay0``, ``pds0``, … or ``names`` (DNS and the well-known files), with ``*``
    and ``?`` as in file names. Without ``times`` it goes on until it is removed.
    """

    host: str
    kind: str
    route: str = ""  # one of `ROUTES`; "": every one that the kind suits
    did: str = ""  # only requests about this account
    times: int | None = None  # only the next so many requests
    chance: float = 1.0  # of each request, by dice of the network's seed
    value: float | str | None = None  # what the kind takes: bytes a second, seconds, a status, a URL

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Fault:
        """A fault as the control API takes it; raises `ActionError` naming what is wrong."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(body) - known):
            raise ActionError(f"a fault has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        for name in ("host", "kind", "route", "did"):
            if not isinstance(body.get(name, ""), str) or (name in ("host", "kind") and not body.get(name)):
                raise ActionError(f"a fault's {name} must be a text")
        times, chance, value = body.get("times"), body.get("chance", 1.0), body.get("value")
        if times is not None and (type(times) is not int or times < 1):
            raise ActionError("a fault's times must be a whole number from 1 on, or be left out")
        if type(chance) not in (int, float) or not 0 < chance <= 1:
            raise ActionError("a fault's chance must be above 0 and at most 1")
        if value is not None and type(value) not in (int, float, str):
            raise ActionError("a fault's value must be a number or a text")
        return cls(**body)


class Planned:
    """A fault that waits for its requests. ``left`` is None where it has no end."""

    __slots__ = ("_counts", "_rng", "fault", "fired", "left", "number")

    def __init__(self, number: int, fault: Fault, rng: Random, counts: Counter[tuple[str, str]]) -> None:
        self.number = number
        self.fault = fault
        self.left = fault.times
        self.fired = 0
        self._rng = rng
        self._counts = counts

    def strikes(self, host: str, route: str, did: str) -> bool:
        """Whether this request is to meet the fault; throws the dice for one that may."""
        fault = self.fault
        if self.left == 0 or fault.route not in ("", route) or fault.did not in ("", did):
            return False
        return fnmatchcase(host, fault.host) and (fault.chance >= 1 or self._rng.random() < fault.chance)

    def fire(self, host: str) -> None:
        """The fault happened at ``host``."""
        self.fired += 1
        if self.left is not None:
            self.left -= 1
        self._counts[host, self.fault.kind] += 1

    def state(self) -> dict[str, Any]:
        return {"id": self.number, "left": self.left, "fired": self.fired, **asdict(self.fault)}


class Faults:
    """The plan of one network. ``kinds`` maps the name of each kind to the routes that it suits."""

    def __init__(self, seed: int, kinds: Mapping[str, frozenset[str]], faults: Iterable[Fault] = ()) -> None:
        self._seed = seed
        self._kinds = kinds
        self._planned: dict[int, Planned] = {}
        self._numbers = 0
        #: (host, kind) → how often it happened, also by faults that were removed since.
        self.fired: Counter[tuple[str, str]] = Counter()
        for fault in faults:
            self.add(fault)

    def add(self, fault: Fault) -> Planned:
        """Plans a fault; those that were added first come first. Raises `ActionError` for an unknown one."""
        suited = self._kinds.get(fault.kind)
        if suited is None:
            raise ActionError(f"no such fault: {fault.kind}; there are {', '.join(sorted(self._kinds))}")
        if fault.route and fault.route not in suited:
            raise ActionError(
                f"{fault.kind} cannot happen to {fault.route}, only to {', '.join(sorted(suited))}"
            )
        self._numbers += 1
        rng = Random(f"{self._seed}/fault/{self._numbers}/{fault.host}/{fault.kind}")
        planned = Planned(self._numbers, fault, rng, self.fired)
        self._planned[planned.number] = planned
        return planned

    def remove(self, number: int) -> None:
        """Ends a fault; its counts stay."""
        if self._planned.pop(number, None) is None:
            raise ActionError(f"no such fault: {number}")

    def clear(self) -> None:
        """Ends all faults; the counts stay."""
        self._planned.clear()

    def striking(self, host: str, route: str, did: str) -> Iterator[Planned]:
        """The faults that this request is to meet; the first one that can be acted out is to be fired."""
        for planned in list(self._planned.values()):
            if route in self._kinds[planned.fault.kind] and planned.strikes(host, route, did):
                yield planned

    def unfired(self) -> list[Fault]:
        """What was planned and has not happened yet."""
        return [planned.fault for planned in self._planned.values() if not planned.fired]

    def state(self) -> dict[str, Any]:
        """The answer to ``GET /faults``."""
        fired: dict[str, dict[str, int]] = {}
        for (host, kind), count in sorted(self.fired.items()):
            fired.setdefault(host, {})[kind] = count
        return {
            "faults": [planned.state() for planned in self._planned.values()],
            "fired": fired,
            "kinds": {kind: sorted(routes) for kind, routes in sorted(self._kinds.items())},
        }

    def command(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """``POST /faults``: a fault to add, or ``{"remove": id}``, or ``{"clear": true}``."""
        if "remove" in body:
            self.remove(body["remove"])
        elif body.get("clear") is True:
            self.clear()
        else:
            return self.add(Fault.from_json(body)).state()
        return self.state()
