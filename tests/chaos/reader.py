"""The subscriber of a chaos run: resumes at its cursor through every kill, and keeps what it was told.

Shares no code with the daemon. Every event must come once, in order, and be the one that the log holds at
the end; only events of accounts that were wiped may be missing there. One event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake


class Event:
    """What is kept of an event: whose it is, and a digest of all that was said."""

    __slots__ = ("did", "digest")

    def __init__(self, message: dict[str, Any], text: str) -> None:
        self.did: str = message[message["type"]]["did"]
        self.digest = hashlib.sha256(text.encode()).digest()[:16]


class Subscriber:
    """``seen``: event id → what it was; ``faults``: broken promises."""

    def __init__(self, url: str, name: str = "the subscriber") -> None:
        self.url = url
        self.seen: dict[int, Event] = {}
        self.next_id = 1
        self.connections = 0
        self.faults: list[str] = []
        self.folded: dict[str, dict[str, str]] = {}
        self._name = name

    async def run(self) -> None:
        """Reads until cancelled."""
        while True:
            try:
                url = f"{self.url}?cursor={self.next_id}"
                async with connect(url, compression=None, max_size=None) as socket:
                    self.connections += 1
                    async for text in socket:
                        self.take(str(text))
            except (OSError, ConnectionClosed, InvalidHandshake, TimeoutError, EOFError):
                await asyncio.sleep(0.05)  # the pause between two attempts; nothing waits for it

    def take(self, text: str) -> None:
        message = json.loads(text)
        if message["type"] == "error":
            self._fault(f"was told {message}")
            return
        if message["type"] == "info":
            if message["name"] == "OutdatedCursor":
                self._fault(f"was told of a floor at {message['id']}; the log is kept for ever")
            self.next_id = max(self.next_id, message["id"])
            return
        event_id = message["id"]
        if event_id != self.next_id:
            what = "doubled or reordered" if event_id < self.next_id else "lost what is between"
            self._fault(f"was told event {event_id} after {self.next_id - 1}: {what}")
        self.seen[event_id] = Event(message, text)
        self.next_id = event_id + 1
        if message["type"] == "record":
            self._fold(message["record"])

    def _fold(self, record: dict[str, Any]) -> None:
        records = self.folded.setdefault(record["did"], {})
        path = f"{record['collection']}/{record['rkey']}"
        if record["action"] == "delete":
            records.pop(path, None)
        else:
            records[path] = record["cid"]

    def _fault(self, text: str) -> None:
        if len(self.faults) < 50:
            self.faults.append(f"{self._name} {text}")

    def compared_with(self, log: Subscriber, wiped: set[str]) -> list[str]:
        """What this one was told otherwise than the log holds in the end."""
        found = []
        for event_id, event in self.seen.items():
            kept = log.seen.get(event_id)
            if kept is None and event.did not in wiped:
                found.append(f"event {event_id} of {event.did} was told, but is not in the log")
            elif kept is not None and kept.digest != event.digest:
                found.append(f"event {event_id} was told otherwise than it stands in the log")
        missed = sorted(log.seen.keys() - self.seen.keys())
        if missed:
            found.append(f"{len(missed)} events were never told, the first is {missed[0]}")
        return found
