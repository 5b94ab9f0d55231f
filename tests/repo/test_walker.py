"""Whole repositories: real ones against their truth, hostile ones refused by both walks."""

from __future__ import annotations

import mmap
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.atproto import mst
from indexer.atproto.car import Limits, car_block, car_header, iter_blocks, read_car
from indexer.atproto.cid import dag_cbor_cid, format_cid, raw_cid
from indexer.atproto.commit import Commit, encode_commit
from indexer.atproto.mst import TreeLimits
from indexer.errors import BadInput, CarError, CommitError, MissingBlock, MstError, SignatureInvalid
from indexer.repo import walker
from indexer.repo.walker import RepoIndex, index_repo, load_repo, walk_chunks, walk_records
from tests.atproto.slow_tree import cid_of, node
from tests.atproto.test_mst import V, key_on, records_of
from tests.repo.repos import NAMES, sample, session_cars, session_truth

DID = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"
REV = "3jzfcijpj2z2a"


def commit_of(data: bytes) -> bytes:
    return encode_commit(Commit(DID, 3, data, REV, None, bytes(64)))


def archive(data: bytes, blocks: list[bytes]) -> bytes:
    """A repository whose commit names ``data``, unsigned."""
    commit = commit_of(data)
    sections = [car_block(dag_cbor_cid(block), block) for block in (commit, *blocks)]
    return car_header([dag_cbor_cid(commit)]) + b"".join(sections)


def made(count: int, seed: int = 1) -> tuple[dict[str, bytes], list[bytes], bytes]:
    """(records, all blocks but the commit, data root)."""
    bodies = {path: b"\xa1aa" + bytes((0x78, len(path))) + path.encode() for path in records_of(count, seed)}
    records = {path: dag_cbor_cid(body) for path, body in bodies.items()}
    tree = mst.build(sorted(records.items()))
    return records, [*tree.nodes.values(), *bodies.values()], tree.root


def agrees(index: RepoIndex, car: bytes, truth: dict[str, object]) -> None:
    assert index.commit.did == truth["did"]
    assert index.commit.rev == truth["rev"]
    assert format_cid(index.data) == truth["data"]
    assert format_cid(index.commit_cid) == truth["commit"]
    assert len(index.records) == truth["count"]
    assert {path: format_cid(cid) for path, cid, _, _ in index.records} == truth["records"]
    paths = [record[0] for record in index.records]
    assert paths == sorted(paths)
    assert all(cid == dag_cbor_cid(car[start:end]) for _, cid, start, end in index.records)
    assert index.bytes == len(car)
    assert index.blocks == sum(1 for _ in iter_blocks(car, verify=False))


# --- real repositories ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_real_repository_agrees_with_its_truth(name: str) -> None:
    _, car, truth = sample(name)
    index = index_repo(car, did=truth["did"], key=truth["signingKey"])
    agrees(index, car, truth)
    assert index_repo(car, verify_hashes=False) == index


def test_the_repositories_of_the_session_agree_with_their_truth() -> None:
    truth = session_truth()
    cars = session_cars()
    assert len(cars) == 10
    for path in cars:
        car = path.read_bytes()
        did = index_repo(car).commit.did
        agrees(index_repo(car, did=did, key=truth[did]["signingKey"]), car, truth[did])


def test_records_come_in_chunks_and_from_any_buffer(tmp_path: Path) -> None:
    car = sample("kilo").car
    (tmp_path / "car").write_bytes(car)
    with (
        (tmp_path / "car").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        for buffer in (car, bytearray(car), memoryview(car), mapped):
            repo = load_repo(buffer)
            chunks = list(walk_chunks(repo, 300))
            assert [len(chunk) for chunk in chunks] == [300, 300, 300, 100]
            assert [record for chunk in chunks for record in chunk] == list(walk_records(repo))
            assert list(repo.records) == list(walk_records(repo))
            assert all(cid == dag_cbor_cid(block) for _, cid, block in repo.records)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 80), st.integers(0, 10**6))
def test_order_of_blocks_duplicates_and_strangers_do_not_matter(count: int, seed: int) -> None:
    records, blocks, root = made(count, seed)
    source = random.Random(seed)
    car = archive(
        root,
        source.sample([*blocks, *blocks[:3], b"\xa0", b"stranger"], k=len(blocks) + 2 + min(3, len(blocks))),
    )
    index = index_repo(car + car_block(raw_cid(b"blob"), b"blob"))
    assert [(path, cid) for path, cid, _, _ in index.records] == sorted(records.items())


def test_a_record_that_looks_like_a_node_and_one_of_many_keys() -> None:
    body = mst.EMPTY_NODE
    tree = mst.build([("com.example.a/1", dag_cbor_cid(body)), ("com.example.a/2", dag_cbor_cid(body))])
    index = index_repo(archive(tree.root, [*tree.nodes.values(), body]))
    assert [record[1] for record in index.records] == [mst.EMPTY_ROOT] * 2


