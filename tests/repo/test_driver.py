"""The walker as a library: the same records whatever the source, the order of blocks and the memory."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import dag_cbor
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multiformats import CID

from indexer import (
    DiskBuilder,
    DriveError,
    Driver,
    DriverBuilder,
    MemoryBlocks,
    MissingBlock,
    MstError,
    OrderLost,
    Output,
    RecordWalk,
    WalkLimits,
    noop,
)
from indexer.atproto.car import car_block, car_header
from indexer.atproto.cid import dag_cbor_cid, raw_cid
from indexer.errors import CarError
from indexer.repo import stream_walk
from tests.atproto.slow_tree import cid_of, node
from tests.atproto.test_mst import V, key_on
from tests.repo.archives import DID, REV, Made, bodies, commit_of, pieces, repository
from tests.repo.repos import sample

#: Memory that no archive of these tests fits, so that all of it is streamed or goes to the store.
NONE = 0.0


class DiskTwin(MemoryBlocks):
    """A dictionary that is treated as a disk, and remembers being emptied."""

    blocking = True
    resets = 0

    def reset(self) -> None:
        super().reset()
        self.resets += 1


async def opened(source: Any, store: DiskTwin | None = None, **options: Any) -> RecordWalk:
    """The walk that a load comes to, with a disk when it asks for one."""
    loaded = await DriverBuilder(**options).load_car(source)
    if isinstance(loaded, Driver.Memory):
        assert loaded.commit == loaded.driver.commit
        return loaded.driver
    commit, driver = await loaded.need_disk.finish_loading(store or DiskTwin())
    assert commit == driver.commit
    return driver


async def drained(walk: RecordWalk, size: int = 100) -> list[Output]:
    out: list[Output] = []
    async for chunk in walk.chunks(size):
        assert 0 < len(chunk) <= size
        out += chunk
    assert await walk.next_chunk(size) is None
    return out


async def walked(source: Any, size: int = 100, **options: Any) -> list[tuple[str, bytes, bytes | None]]:
    return [output[:3] for output in await drained(await opened(source, **options), size)]


# --- the same whatever it comes through ---------------------------------------------------------------------

RECORDS = st.dictionaries(
    st.from_regex(r"com\.example\.[ab]/[a-z0-9_~:-]{1,6}", fullmatch=True),
    st.sampled_from([b"\xa0", b"\xa2ae\x80al\xf6", b"\xa1aa\x01", b"shared"]) | st.binary(max_size=40),
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(
    RECORDS,
    st.integers(0, 10**6),
    st.sampled_from(["in order", "shuffled", "late commit", "strangers"]),
    st.sampled_from([NONE, 0.001, 0.01, 1.0]),
    st.booleans(),
    st.sampled_from([1, 7, 1000]),
    st.sampled_from([noop, lambda block: block[:3]]),
)
def test_the_records_are_those_of_the_twin(
    records: dict[str, bytes],
    seed: int,
    order: str,
    memory: float,
    streaming: bool,
    size: int,
    processor: Any,
) -> None:
    made, source = repository(records), random.Random(seed)
    blocks = list(made.blocks)
    if order == "shuffled":
        source.shuffle(blocks)
    elif order == "late commit":
        blocks = blocks[1:] + blocks[:1]
    elif order == "strangers":
        for stranger in (b"stranger", blocks[0], blocks[-1]):
            blocks.insert(source.randrange(len(blocks) + 1), stranger)
    expected = [(path, cid, processor(block)) for path, cid, block in made.rows]
    options = {"mem_limit_mb": memory, "streaming": streaming, "processor": processor}
    assert asyncio.run(walked(pieces(made.car(blocks), 100), size, **options)) == expected


@pytest.mark.parametrize("size", [1, 100, 1000])
async def test_an_empty_record_at_the_end_is_in_order_too(size: int) -> None:
    made = repository({"com.example.a/0": b"\xa0", "com.example.a/1": b""})
    found = await walked(pieces(made.car(), size), mem_limit_mb=NONE)
    assert found == [(path, cid, block) for path, cid, block in made.rows]
    damaged = bytearray(made.car())
    damaged[-1] ^= 1
    assert not await accepts(bytes(damaged), mem_limit_mb=NONE)


class Reader:
    """An object with an asynchronous ``read``."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self, size: int) -> bytes:
        out, self._data = self._data[: min(size, 333)], self._data[min(size, 333) :]
        return out


