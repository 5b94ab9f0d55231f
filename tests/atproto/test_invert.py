"""Inversion: the vectors, a slow twin, both orders, and forged trees that lead to the right earlier root."""

from __future__ import annotations

import json
import random
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.atproto import invert as invert_module
from indexer.atproto import mst
from indexer.atproto import node as node_module
from indexer.atproto.car import read_car
from indexer.atproto.cid import dag_cbor_cid, parse_cid
from indexer.atproto.commit import decode_commit
from indexer.atproto.frames import CommitFrame, decode_frame
from indexer.atproto.invert import _Inversion, invert
from indexer.atproto.node import encode_node, parse_node
from indexer.atproto.ops import Op, check_ops
from indexer.errors import BadInput, CommitError, MissingBlock, MstError
from tests.atproto.slow_tree import cid_of, layer_of, node, slow_build
from tests.atproto.test_mst import key_on, records_of
from tests.paths import interop, shared_data

V = dag_cbor_cid(b"a record")
W = dag_cbor_cid(b"another record")


class Change(NamedTuple):
    before: dict[str, bytes]
    after: dict[str, bytes]
    ops: list[Op]


def change(before: dict[str, bytes], steps: list[tuple[int, int]], fresh: list[str]) -> Change:
    """Some of ``fresh`` created, some records updated or deleted, each path at most once."""
    after = dict(before)
    ops: list[Op] = []
    for choice, pick in steps:
        old = [path for path in sorted(before) if path in after and after[path] == before[path]]
        new = [path for path in fresh if path not in before and path not in after]
        if choice == 0 and new:
            path = new[pick % len(new)]
            after[path] = W
            ops.append(Op("create", path, W, None))
        elif choice == 1 and old:
            path = old[pick % len(old)]
            after[path] = dag_cbor_cid(b"update of " + path.encode())
            ops.append(Op("update", path, after[path], before[path]))
        elif choice == 2 and old:
            path = old[pick % len(old)]
            ops.append(Op("delete", path, None, after.pop(path)))
            fresh = [name for name in fresh if name != path]
    return Change(before, after, ops)


class Recorder(dict[bytes, bytes]):
    """Blocks that remember which of them were asked for."""

    def __init__(self, blocks: Mapping[bytes, bytes]) -> None:
        super().__init__(blocks)
        self.asked: set[bytes] = set()

    def get(self, key: bytes, default: bytes | None = None) -> bytes | None:  # type: ignore[override]
        self.asked.add(key)
        return super().get(key, default)


# --- vectors and captured frames --------------------------------------------------------------------------


def test_interop_commit_proofs_invert_from_their_blocks_alone() -> None:
    fixtures = json.loads(interop("firehose/commit-proof-fixtures.json").read_text())
    assert len(fixtures) == 6
    for fixture in fixtures:
        leaf = parse_cid(fixture["leafValue"])
        after = dict.fromkeys({*fixture["keys"], *fixture["adds"]} - {*fixture["dels"]}, leaf)
        root, nodes = slow_build(after)
        assert root == parse_cid(fixture["rootAfterCommit"])
        blocks = {cid: nodes[cid] for cid in map(parse_cid, fixture["blocksInProof"]) if cid in nodes}
        ops = [Op("create", key, leaf, None) for key in fixture["adds"]]
        ops += [Op("delete", key, None, leaf) for key in fixture["dels"]]
        earlier = parse_cid(fixture["rootBeforeCommit"])
        for order in (ops, ops[::-1]):
            assert invert(root, blocks, order) == earlier
            assert invert(root, blocks, order, earlier) == earlier
            assert invert(root, blocks, order, earlier, valid_base=True) == earlier


