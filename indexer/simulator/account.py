"""One account: its keys, its tree, and beside the tree the plain dict that is the ground truth.

Owns writes to a repository and its signed head. Knows nothing of frames, sequences or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

from indexer.simulator.cbor import block_cid, cid_text, encode, to_json
from indexer.simulator.keys import SigningKey
from indexer.simulator.tree import Tree
from indexer.simulator.wire import commit_block

ACTIVE = "active"
DELETED = "deleted"
STATUSES = frozenset({ACTIVE, "deactivated", "suspended", "takendown", DELETED})


class ActionError(Exception):
    """An action that this network cannot take (unknown DID, record exists, …)."""


class Write(NamedTuple):
    action: str  # create, update, delete
    path: str
    value: dict[str, Any] | None
    flaw: str = ""  # what makes the value no valid record, for readers of the ledger


class Change(NamedTuple):
    """What a write did."""

    action: str
    path: str
    cid: bytes | None
    prev: bytes | None


class Record(NamedTuple):
    value: dict[str, Any]
    cid: bytes
    block: bytes


class Account:
    """``records`` is the truth; the tree and the commit are derived from it and signed."""

    def __init__(self, did: str, handle: str, pds: int, key: SigningKey) -> None:
        self.did = did
        self.handle = handle
        self.pds = pds
        self.key = key
        self.status = ACTIVE
        self.tombstone = False
        self.seen = False
        self.rev = ""
        self.data = b""
        self.commit = b""
        self.commit_cid = b""
        self.tree = Tree()
        self.records: dict[str, Record] = {}
        self.flaws: dict[str, str] = {}  # of records that break the data model
        self._paths: list[str] = []
        self._place: dict[str, int] = {}
        self._by_cid: dict[bytes, bytes] = {}  # blocks of the commit for which they were last asked

    def write(self, writes: Sequence[Write]) -> list[Change]:
        """Apply all writes or, when one cannot be applied, none."""
        self._check(writes)
        return [self._write(item) for item in writes]

    def _check(self, writes: Sequence[Write]) -> None:
        if len({item.path for item in writes}) != len(writes):
            raise ActionError("a path may occur once in a commit")
        for action, path, value, _ in writes:
            if action not in ("create", "update", "delete") or (value is None) != (action == "delete"):
                raise ActionError(f"not a write: {action} {path}")
            if (path in self.records) == (action == "create"):
                raise ActionError(
                    f"cannot {action} {path}: it {'exists' if action == 'create' else 'does not exist'}"
                )

    def _write(self, item: Write) -> Change:
        old = self.records.get(item.path)
        prev = old.cid if old else None
        self.flaws.pop(item.path, None)
        if item.flaw:
            self.flaws[item.path] = item.flaw
        key = item.path.encode()
        if item.value is None:
            del self.records[item.path]
            self.tree.remove(key)
            self._forget(item.path)
            return Change(item.action, item.path, None, prev)
        block = encode(item.value)
        cid = block_cid(block)
        self.records[item.path] = Record(item.value, cid, block)
        self.tree.set(key, cid)
        if old is None:
            self._place[item.path] = len(self._paths)
            self._paths.append(item.path)
        return Change(item.action, item.path, cid, prev)

    def _forget(self, path: str) -> None:
        at, last = self._place.pop(path), self._paths.pop()
        if last != path:
            self._paths[at], self._place[last] = last, at

    def some_path(self, rng: Random) -> str | None:
        """A random existing path, in constant time."""
        return rng.choice(self._paths) if self._paths else None

    def sign(self, rev: str) -> dict[bytes, bytes]:
        """A new signed commit of the tree as it is; returns the nodes that are new in it."""
        self.data, fresh = self.tree.seal()
        self.head(rev, self.data, commit_block(self.did, rev, self.data, self.key))
        return fresh

    def head(self, rev: str, data: bytes, commit: bytes) -> None:
        self.rev, self.data, self.commit, self.commit_cid = rev, data, commit, block_cid(commit)

    def clear(self) -> None:
        """Delete the repository."""
        self.tree = Tree()
        self.records, self._paths, self._place, self.flaws = {}, [], {}, {}
        self.head("", b"", b"")
        self.commit_cid = b""

    def copy(self) -> Account:
        """Another account object in the same state, for what is only told."""
        twin = Account(self.did, self.handle, self.pds, self.key)
        twin.__dict__ |= self.__dict__
        twin.tree, twin.records, twin.flaws = self.tree.copy(), dict(self.records), dict(self.flaws)
        twin._paths, twin._place = list(self._paths), dict(self._place)
        return twin

    def blocks(self) -> list[tuple[bytes, bytes]]:
        """Commit, then the tree in pre-order with records at their places, each block once."""
        by_cid = {record.cid: record.block for record in self.records.values()}
        found: dict[bytes, bytes] = {self.commit_cid: self.commit}
        for cid, block in self.tree.walk():
            found.setdefault(cid, block or by_cid[cid])
        return list(found.items())

    def chosen(self, cids: Sequence[bytes]) -> list[tuple[bytes, bytes]] | None:
        """These blocks of the current commit; None when one of them is not in it."""
        if self._by_cid.get(self.commit_cid) != self.commit:
            self._by_cid = dict(self.blocks())
        try:
            return [(cid, self._by_cid[cid]) for cid in cids]
        except KeyError:
            return None

    def proof(self, path: str) -> list[tuple[bytes, bytes]]:
        """Commit, the nodes that prove presence or absence of ``path``, and its record."""
        found: dict[bytes, bytes] = {self.commit_cid: self.commit}
        self.tree.cover(path.encode(), found)
        if not self.records:
            found.update(self.tree.seal()[1])
        record = self.records.get(path)
        if record is not None:
            found[record.cid] = record.block
        return list(found.items())

    def ledger(self, pds_url: str, values: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "handle": self.handle,
            "pds": pds_url,
            "active": self.status == ACTIVE,
            "status": self.status,
            "seen": self.seen,
            "rev": self.rev or None,
            "commit": cid_text(self.commit_cid) if self.rev else None,
            "data": cid_text(self.data) if self.rev else None,
            "signing_key": self.key.did_key,
            "records": {path: cid_text(record.cid) for path, record in self.records.items()},
            "invalid": dict(self.flaws),
        }
        if values:
            entry["values"] = {path: to_json(record.value) for path, record in self.records.items()}
        return entry


def writes_of(rows: Iterable[Sequence[Any]], decode: Any) -> Iterator[Write]:
    """Writes from their journal or JSON form: [action, path, value or null], and what is wrong with it."""
    for action, path, value, *flaw in rows:
        yield Write(action, path, None if value is None else decode(value), *flaw)
