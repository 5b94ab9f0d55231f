"""SIGKILL while lists are read: the next start goes on where the last one was, and finds everybody once."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import pytest

from indexer.store.codecs import SyncState, decode_event
from indexer.store.database import Database
from indexer.store.keyspaces import CRAWL, EVENTS
from tests.crawl.node import dids_of, network
from tests.paths import ROOT

KILLS = 6
SETTINGS = """
data_dir = "{data}"
upstreams = []
plc_urls = ["{plc}"]
verifiers = 0
[network]
allow_private = true
[filter]
mode = "full"
[public]
bind = "127.0.0.1:0"
[management]
bind = "127.0.0.1:0"
[disk]
soft_floor_mib = 0
hard_floor_mib = 0
[durability]
flush_interval = 0
[backfill]
memory_workers = 0
disk_workers = 0
[hosts]
requests_per_s = 0
[crawler]
sources = ["hosts::{relay}"]
page_size = 7
pages_per_s = 15
[log]
format = "json"
"""


@pytest.mark.slow
@pytest.mark.limit(120)
async def test_killed_again_and_again_it_goes_on_where_it_was(tmp_path: Path) -> None:
    rng = random.Random(20261121)
    async with network(pds=3, history_accounts=150, history_records=2) as net:
        file = tmp_path / "settings.toml"
        relay = net.relay_url.replace("ws", "http", 1)
        file.write_text(SETTINGS.format(data=tmp_path / "data", plc=net.plc_url, relay=relay))
        pages = 0
        for _ in range(KILLS):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "indexer", "run", "--config", str(file),
                stderr=asyncio.subprocess.PIPE, cwd=ROOT,
            )  # fmt: skip
            assert process.stderr is not None
            while b'"listening"' not in (line := await process.stderr.readline()):
                assert line, "it ended before it listened"
            reading = asyncio.create_task(process.stderr.read())
            await asyncio.wait([reading], timeout=rng.uniform(0.05, 1.2))  # lives for so long
            assert process.returncode is None, await reading
            process.kill()
            await process.wait()
            with Database.open(tmp_path / "data" / "db", memory_mib=32) as db:
                assert db.count("crawler/pages") >= pages
                pages = db.count("crawler/pages")
                sweeps = [row for (kind, _), row in db.scan(CRAWL) if kind in ("source", "host")]
                assert sum(row[5] for row in sweeps) == pages  # none was lost, or counted twice
                assert db.count("crawler/found") == db.count("repos") == sum(row[7] for row in sweeps)
        await _finish(tmp_path, file, dids_of(net))


async def _finish(tmp_path: Path, file: Path, dids: set[str]) -> None:
    """Lets the last daemon do the rest; then nobody is missing, and nobody was found twice."""
    from indexer.config import load
    from indexer.daemon import Daemon

    async with Daemon(load(file, environment=False)) as daemon:
        while True:
            rows = [daemon.db.repo(did) for did in dids]
            if all(row is not None and row.state is SyncState.SYNCED for row in rows):
                break
            await daemon.wait_failed(0.05)
        assert daemon.db.count("repos") == len(dids)
        assert daemon.db.count("crawler/found") == len(dids)
        made = [
            (event.did, event.collection, event.rkey)
            for event in (decode_event(key, raw) for key, raw in daemon.db.scan(EVENTS))
            if event.kind == "record"
        ]
        assert len(made) == len(set(made)) == daemon.db.count("records")
