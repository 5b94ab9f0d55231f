"""Lies: what a broken or hostile upstream emits beside or instead of the truth, and the ledger of them.

Owns the ledger (id, kind, lanes, seqs, what the indexer must make of it), its journal rows, the counter of
each kind, and who is lied about where. What the kinds say is `lie_kinds`'s. A lie leaves the world's truth
alone, except where its kind is a truth that is told badly. One event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from random import Random
from typing import TYPE_CHECKING, Any

from indexer.simulator.account import ACTIVE, DELETED, Account, ActionError
from indexer.simulator.draft import Outgoing
from indexer.simulator.framelog import Turn
from indexer.simulator.lie_base import one_create
from indexer.simulator.lie_kinds import KINDS, Kind
from indexer.simulator.wire import FrameHalves
from indexer.simulator.world import Happening

if TYPE_CHECKING:
    from indexer.simulator.network import SimulatedNetwork

#: Of those that are told by chance: as often as a lie may look for somebody to be told of.
_TRIES = 20
#: What may become of a frame whose repository the indexer does not hold just then, in place of what is
#: expected; never of one that is refused for its form (rows 0 to 2).
UNLESS_SYNCED = (
    "drop/inactive", "drop/stale_rev", "drop/pending", "drop/desynchronized", "buffer/backfilling",
    "buffer/waiting", "buffer/identity", "drop/buffer_full", "drop/unproven_full",
)  # fmt: skip


class Lies:
    """The ledger, and `tell`."""

    def __init__(self, network: SimulatedNetwork) -> None:
        self._network = network
        self.entries: list[dict[str, Any]] = []
        self.told: Counter[str] = Counter()
        self._draws = 0
        self._rate = 0.0
        self._weights: dict[str, float] = {}
        self._where: tuple[str, ...] = ()

    # -- telling

    def tell(
        self, name: str, *, did: str | None = None, lanes: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """Tells one lie now; its entry in the ledger. `ActionError` when nobody fits."""
        kind = KINDS.get(name)
        if kind is None:
            raise ActionError(f"kind must be one of {', '.join(sorted(KINDS))}")
        rng = Random(f"{self._network.world.seed}/lie/{len(self.entries)}")
        named = None if lanes is None else self._named(lanes)
        account = self._account(kind, rng, did, named)
        chosen = named or self._lanes(kind, rng, account)
        before = len(self.entries)
        kind.tell(Telling(self, self._network, kind, rng, account, chosen))
        if len(self.entries) != before + 1:
            raise ActionError(f"{name} was told {len(self.entries) - before} times")
        return self.entries[-1]

    def plan(self, rate: float, weights: Mapping[str, float], lanes: Iterable[str]) -> None:
        """From now on each step is a lie with this chance: of which kinds, and on which lanes.

        Without kinds all that are told by chance, alike; without lanes any relay's.
        """
        wrong = weights.keys() - KINDS.keys()
        if wrong or any(not 0 <= weight < 1e9 for weight in weights.values()):
            raise ActionError(f"kinds must be known and their weights from 0; not {', '.join(sorted(wrong))}")
        lanes = tuple(lanes)
        if set(lanes) - self._network.lanes.keys():
            raise ActionError(f"lanes must be some of {', '.join(self._network.lanes)}")
        if not 0 <= rate <= 1:
            raise ActionError("rate must be a number from 0 to 1")
        self._rate, self._where = rate, lanes
        usual = {name: 1.0 for name, kind in KINDS.items() if kind.chance}
        self._weights = {name: weight for name, weight in (weights or usual).items() if weight > 0}

    def by_chance(self) -> bool:
        """Perhaps a lie; false when there was none."""
        if not self._rate or not self._weights:
            return False
        world = self._network.world
        self._draws += 1
        rng = Random(f"{world.seed}/chance/{world.steps}/{len(self.entries)}/{self._draws}")
        if rng.random() >= self._rate:
            return False
        for _ in range(_TRIES):
            name = rng.choices(list(self._weights), list(self._weights.values()))[0]
            try:
                self.tell(name)
            except ActionError:
                continue  # nobody fits: another kind may
            return True
        return False

    # -- ledger

    def ledger(self) -> dict[str, Any]:
        """All lies so far, and how often each kind was told."""
        kinds = {
            name: {
                "row": kind.row, "about": kind.about, "expect": list(kind.expect),
                "needs": kind.needs, "chance": kind.chance, "told": self.told[name],
            }
            for name, kind in KINDS.items()
        }  # fmt: skip
        plan = {"rate": self._rate, "kinds": self._weights, "lanes": self._where}
        return {"told": sum(self.told.values()), "plan": plan, "unless_synced": UNLESS_SYNCED, "kinds": kinds,
                "lies": self.entries}  # fmt: skip

    def enter(self, row: dict[str, Any]) -> None:
        """Completes the lie of a row that is about to be journaled: its id, and its seq on each lane."""
        lie = row.get("lie")
        if lie is not None:
            lie["id"] = len(self.entries) + 1
            at = lie.pop("frame")
            if at is not None:
                lie["lanes"] = {
                    name: seq for name, seq in self._seqs(row["frames"][at]).items() if name in lie["lanes"]
                }
            self.restore(row)

    def restore(self, row: dict[str, Any]) -> None:
        """Enters the lie of a journal row, if it has one."""
        lie = row.get("lie")
        if lie is not None:
            self.entries.append(lie)
            self.told[lie["kind"]] += 1

    def trick(self, lie: dict[str, Any]) -> None:
        """Journals a lie that no lane keeps."""
        row = {"kind": "trick", "lie": lie}
        self.enter(row)
        self._network.journal(row)

    def _seqs(self, frame: list[Any]) -> dict[str, int]:
        """Lane → seq of a frame's row, where it has one."""
        pds, pds_seq, first, _, _, _, *others = frame
        seqs = {f"relay{number}": seq for number, seq in enumerate((first, *others))}
        return {name: seq for name, seq in (seqs | {f"pds{pds}": pds_seq}).items() if seq}

    # -- of whom, where

    def _account(
        self, kind: Kind, rng: Random, did: str | None, lanes: frozenset[str] | None
    ) -> Account | None:
        world = self._network.world
        if kind.needs == "nobody":
            return None
        if did is not None:
            account = world.account(did)
            if not _fits(kind, account, lanes):
                raise ActionError(f"{kind.name} needs an account that is {kind.needs}: {did}")
            return account
        fitting = [account for account in world.accounts.values() if _fits(kind, account, lanes)]
        if not fitting:
            raise ActionError(f"{kind.name} needs an account that is {kind.needs}; there is none")
        return rng.choice(fitting)

    def _lanes(self, kind: Kind, rng: Random, account: Account | None) -> frozenset[str]:
        """One lane on which the kind may be told."""
        home = "" if account is None else f"pds{account.pds}"
        if kind.needs == "foreign":
            known = self._where or tuple(self._network.lanes)
            open_to = [name for name in known if name.startswith("pds") and name != home]
        else:
            known = self._where or tuple(lane.name for lane in self._network.relays)
            open_to = [name for name in known if name.startswith("relay") or name == home]
        if not open_to:
            raise ActionError(f"{kind.name} can be told on none of {', '.join(known)}")
        return frozenset({rng.choice(open_to)})

    def _named(self, lanes: Iterable[str]) -> frozenset[str]:
        chosen = frozenset(lanes)
        unknown = chosen - self._network.lanes.keys()
        if unknown or not chosen or sum(name.startswith("pds") for name in chosen) > 1:
            raise ActionError(
                f"lanes must be some of {', '.join(self._network.lanes)}, with one PDS at most; "
                f"not {', '.join(sorted(chosen)) or 'none'}"
            )
        return chosen


