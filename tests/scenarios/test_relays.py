"""One relay lies and another is honest: the index follows the truth, whichever of them is faster."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.ingest import due
from indexer.simulator.lie_kinds import KINDS
from indexer.simulator.lies import UNLESS_SYNCED
from tests.scenarios.scene import scene

#: True commits, told badly or not at all.
BADLY = sorted(
    kind.name for kind in KINDS.values() if any(name.startswith("desync/") for name in kind.expect)
)
FEW = ["gap", "leaf_missing", "swapped"]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(due.Waits, "of", lambda _: due.Waits(0.02, 0.05, 0.1))


@pytest.mark.parametrize("kinds", [FEW, pytest.param(BADLY, marks=pytest.mark.slow)], ids=["few", "all"])
async def test_what_one_relay_tells_badly_another_tells_well(tmp_path: Path, kinds: list[str]) -> None:
    async with scene(tmp_path, ("relay0", "relay1")) as both:
        network, node = both.network, both.node
        for name in kinds:
            before = both.counts("relay0")
            lie = network.lies.tell(name, lanes=["relay0"])
            await node.until(lambda seq=lie["lanes"]["relay0"]: node.seqs()[0] >= seq)  # type: ignore[misc]
            await both.settled()
            found = both.counts("relay0") - before
            assert found.keys() & {*lie["expect"], *UNLESS_SYNCED}, (name, found)
        await both.settled()
        assert not [name for name in both.counts("relay1") if name.startswith("reject/")]
        both.check_log()


@pytest.mark.slow
@pytest.mark.limit(60)
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_an_index_is_right_after_many_lies_of_two_relays_and_a_pds(tmp_path: Path, seed: int) -> None:
    async with scene(tmp_path, ("relay0", "relay1", "pds0"), seed=seed) as all_:
        network = all_.network
        network.lies.plan(0.5, {}, ("relay0", "relay1", "pds0"))
        for _ in range(400):
            network.step()
            if not network.world.steps % 20:
                await all_.node.until(lambda: any(lane.lines for lane in network.relays))
        network.lies.plan(0, {}, ())
        for account in list(network.world.active):  # what was withheld last shows with what comes next
            network.publish(network.world.sync(account.did))
        await all_.settled()
        all_.check_log()
        assert len(network.lies.told) > 60
