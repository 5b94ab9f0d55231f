"""The tree: building, walking with every rule, finding, proving."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import dag_cbor
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multiformats import CID

from indexer.atproto import mst
from indexer.atproto.cid import dag_cbor_cid, format_cid, raw_cid
from indexer.atproto.node import MAX_ENTRIES, encode_node, parse_node
from indexer.errors import BadInput, MissingBlock, MstError
from tests.atproto.slow_tree import cid_of, layer_of, node, slow_build
from tests.paths import interop
from tests.repo.repos import sample

V = dag_cbor_cid(b"a record")
ROOM = "com.example.room"


def key_on(layer: int, after: str = "", collection: str = ROOM) -> str:
    """The first key of ``layer`` behind ``after``, by counting."""
    number = int(after.partition("/")[2] or -1) + 1
    while layer_of(f"{collection}/{number:06}") != layer:
        number += 1
    return f"{collection}/{number:06}"


def records_of(count: int, seed: int = 1) -> dict[str, bytes]:
    source = random.Random(seed)
    names = [f"com.example.{source.choice('abc')}/{source.randrange(10**9):x}" for _ in range(count)]
    return {name: dag_cbor_cid(name.encode()) for name in names}


RECORDS = st.dictionaries(
    st.from_regex(r"com\.example\.[ab]/[a-z0-9._~:-]{1,6}", fullmatch=True).filter(
        lambda key: key.partition("/")[2] not in (".", "..")
    ),
    st.binary(max_size=4).map(dag_cbor_cid),
    max_size=30,
)


def test_the_twin_encodes_a_node_as_an_independent_codec_does() -> None:
    entries = [("com.example.a/1", V, cid_of(b"x")), ("com.example.a/2", dag_cbor_cid(b"y"), None)]
    twin = node(entries, cid_of(b"z"), x=1)
    assert dag_cbor.encode(dag_cbor.decode(twin)) == twin
    assert links_of(dag_cbor.decode(twin)) == [cid_of(b"z"), V, cid_of(b"x"), dag_cbor_cid(b"y")]


def links_of(value: Any) -> list[bytes]:
    """The links of a decoded node: left, then value and subtree of each entry."""
    links = [value["l"], *(entry[name] for entry in value["e"] for name in ("v", "t"))]
    return [bytes(link) for link in links if link is not None]


# --- interop vectors --------------------------------------------------------------------------------------


def test_interop_key_heights() -> None:
    vectors = json.loads(interop("mst/key_heights.json").read_text())
    assert len(vectors) == 9
    assert [mst.key_layer(v["key"].encode()) for v in vectors] == [v["height"] for v in vectors]


def test_interop_common_prefix() -> None:
    vectors = json.loads(interop("mst/common_prefix.json").read_text())
    assert len(vectors) == 13
    for v in vectors:
        assert mst.common_prefix(v["left"].encode(), v["right"].encode()) == v["len"]


def test_interop_example_keys_lie_on_the_layer_of_their_digit() -> None:
    keys = interop("mst/example_keys.txt").read_text().split()
    assert len(keys) == 156
    assert all(mst.key_layer(key.encode()) == int(key[1]) for key in keys)
    tree = mst.build([(key, V) for key in sorted(keys)])
    assert (tree.root, tree.nodes) == slow_build(dict.fromkeys(keys, V))


def test_layers_without_the_vectors() -> None:
    for key, height in (("", 0), ("blue", 1), ("88bfafc7", 2), ("2a92d355", 4), ("884976f5", 6)):
        assert mst.key_layer(key.encode()) == height


# --- building ---------------------------------------------------------------------------------------------


def test_the_empty_tree() -> None:
    tree = mst.build([])
    assert format_cid(tree.root) == "bafyreie5737gdxlw5i64vzichcalba3z2v5n6icifvx5xytvske7mr3hpm"
    assert tree.root == mst.EMPTY_ROOT
    assert list(mst.walk(tree.root, tree.nodes.get)) == []
    assert mst.find(tree.root, f"{ROOM}/a", tree.nodes.get) is None
    assert mst.prove(tree.root, f"{ROOM}/a", tree.nodes.get) == [mst.EMPTY_NODE]


@settings(deadline=None, max_examples=60)
@given(RECORDS)
def test_build_and_walk_agree_with_the_slow_twin(records: dict[str, bytes]) -> None:
    tree = mst.build(sorted(records.items()))
    assert (tree.root, tree.nodes) == slow_build(records)
    assert list(mst.walk(tree.root, tree.nodes.get)) == sorted(records.items())


def test_a_larger_tree_agrees_with_the_slow_twin() -> None:
    records = records_of(1500)
    tree = mst.build(sorted(records.items()))
    assert (tree.root, tree.nodes) == slow_build(records)
    for path in [*list(records)[:50], "com.example.a/", "zzz/zzz", "com.example.b/5~"]:
        assert mst.find(tree.root, path, tree.nodes.get) == records.get(path)


@pytest.mark.parametrize(
    "items", [["b/b", "a/a"], ["a/a", "a/a"], ["a"], ["a/b/c"], ["/a"], ["a/"], ["ä/a"], ["a/ "]]
)
def test_build_refuses_what_is_no_tree(items: list[str]) -> None:
    with pytest.raises(MstError):
        mst.build([(item, V) for item in items])


def test_real_trees_are_rebuilt_from_their_records() -> None:
    for name in ("empty", "ten", "kilo"):
        truth = sample(name).truth
        items = sorted((path, mst_cid(cid)) for path, cid in truth["records"].items())
        assert format_cid(mst.build(items).root) == truth["data"]


def mst_cid(text: str) -> bytes:
    return bytes(CID.decode(text))


def test_preorder_gives_nodes_before_what_is_below_them_and_records_in_key_order() -> None:
    tree = mst.build(sorted(records_of(100).items()))
    order = list(tree.preorder())
    assert order[0] == (None, tree.root)
    assert {cid for path, cid in order if path is None} == set(tree.nodes)
    assert [item for item in order if item[0] is not None] == list(mst.walk(tree.root, tree.nodes.get))
    known = {tree.root}
    for path, cid in order:
        if path is None:
            assert cid in known
            known |= {kid for kid in parse_node(tree.nodes[cid]).kids if kid}


# --- hostile trees ----------------------------------------------------------------------------------------


def refused(blocks: list[bytes], words: str) -> None:
    """The tree whose root is the last of ``blocks`` breaks a rule, for the walk and for a look-up."""
    known = {cid_of(block): block for block in blocks}
    with pytest.raises(MstError, match=words):
        list(mst.walk(cid_of(blocks[-1]), known.get))


def test_an_empty_node_below_the_root() -> None:
    empty = node([], None)
    refused([empty, node([(key_on(1), V, cid_of(empty))], None)], "is empty")


def test_a_root_that_is_only_a_pointer() -> None:
    leaf = node([(key_on(0), V, None)], None)
    refused([leaf, node([], cid_of(leaf))], "root and has no entry")


def test_a_key_on_the_wrong_layer() -> None:
    refused(
        [node([(key_on(1), V, None), (key_on(0, key_on(1)), V, None)], None)],
        "of layer 0 is in a node of layer 1",
    )


def test_a_child_two_layers_down() -> None:
    leaf = node([(key_on(0), V, None)], None)
    refused(
        [leaf, node([(key_on(2, key_on(0)), V, None)], cid_of(leaf))], "of layer 0 is in a node of layer 1"
    )


def test_a_child_below_layer_zero() -> None:
    leaf = node([(key_on(0), V, None)], None)
    refused([leaf, node([(key_on(0, key_on(0)), V, None)], cid_of(leaf))], "on layer 0 and has a child")


def test_keys_out_of_order_across_nodes() -> None:
    low, middle = key_on(0), key_on(1, key_on(0))
    leaf = node([(low, V, None)], None)
    refused([leaf, node([(middle, V, cid_of(leaf))], None)], "does not come after")


def test_one_child_referenced_twice() -> None:
    first = key_on(1)
    second = key_on(1, first)
    leaf = node([(key_on(0, second), V, None)], None)
    refused([leaf, node([(first, V, cid_of(leaf)), (second, V, cid_of(leaf))], None)], "does not come after")


def test_an_exponential_tree_is_refused_at_once() -> None:
    # Every layer points to the one below many times over: 8**24 visits for a walk that does not look.
    blocks = [node([(key_on(0), V, None)], None)]
    for _ in range(24):
        below = CID.decode(cid_of(blocks[-1]))
        repeated = [entry(k=b"", t=below)] * 8
        blocks.append(encoded(*repeated, l=below))
    known = {cid_of(block): block for block in blocks}
    with pytest.raises(MstError):
        list(mst.walk(cid_of(blocks[-1]), known.get))


def test_a_long_chain_of_intermediates_ends_at_layer_zero() -> None:
    blocks = [node([], mst.EMPTY_ROOT)]
    for _ in range(1000):
        blocks.append(node([], cid_of(blocks[-1])))
    blocks.append(node([(key_on(3), V, cid_of(blocks[-1]))], None))
    refused(blocks, "on layer 0 and has a child")


def test_limits_on_nodes_and_records() -> None:
    tree = mst.build(sorted(records_of(200).items()))
    with pytest.raises(MstError, match="more than 100 nodes") as caught:
        list(mst.walk(tree.root, tree.nodes.get, mst.TreeLimits(max_nodes=100)))
    assert caught.value.reason == "tree_size"


def test_a_root_of_another_kind() -> None:
    with pytest.raises(MstError, match="root"):
        list(mst.walk(raw_cid(mst.EMPTY_NODE), {raw_cid(mst.EMPTY_NODE): mst.EMPTY_NODE}.get))


@pytest.mark.parametrize(
    "key", ["com.example/.", "com.example.a/..", "x/a", "com.example.a/" + "a" * 513, "1.2.3/a"]
)
def test_keys_that_are_no_paths(key: str) -> None:
    tree = mst.build([(key, V)])
    with pytest.raises(MstError, match="key"):
        list(mst.walk(tree.root, tree.nodes.get))


def test_every_missing_node_is_found() -> None:
    records = records_of(120)
    tree = mst.build(sorted(records.items()))
    for cid in tree.nodes:
        rest = {other: block for other, block in tree.nodes.items() if other != cid}
        with pytest.raises(MissingBlock) as caught:
            list(mst.walk(tree.root, rest.get))
        assert caught.value.cid == cid


# --- nodes ------------------------------------------------------------------------------------------------


ENTRY = {"p": 0, "k": key_on(0).encode(), "v": CID.decode(V), "t": None}


def entry(**changes: Any) -> dict[str, Any]:
    return ENTRY | changes


def encoded(*entries: Any, **changes: Any) -> bytes:
    return dag_cbor.encode({"e": list(entries), "l": None, **changes})


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (b"", "DAG-CBOR"),
        (b"\x00", "not a map"),
        (dag_cbor.encode({"e": []}), "not a map"),
        (encoded(x=1), "not a map"),
        (encoded(l=5), "l of a tree node"),
        (encoded(l=V), "l of a tree node|canonical"),
        (encoded(e=5), "not a map"),
        (encoded(5), "k, p, t and v"),
        (encoded(entry(x=1)), "k, p, t and v"),
        (encoded(entry(p=True)), "p is not an integer"),
        (encoded(entry(p=-1)), "p is -1"),
        (encoded(entry(p=1)), "p is 1"),
        (encoded(entry(p=2**40)), "p is 1099511627776"),
        (encoded(entry(k="text")), "k is not bytes"),
        (encoded(entry(k=b"")), "not a key"),
        (encoded(entry(k=b"a")), "not a key"),
        (encoded(entry(k=b"a/b/c")), "not a key"),
        (encoded(entry(k=b"/a")), "not a key"),
        (encoded(entry(k=b"a/")), "not a key"),
        (encoded(entry(k=b"a/\xff")), "not a key"),
        (encoded(entry(k=b"a/\n")), "not a key"),
        (encoded(entry(k=b"a/" + b"b" * 829)), "not a key"),
        (encoded(entry(k=CID.decode(V))), "not a key|k is not bytes"),
        (encoded(entry(v=None)), "v is not a link"),
        (encoded(entry(v=V)), "canonical"),
        (encoded(entry(v=CID.decode("bafkqaaik"))), "v is not a link"),
        (encoded(entry(t=CID.decode(raw_cid(b"")))), "t is neither"),
        (encoded(entry(t=5)), "t is neither"),
        (encoded(entry(), entry()), "does not come after"),
        (encoded(entry(k=b"b/b"), entry(k=b"a/a")), "does not come after"),
        (encoded(entry(k=b"a/a"), entry(p=0, k=b"a/b")), "the keys share 2"),
        (encoded(entry(k=b"a/a"), entry(p=1, k=b"/b")), "the keys share 2"),
        (encoded(entry(k=b"a/a"), entry(p=3, k=b"")), "does not come after"),
        (encoded(entry(k=b"a/a"), entry(p=4, k=b"b")), "p is 4"),
        (encoded(*[entry(k=b"a/%06d" % n, p=0) for n in range(MAX_ENTRIES + 1)]), "more than 4096"),
        (encoded(entry()) + b"\x00", "DAG-CBOR"),
        (encoded(entry(k=b"a/b")).replace(b"\x43a/b", b"\x58\x03a/b"), "canonical"),
        (encoded(entry(k=b"a/b")).replace(b"ap\x00", b"ap\x18\x00"), "canonical"),
        (encoded(entry(k=b"a/b")).replace(b"\x81", b"\x98\x01"), "canonical"),
        (encoded(entry(k=b"a/b")).replace(b"\x43a/b", b"\x44a/b"), "DAG-CBOR"),
        (b"\xa2ae\x80al\xf6" + bytes(1 << 20), "more than 1048576"),
    ],
)
def test_malformed_nodes(block: bytes, words: str) -> None:
    with pytest.raises(MstError, match=words):
        parse_node(block)


def test_a_key_that_continues_the_one_before() -> None:
    block = node([("a/a", V, None), ("a/ab", V, None)], None)
    assert parse_node(block).keys == [b"a/a", b"a/ab"]


def test_the_longest_keys() -> None:
    long = "a/" + "b" * 827
    block = node([(long + "c", V, None), (long + "d", V, None)], None)
    assert [len(key) for key in parse_node(block).keys] == [830, 830]


@pytest.mark.parametrize("count", [1, 23, 24, 255, 256, MAX_ENTRIES])
def test_nodes_of_many_entries_keep_their_bytes(count: int) -> None:
    keys = [b"com.example.a/%06d" % number for number in range(count)]
    block = encode_node(keys, [V] * count, [None] * (count + 1))
    assert parse_node(block) == (keys, [V] * count, [None] * (count + 1))
    if count <= 256:
        assert block == node([(key.decode(), V, None) for key in keys], None)


def test_every_flipped_bit_of_a_node_changes_its_meaning_or_is_refused() -> None:
    tree = mst.build(sorted(records_of(40).items()))
    block = tree.nodes[tree.root]
    good = parse_node(block)
    for position in range(len(block) * 8):
        damaged = bytearray(block)
        damaged[position // 8] ^= 1 << position % 8
        try:
            other = parse_node(bytes(damaged))
        except MstError:
            continue
        # Still canonical: then it must be another node, and come back to exactly these bytes.
        assert other != good
        assert encode_node(*other) == bytes(damaged)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200), st.booleans())
def test_garbage_as_a_node(data: bytes, framed: bool) -> None:
    block = b"\xa2ae\x81\xa4ak" + data + b"al\xf6" if framed else data
    try:
        parsed = parse_node(block)
    except MstError:
        return
    assert encode_node(*parsed) == block


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(0, 60), st.binary(max_size=120), max_size=3), st.integers(0, 2**32))
def test_damaged_trees_raise_only_our_errors(swaps: dict[int, bytes], seed: int) -> None:
    records = records_of(60, seed=3)
    tree = mst.build(sorted(records.items()))
    source = random.Random(seed)
    blocks = dict(tree.nodes)
    for number, junk in swaps.items():
        cid = sorted(blocks)[number % len(blocks)]
        blocks[cid] = source.choice([junk, source.choice(list(tree.nodes.values()))])
    calls: list[Callable[[], object]] = [
        lambda: list(mst.walk(tree.root, blocks.get)),
        lambda: mst.find(tree.root, source.choice(list(records)), blocks.get),
        lambda: mst.prove(tree.root, source.choice(list(records)), blocks.get),
    ]
    for call in calls:
        try:
            call()
        except BadInput:
            continue


# --- proofs -----------------------------------------------------------------------------------------------


def test_a_proof_suffices_to_find_a_record_or_its_absence() -> None:
    records = records_of(300)
    tree = mst.build(sorted(records.items()))
    absent = ["com.example.a/0", "com.example.b/zz", "com.example.c/~", "a.b.c/d"]
    for path in [*sorted(records)[::10], *absent]:
        proof = mst.prove(tree.root, path, tree.nodes.get)
        blocks = {dag_cbor_cid(block): block for block in proof}
        assert mst.find(tree.root, path, blocks.get) == records.get(path)
        assert dag_cbor_cid(proof[0]) == tree.root
        for cid in blocks:
            rest = {other: block for other, block in blocks.items() if other != cid}
            with pytest.raises(MissingBlock):
                mst.find(tree.root, path, rest.get)


def test_a_false_proof_is_refused() -> None:
    # A look-up must not believe a child that lies outside of its parent's bounds.
    low, middle = key_on(0), key_on(1, key_on(0))
    leaf = node([(low, V, None)], None)
    root = node([(middle, V, cid_of(leaf))], None)
    known = {cid_of(leaf): leaf, cid_of(root): root}
    with pytest.raises(MstError, match="bounds"):
        mst.find(cid_of(root), key_on(0, middle), known.get)
