"""Some collections of a simulated network: fetched as parts, and followed from there as usual."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.ingest.filters import Filters
from indexer.ingest.revisit import Revisit
from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.simulator.content import LIKE, POST
from indexer.store.codecs import SyncState
from tests.ingest.node import Node


async def in_force(node: Node) -> None:
    """What the daemon does at its start: a filter that the settings changed reaches what is held."""
    revisit = Revisit(node.db, node.writer, node.settings)
    await revisit.adopt(Filters.of(node.settings.filter))
    await revisit.run_once()


@pytest.mark.slow
@pytest.mark.limit(90)
async def test_parts_are_followed_and_a_wider_filter_brings_the_rest(tmp_path: Path) -> None:
    config = SimConfig(seed=3, accounts=0, history_accounts=4, history_records=300, pds=1, rate=0)
    network = SimulatedNetwork(config)
    await network.start()
    accounts = list(network.world.accounts.values())
    tables = {
        "upstreams": [network.relay_urls[0].replace("http", "ws", 1)],
        "plc_urls": [network.plc_url],
        "verifiers": 0,
        "durability": {"flush_interval": 3600},
        "backfill": {"sparse_min_records": 0, "sparse_share": 1.0},
    }
    names = [POST]

    def right(node: Node) -> bool:
        for account in accounts:
            row = node.db.repo(account.did)
            if row is None or (row.state, row.rev, row.data) != (SyncState.SYNCED, account.rev, account.data):
                return False
            held = {path: record.cid for path, record in node.db.records(account.did)}
            truth = {path: bytes(record.cid) for path, record in account.records.items()}
            if held != {path: cid for path, cid in truth.items() if path.partition("/")[0] in names}:
                return False
        return True

    try:
        async with Node(tmp_path, tables | {"filter": {"mode": "full", "collections": [POST]}}) as node:
            await in_force(node)
            await node.backfill.add([account.did for account in accounts])
            await node.until(lambda: right(node))
            assert node.backfill.status()["parts"] == len(accounts)
            rows = [node.db.repo(account.did) for account in accounts]
            assert all(row is not None and row.sparse and not row.complete for row in rows)
            for _ in range(150):
                network.step()
            await node.until(lambda: right(node))
            source = node.settings.upstreams[0]
            assert not node.db.counts(f"ingest/{source}/desync/")
            assert not node.db.counts(f"ingest/{source}/reject/")
            assert node.db.count(f"ingest/{source}/ok/commit") > 100
        names.append(LIKE)
        async with Node(tmp_path, tables | {"filter": {"mode": "full", "collections": names}}) as node:
            await in_force(node)
            await node.until(lambda: right(node))
            assert node.backfill.status()["parts"] >= len(accounts)  # one that a commit meets is fetched anew
    finally:
        await network.stop()
