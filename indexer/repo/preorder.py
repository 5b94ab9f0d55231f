"""The walk of a repository whose archive lies in streaming order: commit, nodes before what is below them,
records in between. Hot.

Takes the archive in windows, checks everything in each (hashes, nodes, layers, order, and that the sections
are exactly those that the tree names next), and keeps nothing but the open nodes from one window to the next,
so memory does not grow with the repository. Decides only what every good archive in this order passes:
anything else makes it answer None and stay as it was, for the walk that takes blocks in any order.
Pure state machine, any thread.

Where the time goes (5 MiB, 13,196 records): sections 16 % and their hashes 30 %, taking nodes apart 24 %, key
layers 12 %, places in the tree 11 %. Work is done for a window at a time, in lists that one call fills or
compares, and that fit the processor's cache.
"""

from __future__ import annotations

import re
from hashlib import sha256
from mmap import mmap
from typing import Any, Final, NamedTuple

from indexer.atproto.car import Limits, read_varint
from indexer.atproto.cid import CID_LENGTH
from indexer.atproto.mst import TreeLimits
from indexer.atproto.node import (
    COUNT_HEADS,
    MAX_ENTRIES,
    MAX_NODE_BYTES,
    NODE_LINK,
    NODE_START,
    SHARED,
    SUFFIX_HEADS,
    check_layer,
    key_layer,
)
from indexer.atproto.types import Cid, Path
from indexer.errors import CarError, MstError
from indexer.repo.keys import are_cids, check_keys

#: Bytes of archive that are worth a window: more than a hundred records, less than a processor's cache.
WINDOW: Final = 96 << 10
#: A section whose length takes two bytes needs no comparison with this limit, and nearly all are such.
_TWO_BYTES: Final = 1 << 14

_split: Final = re.compile(
    rb"\xa4ak([\x40-\x57]|\x58.|\x59..)([a-zA-Z0-9._~:/-]{1,830})ap([\x00-\x17]|\x18.|\x19..)at"
    rb"(?:\xf6|\xd8\x2a\x58\x25\x00(\x01\x71\x12\x20.{32}))av\xd8\x2a\x58\x25\x00(\x01[\x71\x55]\x12\x20.{32})",
    re.DOTALL,
).split
_PARTS: Final = 6  # what lies between two entries, and an entry's five groups
#: How a node with so many entries begins.
_STARTS: Final = [NODE_START + head for head in COUNT_HEADS]
_MAP_OF_TWO: Final = NODE_START[0]
#: Instead of the first entry's prefix, which is always 0: its key is compared with nothing.
_FIRST: Final = b"first"
_LENGTHS: Final = {head: length for length, head in enumerate(SUFFIX_HEADS)}
_SHARED: Final = {**SHARED, _FIRST: -1}

#: keys, values, children (one more), number of the child that was entered last
Frame = list[Any]


class Taken(NamedTuple):
    """What one window proved: the records whose blocks it holds, and where it ends."""

    end: int
    paths: list[Path]
    starts: list[int]
    ends: list[int]


class _Sections(NamedTuple):
    end: int
    cids: list[Cid]
    nodes: list[bytes]
    starts: list[int]
    ends: list[int]


