"""Which blocks of a tree some ranges of its keys need, found without knowing where blocks come from.

Owns the way from patterns of collections to ranges, and the plan that names the nodes and records that are
still missing. Every node is checked in its place before what it links to is wanted, and a subtree is only
passed over when its parent's keys show that it lies outside of every range: so when the plan is done, nothing
of the ranges is missing. It also says how much of the tree lies in the ranges, by the layers seen so far.
It goes on in steps of one node, so that whoever drives it can stop or let others go on in between.
Pure, any thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple, Protocol

from indexer.atproto.mst import DEFAULT_LIMITS, TreeLimits, check_path, check_place, root_layer
from indexer.atproto.node import EMPTY_NODE, EMPTY_ROOT, Node, describe, parse_node
from indexer.atproto.types import Cid, Nsid, Path, Rkey
from indexer.errors import MstError

#: Keys on a layer to one on the layer above, on average.
_FANOUT: Final = 4
#: Subtrees by whose number the records in them are estimated.
_SAMPLE: Final = 8
#: The least record key: what is asked for to be led to where a collection begins.
_LEAST_RKEY: Final = "-"
_LEAST_PARTS: Final = 3  # of a collection's name


class Range(NamedTuple):
    """The paths with ``start`` ≤ path < ``stop``."""

    start: Path
    stop: Path


class Known(Protocol):
    """The blocks that are at hand, hashes checked."""

    def __contains__(self, cid: Cid, /) -> bool: ...

    def get(self, cid: Cid, /) -> bytes | None: ...


class Estimate(NamedTuple):
    """What the layers that were seen suggest: records in the ranges, records in all, the ranges' part.

    ``sure``: of the first and the last enough was seen to go by; ``total`` is rough at any time.
    """

    wanted: float
    total: float
    share: float
    sure: bool


class _Place(NamedTuple):
    """Where a node stands: its layer, and the keys between which its own lie, both excluded."""

    layer: int
    low: bytes
    high: bytes


def ranges_of(patterns: Iterable[str]) -> tuple[Range, ...]:
    """The ranges that hold the records of these collections (``ns.*`` allowed): in order, none touching."""
    found: list[Range] = []
    for start in sorted(name[:-1] if name.endswith(".*") else f"{name}/" for name in patterns):
        stop = start[:-1] + chr(ord(start[-1]) + 1)
        if found and start <= found[-1].stop:
            found[-1] = Range(found[-1].start, max(found[-1].stop, stop))
        else:
            found.append(Range(start, stop))
    return tuple(found)


def probe_of(wanted: Range) -> tuple[Nsid, Rkey]:
    """A valid path at or near the start of a range made by `ranges_of`."""
    if wanted.start.endswith("/"):
        return wanted.start[:-1], _LEAST_RKEY
    parts = [*wanted.start.rstrip(".").split("."), "a"]
    return ".".join(parts + ["a"] * (_LEAST_PARTS - len(parts))), _LEAST_RKEY


class _Links(NamedTuple):
    """Links to subtrees from the nodes of one layer: all, those that are wanted, and these with subtrees that
    only reach into a range counted as halves."""

    weight: float
    wanted: int
    all: int


class RangePlan:
    """The blocks that ``ranges`` of the tree at ``root`` need and ``known`` does not have.

    It begins with the root among the missing: what is known already is gone through by the first `steps`.
    """

    def __init__(
        self, root: Cid, ranges: Sequence[Range], known: Known, limits: TreeLimits = DEFAULT_LIMITS
    ) -> None:
        self._ranges = [(start.encode("ascii"), stop.encode("ascii")) for start, stop in ranges]
        self._known = known
        self._limits = limits
        self._nodes: dict[Cid, _Place | None] = {root: None}  # missing; None: the root, whose layer it tells
        self._records: dict[Cid, None] = {}  # missing
        self._entered: set[Cid] = set()
        self._seen = 0
        self._found: dict[int, int] = {}  # layer → records in the ranges
        self._links: dict[int, _Links] = {}  # by the layer of the parents
        self._top = (-1, 0)  # layer and entries of the root
        self._ready: list[Cid] = []  # nodes that are known and not yet looked at
        self._name: Nsid = ""  # the collection that was found valid last
        self.found = 0  # keys in the ranges

    @property
    def done(self) -> bool:
        return not self._nodes and not self._records

    @property
    def pending(self) -> int:
        """How many blocks are missing at least, while `steps` are under way: more may turn out to be."""
        return len(self._nodes) + len(self._records) - len(self._ready)

    def missing(self, most: int) -> list[Cid]:
        """What to ask for next: nodes, because they lead to more, then records."""
        cids = list(islice(self._nodes, most))
        return cids + list(islice(self._records, most - len(cids)))

    def begin(self) -> Iterator[None]:
        """`steps` with the root, once it is known."""
        return self.steps(list(self._nodes))

    def steps(self, arrived: Iterable[Cid]) -> Iterator[None]:
        """Goes on with blocks that are known now, by one node a step. Raises `MstError` for a node that may
        not stand there."""
        for cid in dict.fromkeys(arrived):
            if cid in self._known:
                self._records.pop(cid, None)
                if cid in self._nodes:
                    self._ready.append(cid)
        while self._ready:
            cid = self._ready.pop()
            block = self._known.get(cid)
            if block is not None:
                self._ready += self._enter(cid, block, self._nodes.pop(cid))
            yield

    def advance(self, arrived: Iterable[Cid]) -> None:
        """All `steps` at once: for trees that are known to be small."""
        for _ in self.steps(arrived):
            pass

    def estimate(self) -> Estimate:
        """Of the layers of which every wanted node was seen."""
        layer, entries = self._top
        total = float(max(1, entries) * _FANOUT ** max(0, layer))
        if layer < 0:
            return Estimate(0.0, total, 0.0, True)
        missing = max((place.layer for place in self._nodes.values() if place is not None), default=-1)
        # Leaves have no links, so the layer above them tells how large a part it is.
        above, links = 1.0, _Links(1.0, 1, 1)
        for seen in range(layer, max(missing, 0), -1):
            above *= links.wanted / max(1, links.all)  # entered, of the subtrees that hang here
            links = self._links.get(seen, links)
        found = sum(count for seen, count in self._found.items() if seen > missing)
        below = links.weight * _FANOUT ** (missing + 1) if missing >= 0 else 0.0
        sure = missing < 0 or links.wanted >= _SAMPLE
        return Estimate(found + below, total, above * links.weight / max(1, links.all), sure)

    def _enter(self, cid: Cid, block: bytes, place: _Place | None) -> list[Cid]:
        """Takes a node; gives the children that are wanted and known already."""
        self._entered.add(cid)
        if place is None and cid == EMPTY_ROOT and block == EMPTY_NODE:
            return []
        node, place = self._checked(cid, block, place)
        keys, values, kids = node
        self._seen += 1 + len(keys)
        self._limits.check_size(self._seen)
        weights: dict[int, float] = {}
        for start, stop in self._ranges:
            if place.high <= start or place.low + b"\0" >= stop:
                continue
            first, last = bisect_left(keys, start), bisect_left(keys, stop)
            for index in range(first, last):
                self._want_record(keys[index], values[index], place.layer)
            for index in range(first, last + 1):
                low, high = _bounds(keys, index, place)
                if kids[index] is not None and high > start and low + b"\0" < stop:
                    inside = start <= low and high <= stop
                    weights[index] = min(1.0, weights.get(index, 0.0) + (1.0 if inside else 0.5))
        links = self._links.get(place.layer, _Links(0.0, 0, 0))
        self._links[place.layer] = _Links(
            links.weight + sum(weights.values()),
            links.wanted + len(weights),
            links.all + sum(kid is not None for kid in kids),
        )
        return self._want_kids(node, place, weights)

    def _checked(self, cid: Cid, block: bytes, place: _Place | None) -> tuple[Node, _Place]:
        """The node, which may stand where it is."""
        self._limits.check_node(cid, len(block))
        try:
            node = parse_node(block)
        except MstError as error:
            raise MstError(f"{describe(cid)}: {error}", rule=error.rule) from error
        if place is None:
            layer = root_layer(cid, node)
            self._limits.check_depth(layer)
            self._top = layer, len(node.keys)
            return node, _Place(layer, b"", b"\xff")
        check_place(cid, node, place.layer)
        if node.keys and (node.keys[0] <= place.low or node.keys[-1] >= place.high):
            raise MstError(f"{describe(cid)} has keys outside of its parent's bounds", rule="order")
        return node, place

    def _want_record(self, key: bytes, value: Cid, layer: int) -> None:
        self._name = check_path(key.decode("ascii"), self._name)
        self._found[layer] = self._found.get(layer, 0) + 1
        self.found += 1
        if value not in self._known:
            self._records[value] = None

    def _want_kids(self, node: Node, place: _Place, indices: Iterable[int]) -> list[Cid]:
        known = []
        for index in sorted(indices):
            kid = node.kids[index]
            if kid is None:
                continue
            if kid in self._entered or kid in self._nodes:
                # Subtrees hold keys, and no key stands twice.
                raise MstError(f"{describe(kid)} is linked twice", rule="order")
            self._nodes[kid] = _Place(place.layer - 1, *_bounds(node.keys, index, place))
            if kid in self._known:
                known.append(kid)
        return known


def _bounds(keys: Sequence[bytes], index: int, place: _Place) -> tuple[bytes, bytes]:
    """Between which keys those of the child before ``keys[index]`` lie."""
    return keys[index - 1] if index else place.low, keys[index] if index < len(keys) else place.high
