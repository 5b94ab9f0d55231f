"""The liar itself: its ledger, its lanes, its truth. What the indexer makes of lies: tests/scenarios."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.simulator.account import ActionError
from indexer.simulator.lie_kinds import KINDS
from tests.paths import ROOT
from tests.simulator import strict
from tests.simulator.test_network import act, get, running, take

CONFIG = SimConfig(accounts=3, history_accounts=1, history_records=120, relays=2, rate=0)


def kinds_table() -> str:
    """The table of all kinds as the page shows it."""
    rows = ["| kind | row | what | expected | needs |", "|---|---|---|---|---|"]
    for kind in KINDS.values():
        expected = ", ".join(f"`{name}`" for name in kind.expect) or "nothing"
        needs = kind.needs + ("" if kind.chance else "; on request")
        rows.append(f"| `{kind.name}` | {kind.row} | {kind.about} | {expected} | {needs} |")
    return "\n".join(rows) + "\n"


@contextmanager
def still(config: SimConfig = CONFIG) -> Iterator[SimulatedNetwork]:
    """A network without servers, some steps old."""
    network = SimulatedNetwork(config)
    for _ in range(20):
        network.step()
    yield network
    asyncio.run(network.stop())


def ledger(network: SimulatedNetwork) -> dict[str, Any]:
    """The truth without addresses, which only a started network has."""
    return {did: account.ledger("", False) for did, account in network.world.accounts.items()}


def frame_of(network: SimulatedNetwork, lane: str, seq: int) -> tuple[str, Any]:
    sender = network.lanes[lane]
    (data,) = sender.read(sender.after(seq - 1), 1)
    return strict.split_frame(data)


def test_the_page_shows_every_kind() -> None:
    page = (ROOT / "docs" / "simulator.md").read_text()
    assert kinds_table() in page


def test_a_lie_does_not_touch_the_truth_unless_it_is_a_truth_told_badly() -> None:
    with still() as network:
        for kind in KINDS.values():
            before = ledger(network)
            try:
                network.lies.tell(kind.name)
            except ActionError:
                continue  # sockets, inactive and foreign accounts have tests of their own
            after = ledger(network)
            changed = [did for did in after if after[did] != before[did]]
            true = "legal" in kind.about or kind.expect[0].startswith(("desync", "ok")) or kind.row == "18"
            assert not changed or true or kind.name in ("repeated", "frame_stuck"), kind.name
            for did in changed:
                assert strict_root(network, did)


def strict_root(network: SimulatedNetwork, did: str) -> bool:
    """Whether the account's own tree has the root that its commit signs."""
    account = network.world.accounts[did]
    return account.tree.copy().seal()[0] == account.data


def test_only_the_lying_lane_tells_a_true_commit_otherwise() -> None:
    with still() as network:
        lie = network.lies.tell("too_big", lanes=["relay1"])
        (seq,) = lie["lanes"].values()
        _, told = frame_of(network, "relay1", seq)
        _, true = frame_of(network, "relay0", network.relay.seq)
        assert (told["rev"], told["tooBig"], true["rev"], true["tooBig"]) == (
            lie["rev"],
            True,
            lie["rev"],
            False,
        )
        home = f"pds{network.world.accounts[lie['did']].pds}"
        assert frame_of(network, home, network.lanes[home].seq)[1]["tooBig"] is False


def test_a_lie_told_on_all_lanes_leaves_the_truth_to_the_servers_alone() -> None:
    with still() as network:
        account = network.world.active[0]
        lanes = ["relay0", "relay1", f"pds{account.pds}"]
        lie = network.lies.tell("leaf_missing", did=account.did, lanes=lanes)
        assert lie["lanes"] == {name: network.lanes[name].seq for name in lanes}
        assert account.rev == lie["rev"]
        frames = [frame_of(network, name, network.lanes[name].seq)[1] for name in lanes]
        assert {frame["rev"] for frame in frames} == {account.rev}
        assert len({len(frame["blocks"]) for frame in frames}) == 1


def test_a_withheld_frame_leaves_a_gap_in_the_numbers_of_its_lane_alone() -> None:
    with still() as network:
        did = network.world.active[0].did
        before = {name: lane.seq for name, lane in network.lanes.items()}
        lie = network.lies.tell("gap", did=did, lanes=["relay0"])
        assert lie["lanes"] == {"relay0": before["relay0"] + 2}
        lanes = network.lanes
        assert lanes["relay0"].end + 1 == lanes["relay1"].end == lanes["relay1"].seq == before["relay1"] + 2
        assert len(lanes["relay0"].read(lanes["relay0"].after(before["relay0"]), 1 << 20)) == 1


def test_a_network_that_starts_again_has_the_same_lies_frames_and_truth(tmp_path: Path) -> None:
    config = replace(CONFIG, state=tmp_path, lie_rate=0.5)
    with still(config) as network:
        for _ in range(60):
            network.step()
        network.reset("relay1", 0, mute=True)
        network.step()
        told, truth = network.lies.ledger(), ledger(network)
        frames = {name: lane.read(0, 1 << 30) for name, lane in network.lanes.items()}
    assert told["told"] > 20
    again = SimulatedNetwork(config)
    assert again.lies.ledger() == told
    assert ledger(again) == truth
    assert {name: lane.read(0, 1 << 30) for name, lane in again.lanes.items()} == frames
    asyncio.run(again.stop())


