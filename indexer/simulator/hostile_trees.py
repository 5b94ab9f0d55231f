"""Hostile trees: commits whose tree breaks a rule of sync.md §3, but well signed and with true hashes.

Owns those kinds. Each grows on a copy of a true repository, where the rule is broken at a node that the
commit's own operation leads to. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import TYPE_CHECKING, Any

from indexer.simulator.account import Account, ActionError
from indexer.simulator.cbor import DAG_CBOR, RAW, Link, block_cid, encode
from indexer.simulator.content import POST
from indexer.simulator.draft import Draft
from indexer.simulator.lie_base import Choose, Kind, Tell, mined, on_layers, post, shadow
from indexer.simulator.tree import Node, key_layer
from indexer.simulator.wire import tid

if TYPE_CHECKING:
    from indexer.simulator.lies import Telling

Entries = list[dict[str, Any]]
#: What an entry's tampering needs: the entries of the node and the keys they stand for.
EditEntries = Callable[[Entries, list[bytes], int], None]

_TREE = ("reject/tree",)
_CHAIN = 200
_EXPONENT = 5
_ENTRIES = 4097


def _entries(node: Node) -> Entries:
    """The node's entries as plain values, in their true form."""
    return [_entry(node, at) for at in range(len(node.keys))]


def _entry(node: Node, at: int) -> dict[str, Any]:
    key, before = node.keys[at], node.keys[at - 1] if at else b""
    shared = 0
    while shared < min(len(key), len(before)) and key[shared] == before[shared]:
        shared += 1
    sub = node.subs[at + 1]
    return {
        "k": key[shared:],
        "p": shared,
        "t": None if sub is None else Link(sub.cid),
        "v": Link(node.values[at]),
    }


def _block(node: Node, entries: Entries) -> bytes:
    left = node.subs[0]
    return encode({"e": entries, "l": None if left is None else Link(left.cid)})


def _graft(draft: Draft, twin: Account, way: list[Node], block: bytes) -> None:
    """The last node of ``way`` becomes ``block``; what is above it is hashed anew, and the commit signed."""
    way[-1].block, way[-1].cid = block, block_cid(block)
    draft.nodes[way[-1].cid] = block
    _rehash(draft, twin, way[:-1])


def _rehash(draft: Draft, twin: Account, changed: list[Node]) -> None:
    for node in changed:
        node.cid = b""
    draft.data, fresh = twin.tree.seal()
    draft.nodes |= fresh
    draft.sign()


def _key(draft: Draft, at: int = 0) -> bytes:
    path: str = draft.ops[at]["path"]
    return path.encode()


# -- a node's own form


def _node(edit: EditEntries) -> Tell:
    """Three posts in one leaf; ``edit`` changes the entry of the last of them, or what is around it."""

    def tell(telling: Telling) -> None:
        draft, twin = shadow(telling, on_layers(0, 0, 0)(telling))
        way = twin.tree.path(_key(draft, 2))
        node = way[-1]
        entries = _entries(node)
        edit(entries, node.keys, node.keys.index(_key(draft, 2)))
        _graft(draft, twin, way, _block(node, entries))
        telling.say("#commit", draft.halves(), rev=draft.rev)

    return tell


def _longer_prefix(entries: Entries, keys: list[bytes], at: int) -> None:
    entries[at]["p"] = len(keys[at - 1]) + 7


def _negative_prefix(entries: Entries, keys: list[bytes], at: int) -> None:
    entries[at]["p"] = -1


def _shorter_prefix(entries: Entries, keys: list[bytes], at: int) -> None:
    shared = entries[at]["p"] - 1
    entries[at] |= {"p": shared, "k": keys[at][shared:]}


def _unordered(entries: Entries, keys: list[bytes], at: int) -> None:
    """The last two keys in the wrong order, each with its true prefix."""
    before, last = entries[at - 1], entries[at]
    shared = entries[at]["p"]
    outer = before["p"]
    swapped = [
        last | {"p": outer, "k": keys[at][outer:]},
        before | {"p": shared, "k": keys[at - 1][shared:]},
    ]
    entries[at - 1 : at + 1] = swapped


def _doubled(entries: Entries, keys: list[bytes], at: int) -> None:
    entries.insert(at + 1, entries[at] | {"p": len(keys[at]), "k": b""})


def _no_path(entries: Entries, keys: list[bytes], at: int) -> None:
    entries.insert(at + 1, entries[at] | {"p": 0, "k": b"zzz/a b", "t": None})


def _long_key(entries: Entries, keys: list[bytes], at: int) -> None:
    entries.insert(at + 1, entries[at] | {"p": 0, "k": b"zzz.zzz.zzz/" + b"z" * 900, "t": None})


def _extra_field(entries: Entries, keys: list[bytes], at: int) -> None:
    entries[at]["x"] = 1


