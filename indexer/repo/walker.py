"""A whole repository out of one CAR in memory: verified completely, then its records in key order. Hot.

Everything is checked: the archive to its exact end, every block's hash, the commit and (given a key) its signature,
every tree rule, and that every node and record the tree names is there, so that a cut archive is never taken
for a smaller repository. Works on offsets into one buffer (bytes or mmap); a record's block is sliced when it
is asked for. Any order of blocks, duplicates and blocks that nothing links to are fine. No I/O; runs in verifier
processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from mmap import mmap
from typing import Final, NamedTuple

from indexer.atproto import syntax
from indexer.atproto.car import DEFAULT_LIMITS as CAR_LIMITS
from indexer.atproto.car import Limits, bad_hash, check_block_cid, check_section, read_header, read_varint
from indexer.atproto.cid import CID_LENGTH, DAG_CBOR_PREFIX, format_cid
from indexer.atproto.commit import Commit, check_signature, decode_commit
from indexer.atproto.mst import DEFAULT_LIMITS as TREE_LIMITS
from indexer.atproto.mst import TreeLimits, visit
from indexer.atproto.types import Cid, Did, DidKey, Path
from indexer.errors import CarError, CommitError, MissingBlock

Buffer = bytes | bytearray | memoryview | mmap


class RepoIndex(NamedTuple):
    """Where everything is. ``records``: (path, CID, start, end) in key order, offsets into the buffer."""

    commit: Commit
    commit_cid: Cid
    commit_block: bytes
    data: Cid
    records: list[tuple[Path, Cid, int, int]]
    blocks: int
    bytes: int


class Repo(NamedTuple):
    """A verified repository and the buffer that holds it."""

    commit: Commit
    commit_cid: Cid
    commit_block: bytes
    buffer: bytes | mmap
    index: RepoIndex

    @property
    def records(self) -> Iterator[tuple[Path, Cid, bytes]]:
        """(path, CID, block) in key order."""
        return walk_records(self)


def index_repo(
    buffer: Buffer,
    *,
    did: Did | None = None,
    key: DidKey | None = None,
    limits: Limits = CAR_LIMITS,
    tree_limits: TreeLimits = TREE_LIMITS,
    verify_hashes: bool = True,
) -> RepoIndex:
    data = _sliceable(buffer)
    roots, start = read_header(data, limits)  # type: ignore[arg-type]
    index: dict[Cid, tuple[int, int]] = {}
    at = start
    blocks = 0
    size = len(data)
    while at < size:
        length, begin = read_varint(data, at)  # type: ignore[arg-type]
        check_section(at, length, limits.max_block + CID_LENGTH)
        end = begin + length
        if end > size:
            raise CarError(f"CAR ends inside the section at offset {at}", reason="car_truncated")
        cid = data[begin : begin + CID_LENGTH]
        check_block_cid(at, cid)
        if verify_hashes and sha256(data[begin + CID_LENGTH : end]).digest() != cid[4:]:
            raise bad_hash(at, cid)
        index[cid] = (begin + CID_LENGTH, end)
        blocks += 1
        at = end

    def get(cid: Cid) -> bytes | None:
        span = index.get(cid)
        return None if span is None else data[span[0] : span[1]]

    if not roots:
        raise CarError("CAR has no root")
    commit_block = get(roots[0])
    if commit_block is None:
        raise MissingBlock("commit missing", cid=roots[0])
    commit = decode_commit(commit_block)
    if did is not None and commit.did != did:
        raise CommitError(f"the repository is of {commit.did}, not of {did}")
    if key is not None:
        check_signature(commit, key)
    records = []
    for path, cid in visit(commit.data, get, tree_limits):
        if path is not None:
            span = index.get(cid)
            if span is None:
                raise MissingBlock(f"record {path} is missing", cid=cid)
            records.append((path, cid, *span))
    return RepoIndex(commit, roots[0], commit_block, commit.data, records, blocks, size)


def load_repo(
    buffer: Buffer,
    *,
    did: Did | None = None,
    key: DidKey | None = None,
    limits: Limits = CAR_LIMITS,
    tree_limits: TreeLimits = TREE_LIMITS,
) -> Repo:
    """The verified repository in ``buffer``; raises as `index_repo`."""
    data = _sliceable(buffer)
    index = index_repo(data, did=did, key=key, limits=limits, tree_limits=tree_limits)
    return Repo(index.commit, index.commit_cid, index.commit_block, data, index)


verify_repo = load_repo


def walk_records(repo: Repo) -> Iterator[tuple[Path, Cid, bytes]]:
    """(path, CID, block) of every record in key order."""
    buffer = repo.buffer
    for path, cid, start, end in repo.index.records:
        yield path, cid, buffer[start:end]


def walk_chunks(repo: Repo, size: int) -> Iterator[list[tuple[Path, Cid, bytes]]]:
    """`walk_records` in lists of ``size`` (the last may be shorter)."""
    buffer, records = repo.buffer, repo.index.records
    for first in range(0, len(records), size):
        yield [(path, cid, buffer[start:end]) for path, cid, start, end in records[first : first + size]]


def _sliceable(buffer: Buffer) -> bytes | mmap:
    # Slices of these two are bytes, which is what the decoder and the dictionaries need.
    return buffer if isinstance(buffer, (bytes, mmap)) else bytes(buffer)
