"""The walk over a tree, without knowing where blocks come from: it names the node that it wants, takes its
block, and gives out the records up to the next node.

Checks each node in its place: form, layer, bounds that its parents' keys set. A part of the tree is walked
with ``start`` and ``stop``: no subtree is passed over unless its parent's keys show that it lies outside, so
what is absent is proven absent. The state is a stack, its depth that of the tree. Pure, any thread.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from indexer.atproto.mst import DEFAULT_LIMITS, TreeLimits, check_path, check_place, root_layer
from indexer.atproto.node import EMPTY_NODE, EMPTY_ROOT, describe, key_layer, parse_node
from indexer.atproto.types import Cid, Path
from indexer.errors import MstError
from indexer.repo.preorder import Frame

Entry = tuple[Path, Cid]


class Bounds(NamedTuple):
    """Keys between which a subtree's lie, both excluded."""

    low: bytes = b""
    high: bytes = b"\xff"


class TreeWalk:
    """A walk of the keys in [start, stop); ``stop`` None means all that follow."""

    def __init__(
        self,
        root: Cid,
        *,
        start: Path = "",
        stop: Path | None = None,
        exact: bool = False,
        limits: TreeLimits = DEFAULT_LIMITS,
    ) -> None:
        """``exact``: only ``start`` itself is looked for, which can only stand on its own layer."""
        self.root = root
        #: The node that the walk needs next; None when it is complete.
        self.want: Cid | None = root
        self._start = start.encode("ascii", "replace")
        self._stop = None if stop is None else stop.encode("ascii", "replace")
        self._floor = key_layer(self._start) if exact else -1
        self._limits = limits
        self._layer = -1
        self._stack: list[Frame] = []
        self._bounds: list[Bounds] = []
        self._seen = 0
        self._collection = ""

    @classmethod
    def resume(
        cls, root: Cid, frames: tuple[list[Frame], int, Cid | None], seen: int, limits: TreeLimits
    ) -> TreeWalk:
        """A walk that goes on where a `Preorder` stands."""
        walk = cls(root, limits=limits)
        walk._stack, walk._layer, walk.want = frames
        walk._seen = seen
        bounds = Bounds()
        for frame in walk._stack:
            walk._bounds.append(bounds)
            bounds = _below(frame, bounds)
        return walk

    def upcoming(self, most: int) -> list[Cid]:
        """The node that is wanted and those beside it that will be: worth fetching together."""
        found = [] if self.want is None else [self.want]
        if self._stack:
            keys, _values, kids, index = self._stack[-1]
            for number in range(index + 1, len(kids)):
                if len(found) == most or (self._stop is not None and keys[number - 1] >= self._stop):
                    break
                if kids[number] is not None:
                    found.append(kids[number])
        return found

    def take(self, block: bytes) -> list[Entry]:
        """The records between the wanted node and the next one that is wanted."""
        cid = self.want
        if cid is None:
            raise ValueError("the walk is complete and wants no node")
        if cid == self.root == EMPTY_ROOT and block == EMPTY_NODE:
            self.want = None
            return []
        self._enter(cid, block)
        return self._advance()

    @property
    def layer(self) -> int:
        """The layer of the node that is wanted; -1 when that is the root, whose layer nothing tells."""
        return self._layer - len(self._stack) if self._stack else -1

    @property
    def bounded(self) -> bool:
        """Whether only a part of the tree is walked."""
        return bool(self._start) or self._stop is not None or self._floor >= 0

    def skip(self, first: bytes, last: bytes, size: int) -> list[Entry]:
        """Passes the subtree of the wanted node, found good: its records have keys from ``first`` to
        ``last``, and with its nodes they are ``size``. Gives the records behind it, up to the next node."""
        bounds = _below(self._stack[-1], self._bounds[-1])
        if first <= bounds.low or last >= bounds.high:
            raise MstError("a subtree has keys outside of its parent's bounds", rule="order")
        self._seen += size
        self._limits.check_size(self._seen)
        return self._passed()

    def _enter(self, cid: Cid, block: bytes) -> None:
        self._limits.check_node(cid, len(block))
        try:
            node = parse_node(block)
        except MstError as error:
            raise MstError(f"{describe(cid)}: {error}", rule=error.rule) from error
        bounds = Bounds()
        if self._stack:
            check_place(cid, node, self._layer - len(self._stack))
            bounds = _below(self._stack[-1], self._bounds[-1])
        else:
            self._layer = root_layer(cid, node)
            self._limits.check_depth(self._layer)
        if node.keys and (node.keys[0] <= bounds.low or node.keys[-1] >= bounds.high):
            raise MstError(f"{describe(cid)} has keys outside of its parent's bounds", rule="order")
        self._seen += 1 + len(node.keys)
        self._limits.check_size(self._seen)
        first = bisect_left(node.keys, self._start)
        # The child before a key that is the start itself holds only keys below it.
        skips = first < len(node.keys) and node.keys[first] == self._start
        kids = [None if skips and index == first else kid for index, kid in enumerate(node.kids)]
        self._stack.append([node.keys, node.values, kids, first])
        self._bounds.append(bounds)

    def _advance(self) -> list[Entry]:
        """Passes records until a child is to be entered. A frame's number is of the child entered last."""
        _keys, _values, kids, index = self._stack[-1]
        if kids[index] is not None:
            self._descend(kids[index])
            return []
        return self._passed()

    def _passed(self) -> list[Entry]:
        """Goes on behind the child entered last."""
        out: list[Entry] = []
        while self._stack:
            keys, values, kids, index = frame = self._stack[-1]
            for number in range(index, len(keys)):
                if self._ends_before(keys[number]):
                    self._close()
                    return out
                out.append(self._entry(keys[number], values[number]))
                if kids[number + 1] is not None:
                    frame[3] = number + 1
                    self._descend(kids[number + 1], keys[number])
                    return out
            self._stack.pop()
            self._bounds.pop()
        self.want = None
        return out

    def _descend(self, kid: Cid, low: bytes = b"") -> None:
        """Wants a child, whose keys come after ``low``; unless nothing that is looked for can be below it."""
        layer = self._layer - len(self._stack) + 1
        if layer <= self._floor or (low and self._ends_before(low + b"\0")):
            self._close()
        else:
            self.want = kid

    def _ends_before(self, key: bytes) -> bool:
        return self._stop is not None and key >= self._stop

    def _close(self) -> None:
        self._stack, self._bounds, self.want = [], [], None

    def _entry(self, key: bytes, value: Cid) -> Entry:
        path = key.decode("ascii")
        self._collection = check_path(path, self._collection)
        return path, value


def _below(frame: Frame, bounds: Bounds) -> Bounds:
    """Bounds of the child that was entered last."""
    keys, _values, _kids, index = frame
    return Bounds(keys[index - 1] if index else bounds.low, keys[index] if index < len(keys) else bounds.high)
