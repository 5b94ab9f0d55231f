"""The short way: it proves most commits, nothing that is not so, and leaves the rest to the judge."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.atproto import mst
from indexer.atproto.car import read_car
from indexer.atproto.commit import decode_commit
from indexer.atproto.frames import CommitFrame, decode_frame
from indexer.atproto.node import encode_node, parse_node
from indexer.atproto.ops import Op
from indexer.atproto.shortcut import MAX_OPS, proves
from tests.atproto.slow_tree import cid_of, layer_of, slow_build
from tests.atproto.test_invert import STEPS, V, W, change, forgeries
from tests.atproto.test_mst import key_on, records_of
from tests.paths import DATA


def test_most_commits_of_a_real_pds_are_proven() -> None:
    proven = seen = 0
    for path in sorted((DATA / "session").glob("*.frames")):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            frame = decode_frame(data[at + 4 : at + 4 + size])
            at += 4 + size
            if isinstance(frame, CommitFrame) and frame.prev_data not in (None, mst.EMPTY_ROOT):
                blocks = read_car(frame.blocks).blocks
                root = decode_commit(blocks[frame.commit]).data
                seen += 1
                proven += proves(root, blocks, [Op(*op) for op in frame.ops], frame.prev_data)
    assert seen > 100
    assert proven > 0.75 * seen


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 60), st.integers(0, 10**6), STEPS)
def test_only_the_true_earlier_root_is_proven(size: int, seed: int, steps: list[tuple[int, int]]) -> None:
    before, after, ops = change(records_of(size, seed), steps[:MAX_OPS], list(records_of(30, seed + 1)))
    root, nodes = slow_build(after)
    untouched = dict(nodes)
    other = slow_build({**before, key_on(1): W})[0]
    proves(root, nodes, ops, slow_build(before)[0])
    assert not proves(root, nodes, ops, other)
    assert nodes == untouched, "the blocks of the frame stay as they came"


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("action", ["create", "update", "delete"])
def test_every_kind_of_operation_is_proven_somewhere(layer: int, action: str) -> None:
    proven = 0
    for seed in range(12):
        records = records_of(400, seed)
        paths = [path for path in sorted(records) if layer_of(path) == layer]
        path = paths[seed % len(paths)]
        with_it, without = records, {key: cid for key, cid in records.items() if key != path}
        before, after, op = {
            "create": (without, with_it, Op("create", path, records[path], None)),
            "update": (with_it, {**with_it, path: W}, Op("update", path, W, records[path])),
            "delete": (with_it, without, Op("delete", path, None, records[path])),
        }[action]
        root, nodes = mst.build(sorted(after.items()))
        proven += proves(root, nodes, [op], mst.build(sorted(before.items())).root)
    # The judge's: a delete above the leaves, which splits what lies between its neighbours, and the root's
    # first key.
    assert proven > 6 or (action == "delete" and layer > 0)


@pytest.mark.parametrize("seed", range(6))
def test_a_tree_that_is_proven_is_valid(seed: int) -> None:
    """Keys are put into good trees at random: what is proven, the complete walk must accept."""
    proven = refused = 0
    for forgery in forgeries(1000 + seed, 700):
        if proves(forgery.root, forgery.nodes, forgery.ops, forgery.earlier):
            assert forgery.holds
            proven += bool(forgery.ops)
        else:
            refused += 1
    assert proven > 5
    assert refused > 100


def test_a_key_of_another_layer_in_the_root() -> None:
    """Only a key that stays tells on which layer the root is."""
    wrong, right = sorted((key_on(1), key_on(2)))
    _, tree = slow_build({right: V})
    root = encode_node([wrong.encode(), right.encode()], [V, V], [None, None, None])
    earlier = slow_build({right: V})[0]
    assert not proves(cid_of(root), {**tree, cid_of(root): root}, [Op("create", wrong, V, None)], earlier)


def test_many_operations_are_the_judges() -> None:
    records = records_of(100)
    after = {**records, **{f"com.example.z/{number}": V for number in range(MAX_OPS + 1)}}
    ops = [Op("create", path, V, None) for path in after if path not in records]
    root, nodes = mst.build(sorted(after.items()))
    earlier = mst.build(sorted(records.items())).root
    assert not proves(root, nodes, ops, earlier)


def test_a_missing_node_beside_the_key_is_the_judges() -> None:
    """What faces the key on either side must have been sent, down to the leaves."""
    records = records_of(300)
    asked = 0
    order = sorted(records)
    for path in [path for path in order if layer_of(path) == 2][:10]:
        root, nodes = mst.build(sorted(records.items()))
        earlier = mst.build(sorted(item for item in records.items() if item[0] != path)).root
        op = Op("create", path, records[path], None)
        for cid in list(nodes):
            keys = {order.index(key.decode()) for key in parse_node(nodes[cid]).keys}
            if cid != root and keys & {order.index(path) - 1, order.index(path) + 1}:
                fewer = {key: block for key, block in nodes.items() if key != cid}
                assert not proves(root, fewer, [op], earlier)
                asked += 1
    assert asked > 10


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=90)), max_size=4))
def test_junk_proves_nothing_and_raises_nothing(seed: int, swaps: list[tuple[int, bytes]]) -> None:
    source = random.Random(seed)
    records = records_of(40, seed)
    root, nodes = slow_build(records)
    names = sorted(nodes)
    for number, junk in swaps:
        at = names[number % len(names)]
        cut = nodes[at][: source.randrange(len(nodes[at]) + 1)]
        nodes[at] = source.choice([junk, cut, cut + junk, nodes[source.choice(names)]])
    actions, paths = ["create", "update", "delete"], list(records)
    ops = [
        Op(source.choice(actions), source.choice(paths), V, source.choice([V, W]))
        for _ in range(source.randrange(1, 4))
    ]
    assert not proves(root, nodes, ops, mst.EMPTY_ROOT)
