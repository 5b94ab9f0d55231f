"""Verification in bounded memory: in windows, by a table on disk, and in memory say the same of every CAR."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from indexer.atproto.car import read_header, sections
from indexer.atproto.dagcbor import check_record
from indexer.backfill import spans, verify
from indexer.backfill.apply import CarBlocks
from indexer.backfill.verify import IndexEntry, Verified, read_index, table_path, verify_car
from indexer.errors import CarError, FetchError, IndexerError, MissingBlock, SignatureInvalid
from indexer.simulator.account import Write
from indexer.simulator.corpus import CarInfo, build_car, write_car
from indexer.simulator.wire import car as wire_car
from indexer.simulator.wire import car_section
from indexer.store.codecs import OVERSIZE
from tests.ingest.forge import POST, Forge

NODES = 100_000


def blocks_of(data: bytes) -> list[bytes]:
    """The sections of a CAR, the header first."""
    _roots, start = read_header(data)
    found = [data[:start]]
    found += [car_section(cid, data[begin:end]) for cid, begin, end in sections(data, start)]
    return found


def shuffled(data: bytes) -> bytes:
    header, *blocks = blocks_of(data)
    random.Random(1).shuffle(blocks)
    return header + b"".join(blocks)


def half_in_order(data: bytes) -> bytes:
    """The first half of the blocks lies in streaming order."""
    header, *blocks = blocks_of(data)
    half = len(blocks) // 2
    return header + b"".join(blocks[:half] + blocks[:half:-1] + [blocks[half]])


def kinds(data: bytes) -> dict[str, bytes]:
    header, commit, *rest = blocks_of(data)
    return {
        "in order": data,
        "shuffled": shuffled(data),
        "half in order": half_in_order(data),
        "commit last": header + b"".join(rest) + commit,
        "twice": data + b"".join(rest),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[CarInfo, bytes]:
    path = tmp_path_factory.mktemp("car") / "one.car"
    with path.open("wb") as out:
        info = write_car(out, seed=7, records=3500)
    return info, path.read_bytes()


def verified(
    folder: Path, info: CarInfo, data: bytes, mib: int = 0, key: str = ""
) -> tuple[Verified, list[IndexEntry]]:
    """With 0 MiB nothing fits into memory but the table, which takes one at least."""
    car = folder / "a.car"
    car.write_bytes(data)
    index = folder / "a.index"
    try:
        found = verify_car(car, index, info.did, key or info.signing_key, NODES, mib)
    finally:
        assert not table_path(car).exists()
    return found, [entry for chunk in read_index(index) for entry in chunk]


def test_a_car_in_memory_is_verified_as_one_in_a_file(tmp_path: Path, made: tuple[CarInfo, bytes]) -> None:
    info, data = made
    index = tmp_path / "none.index"

    def held(data: bytes, key: str = info.signing_key) -> Verified:
        return verify_car(data, index, info.did, key, NODES, 1)

    whole, expected = verified(tmp_path, info, data, mib=64)
    found = held(data)
    assert found._replace(held_index=b"") == whole
    entries = [entry for chunk in read_index(found.held_index) for entry in chunk]
    assert entries == expected
    with CarBlocks(data) as blocks:
        assert blocks.read(entries[-5:]) == [
            (path, cid, data[begin:end], flags) for path, cid, begin, end, flags in entries[-5:]
        ]
    assert not index.exists()
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    for wrong in (damaged, data[:-1], b""):
        with pytest.raises(IndexerError):
            held(wrong)
    with pytest.raises(SignatureInvalid):
        held(data, "did:key:zQ3shokFTS3brHcDQrn82RUDfCZESWL1ZdCEJwekUDPQiYBme")


@pytest.mark.parametrize("kind", ["in order", "shuffled", "half in order", "commit last", "twice"])
def test_every_order_and_every_way_give_the_same_records(
    tmp_path: Path, made: tuple[CarInfo, bytes], kind: str
) -> None:
    info, data = made
    data = kinds(data)[kind]
    whole, expected = verified(tmp_path, info, data, mib=64)
    assert whole.records == info.records == len(expected)
    bounded, entries = verified(tmp_path, info, data)
    assert bounded == whole
    assert [entry[:2] for entry in entries] == [entry[:2] for entry in expected]
    assert [data[entry[2] : entry[3]] for entry in entries] == [
        data[entry[2] : entry[3]] for entry in expected
    ]
    with CarBlocks(tmp_path / "a.car") as blocks:
        for start in range(0, len(entries), 500):
            part = entries[start : start + 500]
            read = [(path, cid, data[begin:end], flags) for path, cid, begin, end, flags in part]
            assert blocks.read(part) == read


def test_a_car_in_order_needs_no_table(
    tmp_path: Path, made: tuple[CarInfo, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "any_order", None)
    info, data = made
    assert verified(tmp_path, info, data)[0].records == info.records


@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_a_cut_large_car_is_refused_for_what_it_lacks(
    tmp_path: Path, made: tuple[CarInfo, bytes], order: str
) -> None:
    info, data = made
    header, *blocks = blocks_of(kinds(data)[order])
    for count in (0, 1, len(blocks) // 2, len(blocks) - 1):
        with pytest.raises(MissingBlock):
            verified(tmp_path, info, header + b"".join(blocks[:count]))
    with pytest.raises(CarError) as caught:
        verified(tmp_path, info, (header + b"".join(blocks))[:-1])
    assert caught.value.reason == "car_truncated"


@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_a_damaged_or_foreign_large_car_is_refused(
    tmp_path: Path, made: tuple[CarInfo, bytes], order: str
) -> None:
    info, data = made
    data = kinds(data)[order]
    at = len(data) * 3 // 4
    damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    with pytest.raises(IndexerError):
        verified(tmp_path, info, damaged)
    other = "did:key:zQ3shokFTS3brHcDQrn82RUDfCZESWL1ZdCEJwekUDPQiYBme"
    with pytest.raises(SignatureInvalid):
        verified(tmp_path, info, data, key=other)


def test_a_large_car_keeps_to_the_number_of_blocks(tmp_path: Path, made: tuple[CarInfo, bytes]) -> None:
    info, data = made
    for kind in ("in order", "shuffled"):
        (tmp_path / "a.car").write_bytes(kinds(data)[kind])
        with pytest.raises(CarError, match="more than 1000 blocks"):
            verify_car(tmp_path / "a.car", tmp_path / "a.index", info.did, info.signing_key, 1000, 0)


def test_pages_that_were_read_are_given_back(
    tmp_path: Path, made: tuple[CarInfo, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    info, data = made
    given: list[int] = []
    monkeypatch.setattr(spans, "_GIVE_BACK", 100_000)
    monkeypatch.setattr(spans, "give_back", lambda buffer: given.append(len(buffer)))
    verified(tmp_path, info, data)
    assert len(given) >= len(data) // 200_000


def test_a_block_that_is_not_there_is_no_block(tmp_path: Path) -> None:
    (tmp_path / "a.car").write_bytes(b"0123456789")
    with CarBlocks(tmp_path / "a.car") as blocks:
        assert blocks.read([("a/b", b"c", 2, 4, 0)]) == [("a/b", b"c", b"23", 0)]
        assert blocks.read([("a/b", b"c", 2, 1 << 40, OVERSIZE)]) == [("a/b", b"c", b"", OVERSIZE)]
        with pytest.raises(FetchError, match="ends before"):
            blocks.read([("a/b", b"c", 8, 11, 0)])


def test_records_of_every_size_of_gap_are_read(tmp_path: Path) -> None:
    data = build_car(3, 50)
    (tmp_path / "a.car").write_bytes(data)
    chance = random.Random(4)
    with CarBlocks(tmp_path / "a.car") as blocks:
        for _ in range(50):
            at = [chance.randrange(len(data) - 20) for _ in range(chance.randrange(1, 4))]
            entries: list[IndexEntry] = [(f"p{start}", b"", start, start + 9, 0) for start in at]
            assert blocks.read(entries) == [(f"p{start}", b"", data[start : start + 9], 0) for start in at]


def test_a_record_under_many_keys_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million keys may share one block, whose check takes a part of a second."""
    looked_at: list[int] = []

    def spy(block: bytes, **limits: int) -> None:
        looked_at.append(len(block))
        check_record(block, **limits)

    monkeypatch.setattr(verify, "check_record", spy)
    forge = Forge()
    value = {"$type": POST, "text": "x" * 2000}
    forge.parts(*[Write("create", f"{POST}/3zzzzzzzzz{number:03d}", value) for number in range(150)])
    account = forge.account
    car = tmp_path / "a.car"
    car.write_bytes(wire_car(account.commit_cid, account.blocks()))
    found = verify_car(car, tmp_path / "a.index", account.did, forge.key, NODES, 1)
    assert (found.records, found.flagged) == (150, 0)
    assert len(looked_at) == 1
