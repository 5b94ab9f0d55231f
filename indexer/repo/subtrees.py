"""Whole subtrees at once: the nodes of each layer fetched and checked together, the records in order. Hot.

Decides only what every good subtree of usual size passes; any other is left to `tree_walk`, which goes from
node to node and says what is wrong. Pure but for the ``fetch`` that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple, cast

from indexer.atproto.mst import TreeLimits
from indexer.atproto.node import check_layer
from indexer.atproto.types import Cid, Path
from indexer.errors import MstError
from indexer.repo.keys import check_keys
from indexer.repo.nodes import Nodes, split_nodes

#: The highest layer whose subtrees are taken whole: some thousand records.
HIGHEST: Final = 4
#: Nodes of one layer, and their bytes, that are held at once.
_MOST_NODES: Final = 4096
_MOST_BYTES: Final = 8 << 20
_AT_ONCE: Final = 64

#: CIDs to the blocks of nodes, None for what is missing.
Fetch = Callable[[Sequence[Cid]], list[bytes | None]]


class Subtree(NamedTuple):
    """The records below a node, in key order. ``size`` counts them and the nodes."""

    keys: list[bytes]
    paths: list[Path]
    values: list[Cid]
    size: int


def take_subtree(cid: Cid, layer: int, fetch: Fetch, limits: TreeLimits) -> Subtree | None:
    """The subtree of the node ``cid``, which must be of ``layer``; None when that is not sure."""
    levels: list[Nodes] = []
    wanted = [cid]
    try:
        for each in range(layer, -1, -1):
            nodes = _level(wanted, each, fetch, limits)
            if nodes is None:
                return None
            levels.append(nodes)
            wanted = _kids(nodes)
        if wanted:  # below layer 0
            return None
        keys, values = _in_order(levels)
        size = len(keys) + sum(len(nodes.counts) for nodes in levels)
        return Subtree(keys, check_keys(keys).split("\n"), values, size) if keys else None
    except MstError:
        return None


def _level(cids: list[Cid], layer: int, fetch: Fetch, limits: TreeLimits) -> Nodes | None:
    """The nodes of one layer, None when one of them is missing or not as it should be."""
    if len(cids) > _MOST_NODES:
        return None
    blocks: list[bytes] = []
    size = 0
    for first in range(0, len(cids), _AT_ONCE):
        found = fetch(cids[first : first + _AT_ONCE])
        if None in found:
            return None
        some = cast("list[bytes]", found)
        sizes = list(map(len, some))
        size += sum(sizes)
        if max(sizes) > limits.max_node_bytes or size > _MOST_BYTES:
            return None
        blocks += some
    nodes = split_nodes(blocks)
    if nodes is None or (0 in nodes.counts and (0, None) in zip(nodes.counts, nodes.lefts, strict=True)):
        return None
    check_layer(nodes.keys, layer)
    return nodes


def _kids(nodes: Nodes) -> list[Cid]:
    """The children of a layer's nodes, in order."""
    found: list[Cid | None] = []
    if not _childless(nodes):
        at = 0
        for count, left in zip(nodes.counts, nodes.lefts, strict=True):
            found.append(left)
            found += nodes.kids[at : at + count]
            at += count
    return [kid for kid in found if kid is not None]


def _childless(nodes: Nodes) -> bool:
    return nodes.kids.count(None) == len(nodes.kids) and nodes.lefts.count(None) == len(nodes.lefts)


def _in_order(levels: list[Nodes]) -> tuple[list[bytes], list[Cid]]:
    """All keys and values in key order."""
    below: Iterator[tuple[list[bytes], list[Cid]]] = iter(())
    for nodes in reversed(levels):
        below = iter(list(_joined(nodes, below)))
    return next(below)


def _joined(
    nodes: Nodes, below: Iterator[tuple[list[bytes], list[Cid]]]
) -> Iterator[tuple[list[bytes], list[Cid]]]:
    """Of each node the keys and values of its own and of what is below it."""
    keys, values, kids = nodes.keys, nodes.values, nodes.kids
    if _childless(nodes):
        at = 0
        for count in nodes.counts:
            yield keys[at : at + count], values[at : at + count]
            at += count
        return
    entries = zip(keys, values, kids, strict=True)
    for count, left in zip(nodes.counts, nodes.lefts, strict=True):
        own_keys, own_values = ([], []) if left is None else next(below)
        for key, value, kid in islice(entries, count):
            own_keys.append(key)
            own_values.append(value)
            if kid is not None:
                more_keys, more_values = next(below)
                own_keys += more_keys
                own_values += more_values
        yield own_keys, own_values
