"""SIGKILL in the middle of the demo, at random moments, and a restart on the same data.

A subscriber that resumes at its cursor must see every event exactly once and in order, and at the end
the index must equal the simulated network's ledger. The subscriber shares no code with the daemon.
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

from tests.paths import ROOT

KILLS = 10
SEED = 20261121


class Subscriber:
    """Reads `/stream` at its cursor, across every restart, and keeps what it was given."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: dict[int, str] = {}
        self.next_id = 0
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
            self.next_id = max(self.next_id, message["id"])
            return
        event_id = message["id"]
        if event_id < self.next_id:
            self.faults.append(f"event {event_id} after {self.next_id - 1}: doubled or reordered")
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
    chance = random.Random(SEED)
    for _ in range(KILLS):
        demo = _start(folder, ports, "--seconds", "600")
        try:
            subscriber.connected.clear()
            await asyncio.wait_for(subscriber.connected.wait(), 60)
            await asyncio.sleep(chance.uniform(0, 3))  # the random moment; nothing is waited for
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
    reading.cancel()
    summary = json.loads(out.splitlines()[-1])
    errors = (tmp_path / "demo.err").read_text()
    assert (last.returncode, summary["differences"]) == (0, 0), errors[-3000:]
    assert subscriber.faults == []
    assert len(subscriber.seen) > 200
    missing = await _never_seen(folder, ports, subscriber)
    assert missing == []


async def _never_seen(folder: Path, ports: tuple[int, int], subscriber: Subscriber) -> list[int]:
    """Events below the subscriber's cursor that a fresh reader from 0 is given and it was not."""
    demo = _start(folder, ports, "--seconds", "600")
    fresh = Subscriber(subscriber.url)
    reading = asyncio.create_task(fresh.run())
    try:
        async with asyncio.timeout(120):
            while fresh.next_id < subscriber.next_id:
                await asyncio.sleep(0.05)
    finally:
        reading.cancel()
        _kill(demo)
    return [
        event_id
        for event_id, text in fresh.seen.items()
        if event_id < subscriber.next_id and subscriber.seen.get(event_id) != text
    ]