def test_every_commit_of_the_captured_session_inverts() -> None:
    seen = 0
    for name in ("pds0", "pds1"):
        data = shared_data(f"session/{name}.frames").read_bytes()
        at = 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            frame = decode_frame(data[at + 4 : at + 4 + size])
            at += 4 + size
            if isinstance(frame, CommitFrame):
                ops = [Op(*op) for op in frame.ops]
                check_ops(ops)
                blocks = read_car(frame.blocks).blocks
                earlier = frame.prev_data or mst.EMPTY_ROOT
                root = decode_commit(blocks[frame.commit]).data
                assert invert(root, blocks, ops, earlier) == earlier
                seen += 1
    assert seen > 900


# --- the twin ---------------------------------------------------------------------------------------------


STEPS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10**6)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.integers(0, 10**6), STEPS)
def test_inversion_gives_the_root_that_the_slow_twin_builds(
    size: int, seed: int, steps: list[tuple[int, int]]
) -> None:
    before, after, ops = change(records_of(size, seed), steps, list(records_of(30, seed + 1)))
    root, nodes = slow_build(after)
    earlier, _ = slow_build(before)
    for order in (ops, ops[::-1]):
        assert invert(root, nodes, order, earlier) == earlier
        assert invert(root, nodes, order, earlier, valid_base=True) == earlier


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), STEPS)
def test_the_nodes_that_were_asked_for_suffice(seed: int, steps: list[tuple[int, int]]) -> None:
    before, after, ops = change(records_of(200, seed), steps, list(records_of(20, seed + 1)))
    root, nodes = mst.build(sorted(after.items()))
    earlier = mst.build(sorted(before.items())).root
    recorder = Recorder(nodes)
    assert invert(root, recorder, ops, earlier) == earlier
    assert invert(root, {cid: nodes[cid] for cid in recorder.asked}, ops, earlier) == earlier


def test_only_nodes_near_the_operations_are_read() -> None:
    records = records_of(10_000)
    path = next(path for path in records if layer_of(path) == 0)
    after = mst.build(sorted(records.items()))
    earlier = mst.build(sorted(item for item in records.items() if item[0] != path)).root
    recorder = Recorder(after.nodes)
    assert invert(after.root, recorder, [Op("create", path, records[path], None)], earlier) == earlier
    assert len(recorder.asked) < 12


def test_the_first_commit_and_the_last_delete() -> None:
    tree = mst.build(
        [(key_on(0), V), (key_on(2), V)] if key_on(0) < key_on(2) else [(key_on(2), V), (key_on(0), V)]
    )
    creates = [Op("create", key_on(0), V, None), Op("create", key_on(2), V, None)]
    deletes = [Op("delete", op.path, None, V) for op in creates]
    assert invert(tree.root, tree.nodes, creates, mst.EMPTY_ROOT) == mst.EMPTY_ROOT
    empty = {mst.EMPTY_ROOT: mst.EMPTY_NODE}
    assert invert(mst.EMPTY_ROOT, empty, deletes, tree.root) == tree.root
    assert invert(mst.EMPTY_ROOT, empty, []) == mst.EMPTY_ROOT


# --- too few nodes, and the order of operations -----------------------------------------------------------


def test_a_missing_node_on_the_way_is_insufficient() -> None:
    records = records_of(300)
    path = next(path for path in records if layer_of(path) == 0)
    after = mst.build(sorted(records.items()))
    earlier = mst.build(sorted(item for item in records.items() if item[0] != path)).root
    op = Op("create", path, records[path], None)
    for proof_block in mst.prove(after.root, path, after.nodes.get):
        rest = {cid: block for cid, block in after.nodes.items() if block != proof_block}
        with pytest.raises(MissingBlock):
            invert(after.root, rest, [op], earlier)


def test_both_orders_need_the_same_nodes() -> None:
    """Each key that is taken out or put back needs the nodes on both its sides, whatever went before."""
    source = random.Random(5)
    for seed in range(100):
        steps = [(source.choice([0, 0, 0, 1, 2]), source.randrange(10**6)) for _ in range(12)]
        before, after, ops = change(records_of(60, seed), steps, list(records_of(30, seed + 1000)))
        root, nodes = mst.build(sorted(after.items()))
        earlier = mst.build(sorted(before.items())).root
        ops.sort(key=lambda op: (op.action != "delete", op.path))
        one, other = Recorder(nodes), Recorder(nodes)
        assert _Inversion(root, one, True).run(ops, earlier) == earlier
        assert _Inversion(root, other, True).run(ops[::-1], earlier) == earlier
        assert one.asked == other.asked


