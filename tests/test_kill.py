"""SIGKILL in the middle of the demo, at random moments, and a restart on the same data.

A subscriber that resumes at its cursor must see every event exactly once and in order, and at the end
what it was told, folded, must be the index, which must equal the simulated network's ledger. The
subscriber shares no code with the daemon.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from indexer.atproto.cid import format_cid
from indexer.store.database import Database
from indexer.store.keyspaces import CURSORS, HEAD, RECORDS
from tests.paths import ROOT

KILLS = 10
SEED = 20261121


class Subscriber:
    """Reads `/stream` at its cursor, across every restart, and keeps what it was given."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: dict[int, str] = {}
        self.next_id = 1
        self.faults: list[str] = []
        self.connected = asyncio.Event()

    async def run(self) -> None:
        while True:
            try:
                async with connect(
                    f"{self.url}?cursor={self.next_id}", compression=None, max_size=None
                ) as socket:
                    async for text in socket:
                        self.take(str(text))
                        self.connected.set()
            except (OSError, ConnectionClosed, InvalidHandshake):
                await asyncio.sleep(0.05)

    def take(self, text: str) -> None:
        message = json.loads(text)
        if message["type"] == "info":
            if message["name"] == "OutdatedCursor":
                self.faults.append(f"told of a floor at {message['id']} while the log is kept forever")
            if message["name"] == "Skipped" and message["id"] <= self.next_id:
                self.faults.append(f"told to skip to {message['id']}, below {self.next_id}")
            self.next_id = max(self.next_id, message["id"])
            return
        event_id = message["id"]
        if event_id != self.next_id:
            what = "doubled or reordered" if event_id < self.next_id else "lost what is between"
            self.faults.append(f"event {event_id} after {self.next_id - 1}: {what}")
        if event_id in self.seen:
            self.faults.append(f"event {event_id} came twice")
        self.seen[event_id] = text
        self.next_id = event_id + 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(folder: Path, ports: tuple[int, int], *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "indexer", "demo", "--json", "--data-dir", str(folder), "--rate", "100",
        "--retention", "forever", "--public", f"127.0.0.1:{ports[0]}",
        "--management", f"127.0.0.1:{ports[1]}", *more,
    ]  # fmt: skip
    with (folder.parent / "demo.err").open("a") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)


def _kill(demo: subprocess.Popen[str]) -> None:
    demo.kill()
    demo.communicate()


async def _kill_at_random_moments(folder: Path, ports: tuple[int, int], subscriber: Subscriber) -> None:
    """Every third kill falls into the start; the moments are random, nothing is waited for."""
    chance = random.Random(SEED)
    for number in range(KILLS):
        demo = _start(folder, ports, "--seconds", "600")
        try:
            if number % 3:
                subscriber.connected.clear()
                await asyncio.wait_for(subscriber.connected.wait(), 60)
            await asyncio.sleep(chance.uniform(0, 3))
        finally:
            _kill(demo)


@pytest.mark.slow
@pytest.mark.limit(420)
async def test_no_event_is_lost_doubled_or_reordered_by_ten_kills(tmp_path: Path) -> None:
    folder, ports = tmp_path / "demo", (_free_port(), _free_port())
    folder.mkdir()
    subscriber = Subscriber(f"ws://127.0.0.1:{ports[0]}/stream")
    reading = asyncio.create_task(subscriber.run())
    await _kill_at_random_moments(folder, ports, subscriber)
    last = _start(folder, ports, "--seconds", "5")
    out, _ = await asyncio.to_thread(last.communicate)
    summary = json.loads(out.splitlines()[-1])
    errors = (tmp_path / "demo.err").read_text()
    assert (last.returncode, summary["differences"]) == (0, 0), errors[-3000:]
    head, ledger = _index(folder)  # which is the ledger, as the demo has just said
    await _catch_up(folder, ports, subscriber, head)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert subscriber.faults == []
    assert len(subscriber.seen) > 200
    assert fold(subscriber.seen, head) == ledger


def _index(folder: Path) -> tuple[int, dict[str, str]]:
    """The id of the next event, and the CID of every record, by DID and path."""
    with Database.open(folder / "db") as db:
        head, _ = db.get(CURSORS, HEAD) or (1, 0)
        return head, {
            f"{did}/{path}": format_cid(row.cid) for (did, path), row in db.scan(RECORDS) if row.served
        }


async def _catch_up(folder: Path, ports: tuple[int, int], subscriber: Subscriber, head: int) -> None:
    demo = _start(folder, ports, "--seconds", "600")
    try:
        async with asyncio.timeout(120):
            while subscriber.next_id < head:
                await asyncio.sleep(0.05)
    finally:
        _kill(demo)


def fold(seen: dict[int, str], head: int) -> dict[str, str]:
    """What the events below ``head`` say that there is, in their order."""
    records: dict[str, str] = {}
    for event_id in sorted(seen):
        message = json.loads(seen[event_id])
        if event_id >= head:
            break
        if message["type"] == "record":
            record = message["record"]
            key = f"{record['did']}/{record['collection']}/{record['rkey']}"
            if record["action"] == "delete":
                del records[key]
            else:
                assert (key in records) == (record["action"] == "update"), key
                records[key] = record["cid"]
        elif message["type"] == "account" and message["account"].get("status") == "deleted":
            prefix = message["account"]["did"] + "/"
            records = {key: cid for key, cid in records.items() if not key.startswith(prefix)}
    return records
