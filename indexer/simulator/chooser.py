"""What happens next in a network left to itself: one seeded choice a step.

Owns the rates of rare events and the mix of writes in a commit. The choice of a step depends on the
seed, the step's number and the state of the world, so a restored network goes on as it would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from indexer.simulator import content
from indexer.simulator.account import ACTIVE, Account, Write
from indexer.simulator.phrases import NAMES, PLACES
from indexer.simulator.wire import tid
from indexer.simulator.world import MAX_OPS, Happening, World

_SINGLE_KEYS = ("self", "example.com", "a:b", "~x_-1", "pre:fix", "UPPER.lower")


@dataclass(frozen=True, slots=True)
class Rates:
    """Chance of each rare event, a step; and how large the network may grow by itself."""

    account: float = 0.004
    handle: float = 0.002
    status: float = 0.004
    delete: float = 0.0005
    key: float = 0.0
    migrate: float = 0.0
    sync: float = 0.0005
    batch: float = 0.03
    big_batch: float = 0.002
    max_accounts: int = 2_000
    max_records: int = 300_000  # about 1.5 KB of memory each; beyond it as much is deleted as is made


class Chooser:
    """`step` makes the world's next happening."""

    def __init__(self, world: World, rates: Rates) -> None:
        self._world = world
        self._rates = rates

    def step(self) -> Happening:
        world = self._world
        world.steps += 1
        rng = Random(world.seed << 40 | world.steps)
        return self._rare(rng) or self._commit(rng)

    @property
    def _stays(self) -> Account:
        """The network's first account never leaves: examples for people keep working."""
        return next(iter(self._world.accounts.values()))

    def _rare(self, rng: Random) -> Happening | None:
        """A rare event, when the dice say so and the world allows it."""
        world, rates = self._world, self._rates
        draw = rng.random()
        for kind in ("account", "handle", "status", "delete", "key", "migrate", "sync"):
            draw -= getattr(rates, kind)
            if draw < 0:
                break
        else:
            return None
        if kind == "account":
            return world.create() if len(world.accounts) < rates.max_accounts else None
        if kind == "status":
            return self._status(rng)
        if len(world.active) < 4:  # a tiny network keeps its people
            return None
        account = rng.choice(world.active)
        if not account.seen or (kind == "delete" and account is self._stays):
            return None  # who has a past is first seen by a commit
        did = account.did
        if kind == "handle":
            return world.set_handle(did, f"{rng.choice(NAMES)}-{world.steps}.{rng.choice(PLACES)}.test")
        if kind == "delete":
            return world.set_status(did, "deleted", tombstone=rng.random() < 0.5)
        if kind == "key":
            return world.change_key(did)
        if kind == "migrate" and world.pds > 1:
            return world.change_key(did, pds=(account.pds + 1) % world.pds)
        return world.sync(did)

    def _status(self, rng: Random) -> Happening | None:
        """Somebody leaves or, as often, comes back."""
        world = self._world
        away = [account for account in world.accounts.values() if account.status not in (ACTIVE, "deleted")]
        if away and (len(away) > 2 or rng.random() < 0.5):
            return world.set_status(rng.choice(away).did, ACTIVE)
        account = rng.choice(world.active)
        if len(world.active) < 4 or not account.seen or account is self._stays:
            return None
        status = rng.choice(("deactivated", "deactivated", "takendown", "suspended"))
        return world.set_status(account.did, status)

    def _commit(self, rng: Random) -> Happening:
        world = self._world
        if not world.active:
            return world.create()
        unseen = [account for account in world.unseen if account.status == ACTIVE]
        account = rng.choice(unseen) if unseen and rng.random() < 0.1 else rng.choice(world.active)
        draw = rng.random()
        if draw < self._rates.big_batch:
            count = rng.randrange(50, MAX_OPS + 1)
        elif draw < self._rates.batch:
            count = rng.randrange(2, 20)
        else:
            count = 1
        changing = 0.2 if world.records < self._rates.max_records else 0.75
        return world.commit(account.did, choose_writes(rng, world, account, count, changing))


def choose_writes(
    rng: Random, world: World, account: Account, count: int, changing: float = 0.2
) -> list[Write]:
    """``count`` writes on distinct paths: creates, and with chance ``changing`` deletes and updates."""
    writes: dict[str, Write] = {}
    while len(writes) < count:
        write = _change(rng, world, account) if rng.random() < changing else None
        write = write or _create(rng, world, account)
        if write.path not in writes:
            writes[write.path] = write
    return list(writes.values())


def _change(rng: Random, world: World, account: Account) -> Write | None:
    """A delete, or an update of what people edit."""
    path = account.some_path(rng)
    if path is None:
        return None
    collection, value = path.partition("/")[0], account.records[path].value
    plain = value.get("$type") == collection and path not in account.flaws  # what a lie wrote is not edited
    if collection not in content.EDITABLE or not plain or rng.random() < 0.3:
        return Write("delete", path, None)
    return Write("update", path, content.edited(rng, value, world.clock()))


def _create(rng: Random, world: World, account: Account) -> Write:
    micros = world.clock()
    collection = rng.choices(content.COLLECTIONS, content.WEIGHTS)[0]
    rkey = _rkey(rng, collection, micros)
    path = f"{collection}/{rkey}"
    value: dict[str, Any] = content.record(rng, collection, account.did, world, micros)
    if path in account.records:
        return Write("update", path, content.edited(rng, value, micros))
    return Write("create", path, value)


def _rkey(rng: Random, collection: str, micros: int) -> str:
    if collection == content.PROFILE:
        return "self"
    if collection == content.SAMPLE and rng.random() < 0.3:
        return rng.choice(_SINGLE_KEYS)
    return tid(micros, rng.getrandbits(10))


def past(rng: Random, world: World, did: str, count: int) -> dict[str, dict[str, Any]]:
    """``count`` records of a past that began ``count`` minutes more than a day ago, path → value."""
    start = world.clock() - 2 * 86_400_000_000 - count * 60_000_000
    values: dict[str, dict[str, Any]] = {}
    while len(values) < count:
        micros = start + len(values) * 60_000_000 + rng.randrange(59_000_000)
        collection = rng.choices(content.COLLECTIONS, content.WEIGHTS)[0]
        path = f"{collection}/{_rkey(rng, collection, micros)}"
        values[path] = content.record(rng, collection, did, world, micros)
    return values