async def test_any_source_of_bytes() -> None:
    made = repository(bodies(50))
    car = made.car()
    stream = asyncio.StreamReader()
    stream.feed_data(car)
    stream.feed_eof()
    for source in (car, bytearray(car), memoryview(car), pieces(car, 1), Reader(car), stream):
        assert await walked(source) == made.rows
    for wrong in ([car], 5, None):
        with pytest.raises(TypeError, match="not an asynchronous source"):
            await walked(wrong)

    async def words() -> AsyncIterator[str]:
        yield "text"

    with pytest.raises(TypeError, match="gave str"):
        await walked(words())


async def test_a_plain_file_is_no_asynchronous_source() -> None:
    with io.BytesIO(repository({}).car()) as file, pytest.raises(TypeError, match="source of bytes: BytesIO"):
        await walked(file)


@pytest.mark.parametrize("memory", [NONE, 0.01, 16])
async def test_a_real_repository_with_its_signature(memory: float) -> None:
    _, car, truth = sample("kilo")
    walk = await opened(
        pieces(car, 5000), mem_limit_mb=memory, did=truth["did"], key=truth["signingKey"], streaming=False
    )
    assert (walk.commit.did, walk.commit.rev) == (truth["did"], truth["rev"])
    assert len(await drained(walk)) == truth["count"]


@pytest.mark.parametrize("memory", [NONE, 16])
async def test_the_empty_repository(memory: float) -> None:
    assert await walked(repository({}).car(), mem_limit_mb=memory) == []
    assert await walked(pieces(sample("empty").car), mem_limit_mb=memory) == []


async def test_the_commit_is_there_before_the_records() -> None:
    made = repository(bodies(300))
    loaded = await DriverBuilder(mem_limit_mb=NONE).load_car(made.car())
    assert isinstance(loaded, Driver.Memory)
    assert (loaded.commit.did, loaded.commit.rev, loaded.commit.data) == (DID, REV, made.root)
    paused = await DriverBuilder(mem_limit_mb=NONE, streaming=False).load_car(made.car())
    assert isinstance(paused, Driver.Disk)
    assert paused.need_disk.commit == loaded.commit
    await paused.need_disk.drop()
    with pytest.raises(DriveError, match="dropped"):
        await paused.need_disk.finish_loading(DiskTwin())


# --- streaming order ----------------------------------------------------------------------------------------


