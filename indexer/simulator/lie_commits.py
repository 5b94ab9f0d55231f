"""Lies inside of a commit: rows 8 to 12, 14, 15 and 18 of the commit table, and what is unusual but legal.

Owns those kinds. Where a row lies behind the signature's, the lie is signed with the account's true key: a
broken PDS says it, no forger could. One thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from random import Random
from typing import TYPE_CHECKING, Any

from indexer.simulator.account import Write
from indexer.simulator.cbor import DAG_CBOR, RAW, Float, Link, encode
from indexer.simulator.content import POST
from indexer.simulator.draft import Draft
from indexer.simulator.keys import SigningKey
from indexer.simulator.lie_base import (
    Choose,
    Kind,
    Tell,
    beside,
    creates,
    instead,
    on_layers,
    one_create,
    one_delete,
    one_update,
    other_key,
    post,
    replaced,
    some_cid,
)
from indexer.simulator.wire import car, car_header, car_section, tid, varint

if TYPE_CHECKING:
    from indexer.simulator.lies import Telling

_DAY = 86_400_000_000
_MIB = 1 << 20


# -- row 8: the CAR


def _car(make: Callable[[Draft, Random], bytes]) -> Tell:
    def tamper(draft: Draft, rng: Random) -> None:
        draft.payload["blocks"] = make(draft, rng)

    return beside(tamper)


def _whole(draft: Draft) -> bytes:
    return car(draft.commit_cid, draft.sections)


def _cut(draft: Draft, rng: Random) -> bytes:
    return _whole(draft)[: -rng.randrange(1, 40)]


def _wrong_hash(draft: Draft, rng: Random) -> bytes:
    return car(draft.commit_cid, [*draft.sections[:-1], (draft.sections[-1][0], b"\xa1\x61a\x01")])


def _cycle(draft: Draft, rng: Random) -> bytes:
    """A node that links to itself, under a CID that cannot be its own."""
    cid = some_cid(rng)
    return car(draft.commit_cid, [*draft.sections, (cid, encode({"e": [], "l": cid}))])


def _with_cid(prefix: bytes, digest: Callable[[bytes], bytes]) -> Callable[[Draft, Random], bytes]:
    def make(draft: Draft, rng: Random) -> bytes:
        block = encode({"x": rng.getrandbits(40)})
        return _whole(draft) + car_section(prefix + digest(block), block)

    return make


def _sha256(block: bytes) -> bytes:
    return hashlib.sha256(block).digest()


def _header(body: dict[str, Any]) -> Callable[[Draft, Random], bytes]:
    def make(draft: Draft, rng: Random) -> bytes:
        header = encode(body)
        start = len(car_header(draft.commit_cid))
        return varint(len(header)) + header + _whole(draft)[start:]

    return make


# -- rows 9 to 12: the commit object


def _no_commit_block(draft: Draft, rng: Random) -> bytes:
    return car(draft.commit_cid, draft.sections[1:])


def _object(make: Callable[[Draft, Random], dict[str, Any]]) -> Tell:
    """Another commit object, signed as it is."""

    def tamper(draft: Draft, rng: Random) -> None:
        draft.sign(make(draft, rng))

    return beside(tamper)


def _without(name: str) -> Callable[[Draft, Random], dict[str, Any]]:
    def make(draft: Draft, rng: Random) -> dict[str, Any]:
        body = draft.body()
        del body[name]
        return body

    return make


def _uncanonical(draft: Draft, rng: Random) -> None:
    """The version as an integer of two bytes."""
    draft.commit = draft.commit.replace(b"gversion\x03", b"gversion\x18\x03")


def _unsigned(draft: Draft, rng: Random) -> None:
    draft.commit = encode(draft.body())


def _signature(make: Callable[[SigningKey, bytes], bytes]) -> Tell:
    def tamper(draft: Draft, rng: Random) -> None:
        body = draft.body()
        signature = draft.key.sign(encode(body))
        draft.commit = encode(body | {"sig": make(draft.key, signature)})

    return beside(tamper)


def _other_content(draft: Draft, rng: Random) -> None:
    """The signature is the account's, but of another commit."""
    body = draft.body()
    signature = draft.key.sign(encode(body | {"rev": tid(draft.micros - 1)}))
    draft.commit = encode(body | {"sig": signature})


# -- rows 14 and 15: the operations


def _op_without(name: str) -> Callable[[Draft, Random], None]:
    def tamper(draft: Draft, rng: Random) -> None:
        del draft.ops[0][name]

    return tamper


