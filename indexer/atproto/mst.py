"""The Merkle Search Tree: building it from records, walking it with every rule checked, finding, proving.

Owns the rules that need a node's place: layers, bounds, order over the whole walk, limits on hostile trees.
The node's own form is `node`'s, taking commits back is `invert`'s. Blocks come from a ``get`` function;
whoever provides it has checked their hashes, without which nothing here proves anything. Pure, any thread.
Source of the rules: the repository specification, section "MST Structure".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from indexer.atproto import syntax
from indexer.atproto.cid import DAG_CBOR_PREFIX, dag_cbor_cid
from indexer.atproto.node import (
    EMPTY_NODE,
    EMPTY_ROOT,
    MAX_LAYER,
    MAX_NODE_BYTES,
    Node,
    are_tree_keys,
    check_layer,
    common_prefix,
    describe,
    encode_node,
    key_layer,
    parse_node,
    shown,
)
from indexer.atproto.types import Cid, Path
from indexer.errors import MissingBlock, MstError

__all__ = [
    "DEFAULT_LIMITS", "EMPTY_NODE", "EMPTY_ROOT", "MAX_NODE_BYTES", "Get", "Tree", "TreeBuilder",
    "TreeLimits", "build",
    "common_prefix", "find", "key_layer", "load_node", "prove", "root_layer", "visit", "walk",
]  # fmt: skip

Get = Callable[[Cid], bytes | None]


@dataclass(frozen=True, slots=True)
class TreeLimits:
    """Bounds on one tree: nodes and records together, layers, bytes of a node."""

    max_nodes: int = 5_000_000
    max_depth: int = MAX_LAYER
    max_node_bytes: int = MAX_NODE_BYTES

    def check_depth(self, layer: int) -> None:
        """Raise `MstError` when a root lies on a layer above the limit."""
        if layer > self.max_depth:
            raise MstError(f"tree of {layer} layers, more than {self.max_depth}", reason="tree_depth")

    def check_node(self, cid: Cid, size: int) -> None:
        """Raise `MstError` when a node has more bytes than the limit."""
        if size > self.max_node_bytes:
            raise MstError(
                f"{describe(cid)} has {size} bytes, more than {self.max_node_bytes}", reason="node_size"
            )

    def check_size(self, seen: int) -> None:
        """Raise `MstError` when there are more nodes and records than the limit."""
        if seen > self.max_nodes:
            raise MstError(f"tree of more than {self.max_nodes} nodes and records", reason="tree_size")


DEFAULT_LIMITS: Final = TreeLimits()


class Tree(NamedTuple):
    """A whole tree in memory: its root and every node's block."""

    root: Cid
    nodes: dict[Cid, bytes]

    def preorder(self) -> Iterator[tuple[Path | None, Cid]]:
        """As `visit`: every node before what is below it, records in between."""
        return visit(self.root, self.nodes.get)


# --- Building ---------------------------------------------------------------------------------------------


class _Open:
    """A node that is still growing at its right end."""

    __slots__ = ("keys", "kids", "values")

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.values: list[Cid] = []
        self.kids: list[Cid | None] = []


class TreeBuilder:
    """A tree that grows by records in ascending order. Memory for its open nodes, which are few."""

    def __init__(self, emit: Callable[[Cid, bytes], None]) -> None:
        """``emit`` gets each node when it is finished."""
        self._emit = emit
        self._layers: list[_Open] = []
        self._last = b""

    def add(self, path: Path, value: Cid) -> None:
        """The next record; `MstError` when its path does not ascend or is none."""
        key = path.encode("ascii", "replace")
        if key <= self._last:
            raise MstError(f"key {shown(key)} does not come after {shown(self._last)}", rule="order")
        if not are_tree_keys([key]):
            raise MstError(f"{shown(key)} is not a key of the form collection/rkey")
        self._last = key
        layers, layer = self._layers, key_layer(key)
        while len(layers) <= layer:
            layers.append(_Open())
        node = layers[layer]
        node.kids.append(self._close(layers[:layer]))
        node.keys.append(key)
        node.values.append(value)

    def close(self) -> Cid:
        """Finishes the tree: the CID of its root."""
        root = self._close(self._layers)
        if root is not None:
            return root
        self._emit(EMPTY_ROOT, EMPTY_NODE)
        return EMPTY_ROOT

    def _close(self, layers: list[_Open]) -> Cid | None:
        """Finish the open nodes of ``layers``, lowest first, each as the last child of the next."""
        child: Cid | None = None
        for node in layers:
            if not node.keys and child is None:
                continue
            block = encode_node(node.keys, node.values, [*node.kids, child])
            child = dag_cbor_cid(block)
            self._emit(child, block)
            node.keys, node.values, node.kids = [], [], []
        return child


def build(items: Iterable[tuple[Path, Cid]]) -> Tree:
    """The tree of ``items``, which come in ascending order of their paths (`MstError` otherwise)."""
    nodes: dict[Cid, bytes] = {}
    builder = TreeBuilder(nodes.__setitem__)
    for path, value in items:
        builder.add(path, value)
    return Tree(builder.close(), nodes)