def test_an_absent_node_left_on_top_is_insufficient() -> None:
    high = key_on(2)
    low = key_on(0, high)
    after = slow_build({high: V, low: V})
    root = after[0]
    (left,) = [kid for kid in parse_node(after[1][root]).kids if kid]
    blocks = {root: after[1][root]}
    op = [Op("create", high, V, None)]
    # The child of the old root is an empty intermediate, which nobody can know who does not have it.
    for earlier in (slow_build({low: V})[0], left, None):
        with pytest.raises(MissingBlock):
            invert(root, blocks, op, earlier)
    assert invert(root, after[1], op, slow_build({low: V})[0]) == slow_build({low: V})[0]


def wide(prefix: str, layer: int, count: int) -> list[str]:
    """The first so many keys of ``layer`` in one collection, sorted."""
    found: list[str] = []
    number = 0
    while len(found) < count:
        key = f"{prefix}/{number:08d}"
        if layer_of(key) == layer:
            found.append(key)
        number += 1
    return found


def test_a_node_beside_many_creates_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = wide("com.example.a", 0, 500), wide("com.example.b", 1, 40)
    neighbour = mst.build([(key, V) for key in low])
    root, nodes = mst.build([(key, V) for key in low + high])
    decoded: list[int] = []

    def counted(block: bytes) -> node_module.Fields:
        decoded.append(len(block))
        return node_module.split_node(block)

    monkeypatch.setattr(invert_module, "split_node", counted)
    ops = [Op("create", key, V, None) for key in high]
    for order in (ops, ops[::-1]):
        decoded.clear()
        assert _Inversion(root, nodes, True).run(order, neighbour.root) == neighbour.root
        assert decoded == [len(nodes[neighbour.root])]


def test_the_nodes_of_one_inversion_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    records = records_of(300)
    path = next(path for path in records if layer_of(path) == 0)
    after = mst.build(sorted(records.items()))
    op = [Op("create", path, records[path], None)]
    invert(after.root, after.nodes, op)
    monkeypatch.setattr(invert_module, "MAX_LOADS", 1)
    with pytest.raises(MstError, match="more than 1 nodes") as caught:
        invert(after.root, after.nodes, op)
    assert caught.value.reason == "tree_size"


# --- operations that are not what the tree says -----------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [
        Op("create", key_on(0), W, None),  # another record is there
        Op("create", "com.example.room/none", V, None),
        Op("create", key_on(9), V, None),  # above the root
        Op("update", key_on(0), W, V),
        Op("update", "com.example.room/none", V, W),
        Op("delete", key_on(0), None, V),  # is still there
        Op("create", key_on(0), None, None),
        Op("update", key_on(0), V, None),
        Op("delete", "com.example.room/none", None, None),
        Op("delete", "com.example.room/" + "a" * 900, None, V),
        Op("upsert", key_on(0), V, None),
    ],
)
def test_a_tree_that_contradicts_the_operation(op: Op) -> None:
    root, nodes = slow_build({key_on(0): V, key_on(1): V, key_on(2): V})
    with pytest.raises(MstError) as caught:
        invert(root, nodes, [op])
    assert caught.value.reason == "ops"


def test_another_earlier_root_is_fraud() -> None:
    root, nodes = slow_build({key_on(0): V, key_on(1): V})
    with pytest.raises(MstError, match="gives the root") as caught:
        invert(root, nodes, [Op("create", key_on(0), V, None)], V)
    assert caught.value.reason == "inversion"


GOOD = Op("create", "com.example.room/a", V, None)


