"""What a commit that lies is refused for does not depend on the repository that it is about."""

from __future__ import annotations

import asyncio
import time

import pytest

from indexer.ingest.verify import VerifyLimits, verify_frame
from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.simulator.account import ActionError
from indexer.simulator.lie_kinds import KINDS
from indexer.simulator.wire import tid

#: Rows that are decided from the frame alone.
PURE = frozenset({"1", "2", "3", "7", "8", "9", "10", "11", "12", "14", "15", "16", "17", "18", "§3", "§4"})
OUTCOMES = ("ok", "reject", "desync")
#: Records of the repository; those with few have no room for every fault.
SIZES = (1, 7, 60, 400)


@pytest.mark.parametrize("records", SIZES)
def test_a_lie_is_refused_for_the_same_reason_in_small_and_large_repositories(records: int) -> None:
    config = SimConfig(seed=records, accounts=0, history_accounts=2, history_records=records, pds=1, rate=0)
    network = SimulatedNetwork(config)
    for account in list(network.world.unseen):
        network.publish(network.world.sync(account.did))
    limits = VerifyLimits(tid(time.time_ns() // 1000 + 300_000_000, 1023))
    told = set()
    for kind in KINDS.values():
        if kind.row not in PURE or kind.needs == "nobody":
            continue
        try:
            lie = network.lies.tell(kind.name)
        except ActionError:
            continue
        if lie["lanes"]["relay0"]:
            told.add(kind.name)
            lane = network.relay
            (frame,) = lane.read(lane.after(lie["lanes"]["relay0"] - 1), 1)
            verdict = verify_frame(frame, network.world.accounts[lie["did"]].key.did_key, limits)
            found = f"{OUTCOMES[verdict.outcome]}/{verdict.reason or verdict.kind}"
            assert found == kind.expect[0], (kind.name, verdict.message)
    assert len(told) > 90 if records > 50 else len(told) > 80
    asyncio.run(network.stop())
