"""The fast walk of archives in streaming order takes the good ones, and judges as the general walk does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.atproto.car import Limits
from indexer.atproto.mst import TreeLimits
from indexer.errors import BadInput
from indexer.repo import preorder, walker
from indexer.repo.records import Records
from indexer.repo.walker import index_repo
from tests.repo.archives import bodies, repository
from tests.repo.repos import sample


@pytest.fixture
def only_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walker, "_split", lambda *_: pytest.fail("the general walk was needed"))


@pytest.mark.parametrize("window", [1, 300, 5000, preorder.WINDOW])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.usefixtures("only_fast")
def test_archives_in_order_are_walked_in_windows_of_any_size(
    window: int, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walker, "WINDOW", window)
    records = {**bodies(300), "com.example.a/long": b"y" * 20_000, "com.example.a/longer": b"z" * 200_000}
    records["com.example.m/1"] = records["com.example.m/2"] = b"\xa1aa\x01"
    made = repository(records)
    car = made.car([*made.blocks, b"a stranger", b"another"])
    index = index_repo(car, verify_hashes=verify)
    assert [(path, cid, car[start:end]) for path, cid, start, end in index.records] == made.rows
    assert index.blocks == len(made.blocks) + 2


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([1, 200, 4000]), st.booleans(), st.data())
def test_a_damaged_archive_is_judged_as_by_the_general_walk(
    seed: int, count: int, window: int, verify: bool, data: st.DataObject
) -> None:
    car = bytearray(repository(bodies(count, seed)).car())
    for _ in range(data.draw(st.integers(0, 2))):
        car[data.draw(st.integers(0, len(car) - 1))] = data.draw(st.integers(0, 255))
    general = _judged(bytes(car), verify, fast=False, window=window)
    assert _judged(bytes(car), verify, fast=True, window=window) == general


def _judged(car: bytes, verify: bool, *, fast: bool, window: int) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walker, "WINDOW", window)
        if not fast:
            patch.setattr(walker, "_in_order", lambda *_: None)
        try:
            return index_repo(car, verify_hashes=verify)
        except BadInput as error:
            return type(error), str(error)


@pytest.mark.parametrize("verify", [True, False])
def test_every_place_of_a_block_in_order_can_be_disturbed(verify: bool) -> None:
    made = repository(bodies(12))
    for number in range(1, len(made.blocks) - 1):
        blocks = list(made.blocks)
        blocks[number], blocks[number + 1] = blocks[number + 1], blocks[number]
        assert _judged(made.car(blocks), verify, fast=True, window=4000) == _judged(
            made.car(blocks), verify, fast=False, window=4000
        )


@pytest.mark.parametrize("block", [b"\xa2ae", b"\xa2ae\x80", b"\xa2ae\x81al\xf6", b"\xa2ae\x80al\xf6", b""])
def test_what_only_begins_like_a_node_is_a_record_where_it_stands_as_one(block: bytes) -> None:
    made = repository({**bodies(20), "com.example.b/node": block})
    for blocks in (made.blocks, [*made.blocks, block], [*made.blocks, made.blocks[1]]):
        car = made.car(blocks)
        for verify in (True, False):
            rows = index_repo(car, verify_hashes=verify).records
            assert [(path, cid, car[start:end]) for path, cid, start, end in rows] == made.rows


def test_limits_are_those_of_the_general_walk() -> None:
    car = repository(bodies(60)).car()
    for limits in (Limits(max_blocks=30), Limits(max_block=50), Limits(max_block=20_000, max_blocks=99)):
        for tree_limits in (TreeLimits(), TreeLimits(max_nodes=20), TreeLimits(max_depth=0)):
            judged = []
            for fast in (True, False):
                with pytest.MonkeyPatch.context() as patch:
                    if not fast:
                        patch.setattr(walker, "_in_order", lambda *_: None)
                    try:
                        judged.append(index_repo(car, limits=limits, tree_limits=tree_limits))
                    except BadInput as error:
                        judged.append(str(error))  # type: ignore[arg-type]
            assert judged[0] == judged[1]


# --- the compact records ------------------------------------------------------------------------------------


def test_records_are_a_sequence() -> None:
    car = sample("kilo").car
    records = index_repo(car).records
    rows = list(records)
    assert len(records) == len(rows) == 1000
    assert records[0] == rows[0]
    assert records[-1] == rows[999]
    for part in (
        slice(0, 5),
        slice(990, 2000),
        slice(5, 1, 1),
        slice(-3, None),
        slice(0, 999, 7),
        slice(9, 2, -3),
    ):
        assert records[part] == rows[part]
    with pytest.raises(IndexError, match="record 1000 of 1000"):
        records[1000]
    assert records == rows
    assert records != rows[1:]
    assert Records(b"") == []


def test_places_of_paths() -> None:
    made = repository(bodies(90))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walker, "WINDOW", 500)
        records = index_repo(made.car()).records
    paths = [row[0] for row in made.rows]
    for number, path in enumerate(paths):
        assert records.place(path) == number
        assert records.place(path + "0") == number + 1
    assert records.place("") == 0
    assert records.place("~") == 90
    assert Records(b"").place("a") == 0
    assert list(records.after(90)) == []