def _text_key(entries: Entries, keys: list[bytes], at: int) -> None:
    entries[at]["k"] = entries[at]["k"].decode()


def _raw_link(entries: Entries, keys: list[bytes], at: int) -> None:
    entries[at]["t"] = Link(RAW + bytes(32))


def _identity_link(entries: Entries, keys: list[bytes], at: int) -> None:
    """A child whose CID holds it itself instead of its hash."""
    entries[at]["t"] = Link(DAG_CBOR[:2] + b"\0\x20" + bytes(32))


def _other_hash(entries: Entries, keys: list[bytes], at: int) -> None:
    entries[at]["t"] = Link(DAG_CBOR[:2] + b"\x1b\x20" + bytes(32))


def _map_order(telling: Telling) -> None:
    """The node's two fields in the wrong order."""

    def turn(node: Node) -> bytes:
        block = _block(node, _entries(node))
        at = block.rindex(b"\x61l")
        return block[:1] + block[at:] + block[1:at]

    _bytes(telling, turn)


def _long_integer(telling: Telling) -> None:
    """The first prefix, a zero, in two bytes."""
    _bytes(telling, lambda node: _block(node, _entries(node)).replace(b"ap\x00at", b"ap\x18\x00at", 1))


def _not_a_node(telling: Telling) -> None:
    _bytes(telling, lambda node: encode({"$type": POST, "text": "I am a leaf"}))


def _bytes(telling: Telling, make: Callable[[Node], bytes]) -> None:
    draft, twin = shadow(telling, on_layers(0)(telling))
    way = twin.tree.path(_key(draft))
    _graft(draft, twin, way, make(way[-1]))
    telling.say("#commit", draft.halves(), rev=draft.rev)


# -- a node in the wrong place


def _shape(choose: Choose, bend: Callable[[Account, list[Node], int], None], at: int = 0) -> Tell:
    """``bend`` changes the copy's tree; it gets the way to the post number ``at`` and its index there."""

    def tell(telling: Telling) -> None:
        draft, twin = shadow(telling, choose(telling))
        key = _key(draft, at)
        way = twin.tree.path(key)
        bend(twin, way, way[-1].keys.index(key))
        _rehash(draft, twin, way)
        telling.say("#commit", draft.halves(), rev=draft.rev)

    return tell


def _empty_leaf(twin: Account, way: list[Node], at: int) -> None:
    way[-1].subs[at + 1] = Node([], [], [None])


def _pointer_root(twin: Account, way: list[Node], at: int) -> None:
    twin.tree.root = Node([], [], [twin.tree.root])


def _below_the_ground(twin: Account, way: list[Node], at: int) -> None:
    way[-1].subs[at + 1] = Node([way[-1].keys[at] + b"0"], [way[-1].values[at]], [None, None])


def _chain(twin: Account, way: list[Node], at: int) -> None:
    """Empty intermediates without an end, where a subtree should be."""
    node = Node([way[-1].keys[at] + b"0"], [way[-1].values[at]], [None, None])
    for _ in range(_CHAIN):
        node = Node([], [], [node])
    way[-1].subs[at + 1] = node


def _swapped_subtrees(twin: Account, way: list[Node], at: int) -> None:
    subs = way[-1].subs
    subs[at], subs[at + 1] = subs[at + 1], subs[at]


def _shared_subtree(twin: Account, way: list[Node], at: int) -> None:
    """One child on both sides of a key."""
    way[-1].subs[at + 1] = way[-1].subs[at]


def _skipped_layer(twin: Account, way: list[Node], at: int) -> None:
    """A subtree hangs two layers below its parent."""
    left = way[-1].subs[at]
    assert left is not None
    way[-1].subs[at] = left.subs[-1]


def _between(*layers: int) -> Choose:
    return on_layers(*layers)


def _exponential(telling: Telling) -> None:
    """Each node has its one child on both sides of its key: 2^layers visits of few blocks."""
    draft, twin = shadow(telling, on_layers(0)(telling))
    node: Node | None = None
    value = twin.records[draft.ops[0]["path"]].cid
    for layer in range(_EXPONENT):
        node = Node([f"{POST}/{mined(telling, layer)}".encode()], [value], [node, node])
    assert node is not None
    twin.tree.root, twin.tree.layer = node, _EXPONENT - 1
    draft.ops[0] |= {"path": node.keys[0].decode()}
    _rehash(draft, twin, [])
    telling.say("#commit", draft.halves(), rev=draft.rev)


def _huge(telling: Telling) -> None:
    """More entries in a node than any honest tree has."""
    draft, twin = shadow(telling, on_layers(0)(telling))
    way = twin.tree.path(_key(draft))
    node, at = way[-1], way[-1].keys.index(_key(draft))
    key, value = node.keys[at], node.values[at]
    more = [key + f"{number:04d}".encode() for number in range(_ENTRIES)]
    node.keys[at + 1 : at + 1] = more
    node.values[at + 1 : at + 1] = [value] * len(more)
    node.subs[at + 1 : at + 1] = [None] * len(more)
    _rehash(draft, twin, way)
    telling.say("#commit", draft.halves(), rev=draft.rev)


