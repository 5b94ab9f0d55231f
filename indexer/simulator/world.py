"""What is true in the network, and every way to change it.

Owns the accounts, the directory's answers and the frames that each change causes. A change yields a
`Happening`: a plain journal row, from which `restore` makes the same change again, and the frames it
emits. Sequence numbers, files and sockets belong to others. One thread.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

from indexer.simulator import content
from indexer.simulator.account import (
    ACTIVE,
    DELETED,
    STATUSES,
    Account,
    ActionError,
    Change,
    Write,
    writes_of,
)
from indexer.simulator.cbor import cid_text, encode, from_json, to_json
from indexer.simulator.draft import Draft, Outgoing, draft_of, first_commit
from indexer.simulator.keys import K256, P256, SigningKey
from indexer.simulator.phrases import NAMES, PLACES
from indexer.simulator.wire import car, frame, tid, timestamp

MAX_OPS = 200
_DAY = 86_400_000_000
_REMEMBERED_POSTS = 4000


class Happening(NamedTuple):
    row: dict[str, Any]
    frames: list[Outgoing]


class Clock:
    """Strictly increasing microseconds: wall time, or a virtual start and step for corpora."""

    def __init__(self, start: int | None = None, step: int = 1) -> None:
        self.last = start or 0
        self._step = step
        self._virtual = start is not None

    def __call__(self) -> int:
        self.last += self._step
        if not self._virtual:
            self.last = max(self.last, time.time_ns() // 1000)
        return self.last


class World:
    """All accounts by DID. Methods that change something return its `Happening`, or raise `ActionError`."""

    def __init__(self, seed: int, pds: int, clock: Clock) -> None:
        self.seed = seed
        self.pds = pds
        self.clock = clock
        self.steps = 0
        self.records = 0
        self.accounts: dict[str, Account] = {}
        self.active: list[Account] = []
        self.unseen: list[Account] = []
        self._everybody: list[Account] = []
        self._posts: deque[tuple[str, str]] = deque(maxlen=_REMEMBERED_POSTS)
        self._restorers: dict[str, Callable[[dict[str, Any]], None]] = {
            "account": self._restore_account,
            "commit": self._restore_commit,
            "status": self._restore_status,
            "handle": self._restore_handle,
            "key": self._restore_key,
            "sync": lambda row: None,
            "announce": lambda row: None,
            "lie": lambda row: None,
        }

    # -- whom and what a record may refer to

    def some_person(self, rng: Random) -> tuple[str, str]:
        account = rng.choice(self._everybody)
        return account.did, account.handle

    def some_post(self, rng: Random) -> tuple[str, str] | None:
        return self._posts[rng.randrange(len(self._posts))] if self._posts else None

    def account(self, did: str) -> Account:
        try:
            return self.accounts[did]
        except KeyError:
            raise ActionError(f"no such account: {did}") from None

    # -- changes

    def create(
        self,
        *,
        pds: int | None = None,
        handle: str | None = None,
        curve: str | None = None,
        past: Callable[[str], Mapping[str, dict[str, Any]]] | None = None,
        did: str | None = None,
    ) -> Happening:
        """A new account. ``past`` (DID → values by path) gives it old records, and it emits nothing now.

        ``did`` is for a did:web; without it a did:plc is made.
        """
        index = len(self._everybody)
        rng = Random(self.seed << 32 | index)
        curve = curve or rng.choice((K256, K256, P256))
        handle = handle or f"{rng.choice(NAMES)}{index}.{rng.choice(PLACES)}.test"
        if any(account.handle == handle for account in self._everybody):
            raise ActionError(f"handle is taken: {handle}")
        genesis = encode({"seed": self.seed, "index": index, "handle": handle, "type": "simulated"})
        did = did or "did:plc:" + base64.b32encode(hashlib.sha256(genesis).digest()).decode().lower()[:24]
        if did in self.accounts:
            raise ActionError(f"the account exists: {did}")
        home = index % self.pds if pds is None else self._home(pds)
        account = Account(did, handle, home, SigningKey.derive(curve, f"{self.seed}/{did}/0"))
        self._admit(account)
        writes = [Write("create", path, value) for path, value in past(did).items()] if past else []
        self._remember(account, account.write(writes))
        now = self.clock()
        nodes = account.sign(tid(now - _DAY if past else now, home))
        row = self._row("account", account, handle=handle, pds=home, **self._head(account, writes))
        row |= {"curve": curve, "secret": account.key.secret.hex(), "history": past is not None}
        if past:
            self.unseen.append(account)
            return Happening(row, [])
        account.seen = True
        first = first_commit(account, nodes, now).outgoing()
        return Happening(row, [*self._announce(account, now)[::-1], first, self._sync_frame(account, now)])

    def commit(self, did: str, writes: Sequence[Write]) -> Happening:
        """One signed commit with up to 200 writes."""
        account = self.account(did)
        if account.status != ACTIVE:
            raise ActionError(f"account is {account.status}: {did}")
        row, draft = self.draft(account, writes)
        return Happening(row, [draft.outgoing()])

    def draft(self, account: Account, writes: Sequence[Write]) -> tuple[dict[str, Any], Draft]:
        """A commit that is true from now on, whatever the account's status, and its frame to be sent."""
        if not 1 <= len(writes) <= MAX_OPS:
            raise ActionError(f"a commit has 1 to {MAX_OPS} writes, not {len(writes)}")
        draft, changes = draft_of(account, writes, self.clock())
        self._remember(account, changes)
        self._see(account)
        return self._row("commit", account, **self._head(account, writes)), draft

    def resign(self, did: str) -> dict[str, Any]:
        """A commit without changes: the same tree under a new rev, which only a #sync can tell of."""
        account = self.account(did)
        account.sign(tid(self.clock(), account.pds))
        return self._row("commit", account, **self._head(account, []))

    def set_status(self, did: str, status: str, *, tombstone: bool = False) -> Happening:
        """Deactivate, suspend, take down, delete (with a PLC tombstone on request) or bring back."""
        account = self.account(did)
        if status not in STATUSES or account.status in (status, DELETED):
            raise ActionError(f"cannot go from {account.status} to {status}: {did}")
        before = account.status
        row = self._row("status", account, status=status, tombstone=tombstone)
        self._restore_status(row)
        self._see(account)
        now = self.clock()
        if before == "deactivated" and status == ACTIVE:
            return Happening(row, [*self._announce(account, now), self._sync_frame(account, now)])
        return Happening(row, [self._account_frame(account, now)])

    def set_handle(self, did: str, handle: str) -> Happening:
        account = self.account(did)
        if any(other.handle == handle for other in self._everybody):
            raise ActionError(f"handle is taken: {handle}")
        row = self._row("handle", account, handle=handle)
        self._restore_handle(row)
        self._see(account)
        return Happening(row, [self._identity_frame(account, self.clock())])

    def change_key(self, did: str, *, curve: str | None = None, pds: int | None = None) -> Happening:
        """A new signing key; with ``pds`` also a migration there, as the new host re-signs the repository."""
        account = self.account(did)
        if account.status != ACTIVE:
            raise ActionError(f"account is {account.status}: {did}")
        if pds is not None and self._home(pds) == account.pds:
            raise ActionError(f"{did} is on PDS {pds} already")
        old = account.pds
        account.pds = old if pds is None else pds
        account.key = SigningKey.derive(curve or account.key.curve, f"{self.seed}/{did}/{account.rev}")
        now = self.clock()
        account.sign(tid(now, account.pds))
        row = self._row("key", account, pds=account.pds, **self._head(account, []))
        row |= {"curve": account.key.curve, "secret": account.key.secret.hex()}
        self._see(account)
        if pds is None:
            return Happening(row, [self._identity_frame(account, now), self._sync_frame(account, now)])
        gone = frame(
            "#account", {"did": did, "time": timestamp(now), "active": False, "status": "deactivated"}
        )
        goodbye = Outgoing(old, "#account", gone, relayed=False)
        return Happening(row, [*self._announce(account, now), self._sync_frame(account, now), goodbye])

    def sync(self, did: str) -> Happening:
        """A #sync frame that repeats the current head."""
        account = self.account(did)
        if account.status != ACTIVE:
            raise ActionError(f"account is {account.status}: {did}")
        self._see(account)
        return Happening(self._row("sync", account), [self._sync_frame(account, self.clock())])

    def announce(self, did: str) -> Happening:
        """What is true of the account, said once more: its status, its identity, its head."""
        account = self.account(did)
        self._see(account)
        now = self.clock()
        if account.status == DELETED:
            return Happening(self._row("announce", account), [self._account_frame(account, now)])
        frames = self._announce(account, now)
        if account.status == ACTIVE:
            frames.append(self._sync_frame(account, now))
        return Happening(self._row("announce", account), frames)

    # -- journal

    def restore(self, row: dict[str, Any]) -> None:
        """Make again what a journal row tells; nothing is hashed or signed until `settle`."""
        self._restorers[row["kind"]](row)
        self.clock.last = max(self.clock.last, row["us"])
        self.steps = row["step"]
        if row["emits"] and row["kind"] != "lie":
            self._see(self.accounts[row["did"]])

    def settle(self) -> None:
        """Hash the restored trees; each must have the root that its commit signs."""
        for account in self._everybody:
            if account.rev and account.tree.seal()[0] != account.data:
                raise ActionError(f"the journal of {account.did} does not lead to its signed root")

    def _row(self, kind: str, account: Account, **fields: Any) -> dict[str, Any]:
        return {"kind": kind, "did": account.did, "step": self.steps, **fields}

    def _head(self, account: Account, writes: Sequence[Write]) -> dict[str, Any]:
        ops = [
            [item.action, item.path, None if item.value is None else to_json(item.value)]
            + ([item.flaw] if item.flaw else [])
            for item in writes
        ]
        return {"rev": account.rev, "data": account.data.hex(), "commit": account.commit.hex(), "ops": ops}

    def _restore_account(self, row: dict[str, Any]) -> None:
        key = SigningKey(row["curve"], bytes.fromhex(row["secret"]))
        account = Account(row["did"], row["handle"], row["pds"], key)
        self._admit(account)
        self._restore_commit(row)
        if row["history"]:
            self.unseen.append(account)
        else:
            account.seen = True

    def _restore_commit(self, row: dict[str, Any]) -> None:
        account = self.accounts[row["did"]]
        self._remember(account, account.write(list(writes_of(row["ops"], from_json))))
        account.head(row["rev"], bytes.fromhex(row["data"]), bytes.fromhex(row["commit"]))

    def _restore_status(self, row: dict[str, Any]) -> None:
        account = self.accounts[row["did"]]
        if account.status == ACTIVE:
            self.active.remove(account)
        account.status = row["status"]
        account.tombstone = row["tombstone"]
        if account.status == ACTIVE:
            self.active.append(account)
        elif account.status == DELETED:
            self.records -= len(account.records)
            account.clear()

    def _restore_handle(self, row: dict[str, Any]) -> None:
        self.accounts[row["did"]].handle = row["handle"]

    def _restore_key(self, row: dict[str, Any]) -> None:
        account = self.accounts[row["did"]]
        account.pds = row["pds"]
        account.key = SigningKey(row["curve"], bytes.fromhex(row["secret"]))
        self._restore_commit(row)

    # -- bookkeeping

    def _home(self, pds: int) -> int:
        if not 0 <= pds < self.pds:
            raise ActionError(f"no such PDS: {pds}")
        return pds

    def _admit(self, account: Account) -> None:
        self.accounts[account.did] = account
        self._everybody.append(account)
        self.active.append(account)

    def _see(self, account: Account) -> None:
        if not account.seen:
            account.seen = True
            self.unseen.remove(account)

    def _remember(self, account: Account, changes: Sequence[Change]) -> None:
        for change in changes:
            self.records += (change.action == "create") - (change.action == "delete")
            if change.cid and change.path.startswith(content.POST):
                self._posts.append((f"at://{account.did}/{change.path}", cid_text(change.cid)))

    # -- frames

    def _announce(self, account: Account, now: int) -> list[Outgoing]:
        return [self._account_frame(account, now), self._identity_frame(account, now)]

    def _identity_frame(self, account: Account, now: int) -> Outgoing:
        payload = {"did": account.did, "time": timestamp(now), "handle": account.handle}
        return Outgoing(account.pds, "#identity", frame("#identity", payload))

    def _account_frame(self, account: Account, now: int) -> Outgoing:
        payload = {"did": account.did, "time": timestamp(now), "active": account.status == ACTIVE}
        if account.status != ACTIVE:
            payload["status"] = account.status
        return Outgoing(account.pds, "#account", frame("#account", payload))

    def _sync_frame(self, account: Account, now: int) -> Outgoing:
        blocks = car(account.commit_cid, [(account.commit_cid, account.commit)])
        payload = {"did": account.did, "rev": account.rev, "time": timestamp(now), "blocks": blocks}
        return Outgoing(account.pds, "#sync", frame("#sync", payload))
