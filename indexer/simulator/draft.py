"""A commit's frame in parts, before it is put together: what the world emits, and what a lie tampers with.

Owns how a write to a repository becomes a signed commit, its covering proof and its operations. Knows
nothing of sequences or of what is told to whom. One thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from indexer.simulator.account import Account, Change, Write
from indexer.simulator.cbor import Link, block_cid, encode
from indexer.simulator.keys import SigningKey
from indexer.simulator.wire import FrameHalves, car, frame, tid, timestamp


class Outgoing(NamedTuple):
    """A frame that a PDS emits; relays pass it on unless the PDS no longer speaks for the account.

    ``lanes`` where given are those that send it, whatever would be usual; ``withheld`` are those whose
    numbering goes on without it.
    """

    pds: int
    kind: str
    halves: FrameHalves
    relayed: bool = True
    lanes: frozenset[str] | None = None
    withheld: frozenset[str] = frozenset()


@dataclass(slots=True)
class Draft:
    """All parts of a #commit. ``blocks`` are the tree's nodes and the records, by CID."""

    did: str
    pds: int
    key: SigningKey
    rev: str
    since: str | None
    prev_data: bytes | None
    data: bytes
    commit: bytes
    ops: list[dict[str, Any]]
    nodes: dict[bytes, bytes]
    records: dict[bytes, bytes]
    micros: int
    payload: dict[str, Any] = field(default_factory=dict)  # over the message's fields
    drop: tuple[str, ...] = ()  # fields of the message that are left out

    @property
    def commit_cid(self) -> bytes:
        return block_cid(self.commit)

    @property
    def sections(self) -> list[tuple[bytes, bytes]]:
        return [(self.commit_cid, self.commit), *self.nodes.items(), *self.records.items()]

    def body(self, **fields: Any) -> dict[str, Any]:
        """The commit object without its signature, with ``fields`` over it."""
        usual = {"did": self.did, "version": 3, "data": Link(self.data), "rev": self.rev, "prev": None}
        return usual | fields

    def sign(self, body: dict[str, Any] | None = None, key: SigningKey | None = None) -> None:
        """A commit block anew, of ``body`` and under ``key`` where given."""
        body = self.body() if body is None else body
        self.commit = encode(body | {"sig": (key or self.key).sign(encode(body))})

    def message(self) -> dict[str, Any]:
        """The message's payload without its seq."""
        commit_cid = self.commit_cid
        message: dict[str, Any] = {
            "ops": self.ops,
            "rev": self.rev,
            "repo": self.did,
            "time": timestamp(self.micros),
            "blobs": [],
            "since": self.since,
            "commit": Link(commit_cid),
            "rebase": False,
            "tooBig": False,
        }
        if "blocks" not in self.payload:
            message["blocks"] = car(commit_cid, self.sections)
        if self.prev_data is not None:
            message["prevData"] = Link(self.prev_data)
        message |= self.payload
        for name in self.drop:
            del message[name]
        return message

    def halves(self) -> FrameHalves:
        return frame("#commit", self.message())

    def sync_halves(self, **fields: Any) -> FrameHalves:
        """A #sync of the same commit."""
        blocks = car(self.commit_cid, [(self.commit_cid, self.commit)])
        payload = {"did": self.did, "rev": self.rev, "time": timestamp(self.micros), "blocks": blocks}
        return frame("#sync", payload | fields)

    def outgoing(self, lanes: frozenset[str] | None = None) -> Outgoing:
        return Outgoing(self.pds, "#commit", self.halves(), lanes=lanes)


def draft_of(account: Account, writes: Sequence[Write], now: int) -> tuple[Draft, list[Change]]:
    """Applies ``writes`` to the account and signs; the frame of that."""
    since, before = account.rev or None, account.data or None
    changes = account.write(writes)
    nodes = account.sign(tid(now, account.pds))
    for change in changes:
        account.tree.cover(change.path.encode(), nodes)
    if not account.records:
        nodes.update(account.tree.seal()[1])
    records = {change.cid: account.records[change.path].block for change in changes if change.cid}
    draft = _draft(account, nodes, now, since, before)
    draft.ops = [_op(change) for change in changes]
    draft.records = records
    return draft, changes


def first_commit(account: Account, nodes: dict[bytes, bytes], now: int) -> Draft:
    """The commit with which an account begins: nothing in it, nothing before it."""
    return _draft(account, nodes, now, None, None)


def head_of(account: Account, now: int) -> Draft:
    """The account's newest commit, without the way to it."""
    return _draft(account, {}, now, None, None)


def _draft(
    account: Account, nodes: dict[bytes, bytes], now: int, since: str | None, before: bytes | None
) -> Draft:
    return Draft(
        account.did, account.pds, account.key, account.rev, since, before, account.data, account.commit,
        [], nodes, {}, now,
    )  # fmt: skip


def _op(change: Change) -> dict[str, Any]:
    op: dict[str, Any] = {
        "cid": Link(change.cid) if change.cid else None,
        "path": change.path,
        "action": change.action,
    }
    if change.prev:
        op["prev"] = Link(change.prev)
    return op