class Counted:
    """A source that knows how much of it was taken."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.taken = 0
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for at in range(0, len(self.data), 500):
                self.taken += 500
                yield self.data[at : at + 500]
        finally:
            self.closed = True


async def test_an_archive_in_order_is_walked_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_walk, "WINDOW", 2000)
    monkeypatch.setattr("indexer.repo.driver._HEAD", 1000)
    made = repository(bodies(600))
    source = Counted(made.car())
    walk = await opened(source, mem_limit_mb=0.005)
    assert await walk.next_chunk(10) == [Output(*row) for row in made.rows[:10]]
    assert source.taken < 8000 < len(source.data)
    assert [each[:3] for each in await drained(walk, 50)] == made.rows[10:]
    assert source.closed


async def test_a_record_of_many_keys_may_come_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_walk, "WINDOW", 1000)
    records = bodies(200)
    for path in sorted(records)[10:200:7]:
        records[path] = b"\xa1aa\x07"
    made = repository(records)
    once = list(dict.fromkeys(made.blocks))
    assert len(once) < len(made.blocks)
    assert await walked(made.car(once), mem_limit_mb=0.02) == made.rows
    # Where it was forgotten, the error says what helps, and it does.
    with pytest.raises(OrderLost) as lost:
        await walked(made.car(once), mem_limit_mb=NONE)
    _commit, behind = await lost.value.need_disk.finish_loading(DiskTwin())
    with pytest.raises(DriveError, match="streaming=False") as caught:
        await drained(behind)
    assert caught.value.kind == "missing_block"
    assert await walked(made.car(once), mem_limit_mb=NONE, streaming=False) == made.rows


async def test_a_walk_that_loses_the_order_goes_on_in_memory_or_on_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_walk, "WINDOW", 1000)
    made = repository(bodies(400))
    rest = made.blocks[200:]
    random.Random(1).shuffle(rest)
    car = made.car(made.blocks[:200] + rest)
    assert await walked(pieces(car), mem_limit_mb=1, streaming=True) == made.rows
    walk = await opened(pieces(car), mem_limit_mb=0.02)
    found: list[Output] = []

    async def collect() -> None:
        async for chunk in walk.chunks(7):
            found.extend(chunk)

    with pytest.raises(OrderLost) as caught:
        await collect()
    assert 0 < len(found) < 200
    commit, behind = await caught.value.need_disk.finish_loading(DiskTwin())
    assert commit == walk.commit
    found += await drained(behind)
    assert [each[:3] for each in found] == made.rows


# --- processor ----------------------------------------------------------------------------------------------


def refusing(block: bytes) -> bytes:
    if block.startswith(b"bad"):
        raise ValueError(f"no {block!r}")
    assert not block.startswith(b"\xa2ae\x81"), "a tree node was processed"
    return block[:2] if block != b"odd" else 5  # type: ignore[return-value]


@pytest.mark.parametrize("memory", [NONE, 0.001, 1.0])
@pytest.mark.parametrize("streaming", [True, False])
async def test_a_failure_stays_with_its_record(memory: float, streaming: bool) -> None:
    records = {
        **bodies(30),
        "com.example.b/x": b"bad1",
        "com.example.b/y": b"odd",
        "com.example.z/z": b"bad2",
    }
    walk = await opened(
        repository(records).car(), mem_limit_mb=memory, streaming=streaming, processor=refusing
    )
    found = {each.path: each for each in await drained(walk)}
    assert found["com.example.b/x"][2:] == (None, "ValueError: no b'bad1'")
    assert found["com.example.b/y"].error == "TypeError: the processor returned int, not bytes"
    assert found["com.example.z/z"].data is None
    assert all(each.data == records[path][:2] for path, each in found.items() if each.error is None)
    assert sum(1 for each in found.values() if each.error is None) == 30


async def test_what_looks_like_a_node_is_a_record_where_it_stands_as_one() -> None:
    tree = repository({"com.example.a/1": b"\xa0"})
    records = {**bodies(20), "com.example.n/1": tree.blocks[1], "com.example.n/2": b"\xa2ae\x80al\xf6"}
    made = repository(records)
    for memory in (NONE, 1.0):
        assert await walked(made.shuffled(), mem_limit_mb=memory, processor=lambda block: block) == made.rows
        assert await walked(made.car(), mem_limit_mb=memory, processor=lambda block: block) == made.rows


async def test_the_processors_output_counts_against_the_memory() -> None:
    made = repository(bodies(400, size=190))
    car = made.shuffled()
    whole = await DriverBuilder(mem_limit_mb=0.17).load_car(car)
    assert isinstance(whole, Driver.Disk)
    await whole.need_disk.drop()
    less = await DriverBuilder(mem_limit_mb=0.17, processor=lambda block: b"").load_car(car)
    assert isinstance(less, Driver.Memory)
    more = await DriverBuilder(mem_limit_mb=0.17, processor=lambda block: block * 9).load_car(car)
    assert isinstance(more, Driver.Disk)
    await more.need_disk.drop()


# --- completeness -------------------------------------------------------------------------------------------


async def finished(car: Any, **options: Any) -> None:
    """Walks to the end, with a disk when one is asked for on the way."""
    try:
        await walked(car, size=500, **options)
    except OrderLost as lost:
        await drained((await lost.need_disk.finish_loading(DiskTwin()))[1])


async def accepts(car: bytes, **options: Any) -> bool:
    try:
        await finished(car, **options)
    except DriveError:
        return False
    return True


async def test_an_archive_cut_between_blocks_is_never_accepted() -> None:
    made = repository(bodies(300))
    blocks = made.blocks
    head = car_header([dag_cbor_cid(blocks[0])])
    ends, at = [len(head)], len(head)
    for block in blocks:
        at += len(car_block(dag_cbor_cid(block), block))
        ends.append(at)
    car = made.car()
    assert ends.pop() == len(car)
    for end in ends:
        assert not await accepts(car[:end], mem_limit_mb=1), end
        assert not await accepts(car[:end], mem_limit_mb=NONE), end
    for end in ends[::10]:
        assert not await accepts(car[:end], mem_limit_mb=NONE, streaming=False), end
    for options in ({"mem_limit_mb": 1}, {"mem_limit_mb": NONE}, {"mem_limit_mb": NONE, "streaming": False}):
        assert await accepts(car, **options)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([NONE, 0.01, 1.0]), st.booleans(), st.data())
def test_a_damaged_archive_is_never_accepted(seed: int, memory: float, streaming: bool, data: Any) -> None:
    made = repository(bodies(40, seed))
    car = bytearray(made.car() if streaming else made.shuffled(seed))
    at = data.draw(st.integers(0, len(car) - 1))
    car[at] ^= 1 << data.draw(st.integers(0, 7))
    assert not asyncio.run(accepts(bytes(car), mem_limit_mb=memory))
    del car[at:]
    assert not asyncio.run(accepts(bytes(car), mem_limit_mb=memory))


# --- errors -------------------------------------------------------------------------------------------------

MODES: list[dict[str, Any]] = [
    {"mem_limit_mb": 1},
    {"mem_limit_mb": NONE},
    {"mem_limit_mb": NONE, "streaming": False},
]


def raw_node(entries: list[tuple[int, bytes, bytes]]) -> bytes:
    """A node of (p, k, v), whatever they are."""
    rows: list[Any] = [{"p": p, "k": k, "v": CID.decode(v), "t": None} for p, k, v in entries]
    return bytes(dag_cbor.encode({"e": rows, "l": None}))


async def fails(car: Any, kind: str, words: str | None = None, **options: Any) -> DriveError:
    with pytest.raises(DriveError, match=words) as caught:
        await finished(car, **options)
    assert caught.value.kind == kind
    return caught.value


@pytest.mark.parametrize("options", MODES)
async def test_errors_say_what_is_wrong(options: dict[str, Any]) -> None:
    made = repository(bodies(60))
    commit, root, *rest = made.blocks
    body = rest[-1]
    headless = car_header([dag_cbor_cid(commit)]) + made.car([root, *rest])[len(car_header([raw_cid(b"")])) :]
    await fails(headless, "missing_commit", "the commit", **options)
    assert isinstance(
        (await fails(made.car([commit, *rest]), "missing_root", **options)).__cause__, MissingBlock
    )
    await fails(made.car([commit, root, *rest[:-1]]), "missing_block", **options)
    await fails(car_header([]) + made.car()[len(car_header([raw_cid(b"")])) :], "car", "no root", **options)
    await fails(made.car() + b"\x80", "car", "ends inside", **options)
    await fails(made.car()[:-1] + bytes((body[-1] ^ 1,)), "bad_block", "does not hash", **options)
    await fails(made.car(), "commit", "not of did:plc:other", did="did:plc:other", **options)
    await fails(made.car(), "signature", key=sample("kilo").truth["signingKey"], **options)
    await fails(b"", "car", "empty", **options)


LOW = key_on(0)
MIDDLE = key_on(1, LOW)
HIGH = key_on(2, MIDDLE)
LEAF = node([(LOW, V, None)], None)
EMPTY = b"\xa2ae\x80al\xf6"


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize(
    ("blocks", "rule"),
    [
        ([EMPTY, node([(MIDDLE, V, cid_of(EMPTY))], None)], "empty_node"),
        ([LEAF, node([], cid_of(LEAF))], "empty_node"),
        ([node([(LOW, V, None), (MIDDLE, V, None)], None)], "wrong_depth"),
        ([LEAF, node([(HIGH, V, None)], cid_of(LEAF))], "wrong_depth"),
        ([LEAF, node([(key_on(0, LOW), V, None)], cid_of(LEAF))], "lost_depth"),
        ([LEAF, node([(MIDDLE, V, cid_of(LEAF))], None)], "order"),
        ([LEAF, LEAF, node([(MIDDLE, V, cid_of(LEAF))], cid_of(LEAF))], "order"),
        ([raw_node([(0, b"\xff/a", V)])], "key_not_utf8"),
        ([raw_node([(0, LOW.encode(), V), (99, b"x", V)])], "prefix_out_of_bounds"),
        ([raw_node([(0, LOW.encode(), V), (1, LOW.encode()[1:-1] + b"\x7a", V)])], "prefix_not_maximal"),
    ],
)
async def test_trees_that_break_a_rule(blocks: list[bytes], rule: str, options: dict[str, Any]) -> None:
    made = Made({}, cid_of(blocks[-1]), [commit_of(cid_of(blocks[-1])), *reversed(blocks), b"a record"])
    error = await fails(made.car(), "walk", **options)
    assert isinstance(error.__cause__, MstError)
    assert error.__cause__.rule == rule


@pytest.mark.parametrize("options", MODES)
async def test_limits(options: dict[str, Any]) -> None:
    records = {**bodies(60), "com.example.b/long": b"x" * 700}
    made = repository(records)
    for limits, kind, words in (
        (WalkLimits(max_bytes=900), "limit", "more than 900"),
        (WalkLimits(max_block=600), "bad_block", "more than 600"),
        (WalkLimits(max_blocks=20), "limit", "more than 20 blocks"),
        (WalkLimits(max_node=100), "limit", "more than 100"),
        (WalkLimits(max_nodes_and_records=30), "limit", "more than 30"),
        (WalkLimits(max_depth=0), "limit", "more than 0"),
    ):
        await fails(made.car(), kind, words, limits=limits, **options)
    walk = await opened(made.car(), limits=WalkLimits(max_record=600), **options)
    found = {each.path: each for each in await drained(walk)}
    assert found["com.example.b/long"][2:] == (None, "record of 700 bytes, more than 600")
    assert sum(1 for each in found.values() if each.data is not None) == 60


class Stalled:
    """A source that gives some of an archive and then waits to be closed."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.waits = asyncio.Event()
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            yield self._data
            self.waits.set()
            await asyncio.Event().wait()
        finally:
            self.closed = True


