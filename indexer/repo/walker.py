"""A whole repository out of one CAR in memory: verified completely, then its records in key order. Hot.

An archive in streaming order goes through `preorder`; what that does not take goes the way below, which says
what is wrong with it or takes it in any order.

Everything is checked: the archive to its exact end, every block's hash, the commit and (given a key) its
signature, every tree rule, and that every node and record the tree names is there, so that a cut archive is
never taken for a smaller repository. Works on offsets into one buffer (bytes or mmap); a record's block is
sliced when it is asked for. Any order of blocks, duplicates and blocks that nothing links to are fine. No
I/O; runs in verifier processes.

Where the time goes when blocks lie in any order (big24k.car, 7.4 MiB, 23,699 records): nodes 35 %, sections
20 %, block hashes 15 %, key layers 10 %; hence local names and checks of many keys or CIDs at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from mmap import mmap
from typing import Final, NamedTuple

from indexer.atproto.car import DEFAULT_LIMITS as CAR_LIMITS
from indexer.atproto.car import Limits, read_header, read_varint, sections
from indexer.atproto.cid import CID_LENGTH, DAG_CBOR_PREFIX, format_cid
from indexer.atproto.commit import Commit, check_signature, decode_commit
from indexer.atproto.mst import DEFAULT_LIMITS as TREE_LIMITS
from indexer.atproto.mst import TreeLimits, root_layer
from indexer.atproto.node import (
    EMPTY_ROOT,
    Fields,
    Node,
    check_layer,
    describe,
    shown,
    split_node,
)
from indexer.atproto.types import Cid, Did, DidKey, Path
from indexer.errors import CarError, CommitError, MissingBlock, MstError
from indexer.repo.collector import paused
from indexer.repo.keys import are_cids, check_keys
from indexer.repo.preorder import WINDOW, Preorder
from indexer.repo.records import Records

Buffer = bytes | bytearray | memoryview | mmap


class RepoIndex(NamedTuple):
    """Where everything is; offsets into the buffer."""

    commit: Commit
    commit_cid: Cid
    commit_block: bytes
    data: Cid
    records: Records
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
    with paused():
        return _index(_sliceable(buffer), did, key, limits, tree_limits, verify_hashes)


def _index(
    data: bytes | mmap,
    did: Did | None,
    key: DidKey | None,
    limits: Limits,
    tree_limits: TreeLimits,
    verify_hashes: bool,
) -> RepoIndex:
    roots, start = read_header(data, limits)
    if not roots:
        raise CarError("CAR has no root")
    root = roots[0]
    # What nobody signed is refused before it costs anything: finding 36 bytes takes a hundredth of the walk.
    early = find_commit(data, start, root)
    if early is not None:
        commit = checked_commit(root, early.block, did, key)
        if early.begin == start:
            in_order = _in_order(data, early.end, commit.data, limits, tree_limits, verify_hashes)
            if in_order is not None:
                return RepoIndex(commit, root, early.block, commit.data, *in_order, len(data))
    spans, blocks = _split(data, start, limits, verify_hashes)
    span = spans.get(root)
    if span is None:
        raise MissingBlock(f"the commit {format_cid(root)} is missing", cid=root)
    if early is None:
        at = span >> 32
        block = data[at : at + (span & _LENGTH)]
        commit = checked_commit(root, block, did, key)
    else:
        block = early.block
    records = _records(data, commit.data, spans, tree_limits)
    return RepoIndex(commit, root, block, commit.data, records, blocks, len(data))


def _in_order(
    data: bytes | mmap, at: int, root: Cid, limits: Limits, tree_limits: TreeLimits, verify: bool
) -> tuple[Records, int] | None:
    """(records, number of blocks) of an archive in streaming order that is good, None of any other."""
    walk = Preorder(root, limits, tree_limits, verify=verify)
    records = Records(data)
    size = len(data)
    while at < size:
        taken = walk.window(data, at, min(at + WINDOW, size))
        if taken is None or taken.end == at:
            return None
        records.add(taken.text, taken.starts, taken.ends)
        at = taken.end
    return (records, walk.blocks) if walk.done else None


class Section(NamedTuple):
    """A block and where its section lies."""

    block: bytes
    begin: int
    end: int


def find_commit(data: bytes | mmap, start: int, root: Cid) -> Section | None:
    """The block of ``root`` where its CID first stands; None leaves the judgement to others."""
    place = data.find(root, start)
    body = place + CID_LENGTH
    for begin in range(place - 1, max(place - 3, start - 1), -1):  # a commit's length takes two bytes at most
        with suppress(CarError):
            length, behind = read_varint(data, begin)
            block = data[body : place + length]
            if behind == place and sha256(block).digest() == root[4:]:
                return Section(block, begin, place + length)
    return None


def checked_commit(root: Cid, block: bytes, did: Did | None, key: DidKey | None) -> Commit:
    if root[:4] != DAG_CBOR_PREFIX:
        raise CommitError(f"the root {format_cid(root)} is not a DAG-CBOR block")
    commit = decode_commit(block)
    if did is not None and commit.did != did:
        raise CommitError(f"the repository is of {commit.did}, not of {did}", reason="did_mismatch")
    if key is not None:
        check_signature(commit, key)
    return commit


#: CID → where its block starts, shifted by 32 bits, and its length: half the memory of a pair of numbers.
_Spans = dict[Cid, int]
_LENGTH: Final = (1 << 32) - 1
#: Records that are kept together.
_RUN: Final = 1000


def _split(data: bytes | mmap, at: int, limits: Limits, verify: bool) -> tuple[_Spans, int]:
    """(where each block is, number of blocks). As `car.iter_blocks`, inlined: a third of the walk.

    Only what every good archive passes is decided here; `iter_blocks` says what is wrong with another.
    """
    first, size = at, len(data)
    shortest, largest = CID_LENGTH, min(limits.max_block, _LENGTH) + CID_LENGTH
    most = limits.max_blocks
    digest = sha256
    spans: _Spans = {}
    blocks = 0
    try:
        while at < size:
            length = data[at]
            start = at + 1
            if length > 0x7F:
                high = data[start]
                if 0 < high < 0x80:
                    start += 1
                    length += (high << 7) - 0x80
                else:
                    length, start = read_varint(data, at)
            if not shortest <= length <= largest or blocks == most:
                break
            at = start + length
            body = start + shortest
            cid = data[start:body]
            if verify and digest(data[body:at]).digest() != cid[4:]:
                break
            spans[cid] = body << 32 | at - body
            blocks += 1
        else:
            if at == size and are_cids(b"".join(spans)):
                return spans, blocks
    except IndexError:  # the archive ends inside a length
        pass
    for _ in sections(data, first, limits, verify):
        pass
    raise CarError("CAR is malformed")


def _records(data: bytes | mmap, root: Cid, spans: _Spans, limits: TreeLimits) -> Records:
    """Every record in key order. The rules of `mst.walk`, but checked for many keys at once."""
    records = Records(data)
    if root == EMPTY_ROOT and root in spans:
        return records
    walk = _Walk(data, spans, limits)
    walk.run(root)
    for layer, layer_keys in enumerate(walk.layers):
        check_layer(layer_keys, layer)
    values = walk.values
    paths = check_keys(walk.keys).split("\n")
    try:
        places = list(map(spans.__getitem__, values))
    except KeyError:
        path, value = next(pair for pair in zip(paths, values, strict=True) if pair[1] not in spans)
        raise MissingBlock(f"record {path} ({format_cid(value)}) is missing", cid=value) from None
    for first in range(0, len(paths), _RUN):
        run = places[first : first + _RUN]
        starts = [span >> 32 for span in run]
        ends = [(span >> 32) + (span & _LENGTH) for span in run]
        records.add("\n".join(paths[first : first + _RUN]), starts, ends)
    return records


class _Walk:
    """All keys and values of a tree, in order. Left to the caller: form of keys, layers, presence of records.

    A node's first key must come after every key before it, so no node with keys is entered twice, and chains
    of nodes without keys end at layer 0: a hostile tree costs no more than its bytes times its layers.
    """

    __slots__ = ("_data", "_limits", "_nodes", "_spans", "keys", "layers", "values")

    def __init__(self, data: bytes | mmap, spans: _Spans, limits: TreeLimits) -> None:
        self._data = data
        self._spans = spans
        self._limits = limits
        self._nodes = 0
        self.keys: list[bytes] = []
        self.values: list[Cid] = []
        self.layers: list[list[bytes]] = []  # keys by the layer of the node that holds them

    def run(self, root: Cid) -> None:
        node = self._load(root)
        layer = root_layer(root, Node(*node))
        self._limits.check_depth(layer)
        self.layers = [[] for _ in range(layer + 1)]
        self.layers[layer] += node[0]
        if layer == 0:
            self.keys, self.values = node[0], node[1]
            self._check_size()
            return
        keys, values = self.keys, self.values
        stack: list[tuple[Fields, int, int]] = [(node, layer, 0)]  # node, its layer, number of the next child
        while stack:
            node, layer, index = stack.pop()
            if layer == 1:
                self._leaves(node)
                continue
            node_keys, node_values, kids = node
            if index:  # back from the child before this entry
                keys.append(node_keys[index - 1])
                values.append(node_values[index - 1])
            while index < len(node_keys) and kids[index] is None:
                keys.append(node_keys[index])
                values.append(node_values[index])
                index += 1
            kid = kids[index]
            if kid is not None:
                if index < len(node_keys):
                    stack.append((node, layer, index + 1))
                node = self._load(kid)
                self.layers[layer - 1] += node[0]
                stack.append((node, layer - 1, 0))

    def _load(self, cid: Cid) -> Fields:
        span = self._spans.get(cid)
        if span is None:
            raise MissingBlock(f"{describe(cid)} is missing", cid=cid)
        at = span >> 32
        self._limits.check_node(cid, span & _LENGTH)
        node = split_node(self._data[at : at + (span & _LENGTH)])
        self._check(cid, node)
        self._nodes += 1
        self._check_size()
        return node

    def _check_size(self) -> None:
        self._limits.check_size(self._nodes + len(self.keys))

    def _check(self, cid: Cid, node: Fields) -> None:
        if not node[0]:
            if node[2][0] is None:
                raise MstError(f"{describe(cid)} is empty", rule="empty_node")
        elif self.keys and node[0][0] <= self.keys[-1]:
            raise MstError(
                f"key {shown(node[0][0])} does not come after {shown(self.keys[-1])}", rule="order"
            )

    def _leaves(self, node: Fields) -> None:
        """A node of layer 1 with the leaves below it: most of every tree, and so the tightest loop."""
        keys, values, spans, data = self.keys, self.values, self._spans, self._data
        bottom = self.layers[0]
        length, largest = _LENGTH, self._limits.max_node_bytes
        node_keys, node_values, kids = node
        last = len(node_keys)
        self._nodes += last + 1 - kids.count(None)
        for index, kid in enumerate(kids):
            if kid is not None:
                span = spans.get(kid)
                if span is None:
                    raise MissingBlock(f"{describe(kid)} is missing", cid=kid)
                at = span >> 32
                if span & length > largest:
                    self._limits.check_node(kid, span & length)
                leaf = split_node(data[at : at + (span & length)])
                leaf_keys, leaf_values, below = leaf
                if not leaf_keys or (keys and leaf_keys[0] <= keys[-1]):
                    self._check(kid, leaf)
                if below.count(None) != len(below):
                    raise MstError(f"{describe(kid)} is on layer 0 and has a child", rule="lost_depth")
                bottom += leaf_keys
                keys += leaf_keys
                values += leaf_values
            if index < last:
                keys.append(node_keys[index])
                values.append(node_values[index])
        self._check_size()


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


def walk_records(repo: Repo) -> Iterator[tuple[Path, Cid, bytes]]:
    """(path, CID, block) of every record in key order."""
    return repo.index.records.blocks()


def walk_chunks(repo: Repo, size: int) -> Iterator[list[tuple[Path, Cid, bytes]]]:
    """`walk_records` in lists of ``size`` (the last may be shorter)."""
    buffer, records = repo.buffer, repo.index.records
    for first in range(0, len(records), size):
        yield [(path, cid, buffer[start:end]) for path, cid, start, end in records[first : first + size]]


def _sliceable(buffer: Buffer) -> bytes | mmap:
    # Slices of these two are bytes, which is what the decoder and the dictionaries need.
    return buffer if isinstance(buffer, (bytes, mmap)) else bytes(buffer)
