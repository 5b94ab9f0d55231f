"""Many tree nodes at once: the form of each checked as by `indexer.atproto.node.split_node`. Hot.

The nodes are joined and taken apart by one search, which spares what a call for each costs. Decides only what
every good node passes: of any other it answers None, and `split_node` says what is wrong. Pure, any thread.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, compress, count, repeat
from typing import Any, Final, NamedTuple

from indexer.atproto.node import (
    COUNT_HEADS,
    MAX_NODE_BYTES,
    NODE_LINK,
    NODE_START,
    SHARED,
    SUFFIX_HEADS,
)
from indexer.atproto.types import Cid

_split: Final = re.compile(
    rb"\xa4ak([\x40-\x57]|\x58.|\x59..)([a-zA-Z0-9._~:/-]{1,830})ap([\x00-\x17]|\x18.|\x19..)at"
    rb"(?:\xf6|\xd8\x2a\x58\x25\x00(\x01\x71\x12\x20.{32}))av\xd8\x2a\x58\x25\x00(\x01[\x71\x55]\x12\x20.{32})",
    re.DOTALL,
).split
_PARTS: Final = 6  # what lies between two entries, and an entry's five groups
_LENGTHS: Final = {head: length for length, head in enumerate(SUFFIX_HEADS)}

#: Between joined nodes. No entry reaches over it: the longest run of any bytes that one may have is 32. It
#: begins with another byte than it goes on with, so that it is found where it is whatever lies before it.
_BETWEEN: Final = b"\0" + b"\xff" * 40
_NO_CHILD: Final = b"al\xf6"
_CHILD: Final = b"al" + NODE_LINK
_CHILD_SIZE: Final = 43
_COUNTS: Final = {NODE_START + head: number for number, head in enumerate(COUNT_HEADS)}
#: What lies between the last entry of a node without a first child and the first of the next → its entries.
_USUAL: Final = {_NO_CHILD + _BETWEEN + NODE_START + COUNT_HEADS[size]: size for size in range(1, 65)}
#: A node's end and a node's begin, so that all of what lies between entries has the same form.
_BEFORE: Final = _NO_CHILD + _BETWEEN
_BEHIND: Final = _BETWEEN + NODE_START + COUNT_HEADS[1]


class Nodes(NamedTuple):
    """The entries of all nodes, one after the other, and of each node how many are its own.

    ``kids[i]`` is the child behind ``keys[i]``; ``lefts`` are the children before the first entry.
    """

    keys: list[bytes]
    values: list[Cid]
    kids: list[Cid | None]
    counts: list[int]
    lefts: list[Cid | None]


def split_nodes(blocks: Sequence[bytes]) -> Nodes | None:
    """The nodes in ``blocks``; None when one is not canonical."""
    if not blocks:
        return Nodes([], [], [], [], [])
    if max(map(len, blocks)) > MAX_NODE_BYTES:
        return None
    flat: list[Any] = _split(_BEFORE + _BETWEEN.join(blocks) + _BEHIND)
    suffixes = flat[2::_PARTS]
    if list(map(_LENGTHS.get, flat[1::_PARTS])) != list(map(len, suffixes)):
        return None
    try:
        shared = list(map(SHARED.__getitem__, flat[3::_PARTS]))
    except KeyError:
        return None
    found = _bounds(flat[0::_PARTS], shared)
    if found is None or len(found[0]) != len(blocks):
        return None
    keys = _keys(suffixes, shared)
    return None if keys is None else Nodes(keys, flat[5::_PARTS], flat[4::_PARTS], *found)


def _bounds(between: list[bytes], shared: list[int]) -> tuple[list[int], list[Cid | None]] | None:
    """(entries, first child) of each node. Marks each node's first entry in ``shared`` with -1."""
    shared.append(0)  # of the entry that the last begin promises
    places = list(compress(count(), between))
    texts = list(filter(None, between))
    counts: list[int] = list(map(_USUAL.get, texts, repeat(0)))
    lefts: list[Cid | None] = [None] * len(texts)
    chains: list[tuple[int, list[Cid | None]]] = []  # nodes without entries, by the text that they are in
    for number, size in enumerate(counts):
        if not size:
            first, *others = texts[number].split(_BETWEEN)
            size = _COUNTS.get(others.pop(), 0) if others else 0
            kids = list(map(_first_child, [first, *map(_whole, others)]))
            if not size or b"" in kids:
                return None
            counts[number], lefts[number] = size, kids[0]
            if others:
                chains.append((number, kids[1:]))
    if list(accumulate(counts, initial=0)) != [*places, len(between)]:
        return None
    for place in places:
        if shared[place]:
            return None
        shared[place] = -1
    for number, kids in reversed(chains):
        counts[number:number] = [0] * len(kids)
        lefts[number + 1 : number + 1] = kids
    del counts[-1], lefts[0]
    return counts, lefts


def _whole(block: bytes) -> bytes:
    """The end of a node without entries, or what is none."""
    start = NODE_START + COUNT_HEADS[0]
    return block[len(start) :] if block.startswith(start) else b""


def _first_child(end: bytes) -> Cid | None:
    """The first child that a node's end names; b"" when it is no such end."""
    if end == _NO_CHILD:
        return None
    return end[7:] if len(end) == _CHILD_SIZE and end.startswith(_CHILD) else b""


def _keys(suffixes: list[bytes], shared: list[int]) -> list[bytes] | None:
    """The keys, each but a node's first put together from the one before; None when one does not ascend, or
    could share more."""
    keys: list[bytes] = []
    add = keys.append
    last = b""
    for suffix, length in zip(suffixes, shared, strict=False):
        if length < 0:
            last = suffix
        elif length < len(last):
            if suffix[0] <= last[length]:
                return None
            last = last[:length] + suffix
        elif length == len(last):
            last += suffix
        else:
            return None
        add(last)
    return keys