async def test_time_is_limited() -> None:
    made = repository(bodies(60))
    source = Stalled(made.car()[:2000])
    await fails(source, "time", "longer than 0.05", limits=WalkLimits(max_seconds=0.05))
    assert source.closed


async def test_a_cancelled_load_lets_go_of_its_source_and_empties_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("indexer.repo.driver._HEAD", 1000)
    made = repository(bodies(200))
    source = Stalled(made.car()[:3000])
    task = asyncio.create_task(DriverBuilder().load_car(source))
    await source.waits.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.closed
    source, store = Stalled(made.shuffled()[:9000]), DiskTwin()
    paused = await DriverBuilder(NONE).load_car(source)
    assert isinstance(paused, Driver.Disk)
    task2 = asyncio.create_task(paused.need_disk.finish_loading(store))
    await source.waits.wait()
    task2.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task2
    assert source.closed
    assert store.resets == 1
    assert store.size == 0


async def test_a_walk_that_failed_has_ended_and_its_store_is_empty() -> None:
    made, store = repository(bodies(60)), DiskTwin()
    walk = await opened(made.car(made.blocks[:-1]), store, mem_limit_mb=NONE, streaming=False)
    with pytest.raises(DriveError, match="missing"):
        await drained(walk)
    assert store.resets == 1
    with pytest.raises(DriveError, match="has ended"):
        await walk.next_chunk(5)
    with pytest.raises(ValueError, match="chunk of 0"):
        await walk.next_chunk(0)
    other = await opened(made.car())
    await other.close()
    with pytest.raises(DriveError, match="closed"):
        await other.next_chunk()


