"""The slow, obvious twin of the tree code: a dict of records, a recursive definition of the tree, `cbor2`.

Shares nothing with what it is compared with. Also makes trees and nodes that break the rules.
"""

from __future__ import annotations

from hashlib import sha256
from itertools import pairwise
from typing import Any

from cbor2 import CBORTag, dumps

_DAG_CBOR_SHA256 = bytes((0x01, 0x71, 0x12, 0x20))  # CIDv1, the codec, the hash and its length


def cid_of(block: bytes) -> bytes:
    return _DAG_CBOR_SHA256 + sha256(block).digest()


def link(cid: bytes) -> CBORTag:
    return CBORTag(42, b"\0" + cid)


def layer_of(key: str) -> int:
    bits = 8 * sha256().digest_size
    leading_zeros = bits - int.from_bytes(sha256(key.encode()).digest(), "big").bit_length()
    return leading_zeros // 2


def node(entries: list[tuple[str, bytes, bytes | None]], left: bytes | None, **extra: Any) -> bytes:
    """The block of a node of (key, record CID, subtree behind it)."""
    encoded: list[Any] = []
    last = ""
    for key, value, tree in entries:
        shared = 0
        while shared < min(len(key), len(last)) and key[shared] == last[shared]:
            shared += 1
        encoded.append(
            {
                "p": shared,
                "k": key[shared:].encode(),
                "v": link(value),
                "t": None if tree is None else link(tree),
            }
        )
        last = key
    return dumps({"e": encoded, "l": None if left is None else link(left), **extra}, canonical=True)


def slow_build(records: dict[str, bytes]) -> tuple[bytes, dict[bytes, bytes]]:
    """(root, nodes) of a tree by its definition: the keys of a layer, and subtrees of what lies between."""
    nodes: dict[bytes, bytes] = {}

    def subtree(keys: list[str], layer: int) -> bytes | None:
        if not keys:
            return None
        here = [key for key in keys if layer_of(key) == layer]
        bounds = ["", *here, "\x7f"]
        kids = [
            subtree([key for key in keys if low < key < high], layer - 1) for low, high in pairwise(bounds)
        ]
        entries = [(key, records[key], kid) for key, kid in zip(here, kids[1:], strict=True)]
        block = node(entries, kids[0])
        nodes[cid_of(block)] = block
        return cid_of(block)

    keys = sorted(records)
    root = subtree(keys, max(map(layer_of, keys))) if keys else None
    if root is None:
        block = node([], None)
        nodes[cid_of(block)] = block
        return cid_of(block), nodes
    return root, nodes
