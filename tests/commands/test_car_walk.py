"""Archives of every order and size are walked alike, in memory and with a disk, by path and from a pipe."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from click.testing import CliRunner

from indexer.atproto.car import car_block, iter_blocks, read_header
from indexer.atproto.cid import dag_cbor_cid, format_cid
from indexer.atproto.mst import build
from indexer.commands.car import car, inspect_car, verify_car
from indexer.commands.car_walk import Archive, Distinct, Room, SectionCids, walk
from indexer.errors import BadInput, CarError, DiskError, MissingBlock
from indexer.repo.blocks import Output
from indexer.repo.walker import index_repo
from indexer.store.spill_file import SpillFile
from tests.commands.real_repos import repo_file

KILO = repo_file("kilo.car").read_bytes()


def sections(data: bytes) -> list[bytes]:
    return [car_block(cid, data[start:end]) for cid, start, end in iter_blocks(data, verify=False)]


def header(data: bytes) -> bytes:
    return data[: read_header(data)[1]]


def shuffled() -> bytes:
    parts = sections(KILO)
    random.Random(1).shuffle(parts)
    return header(KILO) + b"".join(parts)


def filler(count: int) -> list[bytes]:
    """Blocks that nothing needs."""
    blocks = (number.to_bytes(400, "big") for number in range(count))
    return [car_block(dag_cbor_cid(block), block) for block in blocks]


def with_strangers() -> bytes:
    """Three blocks that nothing needs, one of them twice, and one of the repository's again."""
    more = [car_block(dag_cbor_cid(block), block) for block in (b"one", b"two", b"three", b"two")]
    return KILO + b"".join([*more, sections(KILO)[5]])


def inside(data: bytes) -> dict[str, object]:
    """What is in an archive, by everything in memory at once."""
    index = index_repo(data)
    cids = [cid for cid, *_ in iter_blocks(data, verify=False)]
    tree = build((path, cid) for path, cid, *_ in index.records)
    needed = {index.commit_cid, *tree.nodes, *(cid for _path, cid, *_ in index.records)}
    return {
        "blocks": len(cids),
        "bytes": len(data),
        "records": len(index.records),
        "record_bytes": sum(end - start for *_, start, end in index.records),
        "tree_nodes": len(tree.nodes),
        "duplicate_blocks": len(cids) - len(set(cids)),
        "unlinked_blocks": len(set(cids) - needed),
        "roots": [format_cid(index.commit_cid)],
        "commit": format_cid(index.commit_cid),
    }


@pytest.mark.parametrize("data", [KILO, shuffled(), with_strangers()], ids=["as it came", "shuffled", "more"])
def test_memory_and_disk_find_the_same(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "repo.car"
    file.write_bytes(data)
    whole = inspect_car(data)
    expected = inside(data)
    assert {name: whole[name] for name in expected} == expected
    room = Room(0, tmp_path)
    assert inspect_car(file, room) == whole
    assert verify_car(file, room=room) == {name: whole[name] for name in verify_car(data)}
    assert list(tmp_path.iterdir()) == [file], "something was left in the folder"


def test_the_other_extremes_are_counted_too() -> None:
    assert inside(with_strangers())["unlinked_blocks"] == 3
    assert inside(with_strangers())["duplicate_blocks"] == 2


def test_ls_from_a_pipe_gives_the_records_of_any_order() -> None:
    arguments = ["ls", "-", "--memory-mib", "1", "--prefix", "app.bsky.feed.post/"]
    listed = [CliRunner().invoke(car, arguments, input=data).stdout for data in (KILO, shuffled())]
    rows = [row for row in index_repo(KILO).records if row[0].startswith("app.bsky.feed.post/")]
    assert listed[0] == listed[1] == "".join(f"{path} {format_cid(cid)}\n" for path, cid, *_ in rows)


@pytest.mark.parametrize("room", [Room(0), Room()])
def test_what_is_wrong_is_told_as_by_the_walk_in_memory(room: Room) -> None:
    cut = header(KILO) + b"".join(sections(KILO)[:-1])
    with pytest.raises(MissingBlock):
        verify_car(cut, room=room)
    with pytest.raises(BadInput, match="does not hash"):
        inspect_car(KILO[:-1] + bytes((KILO[-1] ^ 1,)), room)
    with pytest.raises(CarError, match="ends inside"):
        verify_car(KILO[:-1], room=room)


def test_nothing_is_listed_of_an_archive_that_is_wrong_at_its_end(tmp_path: Path) -> None:
    file = tmp_path / "cut.car"
    file.write_bytes(header(KILO) + b"".join(sections(KILO)[:-1]))
    result = CliRunner().invoke(car, ["ls", str(file)])
    assert result.stdout == ""
    assert isinstance(result.exception, MissingBlock)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which nobody may write")
@pytest.mark.parametrize("command", ["verify", "inspect", "ls"])
def test_a_spill_folder_that_cannot_be_written_is_named(command: str, tmp_path: Path) -> None:
    file = tmp_path / "shuffled.car"
    file.write_bytes(header(KILO) + b"".join(reversed([*sections(KILO), *filler(3000)])))
    for options in ([], ["--spill-folder", "/proc"]):
        result = CliRunner().invoke(car, [command, str(file), "--memory-mib", "1", *options])
        if options:
            assert isinstance(result.exception, DiskError)
            assert str(result.exception).startswith("cannot write to /proc (--spill-folder): ")
        else:
            assert result.exit_code == 0


def test_a_walk_that_loses_the_order_goes_on_with_a_disk() -> None:
    parts = sections(KILO)
    rest = parts[len(parts) // 2 :]
    random.Random(2).shuffle(rest)
    found: list[Output] = []
    data = header(KILO) + b"".join(parts[: len(parts) // 2] + rest)
    walked = walk(Archive(data), None, Room(0), found.extend)
    assert [each[:2] for each in found] == [row[:2] for row in index_repo(KILO).records]
    assert (walked.blocks, walked.bytes) == (len(parts), len(data))


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    rest = iter(data)
    while piece := bytes(islice(rest, size)):
        yield piece


@pytest.mark.parametrize("size", [7, 1000, 1 << 20])
def test_cids_of_sections_in_pieces_of_any_size(size: int, tmp_path: Path) -> None:
    found: list[bytes] = []
    look = SectionCids(found.extend).look
    part = KILO[:20_000]
    for piece in pieces(part, size):
        look(piece)
    cids = [cid for cid, _start, end in iter_blocks(KILO, verify=False) if end <= len(part)]
    assert found == cids
    for most in (0, 5000, 1 << 20):
        file = SpillFile(tmp_path)
        distinct = Distinct(file, most)
        for cid in [*cids, *cids[:9]]:
            distinct.add([cid])
        assert distinct.count() == len(set(cids))
        file.close()
