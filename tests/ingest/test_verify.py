"""The pure rows of the commit table (sync.md §2), one test a row and reason."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from indexer.atproto.commit import decode_commit
from indexer.atproto.dagcbor import check_record
from indexer.atproto.mst import EMPTY_ROOT, key_layer
from indexer.atproto.node import encode_node
from indexer.ingest import verify
from indexer.ingest.verify import Outcome, Verdict, VerifyLimits, verify_batch, verify_frame
from indexer.simulator.account import Write
from indexer.simulator.cbor import Link, block_cid, encode
from indexer.simulator.keys import K256, P256, SigningKey
from indexer.simulator.wire import car, car_section
from indexer.store.codecs import INVALID, OVERSIZE
from tests.ingest.forge import FAR_FUTURE, POST, Forge, Parts, create, delete, update

LIMITS = VerifyLimits(FAR_FUTURE)
REJECT, DESYNC = Outcome.REJECT, Outcome.DESYNC


def verdict_on(forge: Forge, data: bytes, limits: VerifyLimits = LIMITS) -> Verdict:
    return verify_frame(data, forge.key, limits)


def changed() -> tuple[Forge, Parts]:
    """A commit of one create, one update and one delete on a repository of 40 records."""
    forge = Forge()
    forge.posts(40)
    paths = sorted(forge.account.records)
    writes = (create(f"{POST}/3zzzzzzzzzzzz", "new"), update(paths[3], "changed"), delete(paths[20]))
    return forge, forge.parts(*writes)


@pytest.mark.parametrize("curve", [K256, P256])
def test_a_good_commit_gives_its_operations_as_spans_of_its_blocks(curve: str) -> None:
    forge = Forge(curve=curve)
    first = verdict_on(forge, forge.posts(40).encode())
    assert (first.outcome, first.prev_data) == (Outcome.OK, None)
    paths = sorted(forge.account.records)
    parts = forge.parts(
        create(f"{POST}/3zzzzzzzzzzzz", "new"), update(paths[3], "changed"), delete(paths[20])
    )
    verdict = verdict_on(forge, parts.encode())
    assert verdict.outcome is Outcome.OK
    assert (verdict.did, verdict.rev, verdict.since) == (forge.did, parts.rev, parts.since)
    assert (verdict.prev_data, verdict.data) == (parts.prev_data, parts.data)
    blocks = car(block_cid(parts.commit()), parts.blocks())
    start, end = verdict.commit
    assert blocks[start:end] == parts.commit()
    for (action, path, cid, start, end, flags), op in zip(verdict.ops, parts.ops, strict=True):
        assert (action, path, cid, flags) == (op["action"], op["path"], op["cid"], 0)
        assert cid is None or block_cid(blocks[start:end]) == cid


def test_a_verdict_survives_the_way_back_from_a_worker() -> None:
    forge, parts = changed()
    (verdict,) = verify_batch([(parts.encode(), forge.key, True)], LIMITS)
    assert pickle.loads(pickle.dumps(verdict)) == verdict


def test_an_account_s_first_commit_follows_the_empty_tree() -> None:
    forge = Forge()
    verdict = verdict_on(forge, forge.commit())
    assert (verdict.outcome, verdict.data, verdict.ops) == (Outcome.OK, EMPTY_ROOT, ())


def test_the_last_record_leaves_the_empty_tree() -> None:
    forge = Forge()
    forge.posts(1)
    (path,) = forge.account.records
    verdict = verdict_on(forge, forge.commit(delete(path)))
    assert (verdict.outcome, verdict.data) == (Outcome.OK, EMPTY_ROOT)


def test_a_sync_frame_gives_the_signed_root() -> None:
    forge, parts = changed()
    verdict = verdict_on(forge, forge.sync().encode())
    assert (verdict.outcome, verdict.kind, verdict.rev, verdict.data) == (
        Outcome.OK,
        "sync",
        parts.rev,
        parts.data,
    )


Tamper = Callable[[Forge, Parts], None]


def _payload(**fields: Any) -> Tamper:
    return lambda _forge, parts: parts.payload.update(fields)


def _drop(name: str) -> Tamper:
    def tamper(_forge: Forge, parts: Parts) -> None:
        parts.drop = (name,)

    return tamper


def _body(**fields: Any) -> Tamper:
    return lambda _forge, parts: parts.body.update(fields)


def _op(index: int, **fields: Any) -> Tamper:
    return lambda _forge, parts: parts.ops[index].update(fields)


def _blocks(change: Callable[[bytes], bytes]) -> Tamper:
    def tamper(_forge: Forge, parts: Parts) -> None:
        parts.payload["blocks"] = change(car(block_cid(parts.commit()), parts.blocks()))

    return tamper


def _flip_last(blocks: bytes) -> bytes:
    return blocks[:-1] + bytes((blocks[-1] ^ 1,))


def _section_shorter_than_its_cid(blocks: bytes) -> bytes:
    """The CID of the empty block, whose last byte read again as a length leads on to a whole section."""
    empty = block_cid(b"")
    body = bytes(empty[-1] - 36)
    return blocks + bytes((35,)) + empty + block_cid(body) + body


def _foreign_key(_forge: Forge, parts: Parts) -> None:
    parts.key = SigningKey.derive(K256, "somebody else")


def _no_commit_block(_forge: Forge, parts: Parts) -> None:
    root, *others = parts.blocks()
    parts.payload["blocks"] = car(root[0], others)


def _other_root(_forge: Forge, parts: Parts) -> None:
    parts.payload["blocks"] = car(parts.data, parts.blocks())


def _stray_cid(_forge: Forge, parts: Parts) -> None:
    parts.payload["blocks"] = car(block_cid(parts.commit()), parts.blocks()) + car_section(
        b"\x12\x20" + bytes(34), b""
    )


def _without_record(_forge: Forge, parts: Parts) -> None:
    parts.records.pop(parts.ops[0]["cid"])


def _twice(_forge: Forge, parts: Parts) -> None:
    parts.ops.append(parts.ops[0])


def _unlisted(_forge: Forge, parts: Parts) -> None:
    """The tree changed in one path more than the operations say."""
    parts.ops.pop(1)


def _other_cid(_forge: Forge, parts: Parts) -> None:
    block = encode({"$type": POST, "text": "not what the tree holds"})
    parts.records[block_cid(block)] = block
    parts.ops[0]["cid"] = block_cid(block)


def _not_deleted(forge: Forge, parts: Parts) -> None:
    """A delete of a path that the tree still holds."""
    path, record = sorted(forge.account.records.items())[5]
    forge.account.tree.cover(path.encode(), parts.nodes)
    parts.ops[2].update(path=path, prev=Link(record.cid))


def _spoiled_node(forge: Forge, parts: Parts) -> None:
    """The root node under its true hash, but not in canonical form: a signed, malformed tree."""
    node = parts.nodes.pop(parts.data)
    spoiled = node.replace(b"al\xf6", b"al\xf7") if b"al\xf6" in node else node + b"\x00"
    parts.data = block_cid(spoiled)
    parts.nodes[parts.data] = spoiled


def _without_root(_forge: Forge, parts: Parts) -> None:
    del parts.nodes[parts.data]


REFUSED: list[tuple[int, Outcome, str, Tamper]] = [
    (1, REJECT, "fields", _drop("ops")),
    (1, REJECT, "fields", _drop("since")),
    (1, REJECT, "fields", _payload(rev="not a tid")),
    (1, REJECT, "fields", _payload(repo="alice.test")),
    (1, REJECT, "fields", _payload(time="yesterday")),
    (1, REJECT, "fields", _payload(commit="bafy")),
    (1, REJECT, "fields", _op(0, path="no slash")),
    (1, REJECT, "blocks_size", _payload(blocks=b"")),
    (1, REJECT, "blocks_size", _payload(blocks=bytes(2_000_001))),
    (1, REJECT, "ops_count", _payload(ops=[{"action": "delete", "path": f"{POST}/a", "cid": None}] * 201)),
    (3, DESYNC, "too_big", _payload(tooBig=True)),
    (3, DESYNC, "rebase", _payload(rebase=True)),
    (8, REJECT, "car", _blocks(lambda blocks: blocks[:-1])),
    (8, REJECT, "car", _blocks(lambda blocks: blocks + b"\x01")),
    (8, REJECT, "car", _blocks(_flip_last)),
    (8, REJECT, "car", _blocks(lambda blocks: b"\x00" + blocks)),
    (8, REJECT, "car", _stray_cid),
    (8, REJECT, "car", _blocks(_section_shorter_than_its_cid)),
    (9, REJECT, "root", _no_commit_block),
    (9, REJECT, "root", _other_root),
    (10, REJECT, "commit_object", _body(version=2)),
    (10, REJECT, "commit_object", _body(data="bafy")),
    (10, REJECT, "commit_object", _body(extra=1)),
    (11, REJECT, "did_mismatch", _body(did="did:plc:somebodyelse")),
    (11, REJECT, "rev_mismatch", _body(rev="3aaaaaaaaaa22")),
    (12, REJECT, "signature", _foreign_key),
    (14, REJECT, "ops", _op(0, action="upsert")),
    (14, REJECT, "ops", _op(0, prev=Link(EMPTY_ROOT))),
    (14, REJECT, "ops", _op(0, cid=None)),
    (14, REJECT, "ops", _op(1, prev=None)),
    (14, REJECT, "ops", _op(2, cid=Link(EMPTY_ROOT))),
    (14, REJECT, "ops", _twice),
    (15, REJECT, "record_missing", _without_record),
    (15, REJECT, "ops", _other_cid),
    (15, REJECT, "ops", _not_deleted),
    (16, REJECT, "tree", _spoiled_node),
    (17, REJECT, "inversion", lambda _forge, parts: setattr(parts, "prev_data", EMPTY_ROOT)),
    (17, REJECT, "inversion", _op(1, prev=Link(EMPTY_ROOT))),
    (17, REJECT, "inversion", _unlisted),
    (17, DESYNC, "insufficient", _without_root),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "outcome", "reason", "tamper"),
    REFUSED,
    ids=[f"{n}-{row[0]}-{row[2]}" for n, row in enumerate(REFUSED)],
)
def test_a_tampered_commit_fails_its_row(row: int, outcome: Outcome, reason: str, tamper: Tamper) -> None:
    forge, parts = changed()
    tamper(forge, parts)
    verdict = verdict_on(forge, parts.encode())
    assert (verdict.row, verdict.outcome, verdict.reason) == (row, outcome, reason), verdict.message
    assert verdict.message
    assert verdict.signed == (row not in range(1, 3) and row not in range(7, 13))


def on_layer(collection: str, layer: int, count: int = 1) -> list[str]:
    """The first so many paths of ``layer`` in a collection."""
    paths = (f"{collection}/{number:08d}" for number in itertools.count())
    return list(itertools.islice((path for path in paths if key_layer(path.encode()) == layer), count))


@pytest.mark.parametrize(
    "path",
    [on_layer("com.example.z", 3)[0], on_layer("com.example.a", 1)[0]],
    ids=["layers skipped", "a key below the subtree on its left"],
)
@pytest.mark.parametrize("withheld", [True, False])
def test_a_subtree_in_the_wrong_place_is_not_accepted_for_being_withheld(path: str, withheld: bool) -> None:
    """A new root over the whole old tree: taking it off gives the old root, but the new tree breaks rules."""
    forge = Forge()
    forge.parts(*(create(old, old) for old in on_layer("com.example.m", 0, 3)))
    assert forge.account.tree.root is not None
    old_root, old_block = forge.account.data, forge.account.tree.root.block
    parts = forge.parts(create(path, "new"))
    record = bytes(forge.account.records[path].cid)
    root = encode_node([path.encode()], [record], [old_root, None])
    parts.data = block_cid(root)
    parts.nodes = {parts.data: root} if withheld else {parts.data: root, old_root: old_block}
    verdict = verdict_on(forge, parts.encode())
    if withheld:
        assert (verdict.row, verdict.outcome, verdict.reason) == (17, DESYNC, "insufficient"), verdict.message
    else:
        assert (verdict.row, verdict.outcome, verdict.reason) == (16, REJECT, "tree"), verdict.message


def test_a_rev_in_the_future_is_refused() -> None:
    forge, parts = changed()
    assert verdict_on(forge, parts.encode(), VerifyLimits(parts.rev)).outcome is Outcome.OK
    before = parts.since or ""
    verdict = verdict_on(forge, parts.encode(), VerifyLimits(before))
    assert (verdict.row, verdict.outcome, verdict.reason) == (7, REJECT, "future_rev")


@pytest.mark.parametrize("curve", [K256, P256])
def test_a_signature_with_high_s_is_refused(curve: str) -> None:
    order = {
        K256: 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141,
        P256: 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    }[curve]
    forge = Forge(curve=curve)
    parts = forge.posts(3)
    signature = decode_commit(parts.commit()).sig
    high = order - int.from_bytes(signature[32:], "big")
    parts.body["sig"] = signature[:32] + high.to_bytes(32, "big")
    assert verdict_on(forge, parts.encode()).reason == "signature"


def test_refusal_comes_before_desync() -> None:
    """A frame with the wrong signature never says anything about the repository's state."""
    forge, parts = changed()
    _foreign_key(forge, parts)
    parts.payload["tooBig"] = True
    verdict = verdict_on(forge, parts.encode())
    assert (verdict.outcome, verdict.reason, verdict.signed) == (REJECT, "signature", False)


