"""A backup that a running daemon makes under load, and the daemon that goes on from it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from indexer.commands.demo import oracle
from indexer.commands.demo.network import SimulatedNetwork
from indexer.config import Settings, load
from indexer.daemon import Daemon
from indexer.store.check import check
from indexer.store.database import Database
from indexer.store.restore import RESTORE_IDS, restore
from tests.serve.node import messages


def _settings(data_dir: Path, network: SimulatedNetwork) -> Settings:
    return load(
        environment=False,
        overrides={
            "data_dir": data_dir, "upstreams": [network.relay_url], "plc_urls": [network.plc_url],
            "verifiers": 0, "filter": {"mode": "full"}, "archive": {"cars": True},
            "public": {"bind": "127.0.0.1:0"}, "management": {"bind": "127.0.0.1:0"},
            "network": {"allow_private": True, "dns_server": network.dns_address},
            "gc": {"checkpoint_interval": "200ms", "ttl_interval": "200ms", "blocks_interval": "200ms"},
        },
    )  # fmt: skip


async def _backup(daemon: Daemon, target: Path) -> dict[str, Any]:
    url = f"{daemon.management_url}/db/backup"
    async with aiohttp.ClientSession() as http, http.post(url, json={"to": str(target)}) as answer:
        made: dict[str, Any] = await answer.json()
        assert answer.status == 200, made
        return made


async def _until_equal(daemon: Daemon, ledger: dict[str, Any]) -> None:
    while oracle.behind(daemon.db, ledger, ephemeral=False):
        await asyncio.sleep(0.05)
    assert oracle.differences(daemon.db, ledger, ephemeral=False) == []
    assert check(daemon.db).problems == []


async def _first_messages(daemon: Daemon, cursor: int) -> list[dict[str, Any]]:
    url = f"{daemon.public_url}/stream?cursor={cursor}"
    async with aiohttp.ClientSession() as http, http.ws_connect(url, max_msg_size=0) as socket:
        return await messages(socket, 2)


@pytest.mark.slow
@pytest.mark.limit(150)
async def test_a_daemon_goes_on_from_a_backup_taken_during_ingest(tmp_path: Path) -> None:
    options = {"seed": "7", "accounts": "20", "history-accounts": "8", "rate": "80"}
    async with SimulatedNetwork(tmp_path / "network", options) as network:
        async with Daemon(_settings(tmp_path / "data", network)) as daemon:
            await daemon.wait_connected(30)
            await daemon.add_repos(list((await network.ledger())["accounts"]))
            while daemon.writer.head < 1000:
                await daemon.writer.wait_head(daemon.writer.head)
            before = daemon.writer.head
            made = await _backup(daemon, tmp_path / "copy")
            await daemon.writer.wait_head(made["head"] + 200)  # ids that the backup knows nothing of
            lost = daemon.writer.head
            assert before <= made["head"] < lost
        restored = await asyncio.to_thread(restore, tmp_path / "copy", tmp_path / "again")
        assert restored.head == made["head"]
        assert restored.next >= made["head"] + RESTORE_IDS
        with Database.open(tmp_path / "again" / "db") as db:
            assert check(db).problems == []
        async with Daemon(_settings(tmp_path / "again", network)) as daemon:
            await daemon.wait_connected(30)
            await daemon.writer.wait_head(restored.next + 200)
            await network.pause()
            await _until_equal(daemon, await network.ledger(values=True))
            for cursor in (made["head"], lost):  # a reader from before the backup, one from after it
                notice, event = await _first_messages(daemon, cursor)
                assert (notice["type"], notice["name"], notice["id"]) == ("info", "Skipped", restored.next)
                assert event["id"] == restored.next
            [last, hole] = await _first_messages(daemon, made["head"] - 1)
            assert (last["id"], hole.get("name")) == (made["head"] - 1, "Skipped")
