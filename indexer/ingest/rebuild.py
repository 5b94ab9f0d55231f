"""A repository's tree rebuilt from its rows and held against its signed commit.

Pure; runs in a worker process, so it imports nothing that opens files or sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from indexer.atproto.cid import format_cid
from indexer.atproto.commit import Commit, check_signature, decode_commit
from indexer.atproto.mst import TreeBuilder
from indexer.atproto.types import Cid, Did, DidKey, Path
from indexer.errors import BadInput, CommitError, SignatureInvalid
from indexer.store.codecs import RepoRow

#: ``tree``: other records than were signed; ``commit``: the row and its commit say different things;
#: ``signature``: sound, but not signed by the key that the account has now.
Outcome: TypeAlias = Literal["ok", "tree", "commit", "signature"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("ok", "tree", "commit", "signature")
Signature: TypeAlias = Literal["valid", "invalid", "unchecked"]


class Finding(NamedTuple):
    """What a worker process makes of a repository's rows and commit."""

    outcome: Outcome
    message: str
    signature: Signature
    root: Cid  # rebuilt; b"" when no tree can be made of the rows


def grown(tree: TreeBuilder, paths: Sequence[Path], cids: Sequence[Cid]) -> TreeBuilder:
    """``tree`` with further records; only what is open of it goes from process to process. `MstError`
    where they do not ascend, or a path is none."""
    for path, cid in zip(paths, cids, strict=True):
        tree.add(path, cid)
    return tree


def no_tree() -> TreeBuilder:
    """A tree without records of which only the root is wanted."""
    return TreeBuilder(_drop)


def _drop(_cid: Cid, _block: bytes) -> None:
    pass


def inspect(did: Did, row: RepoRow, tree: TreeBuilder) -> Finding:
    """Judge a repository of which ``tree`` holds all records."""
    root = tree.close()
    try:
        commit = decode_commit(row.commit)
        _check_commit(commit, did, row)
    except BadInput as error:
        return Finding("commit", str(error), "unchecked", root)
    signature, why = _signature(commit, row.signing_key)
    if root != commit.data:
        message = f"the index gives the root {format_cid(root)}, signed is {format_cid(commit.data)}"
        return Finding("tree", message, signature, root)
    return Finding("signature" if signature == "invalid" else "ok", why, signature, root)


def _check_commit(commit: Commit, did: Did, row: RepoRow) -> None:
    said = (commit.did, commit.rev, commit.data)
    known = (did, row.rev, row.data)
    for name, theirs, ours in zip(("did", "rev", "data"), said, known, strict=True):
        if theirs != ours:
            raise CommitError(f"the stored commit has another {name} than the repository's row")


def _signature(commit: Commit, key: DidKey) -> tuple[Signature, str]:
    if not key:
        return "unchecked", "no signing key is known"
    try:
        check_signature(commit, key)
    except SignatureInvalid as error:
        return "invalid", f"{error}; the account may have changed its key since"
    return "valid", ""
