"""Where the records of a repository lie in its CAR, found in bounded memory whatever the CAR's size.

Owns the verified walk over a mapped file: in windows where the CAR is in streaming order, else through a
table of the blocks' places on disk. Pages of the file that were read are given back as the walk goes on, so
that a large CAR does not count as memory. Everything that `repo.walker` checks is checked here too; rows come
out before the end is seen, so nothing counts until the iterator has ended. Worker processes.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path as FilePath
from typing import Final, NamedTuple, TypeAlias

from indexer.atproto.car import Limits, read_header, sections
from indexer.atproto.cid import CID_LENGTH, format_cid
from indexer.atproto.commit import Commit
from indexer.atproto.mst import TreeLimits
from indexer.atproto.node import describe
from indexer.atproto.types import Cid, Did, DidKey, Path
from indexer.errors import CarError, MissingBlock
from indexer.repo.blocks import BlockStore
from indexer.repo.preorder import WINDOW, Preorder
from indexer.repo.ranges import Range
from indexer.repo.tree_walk import TreeWalk
from indexer.repo.walker import Section, checked_commit, find_commit

#: path, CID, start and end of the block in the CAR
Span: TypeAlias = tuple[Path, Cid, int, int]

#: Where a commit that comes first is looked for.
_HEAD: Final = 128 << 10
#: Bytes of the file that are read until their pages are given back.
_GIVE_BACK: Final = 4 << 20
#: Places that are put, and nodes that are looked up, at once.
_BATCH: Final = 4096
_AHEAD: Final = 64
_PLACE: Final = struct.Struct("<QI")


class Found(NamedTuple):
    """The commit, and the records in key order; what is wrong with them is raised while they are read."""

    commit: Commit
    commit_block: bytes
    rows: Iterator[list[Span]]


class OrderEnds(Exception):
    """The CAR is not in streaming order from its commit to its end, or something is wrong with it."""


class Signer(NamedTuple):
    """Whose the repository must be, and who must have signed it."""

    did: Did
    key: DidKey


def map_file(path: FilePath) -> mmap.mmap:
    """A CAR's bytes, read as they are touched."""
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise CarError("the CAR is empty", reason="car_truncated") from error


def in_order(data: mmap.mmap, signer: Signer, max_nodes: int) -> Found:
    """A CAR in streaming order. Raises `OrderEnds`, here or while the rows are read, for any other."""
    limits = _limits(data, max_nodes)
    roots, start = read_header(data, limits)
    early = find_commit(data[:_HEAD], start, roots[0]) if roots else None
    if early is None or early.begin != start:
        raise OrderEnds
    commit = checked_commit(roots[0], early.block, *signer)
    walk = Preorder(commit.data, limits, TreeLimits(max_nodes))
    return Found(commit, early.block, _windows(data, early, walk))


def _windows(data: mmap.mmap, commit: Section, walk: Preorder) -> Iterator[list[Span]]:
    size = len(data)
    at = given = commit.end
    while at < size:
        taken = walk.window(data, at, min(at + WINDOW, size))
        if taken is None or taken.end == at:
            raise OrderEnds
        at = taken.end
        cids = [data[start - CID_LENGTH : start] for start in taken.starts]
        yield list(zip(taken.paths, cids, taken.starts, taken.ends, strict=True))
        if at - given > _GIVE_BACK:
            given = at
            give_back(data)
    if not walk.done:
        raise OrderEnds


def any_order(
    data: mmap.mmap, signer: Signer, max_nodes: int, table: BlockStore, ranges: Sequence[Range] = ()
) -> Found:
    """A CAR in any order; where each block lies is kept in ``table``. Raises as `walker.index_repo`.

    With ``ranges``, which are in order, it need hold nothing else: every subtree that reaches into one must
    be there, so that what is not found there is not in the repository.
    """
    limits = _limits(data, max_nodes)
    roots, start = read_header(data, limits)
    if not roots:
        raise CarError("CAR has no root")
    places = sections(data, start, limits)
    while batch := list(islice(places, _BATCH)):
        table.put_many([(cid, _PLACE.pack(begin, end - begin)) for cid, begin, end in batch])
        give_back(data)
    block = _blocks(data, table, [roots[0]])[0]
    if block is None:
        raise MissingBlock(f"the commit {format_cid(roots[0])} is missing", cid=roots[0])
    commit = checked_commit(roots[0], block, *signer)
    tree = TreeLimits(max_nodes)
    walks = [TreeWalk(commit.data, start=start, stop=stop, limits=tree) for start, stop in ranges]
    rows = (_tree(data, table, walk) for walk in walks or [TreeWalk(commit.data, limits=tree)])
    return Found(commit, block, chain.from_iterable(rows))


def table_mib(max_nodes: int) -> float:
    """The most that a table of so many blocks holds."""
    return 1 + max_nodes * (CID_LENGTH + _PLACE.size) / (1 << 20)


def _tree(data: mmap.mmap, table: BlockStore, walk: TreeWalk) -> Iterator[list[Span]]:
    nodes: dict[Cid, bytes | None] = {}
    due: list[tuple[Path, Cid]] = []
    while walk.want is not None:
        if walk.want not in nodes:
            cids = walk.upcoming(_AHEAD)
            nodes = dict(zip(cids, _blocks(data, table, cids), strict=True))
        node = nodes.pop(walk.want)
        if node is None:
            raise MissingBlock(f"{describe(walk.want)} is missing", cid=walk.want)
        due += walk.take(node)
        if len(due) >= _BATCH:
            yield _placed(table, due)
            due = []
            give_back(data)
    yield _placed(table, due)


def _placed(table: BlockStore, due: list[tuple[Path, Cid]]) -> list[Span]:
    rows = []
    found = table.get_many([cid for _path, cid in due])
    for (path, cid), raw in zip(due, found, strict=True):
        if raw is None:
            raise MissingBlock(f"record {path} ({format_cid(cid)}) is missing", cid=cid)
        start, length = _PLACE.unpack(raw)
        rows.append((path, cid, start, start + length))
    return rows


def _blocks(data: mmap.mmap, table: BlockStore, cids: list[Cid]) -> list[bytes | None]:
    places = [None if raw is None else _PLACE.unpack(raw) for raw in table.get_many(cids)]
    return [None if place is None else data[place[0] : place[0] + place[1]] for place in places]


def give_back(data: mmap.mmap) -> None:
    """Lets go of the file's pages; what is touched again comes back from the page cache."""
    if hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)


def _limits(data: mmap.mmap, max_nodes: int) -> Limits:
    return Limits(max_bytes=len(data), max_blocks=max_nodes)