def test_the_tree_itself_as_a_record() -> None:
    inner = mst.build([("com.example.a/1", dag_cbor_cid(b"\xa0"))])
    outer = mst.build([("com.example.a/1", dag_cbor_cid(b"\xa0")), ("com.example.b/1", inner.root)])
    blocks = [b"\xa0", *inner.nodes.values(), *outer.nodes.values()]
    assert len(index_repo(archive(outer.root, blocks)).records) == 2


def test_sections_of_more_than_16_kib() -> None:
    body = b"\x59\x50\x00" + bytes(0x5000)
    tree = mst.build([("com.example.a/1", dag_cbor_cid(body))])
    index = index_repo(archive(tree.root, [*tree.nodes.values(), body]))
    (_, _, start, end) = index.records[0]
    assert end - start == len(body)


# --- completeness -----------------------------------------------------------------------------------------


def test_every_missing_block_is_found() -> None:
    _, blocks, root = made(60)
    index_repo(archive(root, blocks))
    for number in range(len(blocks)):
        with pytest.raises(MissingBlock) as caught:
            index_repo(archive(root, blocks[:number] + blocks[number + 1 :]))
        assert caught.value.cid == dag_cbor_cid(blocks[number])


@pytest.mark.parametrize("name", ["empty", "ten"])
def test_every_cut_is_noticed(name: str) -> None:
    car = sample(name).car
    for end in range(len(car)):
        with pytest.raises((CarError, MissingBlock)):
            index_repo(car[:end])
        with pytest.raises((CarError, MissingBlock)):
            index_repo(car[:end], verify_hashes=False)


def test_cuts_between_blocks_are_missing_blocks_not_a_smaller_repository() -> None:
    car = sample("kilo").car
    for _, _, end in list(iter_blocks(car, verify=False))[:-1:20]:
        with pytest.raises(MissingBlock):
            index_repo(car[:end])


# --- what is refused --------------------------------------------------------------------------------------


def test_whose_it_is_and_who_signed_it() -> None:
    car = sample("ten").car
    with pytest.raises(CommitError, match="not of did:plc:other"):
        index_repo(car, did="did:plc:other")
    with pytest.raises(SignatureInvalid):
        index_repo(car, key=sample("kilo").truth["signingKey"])


def test_roots() -> None:
    _, blocks, root = made(5)
    car = archive(root, blocks)
    body = car[len(car_header([V])) :]
    with pytest.raises(CarError, match="no root"):
        index_repo(car_header([]) + body)
    with pytest.raises(MissingBlock, match="the commit"):
        index_repo(car_header([V]) + body)
    with pytest.raises(CommitError):
        index_repo(car_header([root]) + body)
    commit = commit_of(root)
    with pytest.raises(CommitError, match="not a DAG-CBOR block"):
        index_repo(car_header([raw_cid(commit)]) + car_block(raw_cid(commit), commit) + body)
    assert index_repo(car_header([dag_cbor_cid(commit), V]) + body).data == root


def test_limits() -> None:
    _, blocks, root = made(30)
    car = archive(root, blocks)
    for limits, words in (
        (Limits(max_bytes=100), "more than 100"),
        (Limits(max_blocks=10), "more than 10"),
        (Limits(max_block=50), "more than 50"),
        (Limits(max_header=10), "more than 10"),
    ):
        for verify in (True, False):
            with pytest.raises(CarError, match=words):
                index_repo(car, limits=limits, verify_hashes=verify)
    with pytest.raises(MstError, match="more than 20 nodes"):
        index_repo(car, tree_limits=TreeLimits(max_nodes=20))


def test_blocks_are_counted_while_they_are_read() -> None:
    _, blocks, root = made(5)
    junk = b"".join(car_block(raw_cid(n.to_bytes(4)), n.to_bytes(4)) for n in range(20_000))
    car = archive(root, blocks) + junk
    tracemalloc.start()
    try:
        with pytest.raises(CarError, match="more than 100 blocks"):
            index_repo(car, limits=Limits(max_blocks=100), verify_hashes=False)
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def test_a_commit_that_nobody_signed_is_refused_before_the_rest_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    car = sample("ten").car
    monkeypatch.setattr(walker, "_split", lambda *_: pytest.fail("the blocks were read"))
    with pytest.raises(SignatureInvalid):
        index_repo(car, key=sample("kilo").truth["signingKey"])


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        (b"\x00", "too short"),
        (b"\x23" + bytes(35), "too short"),
        (b"\x80\x00", "not minimal"),
        (b"\x80", "ends inside the varint"),
        (b"\xff" * 10, "longer than 9"),
        (b"\xff\xff\xff\x7f", "more than 2097152"),
        (b"\x30" + bytes(20), "ends inside the section"),
        (b"\x25\x12\x20" + bytes(35), "CIDv0"),
    ],
)
def test_bad_sections(tail: bytes, words: str) -> None:
    _, blocks, root = made(5)
    for verify in (True, False):
        with pytest.raises(CarError, match=words):
            index_repo(archive(root, blocks) + tail, verify_hashes=verify)


