"""A repository's tree rebuilt from its rows and held against its signed commit.

Pure; runs in a worker process, so it imports nothing that opens files or sockets.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias

from indexer.atproto import mst
from indexer.atproto.cid import format_cid
from indexer.atproto.commit import Commit, check_signature, decode_commit
from indexer.atproto.types import Cid, Did, DidKey
from indexer.errors import BadInput, CommitError, SignatureInvalid
from indexer.store.codecs import CID_BYTES, RepoRow

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


def inspect(did: Did, row: RepoRow, paths: str, links: bytes) -> Finding:
    """Judge a repository of ``paths`` (one a line) and their CIDs (one after another)."""
    keys = paths.split("\n") if paths else []
    cids = (links[start : start + CID_BYTES] for start in range(0, len(links), CID_BYTES))
    try:
        root = mst.build(zip(keys, cids, strict=True)).root
    except (BadInput, ValueError) as error:  # a path that is none, or with a line break in it
        return Finding("tree", f"the index holds what no tree can: {error}", "unchecked", b"")
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
