"""Ranges of a tree: exactly the blocks that they need, and no lie on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import MstError
from indexer.atproto.cid import dag_cbor_cid
from indexer.atproto.mst import build
from indexer.atproto.node import EMPTY_NODE, encode_node, parse_node
from indexer.atproto.syntax import is_path
from indexer.config import FilterSettings
from indexer.ingest.filters import Filters
from indexer.repo.ranges import Range, RangePlan, probe_of, ranges_of
from indexer.repo.tree_walk import TreeWalk

NAMES = ("a.b.c", "a.b.cd", "a.b.d", "a.bc.d", "a.b.c.d", "a.b.C", "ab.c.d", "a.c.d")
PATTERNS = (*NAMES, "a.b.*", "a.*", "a.b.c.*", "ab.*")
RECORDS = {
    f"{name}/{number:03d}": dag_cbor_cid(f"{name}{number}".encode()) for name in NAMES for number in range(40)
}
TREE = build(sorted(RECORDS.items()))


def plan_of(root: bytes, ranges: Sequence[Range], known: Mapping[bytes, bytes]) -> RangePlan:
    """A plan that went through all that is known."""
    plan = RangePlan(root, ranges, known)
    plan.advance([root])
    return plan


def fetched(ranges: Sequence[Range], most: int = 7) -> tuple[RangePlan, set[bytes]]:
    """The plan once nothing is missing, and what it asked for."""
    known: dict[bytes, bytes] = {}
    plan, asked = plan_of(TREE.root, ranges, known), set[bytes]()
    while wanted := plan.missing(most):
        assert not plan.done
        assert asked.isdisjoint(wanted)
        asked.update(wanted)
        known.update({cid: TREE.nodes.get(cid, b"record") for cid in wanted})
        plan.advance(wanted)
    assert plan.done
    return plan, asked


def needed(ranges: Sequence[Range]) -> set[bytes]:
    """The nodes that walks of the ranges enter, and the records in them."""
    blocks = set[bytes]()
    for start, stop in ranges:
        walk = TreeWalk(TREE.root, start=start, stop=stop)
        while walk.want is not None:
            blocks.add(walk.want)
            blocks.update(cid for _, cid in walk.take(TREE.nodes[walk.want]))
    return blocks


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(PATTERNS), unique=True))
def test_the_ranges_hold_what_the_filter_wants_and_nothing_else(patterns: list[str]) -> None:
    filters = Filters.of(FilterSettings(collections=patterns))
    ranges = ranges_of(patterns)
    for name in NAMES:
        inside = any(start <= f"{name}/3k" < stop for start, stop in ranges)
        assert inside == (bool(patterns) and filters.wants_collection(name))
    assert all(before.stop < after.start for before, after in pairwise(ranges))
    for wanted in ranges:
        collection, rkey = probe_of(wanted)
        assert is_path(f"{collection}/{rkey}")
        assert wanted.start <= f"{collection}/{rkey}" < wanted.stop


@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3, unique=True), st.integers(1, 50))
def test_a_plan_asks_for_what_walks_need_and_for_nothing_else(patterns: list[str], most: int) -> None:
    ranges = ranges_of(patterns)
    assert fetched(ranges, most)[1] == needed(ranges)


def test_what_is_known_is_not_asked_for() -> None:
    ranges = ranges_of(["a.b.d"])
    plan = plan_of(TREE.root, ranges, TREE.nodes)
    assert set(plan.missing(1000)) == {cid for path, cid in RECORDS.items() if path.startswith("a.b.d/")}
    known = {**TREE.nodes, **dict.fromkeys(RECORDS.values(), b"record")}
    assert plan_of(TREE.root, ranges, known).done


class Looked(dict[bytes, bytes]):
    """Known blocks, and which of them were looked at."""

    def __init__(self, blocks: Mapping[bytes, bytes]) -> None:
        super().__init__(blocks)
        self.at: list[bytes] = []

    def get(self, cid: bytes, default: object = None) -> bytes | None:  # type: ignore[override]
        self.at.append(cid)
        return super().get(cid)


def test_it_goes_on_by_one_node_a_step_and_tells_what_is_missing_at_least() -> None:
    known = Looked(TREE.nodes)
    plan = RangePlan(TREE.root, ranges_of(["a.*", "ab.*"]), known)
    assert (known.at, plan.missing(10)) == ([], [TREE.root])
    records = 0
    for number, _ in enumerate(plan.begin(), 1):
        assert len(known.at) == number
        assert records <= plan.pending == plan.found
        records = plan.found
    assert (len(known.at), records) == (len(TREE.nodes), len(RECORDS))
    plan.advance([])
    assert plan.pending == len(plan.missing(1000)) == len(RECORDS)


def test_an_empty_repository_needs_its_root_alone() -> None:
    empty = build([])
    plan = plan_of(empty.root, ranges_of(["a.b.d"]), empty.nodes)
    assert plan.done
    assert plan.estimate().wanted == 0


def test_the_part_that_is_wanted_is_estimated_from_the_upper_layers() -> None:
    paths = [f"{name}/{number:05d}" for name in NAMES for number in range(500)]
    records = {path: dag_cbor_cid(path.encode()) for path in paths}
    tree = build(sorted(records.items()))
    known: dict[bytes, bytes] = {}
    plan = plan_of(tree.root, ranges_of(["a.b.d"]), known)
    for _ in range(4):
        wanted = plan.missing(10_000)
        known.update({cid: tree.nodes.get(cid, b"record") for cid in wanted})
        plan.advance(wanted)
    top = {tree.root: tree.nodes[tree.root]}
    assert not plan_of(tree.root, ranges_of(["a.b.d"]), top).estimate().sure
    found = plan.estimate()
    assert found.sure
    assert 200 < found.wanted < 1200
    assert 1000 < found.total < 16_000
    assert 0.04 < found.share < 0.4
    everything = plan_of(tree.root, ranges_of(["a.*", "ab.*"]), tree.nodes).estimate()
    assert everything.share > 0.99
    assert everything.wanted == len(records)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_node_that_may_not_stand_there_is_refused(level: int) -> None:
    other = build(sorted((f"x.y.z/{number}", cid) for number, cid in enumerate(RECORDS.values())))
    known: dict[bytes, bytes] = {}
    plan = plan_of(TREE.root, ranges_of(["a.*"]), known)
    for _ in range(level):
        wanted = [cid for cid in plan.missing(1000) if cid in TREE.nodes]
        known.update({cid: TREE.nodes[cid] for cid in wanted})
        plan.advance(wanted)
    cid = next(cid for cid in plan.missing(1000) if cid in TREE.nodes)
    known[cid] = next(iter(other.nodes.values())) if level else EMPTY_NODE  # of a source that checks no hash
    with pytest.raises(MstError):
        plan.advance([cid])


def test_a_subtree_under_two_parents_is_refused_however_often_it_is_linked() -> None:
    root = parse_node(TREE.nodes[TREE.root])
    kid = next(kid for kid in root.kids if kid is not None)
    block = encode_node(root.keys, root.values, [kid] * len(root.kids))
    with pytest.raises(MstError, match="linked twice"):
        plan_of(dag_cbor_cid(block), ranges_of(["a.*", "ab.*"]), {dag_cbor_cid(block): block})
