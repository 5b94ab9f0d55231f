"""A slow, strict reading of the public formats with `dag_cbor`, `multiformats` and `cryptography` alone.

It shares nothing with the simulator nor with the indexer: the tests hold the simulator to it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import dag_cbor
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from multiformats import CID, multibase

CURVES: dict[bytes, tuple[ec.EllipticCurve, int]] = {
    b"\xe7\x01": (ec.SECP256K1(), 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141),
    b"\x80\x24": (ec.SECP256R1(), 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551),
}


def cid_of(block: bytes) -> CID:
    return CID("base32", 1, "dag-cbor", ("sha2-256", hashlib.sha256(block).digest()))


def decode(block: bytes) -> Any:
    """Strict DAG-CBOR; a type for what is looked into by hand."""
    return dag_cbor.decode(block)


def split_frame(frame: bytes) -> tuple[str, dict[str, Any]]:
    stream = io.BytesIO(frame)
    header = dag_cbor.decode(stream, allow_concat=True)
    payload = dag_cbor.decode(stream)
    assert isinstance(header, dict)
    assert isinstance(payload, dict)
    assert dag_cbor.encode(header) + dag_cbor.encode(payload) == frame
    if header["op"] == -1:
        return "error", payload
    assert header["op"] == 1
    return str(header["t"]), payload


def read_car(data: bytes) -> tuple[CID, dict[CID, bytes]]:
    """(root, blocks); every hash checked."""
    (root,), blocks = read_blocks(data)
    return root.set(base="base32"), blocks


def read_blocks(data: bytes) -> tuple[list[CID], dict[CID, bytes]]:
    """(roots, blocks); every hash checked."""
    header_size, at = _varint(data, 0)
    header: Any = decode(data[at : at + header_size])
    assert header["version"] == 1
    at += header_size
    blocks: dict[CID, bytes] = {}
    while at < len(data):
        size, at = _varint(data, at)
        block = data[at + 36 : at + size]
        cid = cid_of(block)
        assert data[at : at + 36] == bytes(cid)
        blocks[cid] = block
        at += size
    assert at == len(data)
    return header["roots"], blocks


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def signature_valid(commit: Mapping[str, Any], did_key: str) -> bool:
    raw = multibase.decode(did_key.removeprefix("did:key:"))
    curve, order = CURVES[raw[:2]]
    public = ec.EllipticCurvePublicKey.from_encoded_point(curve, raw[2:])
    signature = commit["sig"]
    assert len(signature) == 64
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    assert s <= order // 2, "high-S"
    unsigned = dag_cbor.encode({key: value for key, value in commit.items() if key != "sig"})
    try:
        public.verify(encode_dss_signature(r, s), unsigned, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def layer_of(key: bytes) -> int:
    bits = "".join(f"{byte:08b}" for byte in hashlib.sha256(key).digest())
    return (len(bits) - len(bits.lstrip("0"))) // 2


class Insufficient(Exception):
    """A node is needed that the blocks do not hold."""


@dataclass(frozen=True)
class Leaf:
    key: bytes
    value: CID
    layer: int


@dataclass(frozen=True)
class Stub:
    cid: CID
    layer: int


Item = Leaf | Stub


def flatten(root: CID, blocks: Mapping[CID, bytes]) -> list[Item]:
    """A whole or partial tree as its leaves in order, with a stub for each subtree that is not there."""
    node = _node(blocks[root])
    if not node["e"]:
        assert node["l"] is None
        return []
    return _flatten(root, blocks, layer_of(node["e"][0]["k"]))


def _node(block: bytes) -> dict[str, Any]:
    node: dict[str, Any] = decode(block)
    assert set(node) == {"e", "l"}
    assert dag_cbor.encode(node) == block
    return node


def _flatten(cid: CID, blocks: Mapping[CID, bytes], layer: int) -> list[Item]:
    assert layer >= 0
    if cid.set(base="base32") not in blocks:
        return [Stub(cid, layer)]
    node = _node(blocks[cid.set(base="base32")])
    items: list[Item] = [] if node["l"] is None else _flatten(node["l"], blocks, layer - 1)
    key = b""
    for entry in node["e"]:
        key = key[: entry["p"]] + entry["k"]
        items.append(Leaf(key, entry["v"], layer_of(key)))
        assert layer_of(key) == layer
        if entry["t"] is not None:
            items += _flatten(entry["t"], blocks, layer - 1)
    assert items, "an empty node inside a tree"
    keys = [item.key for item in items if isinstance(item, Leaf)]
    assert keys == sorted(set(keys))
    return items


def root_of(items: list[Item]) -> CID:
    """The root of the tree with these leaves and stubs, built from nothing."""
    if not items:
        return cid_of(dag_cbor.encode({"e": [], "l": None}))
    return _build(items, max(item.layer for item in items), top=True)


def _build(items: list[Item], layer: int, *, top: bool = False) -> CID:
    if len(items) == 1 and isinstance(items[0], Stub) and items[0].layer == layer:
        return items[0].cid
    groups: list[list[Item]] = [[]]
    leaves: list[Leaf] = []
    for item in items:
        if isinstance(item, Leaf) and item.layer == layer:
            leaves.append(item)
            groups.append([])
        elif item.layer >= layer:
            raise Insufficient("two subtrees without a leaf between them")
        else:
            groups[-1].append(item)
    children = [_build(group, layer - 1) if group else None for group in groups]
    if top and not leaves:
        raise Insufficient("the root would be a pointer to what is not there")
    entries: list[Any] = []
    previous = b""
    for leaf, child in zip(leaves, children[1:], strict=True):
        shared = next((i for i, (a, b) in enumerate(zip(previous, leaf.key, strict=False)) if a != b), None)
        shared = min(len(previous), len(leaf.key)) if shared is None else shared
        entries.append({"k": leaf.key[shared:], "p": shared, "t": child, "v": leaf.value})
        previous = leaf.key
    return cid_of(dag_cbor.encode({"e": entries, "l": children[0]}))


def invert(root: CID, blocks: Mapping[CID, bytes], ops: Iterable[Mapping[str, Any]]) -> CID:
    """The root before ``ops``; order of ops does not matter here, only what the blocks hold."""
    items = flatten(root, blocks)
    for op in ops:
        key = op["path"].encode()
        at = next((i for i, item in enumerate(items) if isinstance(item, Leaf) and item.key == key), None)
        if op["action"] == "delete":
            assert at is None
            assert op["cid"] is None
            before = sum(1 for item in items if isinstance(item, Leaf) and item.key < key)
            items = _put(items, before, Leaf(key, op["prev"], layer_of(key)))
            continue
        assert at is not None, "a written path is not in the tree"
        leaf = items[at]
        assert isinstance(leaf, Leaf)
        assert leaf.value == op["cid"]
        if op["action"] == "create":
            assert "prev" not in op
            del items[at]
        else:
            assert op["action"] == "update"
            assert op["prev"] != op["cid"]
            items[at] = Leaf(key, op["prev"], leaf.layer)
    return root_of(items)


def _put(items: list[Item], before: int, leaf: Leaf) -> list[Item]:
    """``leaf`` behind ``before`` leaves: the gap there must not hide anything."""
    at = seen = 0
    while seen < before:
        seen += isinstance(items[at], Leaf)
        at += 1
    if at < len(items) and isinstance(items[at], Stub):
        raise Insufficient("a subtree that is not there may hold the key's neighbours")
    return [*items[:at], leaf, *items[at:]]
