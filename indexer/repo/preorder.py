"""The walk of a repository whose archive lies in streaming order: commit, nodes before what is below them,
records in between. Hot.

Takes the archive in windows, checks everything in each (hashes, nodes, layers, order, and that the sections
are exactly those that the tree names next), and keeps nothing but the open nodes from one window to the next,
so memory does not grow with the repository. A record that stands under several keys may come once, where the
caller remembers it. Decides only what every good archive in this order passes: anything else makes it answer
None and stay as it was, for the walk that takes blocks in any order. Pure state machine, any thread.

Where the time goes (5 MiB, 13,196 records): sections 16 % and their hashes 30 %, taking nodes apart 24 %, key
layers 12 %, places in the tree 11 %. Work is done for a window at a time, in lists that one call fills or
compares, and that fit the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from mmap import mmap
from typing import Any, Final, NamedTuple

from indexer.atproto.car import Limits, read_varint
from indexer.atproto.cid import CID_LENGTH, DAG_CBOR_PREFIX
from indexer.atproto.mst import TreeLimits
from indexer.atproto.node import NODE_START, check_layer, key_layer
from indexer.atproto.types import Cid, Path
from indexer.errors import CarError, MstError
from indexer.repo.keys import are_cids, check_keys
from indexer.repo.nodes import Nodes, split_nodes
from indexer.repo.sections import TWO_BYTES

#: Bytes of archive that are worth a window: more than a hundred records, less than a processor's cache.
WINDOW: Final = 96 << 10
_MAP_OF_TWO: Final = NODE_START[0]

#: keys, values, children (one more), number of the child that was entered last
Frame = list[Any]
#: The block of a record that passed before, None when it is not remembered.
Recall = Callable[[Cid], bytes | None]


class Taken(NamedTuple):
    """What one window proved: the records whose blocks it holds or that were recalled, and where it ends."""

    end: int
    text: str  # the paths, with newlines between them
    starts: list[int]
    ends: list[int]
    recalled: dict[int, tuple[Cid, bytes]]  # by the number of the path; the other paths have the sections

    @property
    def paths(self) -> list[Path]:
        return self.text.split("\n") if self.text else []


class _Sections(NamedTuple):
    end: int
    cids: list[Cid]
    nodes: list[bytes]
    starts: list[int]
    ends: list[int]


class Preorder:
    """The state of a walk between windows. The commit's section lies before the first."""

    __slots__ = (
        "_last", "_layer", "_limits", "_order", "_stack", "_text", "_tree_limits", "_verify", "_want",
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
        self._text = ""  # their paths, with newlines between them
        self._last: bytes = b""
        self.blocks = 1
        self.entries = 0  # nodes and records

    @property
    def done(self) -> bool:
        """Whether the tree's last record has come."""
        return self._want is None and not self._order

    def window(self, data: bytes | mmap, at: int, stop: int, recall: Recall | None = None) -> Taken | None:
        """Takes the whole sections that begin in [at, stop); None when they are not as they should be.

        With ``recall``, which needs checked hashes, the section of a record that it gives need not be there.
        """
        if self._limits.max_block < TWO_BYTES:
            return None
        try:
            found = _sections(data, at, stop, self._limits.max_block + CID_LENGTH, self._verify)
            if found is None or self.blocks + len(found.cids) > self._limits.max_blocks:
                return None
            if self.done:
                return self._tail(found)
            return self._tree(found, data, recall)
        except (CarError, MstError):
            return None

    def pending(self) -> list[tuple[Path, Cid]]:
        """Records that were named and whose sections have not come, in order."""
        return list(zip(self._text.split("\n"), self._order, strict=True)) if self._order else []

    def frames(self) -> tuple[list[Frame], int, Cid | None]:
        """(open nodes, layer of the root or -1, the next node), for a walk that goes on from here."""
        return self._stack, self._layer, self._want

    def supply(self, at: int, recall: Recall) -> Taken:
        """The first of `pending`, as far as they are remembered: their sections need not come. No window is
        taken ``at`` the place where the walk stands."""
        recalled: dict[int, tuple[Cid, bytes]] = {}
        for line, cid in enumerate(self._order):
            block = recall(cid)
            if block is None:
                break
            recalled[line] = cid, block
        now, self._text = _cut(self._text, len(self._order), len(recalled))
        del self._order[: len(recalled)]
        return Taken(at, now, [], [], recalled)

    def _tail(self, found: _Sections) -> Taken | None:
        """Behind the tree anything may lie, in whole sections."""
        if not are_cids(b"".join(found.cids)):
            return None
        self.blocks += len(found.cids)
        return Taken(found.end, "", [], [], {})

    def _tree(self, found: _Sections, data: bytes | mmap, recall: Recall | None) -> Taken | None:
        if max(map(len, found.nodes), default=0) > self._tree_limits.max_node_bytes:
            return None
        split = split_nodes(found.nodes)
        if split is None:
            return None
        place = _Place(self._want, [frame.copy() for frame in self._stack], self._layer, list(self._order))
        if not place.run(split):
            return None
        cids = found.cids
        match = _match(place, found, data, recall)
        if match is None:
            return None
        met = match.sections
        if met < len(cids) and (place.want is not None or not are_cids(b"".join(cids[met:]))):
            return None
        entries = self.entries + len(found.nodes) + len(place.keys)
        if place.keys and place.keys[0] <= self._last:
            return None
        self._tree_limits.check_size(entries)
        self._tree_limits.check_depth(place.layer)
        for layer, keys in enumerate(place.layers):
            check_layer(keys, layer)
        texts = [self._text] if self._text else []
        if place.keys:
            texts.append(check_keys(place.keys))
        named = len(self._order) + len(place.keys)
        now, later = _cut("\n".join(texts), named, match.records + len(match.recalled))
        self._commit(place, entries, place.order[match.used :], later, len(cids))
        records = slice(match.records)
        return Taken(found.end, now, found.starts[records], found.ends[records], match.recalled)

    def _commit(self, place: _Place, entries: int, order: list[Cid], text: str, blocks: int) -> None:
        self._want, self._stack, self._layer = place.want, place.stack, place.layer
        self._order, self._text = order, text
        self._last = place.keys[-1] if place.keys else self._last
        self.entries = entries
        self.blocks += blocks


class _Match(NamedTuple):
    """How a window fits the order: so much of that is used, for so many sections."""

    used: int
    sections: int
    records: int  # of the sections
    recalled: dict[int, tuple[Cid, bytes]]


def _match(place: _Place, found: _Sections, data: bytes | mmap, recall: Recall | None) -> _Match | None:
    """None where a section is not the one that the tree names next."""
    cids, order = found.cids, place.order
    met = min(len(order), len(cids))
    if order[:met] == cids[:met]:
        return _Match(met, met, min(len(found.starts), len(order) - len(place.nodes)), {})
    return None if recall is None else _match_recalled(place, found, data, recall)


def _match_recalled(place: _Place, found: _Sections, data: bytes | mmap, recall: Recall) -> _Match | None:
    """As `_match`, where records that stand in front of a section may have come before. One that may still
    come is not recalled. What is a node by its place is one by its block: only that one fits there."""
    cids, nodes = found.cids, set(place.nodes)
    where = {data[start - CID_LENGTH : start]: (start, end) for start, end in zip(*found[3:], strict=True)}
    blocks: dict[Cid, bytes] = {}  # of those that were recalled, one for all their keys
    here: set[Cid] = set()
    recalled: dict[int, tuple[Cid, bytes]] = {}
    met = used = line = 0
    for used, cid in enumerate(place.order):
        is_node = used in nodes
        if met == len(cids):
            break
        if cid == cids[met] and is_node != (cid in where):
            met += 1
            here.add(cid)
        elif is_node:
            return None
        else:
            block = blocks.get(cid)
            if block is None:
                block = data[slice(*where[cid])] if cid in here else recall(cid)
            if block is None:
                return None
            blocks[cid] = block
            recalled[line] = cid, block
        line += not is_node
    else:
        used = len(place.order)
    return _Match(used, met, line - len(recalled), recalled)


def _cut(text: str, lines: int, first: int) -> tuple[str, str]:
    """The first lines of so many, and the others."""
    if first == lines:
        return text, ""
    if first == 0:
        return "", text
    now, *later = text.rsplit("\n", lines - first)
    return now, "\n".join(later)


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
        if body == size and length == CID_LENGTH:
            at = body
            cids.append(data[start:body])
            digests += [digest(b"").digest()] * verify
            starts.append(body)
            ends.append(body)
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
    # Of CIDs with another codec the prefix differs.
    if (
        digests
        and DAG_CBOR_PREFIX + DAG_CBOR_PREFIX.join(digests) != b"".join(cids)
        and not (all(map(bytes.endswith, cids, digests)))
    ):
        return None
    return _Sections(at, cids, nodes, starts, ends)


class _Place:
    """Puts the nodes of a window into their places, and lists what must come in which order."""

    __slots__ = ("keys", "layer", "layers", "nodes", "order", "stack", "want")

    def __init__(self, want: Cid | None, stack: list[Frame], layer: int, order: list[Cid]) -> None:
        self.want = want
        self.stack = stack
        self.layer = layer
        self.order = order
        self.nodes: list[int] = []  # where in ``order``
        self.keys: list[bytes] = []
        self.layers: list[list[bytes]] = [[] for _ in range(layer + 1)]

    def run(self, found: Nodes) -> bool:
        """False when a node is out of place."""
        keys, values, kids, counts, lefts = found
        if self.layer < 0 and counts:
            if not counts[0]:
                return False
            self.layer = key_layer(keys[0])  # the root comes first
            self.layers = [[] for _ in range(self.layer + 1)]
        stack, order, passed = self.stack, self.order, self.keys
        bottom = self.layers[0] if self.layers else []
        at = entered = 0
        for count, left in zip(counts, lefts, strict=True):
            if self.want is None:
                return False
            self.nodes.append(len(order))
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
