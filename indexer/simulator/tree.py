"""The MST of one repository as mutable nodes, each with its encoded block cached until it changes.

Owns insertion, removal, hashing of what changed, covering proofs, and the pre-order walk. Keys are
the UTF-8 bytes of "collection/rkey", values binary CIDs. Not thread-safe; no I/O.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from indexer.simulator.cbor import block_cid, head

_LINK = b"\xd8\x2a\x58\x25\x00"
_NULL = b"\xf6"
#: The block of a tree without records: {"e": [], "l": null}.
EMPTY_BLOCK = b"\xa2\x61e\x80\x61l\xf6"


def key_layer(key: bytes) -> int:
    """Leading zero bits of SHA-256(key), halved and rounded down."""
    digest = int.from_bytes(hashlib.sha256(key).digest(), "big")
    return (256 - digest.bit_length()) // 2


class Node:
    """Entries ``keys[i] → values[i]`` with ``subs[i]`` to the left of entry i and ``subs[-1]`` at the end."""

    __slots__ = ("block", "cid", "keys", "subs", "values")

    def __init__(self, keys: list[bytes], values: list[bytes], subs: list[Node | None]) -> None:
        self.keys = keys
        self.values = values
        self.subs = subs
        self.cid = b""
        self.block = b""

    def or_none(self) -> Node | None:
        return None if not self.keys and self.subs[0] is None else self


class Tree:
    """A mutable MST; `seal` hashes what changed since the last `seal`."""

    def __init__(self) -> None:
        self.root: Node | None = None
        self.layer = 0

    def set(self, key: bytes, value: bytes, layer: int | None = None) -> None:
        """Insert or replace. ``layer``: where the key is put, right or wrong."""
        layer = key_layer(key) if layer is None else layer
        if self.root is None:
            self.root, self.layer = Node([key], [value], [None, None]), layer
        elif layer > self.layer:
            left, right = _split(self.root, key)
            for _ in range(layer - self.layer - 1):
                left, right = _raise(left), _raise(right)
            self.root, self.layer = Node([key], [value], [left, right]), layer
        else:
            _insert(self.root, self.layer, key, layer, value)

    def remove(self, key: bytes) -> None:
        """Take a key out; KeyError when it is not there."""
        root = _remove(self.root, key)
        while root is not None and not root.keys:
            root, self.layer = root.subs[0], self.layer - 1
        self.root = root

    def copy(self) -> Tree:
        """The same tree in nodes of its own."""
        twin = Tree()
        twin.root, twin.layer = _copy(self.root), self.layer
        return twin

    def path(self, key: bytes) -> list[Node]:
        """The nodes from the root to the key's, or to where it would be."""
        found: list[Node] = []
        node = self.root
        while node is not None:
            found.append(node)
            at = bisect_left(node.keys, key)
            if at < len(node.keys) and node.keys[at] == key:
                break
            node = node.subs[at]
        return found

    def seal(self) -> tuple[bytes, dict[bytes, bytes]]:
        """(root CID, blocks encoded by this call in post-order)."""
        if self.root is None:
            return block_cid(EMPTY_BLOCK), {block_cid(EMPTY_BLOCK): EMPTY_BLOCK}
        fresh: dict[bytes, bytes] = {}
        _seal(self.root, fresh)
        return self.root.cid, fresh

    def cover(self, key: bytes, into: dict[bytes, bytes]) -> None:
        """Add the nodes that touch the gaps beside ``key``: enough to undo its op in any order of ops.

        That is the path to the key's place and, if it is there, the inner edges of its two subtrees.
        """
        node = self.root
        while node is not None:
            into[node.cid] = node.block
            at = bisect_left(node.keys, key)
            if at < len(node.keys) and node.keys[at] == key:
                _edge(node.subs[at], -1, into)
                _edge(node.subs[at + 1], 0, into)
                return
            node = node.subs[at]

    def walk(self) -> Iterator[tuple[bytes, bytes]]:
        """Pre-order: (node CID, block) and, at their places, (record CID, b"") in key order."""
        if self.root is None:
            yield block_cid(EMPTY_BLOCK), EMPTY_BLOCK
        else:
            yield from _walk(self.root)

    @classmethod
    def of(cls, items: Iterable[tuple[bytes, bytes]]) -> Tree:
        tree = cls()
        for key, value in items:
            tree.set(key, value)
        return tree


