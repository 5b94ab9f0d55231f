"""Complete verification of a fetched repository, in a worker process.

Owns the step from a CAR on disk to an index beside it: signature, hashes, tree and completeness are
checked by `repo.walker`, each record by the data model, and only when all of it stands is anything
returned. The records go to the index file in key order and in chunks, so that neither the trip
between processes nor the reader ever holds all of them. Pure CPU and two local files.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path as FilePath
from typing import BinaryIO, NamedTuple, TypeAlias

import msgpack

from indexer.atproto.car import Limits
from indexer.atproto.dagcbor import check_record
from indexer.atproto.mst import TreeLimits
from indexer.atproto.types import Cid, Did, DidKey, Path, Rev
from indexer.errors import CarError, RecordInvalid
from indexer.repo.records import Records
from indexer.repo.walker import index_repo
from indexer.store.codecs import INVALID, OVERSIZE

#: Records of one chunk of the index file.
INDEX_CHUNK = 1000
MAX_RECORD = 1_000_000

#: path, CID, start and end of its block in the CAR, flags
IndexEntry: TypeAlias = tuple[Path, Cid, int, int, int]

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


def verify_car(car: FilePath, index: FilePath, did: Did, key: DidKey, max_nodes: int) -> Verified:
    """Verifies the file ``car`` as the repository of ``did`` signed by ``key``; writes ``index``.

    Raises `CarError`, `MstError` (`MissingBlock` for an incomplete one), `CommitError` or
    `SignatureInvalid`; the index file is then not complete and must not be read.
    """
    buffer = map_file(car)
    limits = Limits(max_bytes=len(buffer), max_blocks=max_nodes)
    repo = index_repo(buffer, did=did, key=key, limits=limits, tree_limits=TreeLimits(max_nodes))
    flagged = oversize = 0
    with index.open("wb") as file:
        for chunk in _chunks(repo.records):
            entries = [_entry(buffer, *record) for record in chunk]
            flagged += sum(1 for entry in entries if entry[4])
            oversize += sum(1 for entry in entries if entry[4] & OVERSIZE)
            write_chunk(file, entries)
    return Verified(
        repo.commit.rev, repo.data, repo.commit_block, len(repo.records), flagged, oversize, len(buffer)
    )


def map_file(path: FilePath) -> mmap.mmap:
    """A CAR's bytes, read as they are touched."""
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise CarError("the CAR is empty", reason="car_truncated") from error


def write_chunk(file: BinaryIO, entries: list[IndexEntry]) -> None:
    data = msgpack.packb(entries)
    file.write(_LENGTH.pack(len(data)))
    file.write(data)


def read_index(index: FilePath) -> Iterator[list[IndexEntry]]:
    """The chunks of an index file, in key order."""
    with index.open("rb") as file:
        while head := file.read(_LENGTH.size):
            yield list(msgpack.unpackb(file.read(_LENGTH.unpack(head)[0]), use_list=False))


def _chunks(records: Records) -> Iterable[list[tuple[Path, Cid, int, int]]]:
    return (records[start : start + INDEX_CHUNK] for start in range(0, len(records), INDEX_CHUNK))


def _entry(buffer: mmap.mmap, path: Path, cid: Cid, start: int, end: int) -> IndexEntry:
    if end - start > MAX_RECORD:
        return path, cid, start, end, OVERSIZE
    try:
        check_record(buffer[start:end], max_bytes=MAX_RECORD)
    except RecordInvalid:
        return path, cid, start, end, INVALID
    return path, cid, start, end, 0
