"""Trees rebuilt from the index, for CARs and proofs.

Owns the cache of rebuilt trees by data root (bounded in bytes) and the rule that at most two are built at
one time, in a worker process. A rebuilt root that is not the signed one means that the index is wrong:
that is an error of ours, never an answer.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from indexer.atproto import mst
from indexer.atproto.cid import format_cid
from indexer.atproto.mst import Tree
from indexer.atproto.types import Cid, Did, Path
from indexer.errors import RequestError, StoreCorrupt
from indexer.store.codecs import CID_BYTES, RecordRow

if TYPE_CHECKING:
    from indexer.pool import Pool
    from indexer.store.database import Snapshot

_BUILDS_AT_ONCE = 2
#: Memory of a node in a dict beside its bytes and CID.
_NODE_OVERHEAD = 250
#: Rows read before others get their turn on the loop.
_STEP_ROWS = 2_000


class Listing(NamedTuple):
    """All records of a repository, in tree order."""

    paths: list[Path]
    rows: list[RecordRow]


class Trees:
    """Rebuilds trees and remembers them."""

    def __init__(self, pool: Pool, *, cache_bytes: int, max_records: int) -> None:
        self._pool = pool
        self._budget = cache_bytes
        self._max_records = max_records
        self._turns = asyncio.Semaphore(_BUILDS_AT_ONCE)
        self._cache: OrderedDict[Cid, Tree] = OrderedDict()
        self._sizes: dict[Cid, int] = {}
        self.size = 0
        self.built = 0

    async def listing(self, snapshot: Snapshot, did: Did) -> Listing:
        """The records of ``did`` at the snapshot; a repository that is too large is refused by name."""
        listing = Listing([], [])
        start: Path | None = None
        while True:
            rows = snapshot.records(did, start=start, limit=_STEP_ROWS)
            listing.paths.extend(path for path, _ in rows)
            listing.rows.extend(row for _, row in rows)
            if len(listing.paths) > self._max_records:
                raise RequestError(
                    f"repository {did} has more than {self._max_records} records", name="RepoTooLarge"
                )
            if len(rows) < _STEP_ROWS:
                return listing
            start = rows[-1][0] + "\0"
            await asyncio.sleep(0)

    async def tree(self, did: Did, root: Cid, listing: Listing) -> Tree:
        """The tree of ``listing``, whose root must be ``root``."""
        if (tree := self._cached(root)) is not None:
            return tree
        async with self._turns:
            # Another query may have built it while this one waited.
            if (tree := self._cached(root)) is not None:
                return tree
            paths = "\n".join(listing.paths)
            cids = b"".join(row.cid for row in listing.rows)
            tree = await self._pool.run(build_tree, paths, cids)
        if tree.root != root:
            raise StoreCorrupt(
                f"the index of {did} gives the root {format_cid(tree.root)}, signed is {format_cid(root)}"
            )
        self._remember(tree)
        return tree

    def _cached(self, root: Cid) -> Tree | None:
        tree = self._cache.get(root)
        if tree is not None:
            self._cache.move_to_end(root)
        return tree

    def _remember(self, tree: Tree) -> None:
        self.built += 1
        size = sum(len(node) + _NODE_OVERHEAD for node in tree.nodes.values())
        if size > self._budget or tree.root in self._cache:
            return
        self._cache[tree.root] = tree
        self._sizes[tree.root] = size
        self.size += size
        while self.size > self._budget:
            self.size -= self._sizes.pop(self._cache.popitem(last=False)[0])


def build_tree(paths: str, cids: bytes) -> Tree:
    """The tree of ``paths`` (one a line) and their CIDs (one after another). Runs in a worker process."""
    keys = paths.split("\n") if paths else []
    links = (cids[start : start + CID_BYTES] for start in range(0, len(cids), CID_BYTES))
    return mst.build(zip(keys, links, strict=True))


def preorder(tree: Tree) -> Iterator[tuple[Cid, bytes | None]]:
    """Nodes with their bytes and records without, in the order of a streamable CAR: a node, then what it
    holds from left to right."""
    for path, cid in tree.preorder():
        yield cid, tree.nodes[cid] if path is None else None
