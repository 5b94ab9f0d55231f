"""Many nodes and whole subtrees at once: as one node after the other, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.atproto.cid import dag_cbor_cid
from indexer.atproto.mst import TreeLimits, build
from indexer.atproto.node import encode_node, parse_node, split_node
from indexer.errors import MstError
from indexer.repo import subtrees
from indexer.repo.nodes import Nodes, split_nodes
from indexer.repo.sections import all_match, whole_sections
from indexer.repo.subtrees import take_subtree
from tests.repo.archives import bodies, repository

RECORDS = {path: dag_cbor_cid(block) for path, block in bodies(400).items()}
TREE = build(sorted(RECORDS.items()))
NODES = list(TREE.nodes.values())
FAR = b"\x01\x71\x12\x20" + b"\xff" * 32


def one_by_one(blocks: Sequence[bytes]) -> Nodes | None:
    """The same by `split_node`."""
    out = Nodes([], [], [], [], [])
    for block in blocks:
        try:
            keys, values, kids = split_node(block)
        except MstError:
            return None
        out.keys.extend(keys)
        out.values.extend(values)
        out.kids.extend(kids[1:])
        out.counts.append(len(keys))
        out.lefts.append(kids[0])
    return out


def as_none(found: Nodes | None) -> Nodes | None:
    """Children that are not there are None in both."""
    return found and found._replace(kids=[kid or None for kid in found.kids])


def test_nodes_are_those_of_the_slow_way() -> None:
    empty, chain = b"\xa2ae\x80al\xf6", encode_node([], [], [dag_cbor_cid(b"kid")])
    ends = encode_node([b"a/b", b"a/c"], [FAR, FAR], [FAR, None, FAR])
    for blocks in ([], NODES, [empty], [chain], [chain, *NODES, empty, chain], [ends, ends, NODES[0], ends]):
        expected = one_by_one(blocks)
        assert expected is not None
        assert as_none(split_nodes(blocks)) == expected


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(NODES[:12]), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([b"", b"\xff", b"\0", b"a", b"\xa2ae\x81"]))),
    st.booleans(),
)
def test_damaged_nodes_are_judged_as_one_by_one(
    blocks: list[bytes], damage: list[tuple[int, bytes]], wide: bool
) -> None:
    for place, text in damage[:3]:
        number = place % len(blocks)
        at = place % len(blocks[number])
        blocks[number] = blocks[number][:at] + text + blocks[number][at + (not wide) :]
    assert as_none(split_nodes(blocks)) == one_by_one(blocks)


def test_one_block_is_never_taken_for_two_nodes() -> None:
    for between in (b"\xff" * 40, b"\0" + b"\xff" * 40, b"\0" + b"\xff" * 41):
        assert split_nodes([NODES[0] + between + NODES[1]]) is None
        assert split_nodes([NODES[0] + between, NODES[1]]) is None
    for cut in range(1, len(NODES[0])):
        assert split_nodes([NODES[0][:cut], b"\xa2ae" + NODES[0][cut:]]) is None


def fetch(cids: Sequence[bytes]) -> list[bytes | None]:
    return [TREE.nodes.get(cid) for cid in cids]


def test_a_subtree_has_the_records_below_its_node() -> None:
    layer = len(repository_layers()) - 1
    found = take_subtree(TREE.root, layer, fetch, TreeLimits())
    assert found is not None
    assert list(zip(found.paths, found.values, strict=True)) == sorted(RECORDS.items())
    assert [key.decode() for key in found.keys] == found.paths
    assert found.size == len(RECORDS) + len(TREE.nodes)
    assert take_subtree(TREE.root, layer + 1, fetch, TreeLimits()) is None
    assert take_subtree(TREE.root, layer - 1, fetch, TreeLimits()) is None


def repository_layers() -> set[int]:
    layers, level = set[int](), [TREE.root]
    while level:
        layers.add(len(layers))
        level = [kid for cid in level for kid in parse_node(TREE.nodes[cid]).kids if kid is not None]
    return layers


def test_what_is_missing_or_large_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = len(repository_layers()) - 1
    for absent in TREE.nodes:
        assert take_subtree(
            TREE.root,
            layer,
            lambda cids, absent=absent: [None if cid == absent else TREE.nodes[cid] for cid in cids],  # type: ignore[misc]
            TreeLimits(),
        ) is None  # fmt: skip
    assert take_subtree(TREE.root, layer, fetch, TreeLimits(max_node_bytes=100)) is None
    for bound in ("_MOST_NODES", "_MOST_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(subtrees, bound, 5)
            assert take_subtree(TREE.root, layer, fetch, TreeLimits()) is None


def test_sections_are_taken_whole() -> None:
    made = repository(bodies(30))
    car = made.car()
    begin = car.index(made.blocks[0]) - 38
    found = whole_sections(car, begin, len(car), 1 << 20)
    assert found is not None
    assert [car[start:end] for start, end in zip(found.starts, found.ends, strict=True)] == made.blocks
    assert found.end == len(car)
    assert all_match(found.cids, made.blocks)
    assert not all_match(found.cids, [*made.blocks[:-1], b"other"])
    assert not all_match([b"\x02" + cid[1:] for cid in found.cids], made.blocks)
    for cut in range(len(car) - 60, len(car)):
        part = whole_sections(car[:cut], begin, cut, 1 << 20)
        assert part is not None
        assert (
            len(part.cids) == len(part.starts) == len(part.ends) == sum(1 for end in found.ends if end <= cut)
        )
        assert part.end <= cut
    assert whole_sections(b"\x05" + bytes(50), 0, 51, 1 << 20) is None
    assert whole_sections(b"\xff\xff\x7f" + bytes(50), 0, 53, 1 << 20) is None
