"""Frames of banned hosts are dropped with a reason, and what was missed by it is fetched later."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.ingest.bans import BANNED, Bans
from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.store.codecs import SyncState
from indexer.store.database import Database
from indexer.store.host_rows import HostRow
from indexer.store.keyspaces import HOSTS
from indexer.store.writer import Writer
from tests.ingest.node import Node
from tests.store.support import settings_of


async def test_bans_are_read_from_their_rows_and_asked_by_account_and_source(tmp_path: Path) -> None:
    with Database.open(tmp_path, memory_mib=32) as db:
        writer = Writer(db, settings_of())
        await writer.start()
        await writer.run("ban", lambda tx: tx.set_host("bad.test", HostRow(banned=True)))
        await writer.run("tier", lambda tx: tx.set_host("good.test", HostRow(tier="trusted")))
        bans = Bans(db)
        assert bans.hosts == {"bad.test"}
        assert bans.covers("https://bad.test", "wss://relay.test")
        assert bans.covers("", "pds::wss://bad.test/")
        assert not bans.covers("https://good.test", "wss://relay.test")
        assert not bans.covers("", "wss://bad.test")  # as a relay it is an upstream like others
        bans.set("bad.test", False)
        assert not bans.covers("https://bad.test", "pds::wss://bad.test")
        await writer.run("forget", lambda tx: tx.set_host("bad.test", HostRow()))
        assert [host for host, _ in db.scan(HOSTS)] == ["good.test"]
        await writer.stop()


@pytest.mark.parametrize("source", ["relay", "pds"])
async def test_frames_of_a_banned_host_are_dropped_until_it_is_let_go(tmp_path: Path, source: str) -> None:
    net = SimulatedNetwork(SimConfig(accounts=2, history_accounts=2, history_records=5, pds=1, rate=0))
    await net.start()
    one = next(iter(net.world.accounts.values()))
    upstream = net.relay_url if source == "relay" else "pds::" + net.pds_urls[0].replace("http", "ws", 1)
    tables = {
        "upstreams": [upstream], "plc_urls": [net.plc_url], "filter": {"mode": "full"}, "verifiers": 0,
    }  # fmt: skip
    async with Node(tmp_path, tables) as node:
        await node.backfill.add([one.did])
        await node.until(lambda: _state(node, one.did) is SyncState.SYNCED)
        await node.until(lambda: node.ingest.status()[0]["connected"])
        host = net.pds_urls[0].removeprefix("http://")
        # In the daemon both have one table of bans.
        await node.backfill.hosts.ban(host)
        node.ingest.bans.set(host, True)
        before = dict(node.db.records(one.did))
        rev, seq = node.db.repo(one.did).rev, net.relay.seq  # type: ignore[union-attr]
        while one.rev == rev:
            net.step()
        await node.until(lambda: node.seqs()[0] >= net.relay.seq > seq)
        assert _dropped(node) >= 1
        assert dict(node.db.records(one.did)) == before
        assert _state(node, one.did) is SyncState.DESYNCHRONIZED
        node.ingest.bans.set(host, False)
        await node.backfill.hosts.unban(host)
        await node.until(lambda: _state(node, one.did) is SyncState.SYNCED)
        row = node.db.repo(one.did)
        assert row is not None
        assert row.rev == one.rev
        assert {path: bytes(record.cid) for path, record in one.records.items()} == {
            path: record.cid for path, record in node.db.records(one.did)
        }
    await net.stop()


def _state(node: Node, did: str) -> SyncState | None:
    row = node.db.repo(did)
    return row.state if row is not None else None


def _dropped(node: Node) -> int:
    return sum(n for name, n in node.ingest.status()[0]["outcomes"].items() if name == f"drop/{BANNED}")