class Preorder:
    """The state of a walk between windows. The commit's section lies before the first."""

    __slots__ = (
        "_last", "_layer", "_limits", "_order", "_paths", "_stack", "_tree_limits", "_verify", "_want",
        "blocks", "entries",
    )  # fmt: skip

    def __init__(self, root: Cid, limits: Limits, tree_limits: TreeLimits, *, verify: bool = True) -> None:
        self._limits = limits
        self._tree_limits = tree_limits
        self._verify = verify
        self._want: Cid | None = root
        self._stack: list[Frame] = []
        self._layer = -1  # the root's
        self._order: list[Cid] = []  # of records that were named, but whose sections have not come
        self._paths: list[Path] = []
        self._last: bytes = b""
        self.blocks = 1
        self.entries = 0  # nodes and records

    @property
    def done(self) -> bool:
        """Whether the tree's last record has come."""
        return self._want is None and not self._order

    def window(self, data: bytes | mmap, at: int, stop: int) -> Taken | None:
        """Takes the whole sections that begin in [at, stop); None when they are not as they should be."""
        if self._limits.max_block < _TWO_BYTES:
            return None
        try:
            found = _sections(data, at, stop, self._limits.max_block + CID_LENGTH, self._verify)
            if found is None or self.blocks + len(found.cids) > self._limits.max_blocks:
                return None
            if self.done:
                return self._tail(found)
            return self._tree(found)
        except (CarError, MstError):
            return None

    def pending(self) -> list[tuple[Path, Cid]]:
        """Records that were named and whose sections have not come, in order."""
        return list(zip(self._paths, self._order, strict=True))

    def frames(self) -> tuple[list[Frame], int, Cid | None]:
        """(open nodes, layer of the root or -1, the next node), for a walk that goes on from here."""
        return self._stack, self._layer, self._want

    def supply(self) -> None:
        """The first of `pending` was found elsewhere: its section need not come."""
        del self._paths[0], self._order[0]

    def _tail(self, found: _Sections) -> Taken | None:
        """Behind the tree anything may lie, in whole sections."""
        if not are_cids(b"".join(found.cids)):
            return None
        self.blocks += len(found.cids)
        return Taken(found.end, [], [], [])

    def _tree(self, found: _Sections) -> Taken | None:
        if max(map(len, found.nodes), default=0) > min(MAX_NODE_BYTES, self._tree_limits.max_node_bytes):
            return None
        split = _split_nodes(found.nodes)
        if split is None:
            return None
        place = _Place(self._want, [frame.copy() for frame in self._stack], self._layer, list(self._order))
        if not place.run(split):
            return None
        cids, order = found.cids, place.order
        met = len(order)
        if order[: len(cids)] != cids[:met]:
            return None
        if met < len(cids) and (place.want is not None or not are_cids(b"".join(cids[met:]))):
            return None
        entries = self.entries + len(found.nodes) + len(place.keys)
        if place.keys and place.keys[0] <= self._last:
            return None
        self._tree_limits.check_size(entries)
        self._tree_limits.check_depth(place.layer)
        for layer, keys in enumerate(place.layers):
            check_layer(keys, layer)
        paths = self._paths + (check_keys(place.keys) if place.keys else [])
        ready = min(len(found.starts), len(paths))
        self._commit(place, entries, order[len(cids) :], paths[ready:], len(cids))
        return Taken(found.end, paths[:ready], found.starts[:ready], found.ends[:ready])

    def _commit(self, place: _Place, entries: int, order: list[Cid], paths: list[Path], blocks: int) -> None:
        self._want, self._stack, self._layer = place.want, place.stack, place.layer
        self._order, self._paths = order, paths
        self._last = place.keys[-1] if place.keys else self._last
        self.entries = entries
        self.blocks += blocks


def _sections(data: bytes | mmap, at: int, stop: int, largest: int, verify: bool) -> _Sections | None:
    """The whole sections that begin in [at, stop), nodes apart from the rest; None when a hash is wrong."""
    cids: list[Cid] = []
    nodes: list[bytes] = []
    starts: list[int] = []
    ends: list[int] = []
    digests: list[bytes] = []
    digest = sha256
    size, begin, body = len(data), at, at
    try:
        while at < stop:
            begin = at
            length = data[at]
            start = at + 1
            if length > 0x7F:
                high = data[start]
                if 0 < high < 0x80:
                    length += (high << 7) - 0x80
                    start += 1
                else:
                    length, start = read_varint(data, at)
                    if length > largest:
                        return None
            if length < CID_LENGTH:
                return None
            body = start + CID_LENGTH
            first = data[body]
            at = start + length
            cids.append(data[start:body])
            if verify:
                digests.append(digest(data[body:at]).digest())
            if first == _MAP_OF_TWO and data[body:at].startswith(NODE_START):
                nodes.append(data[body:at])
            else:
                starts.append(body)
                ends.append(at)
    except IndexError:  # the window ends inside a length or a CID, or with an empty block
        pass
    except CarError as error:
        if error.reason != "car_truncated":
            raise
    if at > size:  # inside a block
        at = begin
        cids.pop()
        if starts and starts[-1] == body:
            del starts[-1], ends[-1]
        else:
            nodes.pop()
        del digests[len(cids) :]
    if verify and not all(map(bytes.endswith, cids, digests)):
        return None
    return _Sections(at, cids, nodes, starts, ends)