def _twice(draft: Draft, rng: Random) -> None:
    draft.ops.append(dict(draft.ops[0]))


def _no_record(draft: Draft, rng: Random) -> None:
    del draft.records[draft.ops[0]["cid"]]


def _other_record(draft: Draft, rng: Random) -> None:
    """The operation names a record that came along, but not the one that the tree holds."""
    block = encode({"$type": POST, "text": f"not this one {rng.getrandbits(30)}"})
    cid = Link(DAG_CBOR + _sha256(block))
    draft.records[cid] = block
    draft.ops[0]["cid"] = cid


def _absent(draft: Draft, rng: Random) -> None:
    """An operation more, on a path that the tree does not hold."""
    draft.ops.append(draft.ops[0] | {"path": f"{POST}/{tid(draft.micros + 1)}"})


def _not_deleted(draft: Draft, rng: Random) -> None:
    """What was just created is said to be deleted."""
    op = draft.ops[0]
    draft.ops[0] = {"action": "delete", "path": op["path"], "cid": None, "prev": op["cid"]}


# -- row 18 and legal records


def _record(flaw: str, **more: Any) -> Choose:
    """A new post with fields that are wrong (``flaw``) or only odd."""

    def choose(telling: Telling) -> list[Write]:
        rkey = tid(telling.world.clock(), telling.rng.getrandbits(10))
        return [post(telling, rkey, **more)._replace(flaw=flaw)]

    return choose


def _spoiled(telling: Telling) -> list[Write]:
    """A record that was fine becomes one that is not."""
    (write,) = one_update(telling)
    assert write.value is not None
    return [write._replace(value=write.value | {"share": Float(0.5)}, flaw="float")]


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _shared(telling: Telling) -> list[Write]:
    """One record under two paths."""
    first, second = creates(2)(telling)
    return [first, second._replace(value=first.value)]


def _node_like(telling: Telling) -> list[Write]:
    (write,) = one_create(telling)
    return [write._replace(value={"e": [], "l": None})]


def _nothing(draft: Draft, rng: Random) -> None:
    """The truth."""


def kinds() -> Iterator[Kind]:
    yield from _row_8()
    yield from _rows_9_to_12()
    yield from _rows_14_and_15()
    yield from _row_18()


def _row_8() -> Iterator[Kind]:
    def kind(name: str, about: str, make: Callable[[Draft, Random], bytes]) -> Kind:
        return Kind(name, "8", about, ("reject/car",), _car(make))

    yield kind("car_cut", "the CAR ends in the middle of a block", _cut)
    yield kind("car_hash", "a block is not what its CID says", _wrong_hash)
    yield kind("car_cycle", "a node that links to itself, whatever its hash", _cycle)
    yield kind("car_tail", "bytes behind the last block", lambda draft, rng: _whole(draft) + b"\x05tail")
    yield kind("car_codec", "a block of another codec", _with_cid(b"\x01\x70\x12\x20", _sha256))
    yield kind("car_hash_kind", "a block under another hash function",
               _with_cid(b"\x01\x71\x13\x40", lambda block: hashlib.sha512(block).digest()))  # fmt: skip
    yield kind("car_identity", "a block that is its own CID",
               _with_cid(b"\x01\x71\x00", lambda block: varint(len(block)) + block))  # fmt: skip
    yield kind("car_cid_version", "a block under a CID of version 0", _with_cid(b"\x12\x20", _sha256))
    yield kind("car_version", "a CAR of version 2", _header({"roots": [], "version": 2}))
    yield kind("car_header", "a CAR without a header", _header({"version": 1}))
    yield kind("car_varint", "a length without an end", lambda draft, rng: _whole(draft) + b"\xff" * 12)
    yield kind("car_noise", "no CAR at all", lambda draft, rng: rng.randbytes(300))