def _copy(node: Node | None) -> Node | None:
    if node is None:
        return None
    twin = Node(list(node.keys), list(node.values), [_copy(child) for child in node.subs])
    twin.cid, twin.block = node.cid, node.block
    return twin


def _raise(node: Node | None) -> Node | None:
    return None if node is None else Node([], [], [node])


def _insert(node: Node, at_layer: int, key: bytes, layer: int, value: bytes) -> None:
    node.cid = b""
    at = bisect_left(node.keys, key)
    child = node.subs[at]
    if at_layer > layer:
        if child is not None:
            return _insert(child, at_layer - 1, key, layer, value)
        child = Node([key], [value], [None, None])
        for _ in range(at_layer - layer - 1):
            child = Node([], [], [child])
        node.subs[at] = child
    elif at < len(node.keys) and node.keys[at] == key:
        node.values[at] = value
    else:
        node.keys.insert(at, key)
        node.values.insert(at, value)
        node.subs[at : at + 1] = _split(child, key)
    return None


def _split(node: Node | None, key: bytes) -> tuple[Node | None, Node | None]:
    if node is None:
        return None, None
    at = bisect_left(node.keys, key)
    left, right = _split(node.subs[at], key)
    return (
        Node(node.keys[:at], node.values[:at], [*node.subs[:at], left]).or_none(),
        Node(node.keys[at:], node.values[at:], [right, *node.subs[at + 1 :]]).or_none(),
    )


def _remove(node: Node | None, key: bytes) -> Node | None:
    if node is None:
        raise KeyError(key)
    at = bisect_left(node.keys, key)
    if at < len(node.keys) and node.keys[at] == key:
        del node.keys[at]
        del node.values[at]
        node.subs[at : at + 2] = [_merge(node.subs[at], node.subs[at + 1])]
    else:
        node.subs[at] = _remove(node.subs[at], key)
    node.cid = b""
    return node.or_none()


def _merge(left: Node | None, right: Node | None) -> Node | None:
    if left is None or right is None:
        return left or right
    middle = _merge(left.subs[-1], right.subs[0])
    subs = [*left.subs[:-1], middle, *right.subs[1:]]
    return Node(left.keys + right.keys, left.values + right.values, subs)


def _edge(node: Node | None, side: int, into: dict[bytes, bytes]) -> None:
    while node is not None:
        into[node.cid] = node.block
        node = node.subs[side]


def _seal(node: Node, fresh: dict[bytes, bytes]) -> None:
    if node.cid:
        return
    for child in node.subs:
        if child is not None:
            _seal(child, fresh)
    node.block = _encode(node)
    node.cid = block_cid(node.block)
    fresh[node.cid] = node.block


def _shared(left: bytes, right: bytes) -> int:
    """Length of the longest common prefix."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


def _link(cid: bytes) -> bytes:
    return _LINK + cid


def _encode(node: Node) -> bytes:
    """{"e": [{"k", "p", "t", "v"}, …], "l"}: canonical by construction."""
    parts = [b"\xa2\x61e", head(0x80, len(node.keys))]
    previous = b""
    for key, value, sub in zip(node.keys, node.values, node.subs[1:], strict=True):
        shared = _shared(previous, key)
        rest = len(key) - shared
        parts += (b"\xa4\x61k", head(0x40, rest), key[shared:], b"\x61p", head(0, shared), b"\x61t")
        parts += (_NULL if sub is None else _link(sub.cid), b"\x61v", _link(value))
        previous = key
    left = node.subs[0]
    parts += (b"\x61l", _NULL if left is None else _link(left.cid))
    return b"".join(parts)


def _walk(node: Node) -> Iterator[tuple[bytes, bytes]]:
    yield node.cid, node.block
    if node.subs[0] is not None:
        yield from _walk(node.subs[0])
    for value, sub in zip(node.values, node.subs[1:], strict=True):
        yield value, b""
        if sub is not None:
            yield from _walk(sub)
