"""CAR archives: three readers that agree, limits, damage."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import dag_cbor
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multiformats import CID, varint

from indexer.atproto.car import (
    DEFAULT_LIMITS,
    Car,
    CarSplitter,
    Limits,
    car_block,
    car_header,
    iter_blocks,
    read_car,
    read_varint,
)
from indexer.atproto.cid import dag_cbor_cid, raw_cid
from indexer.errors import BadInput, CarError
from tests.repo.repos import sample

BLOCKS = [b"\xa0", b"\xa1aa\x01", b"", b"x" * 300, b"y" * 20_000]
ROOT = dag_cbor_cid(BLOCKS[0])
HEADER = car_header([ROOT])


def archive(*blocks: bytes, header: bytes = HEADER) -> bytes:
    return header + b"".join(car_block(dag_cbor_cid(block), block) for block in blocks)


def section(cid: bytes, block: bytes) -> bytes:
    return bytes(varint.encode(len(cid) + len(block))) + cid + block


def split(data: bytes, *cuts: int, limits: Limits = DEFAULT_LIMITS, verify: bool = True) -> Car:
    """What `CarSplitter` makes of ``data`` in pieces."""
    splitter = CarSplitter(limits, verify)
    blocks: dict[bytes, bytes] = {}
    bounds = [0, *sorted(cuts), len(data)]
    for start, end in pairwise(bounds):
        blocks.update(splitter.feed(data[start:end]))
    splitter.close()
    assert splitter.size == len(data)
    assert splitter.roots is not None
    return Car(splitter.roots, blocks)


def refused(data: bytes, words: str, limits: Limits = DEFAULT_LIMITS) -> None:
    """Every reader refuses ``data`` with an error that says ``words``."""
    with pytest.raises(CarError, match=words):
        read_car(data, limits)
    with pytest.raises(CarError, match=words):
        list(iter_blocks(data, limits))
    with pytest.raises(CarError, match=words):
        split(data, *range(0, len(data), max(1, len(data) // 7)), limits=limits)


# --- what is fine -----------------------------------------------------------------------------------------


def test_what_is_written_is_read() -> None:
    data = archive(*BLOCKS)
    expected = {dag_cbor_cid(block): block for block in BLOCKS}
    assert read_car(data) == Car((ROOT,), expected)
    assert {cid: data[start:end] for cid, start, end in iter_blocks(data)} == expected


def test_sections_are_those_of_the_specification() -> None:
    header = dag_cbor.encode({"version": 1, "roots": [CID.decode(ROOT)]})
    data = bytes(varint.encode(len(header))) + header + b"".join(section(dag_cbor_cid(b), b) for b in BLOCKS)
    assert data == archive(*BLOCKS)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 21_000), max_size=12))
def test_pieces_of_any_size_give_the_same(cuts: list[int]) -> None:
    data = archive(*BLOCKS)
    assert split(data, *[min(cut, len(data)) for cut in cuts]) == read_car(data)


def test_one_byte_at_a_time() -> None:
    data = archive(*BLOCKS[:4])
    assert split(data, *range(len(data))) == read_car(data)


def test_real_archives_in_pieces() -> None:
    data = sample("kilo").car
    source = random.Random(1)
    cuts = [source.randrange(len(data)) for _ in range(100)]
    assert split(data, *cuts) == read_car(data)


def test_a_splitter_holds_one_section_at_most() -> None:
    splitter = CarSplitter()
    block = b"z" * 1_000_000
    data = archive(block, block)
    for start in range(0, len(data), 65_536):
        splitter.feed(data[start : start + 65_536])
        assert len(splitter._buffer) <= len(block) + 65_536
    splitter.close()
    assert splitter.blocks == 2


def test_duplicates_unlinked_blocks_raw_blocks_and_more_roots_are_fine() -> None:
    other = b"\x12\x20" + bytes(32)
    data = (
        car_header([ROOT, other]) + archive(BLOCKS[0], BLOCKS[0], header=b"") + car_block(raw_cid(b"r"), b"r")
    )
    car = read_car(data)
    assert car.roots == (ROOT, other)
    assert car.blocks == {ROOT: BLOCKS[0], raw_cid(b"r"): b"r"}
    assert len(list(iter_blocks(data))) == 3


def test_no_root_and_no_block() -> None:
    assert read_car(car_header([])) == Car((), {})


def test_hashes_can_be_left_to_the_caller() -> None:
    data = bytearray(archive(BLOCKS[3]))
    data[-1] ^= 1
    assert len(read_car(bytes(data), verify=False).blocks) == 1
    assert len(split(bytes(data), verify=False).blocks) == 1
    refused(bytes(data), "does not hash")


# --- headers ----------------------------------------------------------------------------------------------


def header_of(value: Any) -> bytes:
    block = dag_cbor.encode(value)
    return bytes(varint.encode(len(block))) + block


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"\x00", "header"),
        (b"\x01\xff", "header"),
        (header_of([]), "no CAR"),
        (header_of({"version": 1}), "roots and version"),
        (header_of({"version": 1, "roots": [], "x": 1}), "roots and version"),
        (header_of({"version": 2, "roots": []}), "version 2"),
        (header_of({"version": True, "roots": []}), "version True"),
        (header_of({"version": 1, "roots": 5}), "array of links"),
        (header_of({"version": 1, "roots": [5]}), "array of links"),
        (header_of({"version": 1, "roots": [ROOT]}), "canonical"),
        (header_of({"version": 1, "roots": [CID.decode(b"\x12\x20" + bytes(32))]}), "CIDv0"),
        (header_of({"version": 1, "roots": [CID.decode("bafkqaaik")]}), "unusable"),
        (HEADER[:1] + HEADER[1:].replace(b"\x01", b"\x18\x01")[: HEADER[0]], "header"),
        (b"\xff\xff\x04" + bytes(100), "more than 65536"),
        (bytes(varint.encode(len(HEADER) + 1)) + HEADER[1:] + b"\x00" * 2, "header"),
    ],
)
def test_bad_headers(header: bytes, words: str) -> None:
    refused(header + archive(BLOCKS[0], header=b""), words)


# --- damage and limits ------------------------------------------------------------------------------------


def test_empty() -> None:
    with pytest.raises(CarError, match="empty"):
        read_car(b"")
    with pytest.raises(CarError, match="ends inside its header"):
        split(b"")


@pytest.mark.parametrize("page", [b"<html>It works!</html>", b'{"error":"no"}', b"<!doctype html>" * 20])
def test_what_is_no_car_at_all_is_told_as_that(page: bytes) -> None:
    for read in (read_car, split):
        with pytest.raises(CarError, match="^no CAR: "):
            read(page)


def test_every_cut_is_an_error_unless_it_falls_between_sections() -> None:
    data = archive(*BLOCKS[:4])
    ends = {len(HEADER)} | {end for _, _, end in iter_blocks(data)}
    for cut in range(len(data)):
        if cut in ends:
            continue
        with pytest.raises(CarError) as caught:
            read_car(data[:cut])
        assert caught.value.reason == "car_truncated"
        with pytest.raises(CarError) as caught:
            split(data[:cut])
        assert caught.value.reason == "car_truncated"


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        (b"\x00", "too short"),
        (b"\x00" * 100, "too short"),
        (b"\x23" + bytes(35), "too short"),
        (b"\xa4\x00" + bytes(36), "not minimal"),
        (b"\x80\x00" + bytes(36), "not minimal"),
        (b"\xff" * 9 + b"\x01" + bytes(36), "longer than 9"),
        (b"\xff" * 8 + b"\x7f" + bytes(36), "more than 2097152"),
        (bytes(varint.encode(2097152 + 37)) + bytes(36), "more than 2097152"),
        (section(b"\x12\x20" + bytes(34), b"x"), "CIDv0"),
        (section(b"\x02\x71\x12\x20" + bytes(32), b"x"), "version"),
        (section(b"\x01\x70\x12\x20" + bytes(32), b"x"), "codec"),
        (section(b"\x01\x71\x13\x40" + bytes(64), b"x"), "sha-256"),
        (section(b"\x01\x71\x12\x10" + bytes(32), b"x"), "digest"),
        (section(b"\x01\x71\x00\x20" + bytes(32), b"x"), "sha-256"),
        (section(ROOT, b"x"), "does not hash"),
    ],
)
def test_bad_sections(tail: bytes, words: str) -> None:
    refused(archive(BLOCKS[3]) + tail, words)


def test_errors_name_the_offset() -> None:
    good = archive(BLOCKS[3])
    refused(good + b"\x00", f"offset {len(good)}")
    refused(good + section(ROOT, b"x"), f"offset {len(good)}")


def test_limits() -> None:
    data = archive(*BLOCKS)
    refused(data, "more than 1000", Limits(max_bytes=1000))
    refused(data, "more than 19999", Limits(max_block=19_999))
    refused(data, "more than 4 blocks", Limits(max_blocks=4))
    refused(data, "more than 30", Limits(max_header=30))
    exact = Limits(max_bytes=len(data), max_block=20_000, max_blocks=5, max_header=len(HEADER) - 1)
    assert read_car(data, exact) == split(data, limits=exact)


def test_an_endless_archive_stops_at_its_limit() -> None:
    splitter = CarSplitter(Limits(max_bytes=1_000_000))
    splitter.feed(HEADER)
    piece = archive(BLOCKS[4], header=b"")
    for _ in range(1_000_000 // len(piece)):
        splitter.feed(piece)
    with pytest.raises(CarError, match="more than 1000000"):
        splitter.feed(piece)
    assert splitter.size <= 1_000_000


def test_a_block_that_never_ends_is_not_waited_for() -> None:
    splitter = CarSplitter()
    splitter.feed(HEADER)
    with pytest.raises(CarError, match="more than 2097152"):
        splitter.feed(b"\xff\xff\xff\x7f")


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**63 - 1))
def test_varints(value: int) -> None:
    data = bytes(varint.encode(value))
    assert read_varint(b"??" + data + b"!", 2) == (value, 2 + len(data))


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200), st.booleans())
def test_garbage(data: bytes, headed: bool) -> None:
    data = HEADER + data if headed else data
    outcomes: list[Car | None] = []
    for reader in (read_car, split):
        try:
            outcomes.append(reader(data))
        except BadInput:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_never_passes(position: int, bit: int) -> None:
    data = bytearray(archive(*BLOCKS[:4]))
    data[position % len(data)] ^= 1 << bit
    try:
        car = read_car(bytes(data))
    except CarError:
        return
    # A root that is another CID, which the archive does not have, is for the reader of the repository.
    assert car.roots != (ROOT,)
    assert car.roots[0] not in car.blocks
