"""The captured session of a real network, played through ingest and backfill, ends in its ground truth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from indexer.atproto.cid import format_cid
from indexer.atproto.dagcbor import record_to_json
from indexer.simulator.replay import ReplayNetwork
from indexer.store.codecs import Event, RepoRow, SyncState
from tests.ingest.node import Node
from tests.paths import DATA

SESSION = DATA / "session"


def truth() -> dict[str, dict[str, Any]]:
    return {
        account["did"]: account for account in json.loads((SESSION / "truth.json").read_bytes())["accounts"]
    }


def handles(network: ReplayNetwork) -> list[str]:
    """Where the hosts of the accounts' handles are found."""
    place = network.plc_url.removeprefix("http://")
    return [f"{account['handle']}:{port}={place}" for account in truth().values() for port in (80, 443)]


def quiet(node: Node) -> bool:
    """Nothing is due, waits or is under way."""
    rows = [row for _, row in node.db.repos()]
    return (
        all(row.work == 0 and row.due == 0 for row in rows)
        and node.ingest.due == 0
        and node.backfill.status()["in_flight"] == 0
        and node.db.count("buffer/frames") == 0
        and all(source["in_flight_bytes"] == 0 for source in node.ingest.status())
    )


def folded(events: list[Event]) -> dict[str, dict[str, bytes]]:
    """The records that somebody who only read the log would hold."""
    records: dict[str, dict[str, bytes]] = {}
    epochs: dict[str, int] = {}
    for event in events:
        if event.epoch > epochs.get(event.did, 0):
            records[event.did] = {}
            epochs[event.did] = event.epoch
        if event.kind != "record":
            continue
        mine, path = records.setdefault(event.did, {}), f"{event.collection}/{event.rkey}"
        if event.action == "delete":
            del mine[path]
        else:
            assert event.cid is not None
            assert (path in mine) == (event.action == "update")
            mine[path] = event.cid
    return records


def known(rows: Mapping[str, RepoRow]) -> dict[str, dict[str, Any]]:
    """The accounts of which something is to be known: the directory answers as at the session's end, so that
    of one that was deleted in its course nothing may be."""
    return {did: account for did, account in truth().items() if did in rows or account["status"] != "deleted"}


def check_against_truth(node: Node) -> None:
    rows = dict(node.db.repos())
    accounts = known(rows)
    assert rows.keys() == accounts.keys()
    for did, account in accounts.items():
        check_account(node, did, rows[did], account)


def check_account(node: Node, did: str, row: RepoRow, account: dict[str, Any]) -> None:
    assert row.status.label == account["status"], did
    stored = node.db.records(did)
    assert {path: format_cid(record.cid) for path, record in stored} == account["records"], did
    for path, value in account.get("values", {}).items():
        block = node.db.block(did, dict(stored)[path].cid)
        assert block is not None
        assert orjson.loads(record_to_json(block)) == value
    if account["rev"]:
        assert (row.rev, format_cid(row.data)) == (account["rev"], account["data"])
        assert row.state is SyncState.SYNCED
        assert row.complete
        assert row.signing_key == account["signingKey"]
        assert row.handle == account["handle"]


def check_log(node: Node) -> None:
    events = node.events()
    assert [event.id for event in events] == sorted({event.id for event in events})
    records = folded(events)
    for did, _ in node.db.repos():
        assert records.get(did, {}) == {path: row.cid for path, row in node.db.records(did)}
    keys = [(e.did, e.rev, e.collection, e.rkey) for e in events if e.kind == "record"]
    assert len(keys) == len(set(keys))


async def replay(folder: Path, phases: list[list[int]], verifiers: int, kind: str) -> None:
    """Plays the PDSes' frames; each phase is a run of its own with the upstreams it names."""
    network = ReplayNetwork.from_session(SESSION)
    async with network:
        tables = {
            "plc_urls": [network.plc_url],
            "verifiers": verifiers,
            "filter": {"mode": "full"},
            "network": {"connect_to": [*network.connect_to, *handles(network)]},
            "ingest": {"refresh_interval": 0.2, "first_sight_wait": 0.2, "unknown_grace": 0.2},
            "backfill": {"retry_min": 0.1, "retry_max": 0.5},
        }
        for phase in phases:
            names = [kind + network.stream_urls[index] for index in phase]
            ends = [network.playbacks[index].seq for index in phase]
            async with Node(folder, {**tables, "upstreams": names}) as node:
                await node.until(lambda ends=ends, node=node: node.seqs() == ends and quiet(node))  # type: ignore[misc]
                if phase is phases[-1]:
                    check_against_truth(node)
                    check_log(node)


PDS, RELAY = "pds::", ""


@pytest.mark.parametrize(
    ("phases", "verifiers", "kind"),
    [
        ([[0], [0, 1]], 0, PDS),
        pytest.param([[1], [1, 0]], 1, PDS, marks=pytest.mark.slow),
        ([[0, 1]], 1, PDS),
        pytest.param([[0], [1]], 0, RELAY, marks=pytest.mark.slow),
        pytest.param([[1], [0]], 1, RELAY, marks=pytest.mark.slow),
    ],
    ids=["pds0 first", "pds1 first", "both at once", "pds0 first, as relays", "pds1 first, as relays"],
)
async def test_a_session_ends_in_its_ground_truth(
    tmp_path: Path, phases: list[list[int]], verifiers: int, kind: str
) -> None:
    await replay(tmp_path, phases, verifiers, kind)
