"""The simulated network of a chaos run: it remembers which frames each lane has sent.

Owns the tally that counters are compared with, and the truth that is said once more when the storm is over.
One event loop, that of the run.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.simulator.account import ACTIVE, ActionError, Write
from indexer.simulator.chooser import Rates
from indexer.simulator.content import POST
from indexer.simulator.journal import Place
from indexer.simulator.wire import tid
from indexer.simulator.world import Happening

RELAYS, HOSTS = 2, 3
#: Unrest of all kinds, so that a short run has some of each.
RATES = Rates(
    account=0.002, handle=0.01, status=0.02, delete=0.001, key=0.003, migrate=0.003, sync=0.005,
    batch=0.05, big_batch=0.002, max_records=60_000,
)  # fmt: skip


class ChaosNetwork(SimulatedNetwork):
    """``sent``: lane → kind of frame → how many have a place in the lane's stream; ``rekeyed``: accounts that
    have had more than one key."""

    def __init__(self, seed: int, rate: float) -> None:
        self.sent: dict[str, Counter[str]] = {}
        self.rekeyed: set[str] = set()
        super().__init__(
            SimConfig(
                seed=seed, accounts=0, history_accounts=0, pds=HOSTS, relays=RELAYS, rate=rate,
                rates=RATES, paused=True, window_mib=4096,
            )
        )  # fmt: skip

    def _index(self, rows: list[Any], place: Place) -> None:
        super()._index(rows, place)
        for pds, pds_seq, first, _, _, kind, *others in rows:
            places = {f"relay{number}": seq for number, seq in enumerate((first, *others))}
            for lane, seq in {**places, f"pds{pds}": pds_seq}.items():
                if seq:
                    self.sent.setdefault(lane, Counter())[kind] += 1

    def publish(self, happening: Happening) -> int:
        if happening.row["kind"] == "key":
            self.rekeyed.add(happening.row["did"])
        return super().publish(happening)

    def url_of(self, lane: str) -> str:
        """The firehose of a lane, as the daemon's settings name it."""
        number = int(lane[-1])
        if lane.startswith("relay"):
            return self.relay_urls[number]
        return "pds::" + self.pds_urls[number].replace("http", "ws", 1)

    def populate(self, accounts: int) -> None:
        """Accounts that begin now, and a few with a past that the stream does not show."""
        old = accounts // 10
        for _ in range(accounts - old):
            self.add_account(0)
        for _ in range(old):
            self.add_account(30)

    def say_the_truth(self) -> None:
        """Every host tells of each of its accounts once more, and each that may writes something."""
        for did, account in self.world.accounts.items():
            self.publish(self.world.announce(did))
            if account.status == ACTIVE:
                rkey = tid(self.world.clock())
                value = {"$type": POST, "text": "calm again", "createdAt": "2026-01-01T00:00:00Z"}
                self.publish(self.world.commit(did, [Write("create", f"{POST}/{rkey}", value)]))

    def say_one(self) -> None:
        """Something true, so that no two lies come to one place of a stream."""
        account = next(account for account in self.world.active if account.seen)
        self.publish(self.world.announce(account.did))

    def lie(self, kind: str, lanes: list[str], did: str | None = None) -> dict[str, Any] | None:
        """Tells a lie, where there is somebody whom it can be told of."""
        try:
            return self.lies.tell(kind, lanes=lanes, did=did)
        except ActionError:
            return None