def _fits(kind: Kind, account: Account, lanes: frozenset[str] | None) -> bool:
    hosts = {name for name in lanes or () if name.startswith("pds")}
    home = f"pds{account.pds}"
    if not account.seen or not account.rev:
        return False
    if kind.needs == "inactive":
        return account.status not in (ACTIVE, DELETED) and hosts <= {home}
    if account.status != ACTIVE or (kind.needs == "records" and not account.records):
        return False
    return home not in hosts if kind.needs == "foreign" else hosts <= {home}


class Telling:
    """One lie while it is told: of whom, on which lanes, and the ways to say it."""

    def __init__(
        self,
        lies: Lies,
        network: SimulatedNetwork,
        kind: Kind,
        rng: Random,
        account: Account | None,
        lanes: frozenset[str],
    ) -> None:
        self._lies = lies
        self.network = network
        self.world = network.world
        self.kind = kind
        self.rng = rng
        self.lanes = lanes
        self._account = account
        hosts = [int(name[3:]) for name in lanes if name.startswith("pds")]
        self.pds = hosts[0] if hosts else 0 if account is None else account.pds

    @property
    def account(self) -> Account:
        assert self._account is not None
        return self._account

    @property
    def honest(self) -> frozenset[str]:
        """The lanes that tell the truth meanwhile."""
        return frozenset({*(lane.name for lane in self.network.relays), f"pds{self.pds}"}) - self.lanes

    def say(self, kind: str, halves: FrameHalves, *, rev: str = "", did: str | None = None) -> None:
        """The lie as a frame beside the truth, which stays as it is."""
        row = {"kind": "lie", "did": self._did(did), "step": self.world.steps}
        self._publish(row, [Outgoing(self.pds, kind, halves, lanes=self.lanes)], 0, rev, did)

    def instead(self, row: dict[str, Any], truth: Outgoing, kind: str, halves: FrameHalves, rev: str) -> None:
        """The truth on the honest lanes, the lie on its own."""
        lie = Outgoing(self.pds, kind, halves, lanes=self.lanes)
        self._publish(row, [truth._replace(lanes=self.honest), lie], 1, rev, None)

    def withheld(self, row: dict[str, Any], truth: Outgoing) -> None:
        """A truth that the lie's lanes never tell; their numbers go on."""
        self.network.publish(Happening(row, [truth._replace(lanes=self.honest, withheld=self.lanes)]))

    def true_commit(self) -> None:
        """The account writes something, and every lane tells it."""
        writes = one_create(self)
        self.network.publish(self.world.commit(self.account.did, writes))

    def betrayed(self, row: dict[str, Any], frames: list[Outgoing], at: int, rev: str) -> None:
        """True frames, of which number ``at`` shows what was done before."""
        self._publish(row, frames, at, rev, None)

    def play(self, *turns: Turn) -> None:
        """Every open socket of the lanes takes these turns; no replay repeats them."""
        reached = sum(self.network.lanes[name].play(*turns) for name in sorted(self.lanes))
        if not reached:
            raise ActionError(f"{self.kind.name}: nobody is connected to {', '.join(sorted(self.lanes))}")
        self._lies.trick(self._entry(None, "", None) | {"sockets": reached})

    def enter(self) -> None:
        """The lie is told by other means than a frame."""
        self._lies.trick(self._entry(None, "", None))

    def _publish(
        self, row: dict[str, Any], frames: list[Outgoing], at: int, rev: str, did: str | None
    ) -> None:
        self.network.publish(Happening(row | {"lie": self._entry(at, rev, did)}, frames))

    def _did(self, did: str | None) -> str:
        return did if did is not None else "" if self._account is None else self._account.did

    def _entry(self, at: int | None, rev: str, did: str | None) -> dict[str, Any]:
        return {
            "kind": self.kind.name,
            "row": self.kind.row,
            "lanes": dict.fromkeys(sorted(self.lanes), 0),
            "did": self._did(did),
            "rev": rev,
            "expect": list(self.kind.expect),
            "frame": at,
        }