@pytest.mark.parametrize(
    ("ops", "words"),
    [
        ([Op("upsert", GOOD.path, V, None)], "unknown action"),
        ([GOOD._replace(cid=None)], "create has"),
        ([GOOD._replace(prev=W)], "create has"),
        ([Op("update", GOOD.path, V, None)], "update has"),
        ([Op("update", GOOD.path, None, V)], "update has"),
        ([Op("update", GOOD.path, V, V)], "update has"),
        ([Op("delete", GOOD.path, V, V)], "delete has"),
        ([Op("delete", GOOD.path, None, None)], "delete has"),
        ([GOOD, Op("delete", GOOD.path, None, V)], "one path"),
        ([GOOD._replace(path="com.example.room")], "room"),
        ([GOOD._replace(path="com.example.room/..")], "room"),
        ([GOOD._replace(path="room/a")], "room"),
        ([GOOD._replace(path="com.example.room/a/b")], "room"),
        ([GOOD._replace(path=f"com.example.room/{n}") for n in range(201)], "201 operations"),
    ],
)
def test_malformed_operations(ops: list[Op], words: str) -> None:
    check_ops([GOOD])
    with pytest.raises(CommitError, match=words):
        check_ops(ops)


# --- forged trees that invert to the right root -----------------------------------------------------------


def forged(blocks: list[bytes], ops: list[Op], earlier: bytes, words: str) -> None:
    known = {cid_of(block): block for block in blocks}
    for valid_base in (False, True):
        with pytest.raises(MstError, match=words):
            invert(cid_of(blocks[-1]), known, ops, earlier, valid_base=valid_base)


def test_a_pointer_on_top_of_the_right_tree() -> None:
    leaf = node([(key_on(0), V, None)], None)
    forged([leaf, node([], cid_of(leaf))], [], cid_of(leaf), "no entry")


def test_a_root_linked_straight_to_layer_zero() -> None:
    low = key_on(0)
    high = key_on(3, low)
    leaf = node([(low, V, None)], None)
    root = node([(high, V, None)], cid_of(leaf))
    # Removing the top key leaves the leaf, which is exactly the earlier tree.
    blocks = [leaf, root]
    forged(blocks, [Op("create", high, V, None)], cid_of(leaf), "of layer 0 is in a node of layer 2")


def test_an_empty_leaf_beside_the_key() -> None:
    low = key_on(0)
    high = key_on(1, low)
    leaf = node([(low, V, None)], None)
    empty = node([], None)
    root = node([(high, V, cid_of(empty))], cid_of(leaf))
    forged([leaf, empty, root], [Op("create", high, V, None)], cid_of(leaf), "is empty")


def test_a_key_on_the_wrong_layer_beside_the_operation() -> None:
    first = key_on(0)
    wrong = key_on(1, first)
    root = node([(first, V, None), (wrong, V, None)], None)
    forged(
        [root],
        [Op("create", first, V, None)],
        slow_build({wrong: V})[0],
        "of layer 1 is in a node of layer 0",
    )


def test_a_created_key_on_the_wrong_side_of_a_subtree() -> None:
    first = key_on(0)
    second = key_on(0, first)
    between = key_on(1, first)
    assert first < between
    behind = key_on(0, between)
    leaf = node([(first, V, None), (behind, V, None)], None)
    root = node([(between, V, None)], cid_of(leaf))
    earlier = slow_build({first: V, behind: V})[0]
    assert second
    forged([leaf, root], [Op("create", between, V, None)], earlier, "bounds")


class Loose:
    """A node whose keys may stand anywhere."""

    def __init__(self, keys: list[bytes], kids: list[Loose | None]) -> None:
        self.keys = keys
        self.kids = kids

    @classmethod
    def load(cls, cid: bytes, nodes: Mapping[bytes, bytes]) -> Loose:
        parsed = parse_node(nodes[cid])
        return cls(parsed.keys, [cls.load(kid, nodes) if kid else None for kid in parsed.kids])

    def all(self) -> list[Loose]:
        return [self, *(node for kid in self.kids if kid for node in kid.all())]

    def seal(self, out: dict[bytes, bytes]) -> bytes:
        block = encode_node(
            self.keys, [V] * len(self.keys), [kid.seal(out) if kid else None for kid in self.kids]
        )
        out[dag_cbor_cid(block)] = block
        return dag_cbor_cid(block)