def hostile(blocks: list[bytes], words: str) -> None:
    """Both walks refuse the tree whose root is the last of ``blocks``."""
    car = archive(cid_of(blocks[-1]), [b"a record", *blocks])
    with pytest.raises(MstError, match=words):
        index_repo(car)
    known = read_car(car).blocks
    with pytest.raises(MstError):
        list(mst.walk(cid_of(blocks[-1]), known.get))


LOW = key_on(0)
MIDDLE = key_on(1, LOW)
HIGH = key_on(2, MIDDLE)
LEAF = node([(LOW, V, None)], None)
EMPTY = mst.EMPTY_NODE


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([EMPTY, node([(MIDDLE, V, cid_of(EMPTY))], None)], "is empty"),
        ([LEAF, node([], cid_of(LEAF))], "no entry"),
        ([node([(LOW, V, None), (MIDDLE, V, None)], None)], "of layer 1 is in a node of layer 0"),
        ([LEAF, node([(HIGH, V, None)], cid_of(LEAF))], "of layer 0 is in a node of layer 1"),
        ([LEAF, node([(key_on(0, LOW), V, None)], cid_of(LEAF))], "on layer 0 and has a child"),
        ([LEAF, node([(MIDDLE, V, cid_of(LEAF))], None)], "does not come after"),
        ([LEAF, node([(MIDDLE, V, cid_of(LEAF))], cid_of(LEAF))], "does not come after"),
        ([node([("x/a", V, None)], None)], "begin with a collection"),
        ([node([("com.example.a/..", V, None)], None)], "end with a record key"),
        ([node([("com.example.a/.", V, None), ("com.example.b/a", V, None)], None)], "record key|layer"),
        ([node([("com.example.a/" + "a" * 513, V, None)], None)], "end with a record key"),
        ([node([(LOW, V, None)], None, x=1)], "e .array. and l"),
    ],
)
def test_hostile_trees(blocks: list[bytes], words: str) -> None:
    hostile(blocks, words)


def test_an_exponential_tree_costs_nothing() -> None:
    blocks = [LEAF]
    for _ in range(60):
        below = cid_of(blocks[-1])
        blocks.append(node([(MIDDLE, V, below), (key_on(1, MIDDLE), V, below)], below))
    with pytest.raises(MstError):
        index_repo(archive(cid_of(blocks[-1]), [b"a record", *blocks]))


def test_a_chain_of_intermediates_ends() -> None:
    blocks = [LEAF]
    for _ in range(500):
        blocks.append(node([], cid_of(blocks[-1])))
    hostile([*blocks, node([(HIGH, V, cid_of(blocks[-1]))], None)], "on layer 0 and has a child|layer")


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 500), st.binary(max_size=90)), max_size=3))
def test_damaged_trees_are_judged_alike_by_both_walks(seed: int, swaps: list[tuple[int, bytes]]) -> None:
    _, blocks, root = made(25, seed)
    source = random.Random(seed)
    for number, junk in swaps:
        # Other bytes under the CID of the old ones: what a walk without hashes may meet.
        blocks[number % len(blocks)] = source.choice([junk, source.choice(blocks)])
    _, good, _ = made(25, seed)
    commit = commit_of(root)
    sections = [car_block(dag_cbor_cid(old), new) for old, new in zip(good, blocks, strict=True)]
    car = car_header([dag_cbor_cid(commit)]) + car_block(dag_cbor_cid(commit), commit) + b"".join(sections)
    known = read_car(car, verify=False).blocks
    try:
        plain = list(mst.walk(root, known.get))
        assert all(cid in known for _, cid in plain)
    except (BadInput, AssertionError):
        with pytest.raises(BadInput):
            index_repo(car, verify_hashes=False)
    else:
        assert [record[:2] for record in index_repo(car, verify_hashes=False).records] == plain


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=300), st.booleans())
def test_garbage(data: bytes, headed: bool) -> None:
    with pytest.raises(BadInput):
        index_repo(car_header([V]) + data if headed else data)


def test_a_damaged_block_at_the_very_end_that_nothing_needs() -> None:
    _, blocks, root = made(5)
    car = bytearray(archive(root, [*blocks, b"stranger"]))
    car[-1] ^= 1
    with pytest.raises(CarError, match="does not hash"):
        index_repo(car)