def test_the_operations_of_a_too_big_commit_are_not_looked_at() -> None:
    forge, parts = changed()
    _twice(forge, parts)
    parts.payload["tooBig"] = True
    assert verdict_on(forge, parts.encode()).reason == "too_big"


@pytest.mark.parametrize(
    ("value", "flags"),
    [
        ({"$type": POST, "text": "x" * 1_000_001}, OVERSIZE),
        ({"$type": "", "text": "no type"}, INVALID),
        ({"$type": POST, "n": 2**60}, INVALID),
        ({"$type": POST, "text": "fine"}, 0),
    ],
    ids=["oversize", "empty type", "integer beyond 53 bits", "valid"],
)
def test_a_bad_record_is_flagged_and_its_commit_stands(value: dict[str, Any], flags: int) -> None:
    forge = Forge()
    forge.posts(3)
    parts = forge.parts(
        Write("create", f"{POST}/3zzzzzzzzzzzz", value), create(f"{POST}/3zzzzzzzzzzzy", "good")
    )
    verdict = verdict_on(forge, parts.encode())
    assert verdict.outcome is Outcome.OK
    assert [op[5] for op in verdict.ops] == [flags, 0]


def test_a_record_under_many_paths_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 operations may share one block of a megabyte, and its check takes a part of a second."""
    looked_at: list[bytes] = []

    def spy(block: bytes, **limits: int) -> None:
        looked_at.append(block)
        check_record(block, **limits)

    monkeypatch.setattr(verify, "check_record", spy)
    forge = Forge()
    forge.posts(3)
    value = {"$type": POST, "n": 2**60}
    writes = [Write("create", f"{POST}/3zzzzzzzzz{number:03d}", value) for number in range(200)]
    verdict = verdict_on(forge, forge.parts(*writes).encode())
    assert (verdict.outcome, [op[5] for op in verdict.ops]) == (Outcome.OK, [INVALID] * 200)
    assert looked_at == [encode(value)]


@pytest.mark.parametrize(
    ("row", "reason", "tamper"),
    [
        (1, "fields", _drop("rev")),
        (8, "car", _blocks(_flip_last)),
        (9, "root", _no_commit_block),
        (10, "commit_object", _body(version=2)),
        (11, "did_mismatch", _body(did="did:plc:somebodyelse")),
        (11, "rev_mismatch", _body(rev="3aaaaaaaaaa22")),
        (12, "signature", _foreign_key),
    ],
)
def test_a_tampered_sync_frame_fails_its_row(row: int, reason: str, tamper: Tamper) -> None:
    forge, _ = changed()
    parts = forge.sync()
    tamper(forge, parts)
    verdict = verdict_on(forge, parts.encode())
    assert (verdict.row, verdict.outcome, verdict.reason) == (row, REJECT, reason)


def test_other_messages_are_not_verified() -> None:
    forge = Forge()
    assert verdict_on(forge, forge.identity()).reason == "fields"
    assert verdict_on(forge, b"\xff\x00").row == 1


def test_any_flipped_byte_of_the_blocks_is_refused_or_harmless() -> None:
    """No byte of a frame's blocks can change without the verdict changing or the content staying the same."""
    forge, parts = changed()
    good = verdict_on(forge, parts.encode())
    blocks = car(block_cid(parts.commit()), parts.blocks())
    for at in range(0, len(blocks), 7):
        parts.payload["blocks"] = blocks[:at] + bytes((blocks[at] ^ 0x10,)) + blocks[at + 1 :]
        verdict = verdict_on(forge, parts.encode())
        assert verdict.outcome is not Outcome.OK or verdict[:-1] == good[:-1]
