"""Repositories that are not what they should be: one function for each way to spoil a CAR.

Owns the spoiling. Each takes the account whose repository was asked for, dice and the fault's value, and
gives a whole CAR, or None where this repository cannot be spoiled in that way. The account itself is left
as it is. Pure but for the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from indexer.simulator.account import Account
from indexer.simulator.cbor import Link, block_cid, encode
from indexer.simulator.keys import K256, P256, SigningKey
from indexer.simulator.tree import Tree
from indexer.simulator.wire import car, car_header, car_section, commit_block, tid

Block = tuple[bytes, bytes]
_TID = "234567abcdefghijklmnopqrstuvwxyz"
_HUGE = 3 << 20
_DAY_US = 86_400_000_000
_ORDER_K256 = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
_ORDER_P256 = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


class Subject(NamedTuple):
    """Whose repository it is, and what the spoiling may draw on."""

    account: Account
    others: Sequence[Account]
    rng: Random
    value: float | str | None

    def number(self, default: float) -> float:
        return self.value if isinstance(self.value, (int, float)) else default

    def nodes(self) -> list[bytes]:
        """The CIDs of the tree's nodes, the root first."""
        return [cid for cid, block in self.account.tree.walk() if block]


def _car(subject: Subject, blocks: Sequence[Block]) -> bytes:
    return car(subject.account.commit_cid, blocks)


def _under(subject: Subject, commit: bytes) -> bytes:
    """The repository under another commit block."""
    cid = block_cid(commit)
    return car(cid, [(cid, commit), *subject.account.blocks()[1:]])


def _without(subject: Subject, cid: bytes) -> bytes:
    return _car(subject, [item for item in subject.account.blocks() if item[0] != cid])


# -- bytes that are missing, wrong or too many


def _truncated_at_block(subject: Subject) -> bytes:
    blocks = subject.account.blocks()
    return _car(subject, blocks[: subject.rng.randrange(len(blocks))])


def _wrong_hash(subject: Subject) -> bytes:
    blocks = subject.account.blocks()
    at = subject.rng.randrange(1, len(blocks))
    cid, block = blocks[at]
    place = subject.rng.randrange(len(block))
    blocks[at] = cid, block[:place] + bytes((block[place] ^ 1,)) + block[place + 1 :]
    return _car(subject, blocks)


def _missing_commit(subject: Subject) -> bytes:
    return _without(subject, subject.account.commit_cid)


def _missing_record(subject: Subject) -> bytes | None:
    records = list(subject.account.records.values())
    return _without(subject, subject.rng.choice(records).cid) if records else None


def _missing_node(subject: Subject) -> bytes:
    return _without(subject, subject.rng.choice(subject.nodes()))


def _wrong_root(subject: Subject) -> bytes:
    return car(subject.account.data, subject.account.blocks())


def _trailing(subject: Subject) -> bytes:
    return _car(subject, subject.account.blocks()) + b"\xff\xff\xff"


# -- legal, if unusual


def _extra_blocks(subject: Subject) -> bytes:
    junk = [encode({"junk": number}) for number in range(int(subject.number(20)))]
    return _car(subject, [*subject.account.blocks(), *((block_cid(block), block) for block in junk)])


def _shuffled(subject: Subject) -> bytes:
    blocks = subject.account.blocks()
    subject.rng.shuffle(blocks)
    return _car(subject, blocks)


def _repeated_blocks(subject: Subject) -> bytes:
    blocks = subject.account.blocks()
    return _car(subject, [*blocks, *blocks[::-1]])


# -- somebody else's, or of another time


def _other_account(subject: Subject) -> bytes | None:
    others = [other for other in subject.others if other.rev and other.did != subject.account.did]
    if not others:
        return None
    other = subject.rng.choice(others)
    return car(other.commit_cid, other.blocks())


def _misdirected(subject: Subject) -> bytes:
    """Everything in order, but the signed commit speaks of another account."""
    account = subject.account
    did = "did:plc:" + "".join(subject.rng.choices(_TID, k=24))
    return _under(subject, commit_block(did, account.rev, account.data, account.key))


def _old_rev(subject: Subject) -> bytes | None:
    """The repository as it was before its newest record, under a signature of that time."""
    account = subject.account
    if not account.records:
        return None
    kept = list(account.records)[:-1]
    return _signed(account, kept, tid(_micros(account.rev) - int(subject.number(1) * 1e6)))


def _future_rev(subject: Subject) -> bytes:
    account = subject.account
    rev = tid(int(time.time() * 1e6) + int(subject.number(_DAY_US / 1e6) * 1e6))
    return _under(subject, commit_block(account.did, rev, account.data, account.key))


