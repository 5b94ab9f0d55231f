"""A part of a repository in one archive, and what it proves: that a record is there, or that none is.

Every node on the way to an answer must be in the archive and is checked in its place; a subtree is only
passed over when its parent's keys, or its layer, show that the answer cannot lie there. So an archive that
leaves a node out proves nothing about what lies below it, and asking is an error. Pure, any thread.
"""

from __future__ import annotations

from typing import NamedTuple

from indexer.atproto.car import read_car
from indexer.atproto.cid import format_cid
from indexer.atproto.commit import Commit
from indexer.atproto.node import describe
from indexer.atproto.types import Cid, Path
from indexer.errors import DriveError, MissingBlock
from indexer.repo.blocks import Output
from indexer.repo.loading import Plan, root_of
from indexer.repo.tree_walk import Entry, TreeWalk
from indexer.repo.walker import checked_commit
from indexer.repo.walks import translated


class Proven(NamedTuple):
    """The answer for one path: the record's CID, None when it is proven that there is no record.

    ``record`` is None as well when the archive proves the record but does not bring its block.
    """

    path: Path
    cid: Cid | None
    record: Output | None


class RepoSlice:
    """The blocks of an archive, with the questions that they can answer."""

    def __init__(self, commit: Commit, blocks: dict[Cid, bytes], plan: Plan) -> None:
        self.commit = commit
        self._blocks = blocks
        self._plan = plan

    @classmethod
    def read(cls, data: bytes, plan: Plan) -> RepoSlice:
        """The archive ``data``: its blocks hashed, its commit checked."""
        car = read_car(data, plan.limits)
        root = root_of(car.roots)
        block = car.blocks.get(root)
        if block is None:
            raise DriveError(f"the commit {format_cid(root)} is missing", kind="missing_commit")
        return cls(checked_commit(root, block, plan.did, plan.key), car.blocks, plan)

    def get(self, path: Path) -> Proven:
        """The proof for one path."""
        for found, cid in self._entries(path, path + "\0", exact=True):
            return Proven(found, cid, self._output(found, cid))
        return Proven(path, None, None)

    def range(self, start: Path, stop: Path | None = None) -> list[Output]:
        """All records from ``start`` to before ``stop``; complete, or `DriveError`."""
        found = []
        for path, cid in self._entries(start, stop):
            output = self._output(path, cid)
            if output is None:
                with translated(self.commit):
                    raise MissingBlock(f"record {path} ({format_cid(cid)}) is missing", cid=cid)
            found.append(output)
        return found

    def prefix(self, prefix: Path) -> list[Output]:
        """All records whose path begins with ``prefix``; complete, or `DriveError`."""
        return self.range(prefix, prefix + "\x7f")

    def _entries(self, start: Path, stop: Path | None, *, exact: bool = False) -> list[Entry]:
        limits = self._plan.tree_limits
        walk = TreeWalk(self.commit.data, start=start, stop=stop, exact=exact, limits=limits)
        found: list[Entry] = []
        with translated(self.commit):
            while (cid := walk.want) is not None:
                block = self._blocks.get(cid)
                if block is None:
                    raise MissingBlock(f"{describe(cid)} is missing: nothing is proven below it", cid=cid)
                found += walk.take(block)
        return found

    def _output(self, path: Path, cid: Cid) -> Output | None:
        block = self._blocks.get(cid)
        return None if block is None else Output(path, cid, *self._plan.keeping.outcome(block))