@pytest.mark.slow
def test_every_kind_that_needs_no_reader_is_told_by_chance_sooner_or_later() -> None:
    with still(replace(CONFIG, lie_rate=1.0, rates=CONFIG.rates)) as network:
        frames = {name for name, kind in KINDS.items() if kind.chance and kind.row != "0"}
        some = network.world.active[-1]
        network.publish(network.world.set_status(some.did, "deactivated"))
        while network.lies.told.keys() < (wanted := frames - _of_sockets()):
            before = sum(network.lies.told.values())
            network.step()
            assert sum(network.lies.told.values()) == before + 1, wanted - network.lies.told.keys()


def _of_sockets() -> set[str]:
    from indexer.simulator import lie_sockets

    return {kind.name for kind in lie_sockets.kinds()} - {"word_repeated"}


def test_the_same_seed_tells_the_same_lies() -> None:
    def told() -> list[str]:
        with still(replace(CONFIG, lie_rate=0.7)) as network:
            return [lie["kind"] for lie in network.lies.entries]

    first = told()
    assert first == told()
    assert len(set(first)) > 5


def test_weights_and_lanes_choose_what_is_told_and_where() -> None:
    config = replace(CONFIG, lie_rate=1.0, lies={"gap": 1, "future_rev": 0}, lie_lanes=("relay1",))
    with still(config) as network:
        assert network.lies.told == {"gap": 20}
        assert {name for lie in network.lies.entries for name in lie["lanes"]} == {"relay1"}


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ({"lies": {"fibs": 1.0}}, "fibs"),
        ({"lie_rate": 1.5}, "rate"),
        ({"lie_lanes": ("relay7",)}, "lanes"),
        ({"lies": {"gap": -1.0}}, "weights"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name(plan: dict[str, Any], problem: str) -> None:
    with pytest.raises(ActionError, match=problem):
        SimulatedNetwork(replace(CONFIG, **plan))


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        ({"kind": "fib"}, "kind must be one of"),
        ({"kind": "gap", "did": "did:plc:nobody"}, "no such account"),
        ({"kind": "gap", "lane": "relay9"}, "lanes must be"),
        ({"kind": "gap", "lane": ["pds0", "pds1"]}, "one PDS"),
        ({"kind": "gap", "lane": 7}, "lane must be"),
        ({"kind": "cut"}, "nobody is connected"),
        ({"kind": "inactive"}, "inactive"),
    ],
)
async def test_a_lie_that_cannot_be_told_is_refused_and_not_counted(
    request_: dict[str, Any], problem: str
) -> None:
    async with running(CONFIG) as (network, session):
        body = {"action": "lie", **request_}
        async with session.post(f"{network.control_url}/act", json=body) as response:
            assert response.status == 400
            assert problem in (await response.json())["message"]
        assert not network.lies.entries


async def test_lies_are_told_planned_and_listed_over_the_control_api() -> None:
    async with running(CONFIG) as (network, session):
        lie = await act(session, network, "lie", kind="signature_der", lane="relay1")
        listed = (await get(session, f"{network.control_url}/lies"))[1]
        assert listed["lies"] == [lie]
        assert listed["kinds"]["signature_der"]["told"] == listed["told"] == 1
        assert lie["expect"] == ["reject/signature"]
        assert lie["lanes"] == {"relay1": network.lanes["relay1"].seq}
        plan = {"rate": 1, "kinds": {"field_did": 3}, "lanes": ["relay0"]}
        async with session.post(f"{network.control_url}/lies", json=plan) as response:
            assert (await response.json())["plan"] == plan
        await act(session, network, "steps", count=5)
        assert network.lies.told == {"signature_der": 1, "field_did": 5}
        for wrong in ({}, {"rate": "often"}, {"rate": 1, "kinds": ["gap"]}, {"rate": 1, "lanes": "relay0"}):
            async with session.post(f"{network.control_url}/lies", json=wrong) as response:
                assert response.status == 400


async def test_every_relay_has_its_own_numbers_and_its_own_address() -> None:
    async with running(CONFIG) as (network, session):
        assert len(set(network.relay_urls)) == 2
        await act(session, network, "lie", kind="future_rev", lane="relay0")
        await act(session, network, "steps", count=5)
        first, second = [await take(session, url, lane.end) for url, lane in _relays(network)]
        assert len(first) == len(second) + 1
        assert [payload["seq"] for _, payload in second] == list(range(1, len(second) + 1))
        plain = [{**payload, "seq": 0} for _, payload in first]
        assert all({**payload, "seq": 0} in plain for _, payload in second)


def _relays(network: SimulatedNetwork) -> list[tuple[str, Any]]:
    return list(zip(network.relay_urls, network.relays, strict=True))


async def test_a_socket_that_is_lied_to_gets_what_no_replay_repeats() -> None:
    async with running(CONFIG) as (network, session):
        address = f"{network.relay_url}/xrpc/com.atproto.sync.subscribeRepos?cursor={network.relay.seq}"
        async with session.ws_connect(address) as socket:
            while not network.relay.lines:
                await asyncio.sleep(0)
            lie = await act(session, network, "lie", kind="frame_text", lane="relay0")
            assert lie["sockets"] == 1
            assert (await socket.receive()).type is aiohttp.WSMsgType.TEXT
            await act(session, network, "lie", kind="close", lane="relay0")
            assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        async with session.ws_connect(address) as socket:
            await act(session, network, "steps", count=1)
            assert (await socket.receive()).type is aiohttp.WSMsgType.BINARY
