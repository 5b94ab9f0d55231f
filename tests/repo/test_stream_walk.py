"""Records that stand under several keys and came once: found again without another look at what follows."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import Driver, DriverBuilder, Output, noop
from indexer.atproto.car import Limits, car_block
from indexer.atproto.mst import TreeLimits
from indexer.repo import preorder, stream_walk
from indexer.repo.stream_walk import StreamWalk
from tests.atproto.slow_tree import cid_of, node
from tests.atproto.test_mst import key_on
from tests.repo.archives import Made, bodies, pieces, repository


@pytest.fixture(autouse=True)
def _also_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small archives are walked as they are read too."""
    monkeypatch.setattr("indexer.repo.driver._WHOLE", -1)


async def walked(car: bytes, **options: Any) -> list[Output]:
    """What the walk gives of an archive that stays in order."""
    loaded = await DriverBuilder(**options).load_car(pieces(car, 700))
    assert isinstance(loaded, Driver.Memory)
    assert isinstance(loaded.driver, StreamWalk)
    out = [output async for chunk in loaded.driver.chunks(50) for output in chunk]
    assert loaded.driver._rest is None
    return out


def once(made: Made, again: float = 0.0, seed: int = 1) -> bytes:
    """The archive with each block where it is first due; so many of the others where they are due too."""
    source, seen = random.Random(seed), set()
    chosen = []
    for block in made.blocks:
        if block not in seen or source.random() < again:
            chosen.append(block)
        seen.add(block)
    return made.car(chosen)


def shared(count: int, different: int, seed: int = 1) -> Made:
    """A repository of so many keys whose records are so many."""
    source = random.Random(seed)
    few = [b"\xa1aa\x19" + number.to_bytes(2, "big") for number in range(different)]
    return repository({path: source.choice(few) for path in bodies(count, seed)})


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 80),
    st.integers(1, 30),
    st.sampled_from([1, 60, 400, preorder.WINDOW]),
    st.sampled_from([noop, lambda block: block[:3], lambda _block: None]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 9),
)
def test_they_are_those_of_the_twin(
    count: int, different: int, window: int, processor: Any, again: float, seed: int
) -> None:
    made = shared(count, different, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_walk, "WINDOW", window)
        found = asyncio.run(walked(once(made, again, seed), mem_limit_mb=1.0, processor=processor))
    failed = processor(b"") is None
    assert [output[:2] for output in found] == [row[:2] for row in made.rows]
    assert [output.data for output in found] == [None if failed else processor(row[2]) for row in made.rows]
    assert all((output.error is not None) is failed for output in found)


async def test_every_window_is_taken_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, sections = [0], preorder._sections

    def counted(data: bytes, at: int, stop: int, *rest: Any) -> Any:
        taken[0] += max(0, stop - at)
        return sections(data, at, stop, *rest)

    monkeypatch.setattr(preorder, "_sections", counted)
    monkeypatch.setattr(stream_walk, "WINDOW", 2000)
    records = bodies(800)
    for path in sorted(records)[20::2]:
        records[path] = b"\xa1aa\x07"
    car = once(made := repository(records))
    assert [output[:3] for output in await walked(car, mem_limit_mb=1.0)] == made.rows
    assert taken[0] < 1.2 * len(car)


@pytest.mark.parametrize("every", [2, 9])
async def test_one_that_is_used_again_and_again_is_remembered(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_walk, "WINDOW", 700)
    records = bodies(300)
    for path in sorted(records)[10::every]:
        records[path] = b"\xa1aa\x07"
    made = repository(records)
    assert [output[:3] for output in await walked(once(made), mem_limit_mb=0.016)] == made.rows


async def test_a_processor_sees_one_of_a_window_once() -> None:
    seen = []

    def process(block: bytes) -> bytes:
        seen.append(block)
        return block[:3]

    made = shared(400, 3)
    found = await walked(once(made), mem_limit_mb=1.0, processor=process)
    assert [output.data for output in found] == [row[2][:3] for row in made.rows]
    assert len(seen) < 20


def test_a_record_in_the_place_of_a_node_is_not_recalled() -> None:
    """A subtree may not come in where the tree names a record that is known in its place."""
    record = b"\xa1aa\x01"
    first = key_on(1)
    below = key_on(0, first)
    last = key_on(1, below)
    leaf = node([(below, cid_of(record), None)], None)
    for kid, good in ((leaf, True), (record, False)):
        value = record if good else leaf  # every section is named somewhere
        root = node([(first, cid_of(record), cid_of(kid)), (last, cid_of(value), None)], None)
        data = b"".join(car_block(cid_of(block), block) for block in (root, record, leaf))
        walk = preorder.Preorder(cid_of(root), Limits(), TreeLimits())
        taken = walk.window(data, 0, len(data), lambda _cid: None)
        assert (taken is not None) is good
        if taken is not None:
            assert (taken.paths, walk.pending()) == (
                [first],
                [(below, cid_of(record)), (last, cid_of(record))],
            )
            assert walk.supply(taken.end, lambda _cid: record).paths == [below, last]
            assert walk.done
