"""Taking a commit back: from its root, a partial tree and its operations to the root before it. Hot.

An inversion that ends in a verified earlier root proves the part of the tree that it never touched, because
that part stands in the earlier tree by its hash, in the same place. What it does touch is held to every tree
rule as it stands in the *new* tree: form, bounds, no empty node, the root has an entry, before it is changed;
layers at the end, by one hash (`_finish`), where the earlier tree was verified as a whole, else node by node.
So a result proves nothing until it is compared with a verified root, nor for operations that did not pass
`check_ops`.

Whatever touches a key that is taken out is touched: both edges beside it, to the bottom, or else a subtree
could hang on the wrong side or the wrong layer. A node that this needs and that is not there makes the blocks
insufficient, never the tree right. Nodes off the paths of the operations are never decoded, each other is
decoded once, and one of which only a child changed is re-encoded by exchanging that child's CID in its bytes.
Source: the sync specification, "MST Operation Inversion". Pure, any thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Final

from indexer.atproto.cid import DAG_CBOR_PREFIX, format_cid
from indexer.atproto.mst import load_node, root_layer
from indexer.atproto.node import (
    EMPTY_ROOT,
    MAX_KEY_BYTES,
    check_layer,
    describe,
    encode_node,
    key_layer,
    parse_node,
    replace_kid,
    shown,
    split_node,
)
from indexer.atproto.ops import Op
from indexer.atproto.shortcut import proves
from indexer.atproto.types import Cid, Path
from indexer.errors import MissingBlock, MstError

#: Nodes decoded for one inversion: 200 operations, each with a way down, a split and two edges of 20 layers.
MAX_LOADS: Final = 16_384


class _Part:
    """A loaded node. A kid is None, the CID of a node that is not loaded, or a `_Part`.

    ``block`` is the node's bytes as they were in the new tree, None once its own entries have changed.
    """

    __slots__ = ("block", "cid", "keys", "kids", "layer", "values")

    def __init__(
        self,
        layer: int,
        keys: list[bytes],
        values: list[Cid],
        kids: list[Cid | _Part | None],
        cid: Cid = b"",
        block: bytes | None = None,
    ) -> None:
        self.layer = layer
        self.keys = keys
        self.values = values
        self.kids = kids
        self.cid = cid
        self.block = block

    @property
    def empty(self) -> bool:
        return not self.keys and self.kids[0] is None


_Kid = Cid | _Part | None


def invert(
    root: Cid,
    blocks: Mapping[Cid, bytes],
    ops: Sequence[Op],
    expected: Cid | None = None,
    *,
    valid_base: bool = False,
) -> Cid:
    """The root before ``ops``, from the root after them and the nodes in ``blocks`` (hashes checked).

    Two orders are tried, since a partial tree that suffices for one may not for the other: deletes first,
    each group by path; then the message backwards. `MissingBlock`: the nodes do not suffice. `MstError`, with
    reason ``ops``: the tree does not hold what the operations say; ``mst``: it breaks a rule; ``inversion``:
    ``expected`` is given and the result is another root. ``valid_base``: the tree at ``expected`` is known to
    be valid as a whole, should the result be that root: most commits can be proven the short way then, and
    no key's layer has to be looked at. Of a tree that is not known so each node on the way is checked whole.
    """
    if valid_base and expected is not None and proves(root, blocks, ops, expected):
        return expected
    ordered = sorted(ops, key=_sorted_order)
    try:
        return _Inversion(root, blocks, valid_base).run(ordered, expected)
    except MissingBlock:
        backwards = list(reversed(ops))
        if backwards == ordered:
            raise
        return _Inversion(root, blocks, valid_base).run(backwards, expected)


def _sorted_order(op: Op) -> tuple[bool, Path]:
    return op.action != "delete", op.path


class _Inversion:
    """One attempt, in one order."""

    __slots__ = ("_blocks", "_loads", "_root", "_valid_base")

    def __init__(self, root: Cid, blocks: Mapping[Cid, bytes], valid_base: bool) -> None:
        self._blocks = blocks
        self._valid_base = valid_base
        self._loads = 0
        node = load_node(root, blocks.get)
        if root == EMPTY_ROOT:
            self._root = _Part(0, [], [], [None], root, b"")
        else:
            self._root = _Part(root_layer(root, node), *node, root, blocks[root])  # type: ignore[arg-type]

    def run(self, ops: Sequence[Op], expected: Cid | None) -> Cid:
        for op in ops:
            key = op.path.encode("ascii", "replace")
            if len(key) > MAX_KEY_BYTES:
                raise MstError(f"{shown(key)}… is longer than {MAX_KEY_BYTES} bytes", reason="ops")
            if op.action == "create":
                self._remove(key, op.cid)
            elif op.action == "update":
                self._exchange(key, op.cid, op.prev)
            elif op.action == "delete":
                self._insert(key, op.prev)
            else:
                raise MstError(f"unknown action {op.action[:50]!r}", reason="ops")
        return self._finish(expected)

    # --- the three inverse operations ---

    def _remove(self, key: bytes, cid: Cid | None) -> None:
        way, node, index, low, high = self._locate(key)
        _expect(node, index, key, cid)
        left, right = node.kids[index], node.kids[index + 1]
        merged = self._merge(left, right, key, node.layer - 1, low, high)
        del node.keys[index], node.values[index]
        node.kids[index : index + 2] = [merged]
        node.block = None
        while way and node.empty:
            node, index = way.pop()
            node.kids[index] = None
            node.block = None

    def _exchange(self, key: bytes, cid: Cid | None, prev: Cid | None) -> None:
        _, node, index, _, _ = self._locate(key)
        _expect(node, index, key, cid)
        if prev is None:
            raise MstError(f"the update of {shown(key)} has no prev", reason="ops")
        node.values[index] = prev
        node.block = None

    def _insert(self, key: bytes, prev: Cid | None) -> None:
        if prev is None:
            raise MstError(f"the delete of {shown(key)} has no prev", reason="ops")
        layer = key_layer(key)
        while self._root.layer < layer:
            below = None if self._root.empty else self._root
            self._root = _Part(self._root.layer + 1, [], [], [below])
        node, index, low, high = self._descend_to(key, layer)
        if index < len(node.keys) and node.keys[index] == key:
            raise MstError(f"{shown(key)} is deleted, but the tree holds it", reason="ops")
        left, right = self._split(node.kids[index], key, layer - 1, low, high)
        node.keys.insert(index, key)
        node.values.insert(index, prev)
        node.kids[index : index + 1] = [left, right]
        node.block = None

    # --- finding the place ---

    def _locate(self, key: bytes) -> tuple[list[tuple[_Part, int]], _Part, int, bytes, bytes | None]:
        """(nodes above with the child taken, node, index, bounds of the subtree around the entry)."""
        layer = key_layer(key)
        node = self._root
        way: list[tuple[_Part, int]] = []
        low: bytes = b""
        high: bytes | None = None
        while True:
            keys = node.keys
            index = bisect_left(keys, key)
            if node.layer <= layer:
                break
            if index:
                low = keys[index - 1]
            if index < len(keys):
                high = keys[index]
            kid = node.kids[index]
            if kid is None:
                raise MstError(f"the tree does not hold {shown(key)}", reason="ops")
            way.append((node, index))
            if type(kid) is bytes:
                kid = node.kids[index] = self._load(kid, node.layer - 1, low, high)
            node = kid  # type: ignore[assignment]
        if node.layer != layer or index >= len(keys) or keys[index] != key:
            raise MstError(f"the tree does not hold {shown(key)} where it belongs", reason="ops")
        low = keys[index - 1] if index else low
        high = keys[index + 1] if index + 1 < len(keys) else high
        return way, node, index, low, high

    def _descend_to(self, key: bytes, layer: int) -> tuple[_Part, int, bytes, bytes | None]:
        """The node of ``layer`` in which ``key`` belongs, made of empty intermediates where there is none."""
        node = self._root
        low: bytes = b""
        high: bytes | None = None
        while True:
            keys = node.keys
            index = bisect_left(keys, key)
            if index:
                low = keys[index - 1]
            if index < len(keys):
                high = keys[index]
            if node.layer == layer:
                return node, index, low, high
            kid = node.kids[index]
            if kid is None:
                kid = node.kids[index] = _Part(node.layer - 1, [], [], [None])
                node.block = None
            elif type(kid) is bytes:
                kid = node.kids[index] = self._load(kid, node.layer - 1, low, high)
            node = kid  # type: ignore[assignment]

    def _load(self, cid: Cid, layer: int, low: bytes, high: bytes | None) -> _Part:
        """The node behind ``cid``: canonical, not empty, keys within (low, high). Their layer and the form of
        keys are checked here where no verified tree vouches for them, see `_finish`."""
        block = self._blocks.get(cid)
        if block is None:
            raise MissingBlock(f"{describe(cid)} is missing", cid=cid)
        self._loads += 1
        if self._loads > MAX_LOADS:
            raise MstError(
                f"taking the operations back needs more than {MAX_LOADS} nodes", reason="tree_size"
            )
        if self._valid_base:
            keys, values, kids = split_node(block)
        else:
            keys, values, kids = parse_node(block)
            check_layer(keys, layer)
        if layer == 0 and kids.count(None) != len(kids):
            raise MstError(f"{describe(cid)} is on layer 0 and has a child")
        if not keys and kids[0] is None:
            raise MstError(f"{describe(cid)} is empty")
        if keys and (keys[0] <= low or (high is not None and keys[-1] >= high)):
            raise MstError(f"{describe(cid)} has keys outside of its parent's bounds")
        return _Part(layer, keys, values, kids, cid, block)  # type: ignore[arg-type]

    # --- changing the shape ---

    def _merge(self, left: _Kid, right: _Kid, key: bytes, layer: int, low: bytes, high: bytes | None) -> _Kid:
        """One subtree of the two that touch once ``key`` between them is gone."""
        if left is None:
            return self._check_edge(right, True, layer, key, high)
        if right is None:
            return self._check_edge(left, False, layer, low, key)
        if type(left) is bytes:
            left = self._load(left, layer, low, key)
        if type(right) is bytes:
            right = self._load(right, layer, key, high)
        assert isinstance(left, _Part)
        assert isinstance(right, _Part)
        inner = self._merge(
            left.kids[-1], right.kids[0], key, layer - 1,
            left.keys[-1] if left.keys else low, right.keys[0] if right.keys else high,
        )  # fmt: skip
        return _Part(
            layer, left.keys + right.keys, left.values + right.values,
            [*left.kids[:-1], inner, *right.kids[1:]],
        )  # fmt: skip

    def _check_edge(self, kid: _Kid, leftmost: bool, layer: int, low: bytes, high: bytes | None) -> _Kid:
        """The only subtree beside a key that is taken out, loaded along the edge that faced the key.

        Where a subtree begins and ends is known at the bottom of its edges only, so every node down to there
        must have been sent. What was loaded stays in the tree: the next operation finds it there.
        """
        top: _Kid = None
        above: _Part | None = None
        while kid is not None:
            if type(kid) is bytes:
                kid = self._load(kid, layer, low, high)
            assert isinstance(kid, _Part)
            if above is None:
                top = kid
            else:
                above.kids[0 if leftmost else -1] = kid
            keys = kid.keys
            if keys:
                if keys[0] <= low or (high is not None and keys[-1] >= high):
                    raise MstError(f"{shown(keys[0])} and what is beside it lie on the wrong side of a key")
                if leftmost:
                    high = keys[0]
                else:
                    low = keys[-1]
            above, layer = kid, layer - 1
            kid = kid.kids[0 if leftmost else -1]
        return top

    def _split(self, kid: _Kid, key: bytes, layer: int, low: bytes, high: bytes | None) -> tuple[_Kid, _Kid]:
        """The parts of a subtree before and behind ``key``."""
        if kid is None:
            return None, None
        node = self._load(kid, layer, low, high) if type(kid) is bytes else kid
        assert isinstance(node, _Part)
        index = bisect_left(node.keys, key)
        inner_low = node.keys[index - 1] if index else low
        inner_high = node.keys[index] if index < len(node.keys) else high
        before, behind = self._split(node.kids[index], key, layer - 1, inner_low, inner_high)
        left = _Part(layer, node.keys[:index], node.values[:index], [*node.kids[:index], before])
        right = _Part(layer, node.keys[index:], node.values[index:], [behind, *node.kids[index + 1 :]])
        return None if left.empty else left, None if right.empty else right

    # --- the result ---

    def _trim(self) -> _Part | None:
        """The highest node that has an entry, None for the empty tree."""
        top: _Kid = self._root
        layer = self._root.layer
        while top is not None:
            if type(top) is bytes:
                top = self._load(top, layer, b"", None)
            assert isinstance(top, _Part)
            if top.keys:
                return top
            top = top.kids[0]
            layer -= 1
        return None

    def _finish(self, expected: Cid | None) -> Cid:
        """The root now. One hash tells whether every key that was seen is on its layer:

        a key of the new tree was either taken out, which `_locate` does on the key's own layer only, or it is
        still here, where it stands in the earlier tree, as far below the top as there. Where that tree is
        verified as a whole, all is well when the top is on its layer; so it is with the form of keys. Where
        it is not, in ephemeral mode or when a part of it was fetched, `_load` has looked at each node.
        """
        top = self._trim()
        if top is not None:
            check_layer(top.keys[:1], top.layer)
        result = EMPTY_ROOT if top is None else _seal(top)
        if expected is not None and result != expected:
            raise MstError(
                f"taking the operations back gives the root {format_cid(result)}, not {format_cid(expected)}",
                reason="inversion",
            )
        return result


def _expect(node: _Part, index: int, key: bytes, cid: Cid | None) -> None:
    if node.values[index] != cid:
        found = format_cid(node.values[index])
        raise MstError(f"the tree maps {shown(key)} to {found}, not to what the operation says", reason="ops")


def _seal(node: _Part) -> Cid:
    """The CID of a loaded subtree as it stands now. As deep as its layers, at most 128."""
    kids = node.kids
    block = node.block
    for index, kid in enumerate(kids):
        if type(kid) is _Part:
            cid = _seal(kid)
            if block is not None and cid != kid.cid:
                block = replace_kid(block, index, kid.cid, cid) if kid.cid else None
            kids[index] = cid
    if block is None:
        block = encode_node(node.keys, node.values, kids)  # type: ignore[arg-type]
    elif block is node.block:
        return node.cid
    return DAG_CBOR_PREFIX + sha256(block).digest()