class _Nodes(NamedTuple):
    """The entries of all nodes of a window, and of each node (number of entries, child before the first)."""

    keys: list[bytes]
    values: list[Cid]
    kids: list[Cid | None]  # behind each key
    nodes: list[tuple[int, Cid | None]]


def _split_nodes(blocks: list[bytes]) -> _Nodes | None:
    """`node.split_node` for many; None when one is not canonical."""
    flat: list[Any] = []
    nodes: list[tuple[int, Cid | None]] = []
    filled = 0
    split, starts, first = _split, _STARTS, _FIRST
    for block in blocks:
        parts: list[Any] = split(block)
        rest = parts.pop()
        count = len(parts) // _PARTS
        if count:
            if count > MAX_ENTRIES or parts[0] != starts[count] or parts[3] != b"\0":
                return None
            parts[3] = first
            flat += parts
            filled += 1
        elif block.startswith(starts[0]):
            rest = block[len(starts[0]) :]
        else:
            return None
        if rest == b"al\xf6":
            nodes.append((count, None))
        elif len(rest) == 43 and rest.startswith(b"al" + NODE_LINK):
            nodes.append((count, rest[7:]))
        else:
            return None
    between = flat[0::_PARTS]  # each node's start is there; between two entries there must be nothing
    suffixes = flat[2::_PARTS]
    if len(between) - between.count(b"") != filled:
        return None
    if list(map(_LENGTHS.get, flat[1::_PARTS])) != list(map(len, suffixes)):
        return None
    keys = _keys(suffixes, flat[3::_PARTS])
    return None if keys is None else _Nodes(keys, flat[5::_PARTS], flat[4::_PARTS], nodes)


def _keys(suffixes: list[bytes], prefixes: list[bytes]) -> list[bytes] | None:
    """The keys, each but a node's first put together from the one before; None when one does not ascend, or
    could share more."""
    keys: list[bytes] = []
    add = keys.append
    last = b""
    try:
        for suffix, shared in zip(suffixes, map(_SHARED.__getitem__, prefixes), strict=True):
            if shared < 0:
                last = suffix
            elif shared < len(last):
                if suffix[0] <= last[shared]:
                    return None
                last = last[:shared] + suffix
            elif shared == len(last):
                last += suffix
            else:
                return None
            add(last)
    except KeyError:
        return None
    return keys


class _Place:
    """Puts the nodes of a window into their places, and lists what must come in which order."""

    __slots__ = ("keys", "layer", "layers", "order", "stack", "want")

    def __init__(self, want: Cid | None, stack: list[Frame], layer: int, order: list[Cid]) -> None:
        self.want = want
        self.stack = stack
        self.layer = layer
        self.order = order
        self.keys: list[bytes] = []
        self.layers: list[list[bytes]] = [[] for _ in range(layer + 1)]

    def run(self, found: _Nodes) -> bool:
        """False when a node is out of place."""
        keys, values, kids, nodes = found
        if self.layer < 0 and nodes:
            if not nodes[0][0]:
                return False
            self.layer = key_layer(keys[0])  # the root comes first
            self.layers = [[] for _ in range(self.layer + 1)]
        stack, order, passed = self.stack, self.order, self.keys
        bottom = self.layers[0] if self.layers else []
        at = entered = 0
        for count, left in nodes:
            if self.want is None:
                return False
            order.append(self.want)
            stop = at + count
            own = keys[at:stop]
            below = self.layer - len(stack)
            if below == 0:
                if not count or left is not None:
                    return False
                bottom += own
                passed += own
                order += values[at:stop]
                at = stop
            else:
                if below < 0 or (not count and left is None):
                    return False
                self.layers[below] += own
                behind = kids[at:stop]
                entered += count - behind.count(None)
                stack.append([own, values[at:stop], [left, *behind], 0])
                at = stop
                if left is not None:
                    self.want = left
                    continue
            self._advance()
        return entered == len(kids) - kids.count(None)  # none is on layer 0

    def _advance(self) -> None:
        """Passes the records up to the next child of an open node; its CID is ``want`` then, or None."""
        stack = self.stack
        while stack:
            keys, values, kids, first = frame = stack[-1]
            for index in range(first + 1, len(kids)):
                if kids[index] is not None:
                    frame[3] = index
                    self.keys += keys[first:index]
                    self.order += values[first:index]
                    self.want = kids[index]
                    return
            self.keys += keys[first:]
            self.order += values[first:]
            stack.pop()
        self.want = None
