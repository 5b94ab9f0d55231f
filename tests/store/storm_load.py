"""The storm's load: what unit number n does, in the store and in a plain twin.

A unit follows from the seed and its number alone, so the parent knows what a killed child did from the
number that the store's cursor holds. Every unit sets that cursor in its own batch.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from indexer.errors import BadInput
from indexer.store.archives import Archived
from indexer.store.codecs import INVALID, NEW_REPO, OVERSIZE, AccountStatus, RepoRow, SyncState
from indexer.store.transaction import Transaction
from tests.store.support import block_of, cid_of

CURSOR = "storm"
BUFFERED = 6  # frames of one repository
QUARANTINED = 40  # frames in the ring
ARCHIVED = 2  # CARs of one repository
LARGE = "did:web:large.test"  # wiped by ranges, the others row by row
DIDS = [*(f"did:web:user{number}.test" for number in (1, 2, 3, 11, 12, 13)), LARGE]

Kind = Literal["commit", "claim", "chunk", "wipe", "buffer", "drain", "word", "due", "fail", "archive"]
_WEIGHTS: dict[Kind, int] = {
    "commit": 500, "claim": 20, "chunk": 150, "wipe": 5, "buffer": 80, "drain": 40, "word": 30,
    "due": 40, "fail": 60, "archive": 10,
}  # fmt: skip


class Change(NamedTuple):
    path: str
    text: str  # "" deletes
    flags: int


class Op(NamedTuple):
    number: int
    kind: Kind
    did: str
    changes: list[Change]
    coin: float
    text: str

    @property
    def rev(self) -> str:
        return f"3k{self.number:011d}"


class Told(NamedTuple):
    """What a reader of the log must be told of an event."""

    kind: str
    live: bool
    did: str
    epoch: int
    rev: str
    path: str
    action: str
    cid: str


def op_of(seed: int, number: int) -> Op:
    chance = random.Random(f"{seed}/{number}")
    kind = chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    did = chance.choice(DIDS)
    paths = 300 if did == LARGE else 25
    if kind == "chunk":
        fresh = chance.random() < 0.5
        changes = [
            _fetched(chance, number, rkey) if fresh else _change(chance, paths)
            for rkey in range(chance.randrange(10, 50))
        ]
        changes.sort(key=lambda change: not change.text)  # deletes after puts
    else:
        changes = [_change(chance, paths) for _ in range(chance.randrange(1, 4))]
    return Op(number, kind, did, changes, chance.random(), f"{chance.randrange(60)}")


def _fetched(chance: random.Random, number: int, rkey: int) -> Change:
    """One of a run of neighbours, most often in a place where nothing is stored."""
    return Change(f"a.b.e/{number % 20:02}{rkey:02}", f"new {chance.getrandbits(8)}", 0)


def _change(chance: random.Random, paths: int) -> Change:
    text = chance.choice(["", f"again {chance.randrange(60)}", f"new {chance.getrandbits(64):x}"])
    flags = chance.choices([0, INVALID, OVERSIZE], [90, 5, 5])[0]
    return Change(f"a.b.{chance.choice('cd')}/{chance.randrange(paths)}", text, flags)


def car_of(op: Op) -> bytes:
    return f"the repository of {op.did}, {op.text}".encode() * 50


# ---- in the store


def rescue_of(op: Op, tx: Transaction) -> None:
    """In the place of a unit that failed."""
    tx.quarantine("relay", op.number, op.did, "bad_input", "no", b"frame " + op.text.encode())
    _done(op, tx)


def perform(op: Op, tx: Transaction, archived: Archived | None = None) -> None:
    row = tx.repo(op.did) or NEW_REPO
    match op.kind:
        case "commit":
            write(op, tx, live=True)
            if op.coin < 0.2:
                tx.append_event("sync", op.did, rev=op.rev, fields={})
            tx.set_repo(op.did, synced(row, op.rev))
        case "claim":
            tx.set_cursor(f"job/{op.did}", row.epoch + 1)
            tx.set_repo(op.did, row._replace(tracked=True, state=SyncState.BACKFILLING, due=1))
        case "chunk" if tx.cursor(f"job/{op.did}") == row.epoch + 1:
            fetch(op, tx)
            if op.coin < 0.3:
                tx.set_repo(op.did, synced(row, op.rev))
        case "wipe":
            wipe(op, tx)
        case "buffer":
            source = f"relay {op.text[-1]}"
            tx.buffer_frame(op.did, op.rev[-2:], "commit", source, b"frame" * len(op.changes))
        case "drain":
            tx.drop_buffered(op.did, op.rev[-2:] if op.coin < 0.5 else None)
        case "word":
            tx.set_account_word(
                op.did, f"host {op.text[-1]}", AccountStatus.SUSPENDED, False, op.number, op.number
            )
        case "due":
            tx.schedule(op.did, int(op.coin * 4))
        case "archive" if archived is not None:
            archived.hold(tx, op.did, f"rev {op.text[-1]}")
        case "fail":
            write(op, tx, live=True)
            tx.buffer_frame(op.did, "zz", "sync", "relay", b"half")
            if op.coin < 0.3:
                wipe(op, tx)
            raise BadInput("the frame is wrong after all")
    _done(op, tx)


def write(op: Op, tx: Transaction, *, live: bool) -> None:
    for path, text, flags in op.changes:
        if text:
            block = block_of(text)
            tx.put_record(op.did, path, cid_of(block), block, op.rev, live=live, flags=flags)
        else:
            tx.delete_record(op.did, path, op.rev, live=live)


def fetch(op: Op, tx: Transaction) -> None:
    """As the backfill does it."""
    puts = [(path, block_of(text), flags) for path, text, flags in op.changes if text]
    tx.put_records(op.did, op.rev, [(path, cid_of(block), block, f) for path, block, f in puts], live=False)
    for path, text, _ in op.changes:
        if not text:
            tx.delete_record(op.did, path, op.rev, live=False)


def wipe(op: Op, tx: Transaction) -> None:
    """The account goes; every second time it is back at once, with records that it had."""
    rows = [(path, row.cid) for path, row in tx.records(op.did, limit=20) if row.served]
    kept = [(path, cid, tx.block(op.did, cid) or b"") for path, cid in rows]
    tx.wipe_repo(op.did, AccountStatus.DELETED)
    if op.coin < 0.5:
        for path, cid, block in kept:
            tx.put_record(op.did, path, cid, block, op.rev, live=True)


def synced(row: RepoRow, rev: str) -> RepoRow:
    return row._replace(
        tracked=True, state=SyncState.SYNCED, status=AccountStatus.ACTIVE, rev=rev, due=0, attempt=0
    )


def _done(op: Op, tx: Transaction) -> None:
    tx.add_count(f"storm/{op.kind}", 1)
    tx.set_cursor(CURSOR, op.number)


# ---- in the twin


class Version(NamedTuple):
    cid: bytes
    flags: int
    rev: str


@dataclass
class Account:
    """One repository; `row` has the fields of its row that the load sets."""

    row: RepoRow = NEW_REPO
    records: dict[str, Version] = field(default_factory=dict)
    job: int = 0
    buffered: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    words: dict[str, int] = field(default_factory=dict)
    archives: list[tuple[str, bytes]] = field(default_factory=list)  # rev, digest; newest first
    refused_before_wipe: int = 0


class Twin:
    """What the store must hold after so many units, as plainly as can be."""

    def __init__(self) -> None:
        self.number = 0
        self.accounts = {did: Account() for did in DIDS}
        self.events: dict[int, Told] = {}
        self.head = 1
        self.tallies: Counter[str] = Counter()
        self.refused: dict[int, str] = {}  # number → DID

    def dead(self, told: Told) -> bool:
        return told.epoch < self.accounts[told.did].row.epoch

    def apply(self, op: Op) -> None:
        one = self.accounts[op.did]
        match op.kind:
            case "commit":
                self._write(one, op, live=True)
                if op.coin < 0.2:
                    self._append(one, op, "sync", True, op.rev)
                one.row = synced(one.row, op.rev)
            case "claim":
                one.job = one.row.epoch + 1
                one.row = one.row._replace(tracked=True, state=SyncState.BACKFILLING, due=1)
            case "chunk" if one.job == one.row.epoch + 1:
                self._write(one, op, live=False)
                if op.coin < 0.3:
                    one.row = synced(one.row, op.rev)
            case "wipe":
                self._wipe(one, op)
            case "buffer":
                key = (op.rev[-2:], "commit", f"relay {op.text[-1]}")
                if key in one.buffered or len(one.buffered) < BUFFERED:
                    one.buffered[key] = b"frame" * len(op.changes)
            case "drain":
                for key in [key for key in one.buffered if op.coin >= 0.5 or key[0] <= op.rev[-2:]]:
                    del one.buffered[key]
            case "word":
                one.words[f"host {op.text[-1]}"] = op.number
            case "due":
                one.row = one.row._replace(due=int(op.coin * 4))
            case "archive":
                self._archive(one, op)
            case "fail":
                number = self.tallies["storm/fail"]
                self.refused[number] = op.did
                self.refused.pop(number - QUARANTINED, None)
        self.tallies[f"storm/{op.kind}"] += 1
        self.number = op.number

    def _write(self, one: Account, op: Op, *, live: bool) -> None:
        for path, text, flags in op.changes:
            old = one.records.get(path)
            served = old is not None and not old.flags
            if not text:
                if one.records.pop(path, None) is not None and served:
                    self._append(one, op, "record", live, op.rev, path, "delete")
                continue
            cid = cid_of(block_of(text))
            if old is not None and old[:2] == (cid, flags):
                continue
            one.records[path] = Version(cid, flags, op.rev)
            if not flags:
                action = "update" if served else "create"
                self._append(one, op, "record", live, op.rev, path, action, cid)
            elif served:
                self._append(one, op, "record", live, op.rev, path, "delete")

    def _wipe(self, one: Account, op: Op) -> None:
        kept = [(path, old) for path, old in sorted(one.records.items())[:20] if not old.flags]
        one.records.clear()
        one.buffered.clear()
        one.archives.clear()
        one.refused_before_wipe = self.tallies["storm/fail"]
        one.row = NEW_REPO._replace(status=AccountStatus.DELETED, epoch=one.row.epoch + 1)
        self._append(one, op, "account", True, "")
        if op.coin < 0.5:
            for path, old in kept:
                one.records[path] = Version(old.cid, 0, op.rev)
                self._append(one, op, "record", True, op.rev, path, "create", old.cid)

    def _archive(self, one: Account, op: Op) -> None:
        new = (f"rev {op.text[-1]}", hashlib.sha256(car_of(op)).digest())
        others = [old for old in one.archives if old[0] != new[0] and old[1] != new[1]]
        one.archives = [new, *others][:ARCHIVED]

    def _append(
        self,
        one: Account,
        op: Op,
        kind: str,
        live: bool,
        rev: str,
        path: str = "",
        action: str = "",
        cid: bytes = b"",
    ) -> None:
        self.events[self.head] = Told(kind, live, op.did, one.row.epoch, rev, path, action, cid.hex())
        self.head += 1
