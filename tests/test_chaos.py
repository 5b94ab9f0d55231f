"""Two chaos runs in small; `python -m tests.chaos --seeds 20` and `--minutes 30` are the long ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from indexer.simulator.account import Account
from tests.chaos.__main__ import run_seed
from tests.chaos.network import ChaosNetwork
from tests.chaos.plan import Plan
from tests.chaos.run import Options
from tests.chaos.verdict import Judge
from tests.store.support import opened

LANES = ["relay0", "relay1", "pds0"]


@pytest.mark.slow
@pytest.mark.limit(300)
@pytest.mark.parametrize("seed", [1, 2])
def test_lies_faults_and_kills_cost_time_but_never_correctness(seed: int, tmp_path: Path) -> None:
    report = run_seed(Options(seed, seconds=4), tmp_path)
    assert report.faults == []
    assert report.figures["kills"] >= 4
    assert report.figures["refusals"]["never"] in ([], ["frame_stuck"], ["account_foreign", "frame_stuck"])


# -- the judge sees what is wrong


class _Town(ChaosNetwork):
    """A network whose addresses do not matter: nobody listens."""

    def url_of(self, lane: str) -> str:
        return f"ws://{lane}.test"


@pytest.fixture
def network() -> Iterator[ChaosNetwork]:
    made = _Town(1, 0)
    made.populate(12)
    yield made
    asyncio.run(made.stop())


def _somebody(network: ChaosNetwork) -> Account:
    return next(account for account in network.world.active if account.records or account.seen)


async def _judged(
    tmp_path: Path, network: ChaosNetwork, counts: dict[str, int], *refused: tuple[int, str]
) -> list[str]:
    """What the judge says of relay0 when this was counted and refused there; the cursor stands right."""
    source = network.url_of("relay0")

    def step(tx: Any) -> None:
        for name, count in counts.items():
            tx.add_count(f"ingest/{source}/{name}", count)
        for seq, reason in refused:
            tx.quarantine(source, seq, "", reason, "", b"")
        tx.set_cursor(f"upstream/{source}", network.lanes["relay0"].seq)

    async with opened(tmp_path) as store:
        await store.writer.run("scene", step)
        judge = Judge(store.db, network, ["relay0"], [lie["id"] for lie in network.lies.entries])
        return list(judge.faults())


async def test_a_lie_that_is_found_once_under_its_reason_is_no_fault(
    network: ChaosNetwork, tmp_path: Path
) -> None:
    lie = network.lie("tree_chain", ["relay0"])
    assert lie is not None
    came = sum(network.sent["relay0"].values())
    counts = {"ok/commit": came - 1, "reject/tree": 1}
    assert await _judged(tmp_path, network, counts, (lie["lanes"]["relay0"], "tree")) == []


@pytest.mark.parametrize(
    ("counts", "reason", "said"),
    [
        ({"ok/commit": 1}, "tree", "were counted"),  # one too many: a replay was counted again
        ({"ok/commit": -1}, "tree", "were counted"),
        ({"reject/tree": 1}, "tree", "are in the quarantine"),
        ({}, "inversion", "refused for inversion"),
        ({}, "", "was not"),
        ({"reject/failed": 1}, "tree", "1 reject/failed"),
    ],
)
async def test_a_wrong_count_or_reason_is_a_fault(
    counts: dict[str, int], reason: str, said: str, network: ChaosNetwork, tmp_path: Path
) -> None:
    lie = network.lie("tree_chain", ["relay0"])
    assert lie is not None
    right = {"ok/commit": sum(network.sent["relay0"].values()) - 1, "reject/tree": 1}
    wrong = {name: right.get(name, 0) + counts.get(name, 0) for name in right | counts}
    refused = [(lie["lanes"]["relay0"], reason)] if reason else []
    faults = await _judged(tmp_path, network, wrong, *refused)
    assert any(said in fault for fault in faults), faults


async def test_a_lie_that_is_refused_twice_is_a_fault(network: ChaosNetwork, tmp_path: Path) -> None:
    lie = network.lie("tree_chain", ["relay0"])
    assert lie is not None
    counts = {"ok/commit": sum(network.sent["relay0"].values()) - 2, "reject/tree": 2}
    seq = lie["lanes"]["relay0"]
    faults = await _judged(tmp_path, network, counts, (seq, "tree"), (seq, "tree"))
    assert faults == ["relay0: 1 frames too many were refused twice"]


async def test_a_true_frame_that_is_refused_is_a_fault(network: ChaosNetwork, tmp_path: Path) -> None:
    came = sum(network.sent["relay0"].values())
    faults = await _judged(tmp_path, network, {"ok/commit": came - 1, "reject/car": 1}, (3, "car"))
    assert len(faults) == 1
    assert "no lie, was refused for car" in faults[0]


def test_what_was_planned_and_did_not_happen_is_named(network: ChaosNetwork) -> None:
    plan = Plan(network, LANES, Random(1))
    before = plan.missing()
    assert "fault gzip_bomb" in before
    assert "lie gap" in before
    while "lie gap" in plan.missing():
        plan.lie()
    network.faults.fired["pds0", "gzip_bomb"] += 1
    assert "fault gzip_bomb" not in plan.missing()
    assert not plan.complete