def _signed(
    account: Account, paths: Sequence[str], rev: str, more: Sequence[tuple[str, bytes]] = ()
) -> bytes:
    """A repository of some of the account's records and others, under its true key."""
    records = {path: account.records[path].block for path in paths} | dict(more)
    tree = Tree.of((path.encode(), block_cid(block)) for path, block in records.items())
    data, _ = tree.seal()
    commit = commit_block(account.did, rev, data, account.key)
    by_cid: dict[bytes, bytes] = {block_cid(block): block for block in records.values()}
    root = block_cid(commit)
    return car(root, [(root, commit), *((cid, block or by_cid[cid]) for cid, block in tree.walk())])


# -- signatures


def _other_key(subject: Subject) -> bytes:
    account = subject.account
    key = SigningKey.derive(account.key.curve, f"not of {account.did}")
    return _under(subject, commit_block(account.did, account.rev, account.data, key))


def _resigned(subject: Subject, change: Callable[[bytes], bytes]) -> bytes:
    """The commit with its true signature changed."""
    account = subject.account
    body = {
        "did": account.did, "version": 3, "data": Link(account.data), "rev": account.rev, "prev": None,
    }  # fmt: skip
    return _under(subject, encode(body | {"sig": change(account.key.sign(encode(body)))}))


def _bad_signature(subject: Subject) -> bytes:
    bit = subject.rng.randrange(8)
    return _resigned(subject, lambda sig: sig[:40] + bytes((sig[40] ^ 1 << bit,)) + sig[41:])


def _high_s(subject: Subject) -> bytes:
    order = {K256: _ORDER_K256, P256: _ORDER_P256}[subject.account.key.curve]
    return _resigned(
        subject, lambda sig: sig[:32] + (order - int.from_bytes(sig[32:], "big")).to_bytes(32, "big")
    )


# -- true signature, hostile content


def _huge_record(subject: Subject) -> bytes:
    """A record of ``value`` bytes that the host made up and signed."""
    account = subject.account
    record = encode({"$type": "app.bsky.feed.post", "text": "x" * int(subject.number(_HUGE))})
    rev = tid(_micros(account.rev) + 1)
    return _signed(account, list(account.records), rev, [("app.bsky.feed.post/3zzzzzzzzzzzz", record)])


def _root_is_a_record(subject: Subject) -> bytes | None:
    account = subject.account
    if not account.records:
        return None
    record = subject.rng.choice(list(account.records.values()))
    return _under(subject, commit_block(account.did, account.rev, record.cid, account.key))


def _wrong_tree(subject: Subject) -> bytes | None:
    """All keys in one node whatever their layers, under a true signature."""
    account = subject.account
    entries: list[dict[str, object]] = []
    for path in sorted(account.records, key=str.encode):
        link = Link(account.records[path].cid)
        entries.append({"p": 0, "k": path.encode(), "v": link, "t": None})
    if len(entries) < 2:
        return None
    node = encode({"l": None, "e": entries})
    commit = commit_block(account.did, account.rev, block_cid(node), account.key)
    blocks = [(block_cid(block), block) for block in (commit, node)]
    records = {record.cid: record.block for record in account.records.values()}
    return car(block_cid(commit), [*blocks, *records.items()])


def _long_section(subject: Subject) -> bytes:
    """One block that says it is half a gigabyte."""
    cid, block = subject.account.commit_cid, subject.account.commit
    head = car_header(cid) + car_section(cid, block)
    return head + b"\x80\x80\x80\x80\x02" + bytes(4096)


def _micros(rev: str) -> int:
    number = 0
    for letter in rev:
        number = number << 5 | _TID.index(letter)
    return number >> 10


#: Name of the fault → how it spoils a repository.
CARS: dict[str, Callable[[Subject], bytes | None]] = {
    "truncated_at_block": _truncated_at_block,
    "wrong_hash": _wrong_hash,
    "missing_commit": _missing_commit,
    "missing_record": _missing_record,
    "missing_node": _missing_node,
    "wrong_root": _wrong_root,
    "trailing": _trailing,
    "extra_blocks": _extra_blocks,
    "shuffled": _shuffled,
    "repeated_blocks": _repeated_blocks,
    "other_account": _other_account,
    "misdirected": _misdirected,
    "old_rev": _old_rev,
    "future_rev": _future_rev,
    "other_key": _other_key,
    "bad_signature": _bad_signature,
    "high_s": _high_s,
    "huge_record": _huge_record,
    "root_is_a_record": _root_is_a_record,
    "wrong_tree": _wrong_tree,
    "long_section": _long_section,
}