async def coroutine(block: bytes) -> bytes:
    return block


class Coroutine:
    async def __call__(self, block: bytes) -> bytes:
        return block


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"processor": 5}, "processor is 5, not a function of bytes"),
        ({"processor": None}, "processor is None"),
        ({"processor": coroutine}, "processor is the coroutine function"),
        ({"processor": Coroutine()}, "processor is the coroutine function"),
        ({"mem_limit_mb": "x"}, "mem_limit_mb is 'x', not a number"),
        ({"mem_limit_mb": -1}, "mem_limit_mb is -1, below zero"),
        ({"mem_limit_mb": float("nan")}, "mem_limit_mb is nan, below zero or no finite"),
        ({"mem_limit_mb": float("inf")}, "mem_limit_mb is inf, below zero or no finite"),
        ({"limits": 5}, "limits is 5, not WalkLimits"),
    ],
)
def test_a_builder_refuses_what_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        DriverBuilder(**options)


@pytest.mark.parametrize("size", ["x", 2.5, None, 0, -1])
async def test_a_chunk_has_a_size(size: Any) -> None:
    walk = await opened(repository({}).car())
    with pytest.raises(
        (TypeError, ValueError), match=f"{size!r}, not a whole number|a chunk of {size} records"
    ):
        await walk.next_chunk(size)
    assert await walk.next_chunk() is None  # it stands


