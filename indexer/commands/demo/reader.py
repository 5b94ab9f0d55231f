"""The demo's own subscriber: reads `/stream` like any client and checks what it is told.

It folds record events into {DID: {path: CID}} and notes every broken promise: an id that does not
rise, the same (DID, rev, path) twice, an update of what was never created.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

Fold = dict[str, dict[str, str]]
MAX_FAULTS_KEPT = 100


class CheckingReader:
    """``base`` is what was there before the first event; None when nobody knows."""

    def __init__(self, url: str, cursor: int, base: Fold | None) -> None:
        self._url = url
        self._known = base is not None
        self.fold: Fold = {did: dict(records) for did, records in (base or {}).items()}
        #: Paths that an event named, so that a fold without a base can still be compared.
        self.touched: dict[str, set[str]] = {}
        self.faults: list[str] = []
        self.events = 0
        self.next_id = cursor
        self._seen: set[tuple[str, str, str]] = set()

    async def run(self) -> None:
        """Reads until cancelled; reconnects at its cursor."""
        while True:
            try:
                async with connect(
                    f"{self._url}/stream?cursor={self.next_id}", max_size=None, compression=None
                ) as socket:
                    async for message in socket:
                        self.take(orjson.loads(message))
            except (OSError, ConnectionClosed):
                await asyncio.sleep(0.2)

    def take(self, message: dict[str, Any]) -> None:
        """One message of the stream."""
        if message["type"] == "info":
            if message["name"] == "OutdatedCursor":
                self._fault(f"the log was pruned before it was read: the floor is at {message['id']}")
                self._known = False
            self.next_id = max(self.next_id, int(message.get("id", 0)))
            return
        event_id = int(message["id"])
        if event_id < self.next_id:
            self._fault(f"event {event_id} came after {self.next_id - 1}")
        self.next_id = event_id + 1
        self.events += 1
        if message["type"] == "record":
            self._take_record(message["record"])
        elif message["type"] == "account" and message["account"].get("status") == "deleted":
            did = message["account"]["did"]
            self.fold.pop(did, None)
            self.touched.pop(did, None)

    def _take_record(self, record: dict[str, Any]) -> None:
        did, path, action = record["did"], f"{record['collection']}/{record['rkey']}", record["action"]
        key = (did, record["rev"], path)
        if key in self._seen:
            self._fault(f"{action} of {did}/{path} at rev {record['rev']} came twice")
        self._seen.add(key)
        records = self.fold.setdefault(did, {})
        if self._known and (path in records) != (action != "create"):
            self._fault(f"{action} of {did}/{path}, which {'was' if path in records else 'was not'} there")
        self.touched.setdefault(did, set()).add(path)
        if action == "delete":
            records.pop(path, None)
        else:
            records[path] = record["cid"]

    def differences(self, ledger: dict[str, Any]) -> list[str]:
        """What the folded log says otherwise than the ledger."""
        found = list(self.faults)
        for did, account in ledger["accounts"].items():
            want, have = account["records"], self.fold.get(did, {})
            if account["status"] != "active" and did not in self.fold:
                continue  # never seen while it was active: the log owes nothing
            paths = want.keys() | have.keys() if self._known else self.touched.get(did, set())
            wrong = sorted(path for path in paths if want.get(path) != have.get(path))
            if wrong:
                found.append(f"{did}: the folded log differs at {len(wrong)} paths, first {wrong[0]}")
        return found

    def _fault(self, text: str) -> None:
        if len(self.faults) < MAX_FAULTS_KEPT:
            self.faults.append(text)