def _wrong_layer(collection: str, above: int = 0) -> Tell:
    """The new key, of layer 0, stands higher: in the root, or on layer ``above``."""

    def tell(telling: Telling) -> None:
        rkey = mined(telling, 0, collection)
        write = post(telling, rkey)._replace(path=f"{collection}/{rkey}")
        draft, twin = shadow(telling, [write])
        _need_layers(telling, twin, above + 1)
        key = _key(draft)
        twin.tree.remove(key)
        twin.tree.set(key, twin.records[write.path].cid, above or twin.tree.layer)
        _rehash(draft, twin, twin.tree.path(key))
        telling.say("#commit", draft.halves(), rev=draft.rev)

    return tell


def _need_layers(telling: Telling, twin: Account, layer: int) -> None:
    if twin.tree.layer < layer:
        raise ActionError(f"{telling.kind.name} needs a tree with a layer {layer}")


def _wrong_neighbour(telling: Telling) -> None:
    """Beside the new key stands another one that belongs on another layer; no operation tells of it."""
    draft, twin = shadow(telling, on_layers(1)(telling))
    _need_layers(telling, twin, 2)
    way = twin.tree.path(_key(draft))
    node, at = way[-1], way[-1].keys.index(_key(draft))
    rng = Random(telling.rng.getrandbits(32))
    while key_layer(other := node.keys[at] + tid(rng.getrandbits(50)).encode()) != 0:
        continue
    node.keys.insert(at + 1, other)
    node.values.insert(at + 1, node.values[at])
    node.subs.insert(at + 1, None)
    _rehash(draft, twin, way)
    telling.say("#commit", draft.halves(), rev=draft.rev)


def kinds() -> Iterator[Kind]:
    row = "16"
    forms: tuple[tuple[str, str, Tell], ...] = (
        ("prefix_long", "p is longer than the key before", _node(_longer_prefix)),
        ("prefix_negative", "p is negative", _node(_negative_prefix)),
        ("prefix_short", "p is not the longest shared prefix", _node(_shorter_prefix)),
        ("unordered", "keys in the wrong order", _node(_unordered)),
        ("doubled", "a key twice", _node(_doubled)),
        ("key_form", "a key that is no path", _node(_no_path)),
        ("key_long", "a key of more than 830 bytes", _node(_long_key)),
        ("extra_field", "an entry with a field too many", _node(_extra_field)),
        ("key_type", "a key as text", _node(_text_key)),
        ("link_raw", "a child of raw bytes", _node(_raw_link)),
        ("link_identity", "a child that is its own CID", _node(_identity_link)),
        ("link_hash", "a child under another hash function", _node(_other_hash)),
        ("map_order", "fields in the wrong order", _map_order),
        ("integer", "an integer in more bytes than it needs", _long_integer),
        ("record", "a record where a node belongs", _not_a_node),
        ("huge", "4,097 entries in one node", _huge),
        ("empty_leaf", "an empty node beside a key", _shape(_between(1), _empty_leaf)),
        ("pointer_root", "a root that only points", _shape(_between(0), _pointer_root)),
        ("below_ground", "a child below layer 0", _shape(_between(0), _below_the_ground)),
        ("chain", "200 empty intermediates below each other", _shape(_between(2), _chain)),
        ("swapped", "subtrees on the wrong sides of a key", _shape(_between(0, 1, 0), _swapped_subtrees, 1)),
        ("shared", "one child on both sides of a key", _shape(_between(0, 1), _shared_subtree, 1)),
        ("exponential", "one child on both sides, on every layer", _exponential),
    )
    for name, about, tell in forms:
        yield Kind(f"tree_{name}", row, f"the tree: {about}", _TREE, tell)
    yield Kind("tree_root_layer", row, "the tree: the root's first key belongs on another layer", _TREE,
               _wrong_layer("aaa.example.first"))  # fmt: skip
    yield Kind("tree_root_key", row, "the tree: a key in the root belongs on another layer", _TREE,
               _wrong_layer("zzz.example.last"))  # fmt: skip
    yield Kind("tree_layer", "15", "the tree: the new key on a layer that is not its own", ("reject/ops",),
               _wrong_layer("zzz.example.last", 1))  # fmt: skip
    yield Kind("tree_skipped", "15", "the tree: a child two layers below its parent", ("reject/ops",),
               _shape(_between(0, 2), _skipped_layer, 1))  # fmt: skip
    yield Kind("tree_neighbour", "17", "the tree: an untold key of another layer beside the new one",
               ("reject/inversion",), _wrong_neighbour)  # fmt: skip
