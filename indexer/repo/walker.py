"""A whole repository out of one CAR in memory: verified completely, then its records in key order. Hot.

Everything is checked: the archive to its exact end, every block's hash, the commit and (given a key) its
signature, every tree rule, and that every node and record the tree names is there, so that a cut archive is
never taken for a smaller repository. Works on offsets into one buffer (bytes or mmap); a record's block is
sliced when it is asked for. Any order of blocks, duplicates and blocks that nothing links to are fine. No
I/O; runs in verifier processes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice, pairwise
from mmap import mmap
from operator import lt
from typing import NamedTuple

from indexer.atproto.car import DEFAULT_LIMITS as CAR_LIMITS
from indexer.atproto.car import Limits, read_header, read_varint, sections
from indexer.atproto.cid import CID_LENGTH, DAG_CBOR_PREFIX, RAW_PREFIX, format_cid
from indexer.atproto.commit import Commit, check_signature, decode_commit
from indexer.atproto.mst import DEFAULT_LIMITS as TREE_LIMITS
from indexer.atproto.mst import TreeLimits, check_path, root_layer
from indexer.atproto.node import (
    EMPTY_ROOT,
    Fields,
    Node,
    are_tree_keys,
    check_layer,
    describe,
    shown,
    split_node,
)
from indexer.atproto.syntax import MAX_RKEY
from indexer.atproto.types import Cid, Did, DidKey, Path
from indexer.errors import CarError, CommitError, MissingBlock, MstError

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


@dataclass(frozen=True, slots=True)
class Repo:
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
    """Check the repository in ``buffer`` and say where everything is.

    ``did``: whose it must be; ``key``: who must have signed it (both unchecked when None). Raises `CarError`,
    `CommitError`, `SignatureInvalid`, `MstError`; `MissingBlock` (an `MstError`) when something that the
    commit names is absent, which is what a cut archive looks like: worth another fetch.
    ``verify_hashes`` may be off where the blocks were hashed on arrival; else nothing here is proven.
    """
    data = _sliceable(buffer)
    roots, start = read_header(data, limits)
    if not roots:
        raise CarError("CAR has no root")
    spans, blocks = _split(data, start, limits, verify_hashes)
    span = spans.get(roots[0])
    if span is None:
        raise MissingBlock(f"the commit {format_cid(roots[0])} is missing", cid=roots[0])
    if roots[0][:4] != DAG_CBOR_PREFIX:
        raise CommitError(f"the root {format_cid(roots[0])} is not a DAG-CBOR block")
    commit_block = data[span[0] : span[1]]
    commit = decode_commit(commit_block)
    if did is not None and commit.did != did:
        raise CommitError(f"the repository is of {commit.did}, not of {did}", reason="did_mismatch")
    if key is not None:
        check_signature(commit, key)
    records = _records(data, commit.data, spans, tree_limits.max_nodes)
    return RepoIndex(commit, roots[0], commit_block, commit.data, records, blocks, len(data))


_Spans = dict[Cid, tuple[int, int]]


def _split(data: bytes | mmap, at: int, limits: Limits, verify: bool) -> tuple[_Spans, int]:
    """(where each block is, number of blocks). As `car.iter_blocks`, inlined: a third of the walk.

    Only what every good archive passes is decided here; `iter_blocks` says what is wrong with another.
    """
    first, size = at, len(data)
    largest = limits.max_block + CID_LENGTH
    prefix = DAG_CBOR_PREFIX
    digest = sha256
    spans: _Spans = {}
    blocks = 0
    while at < size:
        length = data[at]
        if length < 0x80:
            body = at + 1 + CID_LENGTH
            if length < CID_LENGTH:
                break
        else:
            high = data[at + 1] if at + 1 < size else 0
            if 0 < high < 0x80:
                length += (high << 7) - 0x80
                body = at + 2 + CID_LENGTH
            else:
                length, body = read_varint(data, at)
                body += CID_LENGTH
            if length > largest:
                break
        at = body - CID_LENGTH + length
        cid = data[body - CID_LENGTH : body]
        if verify:
            if prefix + digest(data[body:at]).digest() != cid and (
                cid[:4] != RAW_PREFIX or digest(data[body:at]).digest() != cid[4:]
            ):
                break
        elif cid[:4] != prefix and cid[:4] != RAW_PREFIX:
            break
        spans[cid] = (body, at)
        blocks += 1
    else:
        if at == size and blocks <= limits.max_blocks:
            return spans, blocks
    for _ in sections(data, first, limits, verify):
        pass
    raise CarError("CAR is malformed")


def _records(
    data: bytes | mmap, root: Cid, spans: _Spans, max_nodes: int
) -> list[tuple[Path, Cid, int, int]]:
    """Every record in key order. The rules of `mst.walk`, but checked for many keys at once."""
    if root == EMPTY_ROOT and root in spans:
        return []
    keys, values = _walk(data, root, spans, max_nodes)
    paths = check_keys(keys)
    try:
        return [
            (path, value, start, end)
            for path, value, (start, end) in zip(paths, values, map(spans.__getitem__, values), strict=True)
        ]
    except KeyError:
        path, value = next(pair for pair in zip(paths, values, strict=True) if pair[1] not in spans)
        raise MissingBlock(f"record {path} ({format_cid(value)}) is missing", cid=value) from None


def _walk(data: bytes | mmap, root: Cid, spans: _Spans, max_nodes: int) -> tuple[list[bytes], list[Cid]]:
    """All keys and values in the order of the walk. Left to the caller: order, form, presence of records.

    No node is entered twice (that would repeat keys), so a hostile tree costs no more than its bytes.
    """
    keys: list[bytes] = []
    values: list[Cid] = []
    seen: set[Cid] = set()
    layers: list[list[bytes]] = []  # keys by the layer of the node that holds them
    stack: list[tuple[Fields, int, int]] = []  # a node under way, its layer, the number of its next child
    cid, layer = root, -1
    while True:
        span = spans.get(cid)
        if span is None:
            raise MissingBlock(f"{describe(cid)} is missing", cid=cid)
        if cid in seen:
            raise MstError(f"{describe(cid)} is reached twice")
        seen.add(cid)
        node = split_node(data[span[0] : span[1]])
        if layer < 0:
            layer = root_layer(root, Node(*node))
            layers = [[] for _ in range(layer + 1)]
        node_keys, node_values, kids = node
        layers[layer] += node_keys
        if layer and kids.count(None) < len(kids):
            stack.append((node, layer, 0))
        elif node_keys and kids.count(None) == len(kids):
            keys += node_keys
            values += node_values
        else:
            raise MstError(f"{describe(cid)} is {'on layer 0 and has a child' if any(kids) else 'empty'}")
        if len(seen) + len(keys) > max_nodes:
            raise MstError(f"tree of more than {max_nodes} nodes and records", reason="tree_size")
        step = _next(stack, keys, values)
        if step is None:
            break
        cid, layer = step
    for layer, layer_keys in enumerate(layers):
        check_layer(layer_keys, layer)
    return keys, values


def _next(
    stack: list[tuple[Fields, int, int]], keys: list[bytes], values: list[Cid]
) -> tuple[Cid, int] | None:
    """(CID, layer) of the next child to enter; entries before it are added to ``keys`` and ``values``."""
    while stack:
        node, layer, index = stack.pop()
        node_keys, node_values, kids = node
        count = len(node_keys)
        if index:  # back from the child before this entry
            keys.append(node_keys[index - 1])
            values.append(node_values[index - 1])
        kid = kids[index]
        while kid is None and index < count:
            keys.append(node_keys[index])
            values.append(node_values[index])
            index += 1
            kid = kids[index]
        if kid is not None:
            if index < count:
                stack.append((node, layer, index + 1))
            return kid, layer - 1
    return None


def check_keys(keys: Sequence[bytes]) -> list[Path]:
    """The keys of a whole tree as paths, when they ascend and are all valid; `MstError` otherwise."""
    if not all(map(lt, keys, islice(keys, 1, None))):
        last, key = next(pair for pair in pairwise(keys) if pair[0] >= pair[1])
        raise MstError(f"key {shown(key)} does not come after {shown(last)}")
    joined = b"\n".join(keys)
    paths = joined.decode("ascii").split("\n")
    # Keys are sorted: the keys of a collection lie together, and one look at each collection is enough.
    first = 0
    while first < len(paths):
        collection = paths[first].partition("/")[0]
        check_path(paths[first], "")
        first = bisect_left(paths, collection + "0", first)  # "0" is the character after "/"
    odd: Iterable[Path] = paths
    if are_tree_keys(keys) and not (
        b"/.\n" in joined or b"/..\n" in joined or joined.endswith((b"/.", b"/.."))
    ):
        odd = [path for path in paths if len(path) > MAX_RKEY]
    for path in odd:
        check_path(path, "")
    return paths


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