def hung_anywhere(tree: Loose, key: bytes, source: random.Random) -> Loose:
    """``tree`` with ``key`` in any node, or a new one above or below, on either side of what is there."""
    below: Loose | None = tree
    node = source.choice(tree.all())
    index = bisect_left(node.keys, key)
    on_top, in_node = source.random() < 0.2, source.random() < 0.75
    if not on_top:
        below = node.kids[index]
        if in_node:
            node.keys.insert(index, key)
            node.kids[index : index + 1] = source.choice([[below, None], [None, below]])
            return tree
    for _ in range(source.randrange(3) if below else 0):
        below = Loose([], [below])
    made = Loose([key], source.choice([[below, None], [None, below]]))
    for _ in range(0 if on_top else source.randrange(2)):
        made = Loose([], [made])
    if on_top:
        return made
    node.kids[index] = made
    return tree


class Forgery(NamedTuple):
    """A valid tree with keys put anywhere, and what would be true of it were they in their places."""

    root: bytes
    nodes: dict[bytes, bytes]
    ops: list[Op]
    earlier: bytes
    paths: list[str]

    @property
    def holds(self) -> bool:
        """Whether the complete walk finds nothing wrong."""
        try:
            return [path for path, _ in mst.walk(self.root, self.nodes.get)] == self.paths
        except MstError:
            return False


def forgeries(seed: int, count: int) -> Iterator[Forgery]:
    source = random.Random(seed)
    pool = {layer: wide("com.example.a", layer, 12) for layer in range(4)}
    for _ in range(count):
        names = {key for layer in range(4) for key in source.sample(pool[layer], source.choice([0, 1, 3]))}
        if not names:
            continue
        old = mst.build([(key, V) for key in sorted(names)])
        tree = Loose.load(old.root, old.nodes)
        keys = {source.choice(pool[source.randrange(4)]) for _ in range(source.choice([1, 2]))} - names
        for key in sorted(keys):
            tree = hung_anywhere(tree, key.encode(), source)
        nodes: dict[bytes, bytes] = {}
        root = tree.seal(nodes)
        ops = [Op("create", key, V, None) for key in keys]
        yield Forgery(root, nodes, ops, old.root, sorted(names | keys))


@pytest.mark.parametrize("seed", range(4))
def test_a_tree_that_inverts_to_a_valid_one_is_valid(seed: int) -> None:
    """Keys are put into good trees at random: what inversion accepts, the complete walk must accept."""
    accepted = 0
    for forgery in forgeries(seed, 400):
        try:
            invert(forgery.root, forgery.nodes, forgery.ops, forgery.earlier)
        except MstError:
            continue
        assert forgery.holds
        accepted += bool(forgery.ops)
    assert accepted > 5


def test_a_node_that_is_not_canonical() -> None:
    leaf = node([(key_on(0), V, None)], None, x=1)
    forged([leaf], [Op("create", key_on(0), V, None)], mst.EMPTY_ROOT, "e .array. and l")


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=60)), max_size=3))
def test_damaged_trees_and_random_operations_raise_only_our_errors(
    seed: int, swaps: list[tuple[int, bytes]]
) -> None:
    source = random.Random(seed)
    records = records_of(40, seed)
    root, nodes = slow_build(records)
    names = sorted(nodes)
    for number, junk in swaps:
        nodes[names[number % len(names)]] = source.choice([junk, nodes[source.choice(names)]])
    paths = [*records, *records_of(5, seed + 1)]
    ops = [
        Op(
            source.choice(["create", "update", "delete"]),
            source.choice(paths),
            V,
            source.choice([V, W, None]),
        )
        for _ in range(source.randrange(6))
    ]
    try:
        invert(root, nodes, ops, source.choice([root, mst.EMPTY_ROOT, None]))
    except BadInput:
        return
