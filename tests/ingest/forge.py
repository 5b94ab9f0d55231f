"""Frames made to order: an account that signs real commits, and every part of a frame open to tampering.

Built on the simulator's own tree, signer and CBOR, which share no code with what is tested.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from indexer.simulator.account import Account, Change, Write
from indexer.simulator.cbor import Link, block_cid, encode
from indexer.simulator.keys import K256, SigningKey
from indexer.simulator.wire import car, frame, tid, timestamp

#: 2026-01-01, the time of the first commit.
EPOCH_US = 1_767_225_600_000_000
FAR_FUTURE = "7zzzzzzzzzzzz"
POST = "app.bsky.feed.post"


@dataclass
class Parts:
    """A frame before it is put together. Tests change what they like, then `encode`."""

    did: str
    rev: str
    data: bytes
    key: SigningKey
    since: str | None
    prev_data: bytes | None
    ops: list[dict[str, Any]]
    nodes: dict[bytes, bytes]
    records: dict[bytes, bytes]
    seq: int = 1
    time: str = ""
    kind: str = "#commit"
    body: dict[str, Any] = field(default_factory=dict)  # over the commit object's fields
    payload: dict[str, Any] = field(default_factory=dict)  # over the message's fields
    drop: tuple[str, ...] = ()  # fields of the message that are left out
    _signed: dict[tuple[SigningKey, bytes], bytes] = field(default_factory=dict)

    def commit(self) -> bytes:
        """The signed commit block."""
        body = {"did": self.did, "version": 3, "data": Link(self.data), "rev": self.rev, "prev": None}
        body |= self.body
        unsigned = encode(body)
        if (self.key, unsigned) not in self._signed:  # P-256 signatures are never the same twice
            self._signed[self.key, unsigned] = encode({"sig": self.key.sign(unsigned)} | body)
        return self._signed[self.key, unsigned]

    def blocks(self) -> list[tuple[bytes, bytes]]:
        commit = self.commit()
        return [(block_cid(commit), commit), *self.nodes.items(), *self.records.items()]

    def encode(self) -> bytes:
        commit_cid = block_cid(self.commit())
        message: dict[str, Any] = {
            "rev": self.rev,
            "time": self.time,
            "blocks": car(commit_cid, self.blocks()),
        }
        if self.kind == "#commit":
            message |= {
                "repo": self.did, "since": self.since, "ops": self.ops, "blobs": [],
                "commit": Link(commit_cid), "rebase": False, "tooBig": False,
            }  # fmt: skip
            if self.prev_data is not None:
                message["prevData"] = Link(self.prev_data)
        else:
            message["did"] = self.did
        message |= self.payload
        for name in self.drop:
            del message[name]
        return frame(self.kind, message).numbered(self.seq)


class Forge:
    """An account and its commits, one after another."""

    def __init__(self, did: str = "did:plc:ewvi7nxzyoun6zhxrhs64oiz", *, curve: str = K256) -> None:
        self.account = Account(did, "someone.test", 0, SigningKey.derive(curve, did))
        self._now = EPOCH_US
        self.seq = 0

    @property
    def did(self) -> str:
        return self.account.did

    @property
    def key(self) -> str:
        return self.account.key.did_key

    def parts(self, *writes: Write) -> Parts:
        """The next commit, of these writes."""
        account = self.account
        since, before = account.rev or None, account.data or None
        changes = account.write(writes)
        self._now += 1_000_000
        self.seq += 1
        nodes = account.sign(tid(self._now))
        for change in changes:
            account.tree.cover(change.path.encode(), nodes)
        if not account.records:
            nodes.update(account.tree.seal()[1])
        records = {change.cid: account.records[change.path].block for change in changes if change.cid}
        return Parts(
            account.did, account.rev, account.data, account.key, since, before,
            [_op(change) for change in changes], nodes, records, self.seq, timestamp(self._now),
        )  # fmt: skip

    def commit(self, *writes: Write) -> bytes:
        return self.parts(*writes).encode()

    def sync(self) -> Parts:
        """A `#sync` of where the repository stands."""
        account = self.account
        self.seq += 1
        return Parts(
            account.did, account.rev, account.data, account.key, None, None, [], {}, {}, self.seq,
            timestamp(self._now), "#sync",
        )  # fmt: skip

    def posts(self, count: int) -> Parts:
        """A commit of so many new posts."""
        start = len(self.account.records)
        return self.parts(
            *(create(f"{POST}/{tid(EPOCH_US + start + n)}", f"post {start + n}") for n in range(count))
        )

    def identity(self, handle: str | None = None) -> bytes:
        self.seq += 1
        payload = {"did": self.did, "time": timestamp(self._now)}
        return frame("#identity", payload | ({"handle": handle} if handle else {})).numbered(self.seq)

    def status(self, active: bool, status: str | None = None) -> bytes:
        self.seq += 1
        self._now += 1_000
        payload: dict[str, Any] = {"did": self.did, "time": timestamp(self._now), "active": active}
        return frame("#account", payload | ({"status": status} if status else {})).numbered(self.seq)


def create(path: str, text: str) -> Write:
    return Write("create", path, {"$type": path.partition("/")[0], "text": text})


def update(path: str, text: str) -> Write:
    return Write("update", path, {"$type": path.partition("/")[0], "text": text})


def delete(path: str) -> Write:
    return Write("delete", path, None)


def _op(change: Change) -> dict[str, Any]:
    op: dict[str, Any] = {
        "action": change.action, "path": change.path, "cid": Link(change.cid) if change.cid else None,
    }  # fmt: skip
    return op | ({"prev": Link(change.prev)} if change.prev else {})