# --- Loading nodes in their place -------------------------------------------------------------------------


def load_node(cid: Cid, get: Get) -> Node:
    """The node behind ``cid``; `MissingBlock` when ``get`` does not have it."""
    block = get(cid)
    if block is None:
        raise MissingBlock(f"{describe(cid)} is missing", cid=cid)
    try:
        return parse_node(block)
    except MstError as error:
        raise MstError(f"{describe(cid)}: {error}", rule=error.rule) from error


def root_layer(root: Cid, node: Node) -> int:
    """The layer of a root node that is not the empty tree's, from its first key."""
    if not node.keys:
        raise MstError(f"{describe(root)} is the root and has no entry", rule="empty_node")
    layer = key_layer(node.keys[0])
    check_place(root, node, layer)
    return layer


def check_place(cid: Cid, node: Node, layer: int) -> None:
    """Raise `MstError` unless the node may stand on ``layer``."""
    try:
        check_layer(node.keys, layer)
    except MstError as error:
        raise MstError(f"{describe(cid)}: {error}", rule=error.rule) from error
    if layer == 0 and any(node.kids):
        raise MstError(f"{describe(cid)} is on layer 0 and has a child", rule="lost_depth")
    if not node.keys and node.kids[0] is None:
        raise MstError(f"{describe(cid)} is empty", rule="empty_node")


def _check_root(root: Cid) -> None:
    if root[:4] != DAG_CBOR_PREFIX or len(root) != 36:
        raise MstError(f"the root {root[:40].hex()} is not the CID of a DAG-CBOR block with SHA-256")


# --- Walking ----------------------------------------------------------------------------------------------


def walk(root: Cid, get: Get, limits: TreeLimits = DEFAULT_LIMITS) -> Iterator[tuple[Path, Cid]]:
    """(path, record CID) in key order; every rule is checked before what depends on it is given out."""
    for path, cid in visit(root, get, limits):
        if path is not None:
            yield path, cid


def visit(root: Cid, get: Get, limits: TreeLimits = DEFAULT_LIMITS) -> Iterator[tuple[Path | None, Cid]]:
    """Nodes as (None, CID) and records as (path, CID) in the preferred order of a CAR."""
    _check_root(root)
    node = load_node(root, get)
    yield None, root
    if root == EMPTY_ROOT:
        return
    layer = root_layer(root, node)
    limits.check_depth(layer)
    seen = 1 + len(node.keys)
    last = b""
    collection = ""
    stack: list[tuple[Node, int]] = []
    index = 0
    while True:
        kid = node.kids[index]
        if kid is not None:
            stack.append((node, index))
            node, layer, index = load_node(kid, get), layer - 1, 0
            check_place(kid, node, layer)
            seen += 1 + len(node.keys)
            limits.check_size(seen)
            yield None, kid
            continue
        while index == len(node.keys):
            if not stack:
                return
            node, index = stack.pop()
            layer += 1
        key = node.keys[index]
        if key <= last:
            raise MstError(f"key {shown(key)} does not come after {shown(last)}", rule="order")
        last = key
        path = key.decode("ascii")
        collection = check_path(path, collection)
        yield path, node.values[index]
        index += 1


def check_path(path: Path, collection: str) -> str:
    """The collection of ``path``; ``collection`` is one that was found valid before (keys come sorted)."""
    name, _, rkey = path.partition("/")
    if (not name or name != collection) and not syntax.is_nsid(name):
        raise MstError(f"key {path[:120]!r} does not begin with a collection")
    if not syntax.is_rkey(rkey):
        raise MstError(f"key {path[:120]!r} does not end with a record key")
    return name


# --- Looking up -------------------------------------------------------------------------------------------


def find(root: Cid, path: Path, get: Get) -> Cid | None:
    """The record CID at ``path``, None when the tree proves that there is none."""
    return _descend(root, path, get)[1]


def prove(root: Cid, path: Path, get: Get) -> list[bytes]:
    """The blocks of all nodes from the root to ``path`` or to where its absence is shown, root first."""
    return [block for cid in _descend(root, path, get)[0] if (block := get(cid)) is not None]


def _descend(root: Cid, path: Path, get: Get) -> tuple[list[Cid], Cid | None]:
    """(nodes on the way, record CID or None). Each node is checked in its place and within its bounds."""
    key = path.encode("ascii", "replace")
    _check_root(root)
    node = load_node(root, get)
    way = [root]
    if root == EMPTY_ROOT:
        return way, None
    layer = root_layer(root, node)
    target = key_layer(key)
    low, high = b"", b"\xff"
    while True:
        index = bisect_left(node.keys, key)
        if index < len(node.keys) and node.keys[index] == key:
            return way, node.values[index]
        kid = node.kids[index]
        if kid is None or layer <= target:
            return way, None
        low = node.keys[index - 1] if index else low
        high = node.keys[index] if index < len(node.keys) else high
        node, layer = load_node(kid, get), layer - 1
        check_place(kid, node, layer)
        if node.keys and (node.keys[0] <= low or node.keys[-1] >= high):
            raise MstError(f"{describe(kid)} has keys outside of its parent's bounds", rule="order")
        way.append(kid)
