"""Complete verification of a fetched repository, in a worker process.

Owns the step from a CAR to an index of it, both in memory or both on disk: signature, hashes, tree and
completeness are checked by `repo.walker`, each record by the data model, and only when all of it stands
is anything returned. The records go to the index in key order and in chunks: of one in a file neither the
trip between processes nor the reader ever holds all of them. Pure CPU and two local files.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path as FilePath
from typing import BinaryIO, NamedTuple, TypeAlias

import msgpack

from indexer.atproto.car import Limits
from indexer.atproto.dagcbor import check_record
from indexer.atproto.mst import TreeLimits
from indexer.atproto.types import Cid, Did, DidKey, Path, Rev
from indexer.backfill.spans import Found, OrderEnds, Signer, Span, any_order, in_order, map_file, table_mib
from indexer.errors import CarError, DiskError, FetchError, RecordInvalid
from indexer.repo.blocks import MemoryBlocks
from indexer.repo.ranges import Range
from indexer.repo.walker import index_repo
from indexer.store.codecs import INVALID, OVERSIZE
from indexer.store.spill import DiskBuilder

#: Records of one chunk of the index file.
INDEX_CHUNK = 1000
MAX_RECORD = 1_000_000
MIB = 1 << 20
#: Records of this many bytes are worth remembering, the last `_REMEMBERED` of them (2 MB).
_COSTLY = 1 << 10
_REMEMBERED = 1 << 14

#: path, CID, start and end of its block in the CAR, flags
IndexEntry: TypeAlias = tuple[Path, Cid, int, int, int]

#: A CAR as it is read.
Buffer: TypeAlias = bytes | mmap.mmap

_LENGTH = struct.Struct("<I")


class Verified(NamedTuple):
    """What a repository's CAR proved to be."""

    rev: Rev
    data: Cid
    commit_block: bytes
    records: int
    flagged: int
    oversize: int
    size: int
    held_index: bytes = b""  # of a CAR that came as bytes


def verify_car(
    car: FilePath | bytes,
    index: FilePath,
    did: Did,
    key: DidKey,
    max_nodes: int,
    memory_mib: int,
    ranges: Sequence[Range] = (),
) -> Verified:
    """Verifies ``car`` as the repository of ``did`` signed by ``key``; writes ``index``.

    A ``car`` of bytes is small and whole; its index is in the answer, not in a file.

    With ``ranges`` it is a part of the repository, complete in each of them, and only that is looked at.

    Memory stays near ``memory_mib`` (MiB), whatever the size. Raises `CarError`, `MstError` (`MissingBlock`
    for an incomplete one), `CommitError` or `SignatureInvalid`; the index file is then not complete and must
    not be read.
    """
    signer = Signer(did, key)
    if isinstance(car, bytes):
        if not car:
            raise CarError("the CAR is empty", reason="car_truncated")
        with BytesIO() as held:
            return _written(held, car, _in_memory(car, signer, max_nodes))._replace(
                held_index=held.getvalue()
            )
    with index.open("wb") as file:
        return _verified_file(car, file, signer, max_nodes, memory_mib, ranges)


def _verified_file(
    car: FilePath,
    index: BinaryIO,
    signer: Signer,
    max_nodes: int,
    memory_mib: int,
    ranges: Sequence[Range],
) -> Verified:
    buffer = map_file(car)
    # What memory holds is checked as a whole; the limit leaves room for the objects that this makes.
    if len(buffer) <= memory_mib * MIB:
        if ranges:
            return _written(index, buffer, any_order(buffer, signer, max_nodes, MemoryBlocks(), ranges))
        return _written(index, buffer, _in_memory(buffer, signer, max_nodes))
    try:
        if not ranges:
            return _written(index, buffer, in_order(buffer, signer, max_nodes))
    except OrderEnds:
        pass
    try:
        with DiskBuilder(max(1, memory_mib), table_mib(max_nodes)).open(table_path(car)) as table:
            return _written(index, buffer, any_order(buffer, signer, max_nodes, table, ranges))
    except DiskError as error:
        raise FetchError(f"cannot verify a large repository: {error}", reason="spool") from error


def _in_memory(buffer: Buffer, signer: Signer, max_nodes: int) -> Found:
    limits = Limits(max_bytes=len(buffer), max_blocks=max_nodes)
    repo = index_repo(
        buffer, did=signer.did, key=signer.key, limits=limits, tree_limits=TreeLimits(max_nodes)
    )
    records = repo.records
    rows = (records[start : start + INDEX_CHUNK] for start in range(0, len(records), INDEX_CHUNK))
    return Found(repo.commit, repo.commit_block, rows)


def table_path(car: FilePath) -> FilePath:
    """Where the table of a large CAR's blocks is kept while it is verified."""
    return car.with_suffix(".table")


def _written(index: BinaryIO, buffer: Buffer, found: Found) -> Verified:
    """Checks each record and writes it down, from the beginning; raises what the walk raises."""
    records = flagged = oversize = 0
    seen: dict[Cid, int] = {}
    index.seek(0)
    for rows in _chunks(found.rows):
        entries = [_entry(buffer, seen, *row) for row in rows]
        flagged += sum(1 for entry in entries if entry[4])
        oversize += sum(1 for entry in entries if entry[4] & OVERSIZE)
        records += len(entries)
        write_chunk(index, entries)
    index.truncate()
    commit = found.commit
    return Verified(commit.rev, commit.data, found.commit_block, records, flagged, oversize, len(buffer))


def write_chunk(file: BinaryIO, entries: list[IndexEntry]) -> None:
    data = msgpack.packb(entries)
    file.write(_LENGTH.pack(len(data)))
    file.write(data)


def read_index(index: FilePath | bytes) -> Iterator[list[IndexEntry]]:
    """The chunks of an index, in key order."""
    with BytesIO(index) if isinstance(index, bytes) else index.open("rb") as file:
        while head := file.read(_LENGTH.size):
            yield list(msgpack.unpackb(file.read(_LENGTH.unpack(head)[0]), use_list=False))


def _chunks(parts: Iterator[list[Span]]) -> Iterator[list[Span]]:
    """``parts`` cut anew into chunks of `INDEX_CHUNK`, of which the last may be shorter."""
    held: list[Span] = []
    for part in parts:
        held += part
        while len(held) >= INDEX_CHUNK:
            yield held[:INDEX_CHUNK]
            del held[:INDEX_CHUNK]
    if held:
        yield held


def _entry(buffer: Buffer, seen: dict[Cid, int], path: Path, cid: Cid, start: int, end: int) -> IndexEntry:
    """``seen``: flags of records that cost time, of which one may stand under any number of keys."""
    if end - start < _COSTLY:
        return path, cid, start, end, _flags(buffer[start:end])
    flags = seen.get(cid)
    if flags is None:
        if len(seen) >= _REMEMBERED:
            seen.clear()
        flags = seen[cid] = OVERSIZE if end - start > MAX_RECORD else _flags(buffer[start:end])
    return path, cid, start, end, flags


def _flags(record: bytes) -> int:
    try:
        check_record(record, max_bytes=MAX_RECORD)
    except RecordInvalid:
        return INVALID
    return 0