def test_a_disk_refuses_what_is_no_number() -> None:
    for options in ({"cache_mb": "x"}, {"max_stored_mb": "x"}, {"cache_mb": 1.5}):
        with pytest.raises(TypeError, match="a whole number and a number"):
            DiskBuilder(**options)


class Failing:
    """A stream that gives the beginning of an archive and raises then."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.left = [repository({}).car()[:50]]

    async def read(self, size: int) -> bytes:
        if not self.left:
            raise self.error
        return self.left.pop()

    async def iterated(self) -> AsyncIterator[bytes]:
        while True:
            yield await self.read(1)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset by peer"), ValueError("no such thing"), TimeoutError("too late"),
        aiohttp.ClientPayloadError("broken off"), CarError("of its own"), DriveError("a load", kind="walk"),
    ],
)  # fmt: skip
async def test_a_source_that_fails(error: Exception) -> None:
    for source in (Failing(error), Failing(error).iterated()):
        with pytest.raises(DriveError, match=f"the source failed: {type(error).__name__}: {error}") as caught:
            await DriverBuilder().load_car(source)
        assert caught.value.kind == "source"
        assert caught.value.__cause__ is error


async def test_a_source_that_fails_under_a_walk() -> None:
    async def broken() -> AsyncIterator[bytes]:
        car = repository(bodies(3000)).car()
        yield car[: len(car) // 2]
        raise KeyError("gone")

    with pytest.raises(DriveError, match="KeyError: 'gone'") as caught:
        await walked(broken(), mem_limit_mb=NONE)
    assert caught.value.kind == "source"


# --- seeking ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"mem_limit_mb": 1}, {"mem_limit_mb": NONE, "streaming": False}, {"mem_limit_mb": NONE}]
)
async def test_seeking(options: dict[str, Any]) -> None:
    made = repository(bodies(120))
    paths = [row[0] for row in made.rows]
    walk = await opened(pieces(made.car()), **options)
    assert (await walk.get(paths[3])) == Output(*made.rows[3])
    assert await walk.get(paths[3] + "0") is None
    await walk.seek(paths[50], paths[60])
    assert [each.path for each in await drained(walk)] == paths[50:60]
    inside = [path for path in paths if path.startswith("com.example.c/")]
    found = [each.path async for chunk in walk.prefix("com.example.c/", 5) for each in chunk]
    assert found == inside
    await walk.seek("com.example.zz")
    assert await drained(walk) == []
    if options == {"mem_limit_mb": NONE}:
        with pytest.raises(DriveError, match="cannot go back"):
            await walk.seek("com.example.a")
    else:
        await walk.seek("")
        assert [each.path for each in await drained(walk)] == paths