def _rows_9_to_12() -> Iterator[Kind]:
    yield Kind("root_other", "9", "the CAR's root is not the commit that the message names", ("reject/root",),
               _car(lambda draft, rng: car(draft.sections[1][0], draft.sections)))  # fmt: skip
    yield Kind("root_missing", "9", "the commit block is not there", ("reject/root",), _car(_no_commit_block))
    objects: tuple[tuple[str, str, Tell], ...] = (
        ("commit_version", "version 2", _object(lambda draft, rng: draft.body(version=2))),
        ("commit_prev", "no prev key", _object(_without("prev"))),
        ("commit_data", "no data key", _object(_without("data"))),
        ("commit_extra", "a field too many", _object(lambda draft, rng: draft.body(more=1))),
        ("commit_codec", "data is a link to raw bytes",
         _object(lambda draft, rng: draft.body(data=Link(RAW + rng.randbytes(32))))),
        ("commit_rev", "rev is no TID", _object(lambda draft, rng: draft.body(rev="now"))),
        ("commit_form", "its bytes are not canonical", beside(_uncanonical)),
        ("commit_unsigned", "no signature", beside(_unsigned)),
    )  # fmt: skip
    for name, about, tell in objects:
        yield Kind(name, "10", f"the commit object: {about}", ("reject/commit_object",), tell)
    yield Kind("did_mismatch", "11", "the commit is another account's", ("reject/did_mismatch",),
               _object(lambda draft, rng: draft.body(did="did:plc:" + "q" * 24)))  # fmt: skip
    yield Kind("rev_mismatch", "11", "the commit has another rev than the message", ("reject/rev_mismatch",),
               _object(lambda draft, rng: draft.body(rev=tid(draft.micros - 1))))  # fmt: skip
    signatures: tuple[tuple[str, str, Tell], ...] = (
        ("signature_key", "signed by another key", beside(other_key)),
        ("signature_other", "the signature of another commit", beside(_other_content)),
        ("signature_high", "a high-S signature", _signature(lambda key, sig: key.high(sig))),
        ("signature_der", "a signature in DER", _signature(lambda key, sig: key.der(sig))),
        ("signature_cut", "half of a signature", _signature(lambda key, sig: sig[:32])),
        ("signature_zero", "a signature of zeros", _signature(lambda key, sig: bytes(64))),
    )
    for name, about, tell in signatures:
        yield Kind(name, "12", about, ("reject/signature",), tell)


def _rows_14_and_15() -> Iterator[Kind]:
    ops = ("reject/ops",)
    yield Kind("op_action", "14", "an unknown action", ops, beside(replaced(action="upsert")))
    yield Kind("create_prev", "14", "a create with a prev", ops,
               beside(replaced(prev=lambda rng, op: some_cid(rng))))  # fmt: skip
    yield Kind("create_cid", "14", "a create without a cid", ops, beside(replaced(cid=None)))
    yield Kind("update_same", "14", "an update that changes nothing", ops,
               beside(replaced(prev=lambda rng, op: op["cid"]), one_update), "records")  # fmt: skip
    yield Kind("update_no_prev", "14", "an update without a prev", ops,
               beside(_op_without("prev"), one_update), "records")  # fmt: skip
    yield Kind("delete_cid", "14", "a delete with a cid", ops,
               beside(replaced(cid=lambda rng, op: some_cid(rng)), one_delete), "records")  # fmt: skip
    yield Kind("delete_no_prev", "14", "a delete without a prev", ops,
               beside(_op_without("prev"), one_delete), "records")  # fmt: skip
    yield Kind("path_twice", "14", "two operations on one path", ops, beside(_twice))
    yield Kind(
        "record_missing", "15", "a record is not there", ("reject/record_missing",), beside(_no_record)
    )
    yield Kind("record_other", "15", "the tree holds another record", ops, beside(_other_record))
    yield Kind("op_absent", "15", "the tree does not hold what was created", ops, beside(_absent))
    yield Kind("delete_present", "15", "the tree still holds what was deleted", ops, beside(_not_deleted))


def _row_18() -> Iterator[Kind]:
    fine = ("ok/commit",)
    flaws: tuple[tuple[str, str, Choose], ...] = (
        ("float", "a number with a fraction", _record("float", share=Float(0.25))),
        ("deep", "nested deeper than 32 levels", _record("deep", tree=_nested(40))),
        ("integer", "an integer beyond 53 bits", _record("integer", big=1 << 60)),
        ("type", "an empty $type", _record("type", **{"$type": ""})),
        ("large", "more than 1,000,000 bytes", _record("large", text="x" * (_MIB - 1))),
    )
    for name, about, choose in flaws:
        yield Kind(f"record_{name}", "18", f"a record that is none: {about}", fine, instead(_nothing, choose))
    yield Kind("record_spoiled", "18", "an update makes a record that is none", fine,
               instead(_nothing, _spoiled), "records")  # fmt: skip
    yield Kind("record_node", "§3", "legal: a record in the form of a tree node", fine,
               instead(_nothing, _node_like))  # fmt: skip
    yield Kind("record_shared", "§3", "legal: one record under two paths", fine, instead(_nothing, _shared))
    yield Kind("key_deep", "§3", "legal: a key far above all others", fine,
               instead(_nothing, on_layers(6)))  # fmt: skip
