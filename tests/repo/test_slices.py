"""Parts of a repository: what they prove, and that a missing node proves nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import DriveError, DriverBuilder, MstError, Output, RepoSlice
from indexer.atproto import mst
from indexer.atproto.car import car_block, car_header
from indexer.atproto.cid import dag_cbor_cid
from indexer.repo.tree_walk import TreeWalk
from tests.repo.archives import Made, bodies, pieces, repository
from tests.repo.repos import sample

MADE = repository(bodies(150))
KNOWN = {dag_cbor_cid(block): block for block in MADE.blocks}
PATHS = [row[0] for row in MADE.rows]
ABSENT = ["com.example.a/0", "com.example.b/5", "com.example.zz/1", PATHS[7] + "0", PATHS[7][:-1], "a.b.c/d"]


async def part(made: Made, blocks: list[bytes]) -> RepoSlice:
    return await DriverBuilder().load_slice(pieces(made.car([made.blocks[0], *blocks])))


def needed(start: str, stop: str | None) -> list[bytes]:
    """The nodes that a walk of this part enters."""
    walk, nodes = TreeWalk(MADE.root, start=start, stop=stop), []
    while walk.want is not None:
        nodes.append(KNOWN[walk.want])
        walk.take(nodes[-1])
    return nodes


async def test_presence_and_absence_by_the_proofs_that_we_serve() -> None:
    for path, cid, block in MADE.rows[::9]:
        proof = mst.prove(MADE.root, path, KNOWN.get)
        assert (await part(MADE, proof)).get(path) == (path, cid, None)
        assert (await part(MADE, [*proof, block])).get(path) == (path, cid, Output(path, cid, block))
    for path in ABSENT:
        proof = mst.prove(MADE.root, path, KNOWN.get)
        assert (await part(MADE, proof)).get(path) == (path, None, None)


async def test_without_a_node_on_the_way_nothing_is_proven() -> None:
    for path in [*PATHS[::20], *ABSENT]:
        proof = mst.prove(MADE.root, path, KNOWN.get)
        for number in range(len(proof)):
            slice_ = await part(MADE, proof[:number] + proof[number + 1 :])
            with pytest.raises(DriveError, match="nothing is proven") as caught:
                slice_.get(path)
            assert caught.value.kind in ("missing_root", "missing_block")


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([*PATHS, *ABSENT]), st.none() | st.sampled_from([*PATHS, *ABSENT]))
def test_a_range_is_that_of_the_twin_and_needs_every_node_on_its_way(start: str, stop: str | None) -> None:
    expected = [row for row in MADE.rows if row[0] >= start and (stop is None or row[0] < stop)]
    nodes, entries = needed(start, stop), []
    walk = TreeWalk(MADE.root, start=start, stop=stop)
    while walk.want is not None:
        entries += walk.take(KNOWN[walk.want])
    assert entries == [row[:2] for row in expected]
    # A subtree that was not entered lies outside: each node with a key of the range was.
    for block in KNOWN.values():
        if block.startswith(b"\xa2ae"):
            inside = [
                key
                for key in mst.load_node(dag_cbor_cid(block), KNOWN.get).keys
                if key.decode() >= start and (stop is None or key.decode() < stop)
            ]
            assert not inside or block in nodes


async def test_ranges_and_prefixes_of_a_part() -> None:
    start, stop = PATHS[40], PATHS[80]
    blocks = [*needed(start, stop), *(row[2] for row in MADE.rows[40:80])]
    random.Random(1).shuffle(blocks)
    slice_ = await part(MADE, blocks)
    assert [each[:3] for each in slice_.range(start, stop)] == MADE.rows[40:80]
    with pytest.raises(DriveError, match="missing"):
        slice_.range(start)
    blocks.remove(MADE.rows[50][2])
    with pytest.raises(DriveError, match="record .* is missing"):
        (await part(MADE, blocks)).range(start, stop)
    whole = await part(MADE, MADE.blocks)
    inside = [row for row in MADE.rows if row[0].startswith("com.example.b/")]
    assert [each[:3] for each in whole.prefix("com.example.b/")] == inside
    assert [each[:3] for each in whole.range("")] == MADE.rows


async def test_a_node_outside_of_its_bounds_is_refused() -> None:
    leaf_of_another = repository({"com.example.zz/9": b"\xa0"})
    for path in PATHS[::30]:
        proof = mst.prove(MADE.root, path, KNOWN.get)
        walk = TreeWalk(MADE.root, start=path, stop=path + "\0", exact=True)
        walk.take(proof[0])
        if walk.want is not None:
            with pytest.raises(MstError):
                walk.take(leaf_of_another.blocks[1])


async def test_the_commit_of_a_part_is_checked() -> None:
    _, car, truth = sample("ten")
    good = await DriverBuilder(did=truth["did"], key=truth["signingKey"]).load_slice(car)
    assert len(good.range("")) == truth["count"]
    with pytest.raises(DriveError) as caught:
        await DriverBuilder(key=sample("kilo").truth["signingKey"]).load_slice(car)
    assert caught.value.kind == "signature"
    with pytest.raises(DriveError) as caught:
        await DriverBuilder(mem_limit_mb=0.001).load_slice(car)
    assert caught.value.kind == "limit"
    made = repository({})
    headless = car_header([dag_cbor_cid(b"a commit")]) + car_block(MADE.root, KNOWN[MADE.root])
    with pytest.raises(DriveError, match="the commit") as caught:
        await DriverBuilder().load_slice(headless)
    assert caught.value.kind == "missing_commit"
    assert (await part(made, made.blocks[1:])).get("com.example.a/1").cid is None
