"""Commit objects: decoding with the bytes reproduced exactly, signed bytes, signature.

A commit has six fields and nothing else, so its canonical bytes are put together by hand here and compared:
that covers field names and order, minimal lengths, and links and byte strings that are what they seem.
(The general encoder cannot be used for it: a signature may look like a CID.) Pure functions, any thread.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from indexer.atproto import crypto, syntax
from indexer.atproto.cid import CID_LENGTH, DAG_CBOR_PREFIX
from indexer.atproto.dagcbor import decode
from indexer.atproto.types import Cid, Did, DidKey, Rev
from indexer.errors import CommitError, DagCborError, SignatureInvalid

VERSION: Final = 3
MAX_COMMIT_BYTES: Final = 8192
_FIELDS: Final = frozenset({"did", "rev", "sig", "data", "prev", "version"})
_LINK: Final = b"\xd8\x2a\x58\x25\x00"


class Commit(NamedTuple):
    """A signed statement about a repository's root. ``prev`` is None in nearly all of them."""

    did: Did
    version: int
    data: Cid
    rev: Rev
    prev: Cid | None
    sig: bytes


def decode_commit(block: bytes) -> Commit:
    """The commit in ``block``; `CommitError` names the field that is wrong or missing."""
    if len(block) > MAX_COMMIT_BYTES:
        raise CommitError(f"commit of {len(block)} bytes, more than {MAX_COMMIT_BYTES}")
    try:
        value = decode(block)
    except DagCborError as error:
        raise CommitError(f"commit is {error}") from error
    if type(value) is not dict:
        raise CommitError(f"commit is not a map but {type(value).__name__}")
    if value.keys() != _FIELDS:
        missing, unknown = sorted(_FIELDS - value.keys()), sorted(value.keys() - _FIELDS)
        raise CommitError(f"commit fields: missing {missing}, unknown {unknown}"[:300])
    _check_fields(value)
    commit = Commit(value["did"], VERSION, value["data"], value["rev"], value["prev"], value["sig"])
    if _canonical(commit, signed=True) != block:
        raise CommitError("commit is not in canonical form: encoding it again gives other bytes")
    return commit


def _check_fields(value: dict[str, Any]) -> None:
    if type(value["version"]) is not int or value["version"] != VERSION:
        raise CommitError(f"commit version {value['version']!r} is not {VERSION}"[:200])
    for name in ("did", "rev"):
        if type(value[name]) is not str:
            raise CommitError(f"commit {name} is not a string")
    if not syntax.is_did(value["did"]):
        raise CommitError(f"commit did is not a DID: {value['did']!r}"[:200])
    if not syntax.is_tid(value["rev"]):
        raise CommitError(f"commit rev is not a TID: {value['rev']!r}"[:200])
    if type(value["sig"]) is not bytes:
        raise CommitError("commit sig is not bytes")
    data, prev = value["data"], value["prev"]
    if type(data) is not bytes or len(data) != CID_LENGTH or data[:4] != DAG_CBOR_PREFIX:
        raise CommitError("commit data is not a link to a DAG-CBOR block with SHA-256")
    if prev is not None and (
        type(prev) is not bytes or len(prev) != CID_LENGTH or prev[:4] != DAG_CBOR_PREFIX
    ):
        raise CommitError("commit prev is neither null nor a link to a DAG-CBOR block with SHA-256")


def encode_commit(commit: Commit) -> bytes:
    """The commit's block."""
    return _canonical(commit, signed=True)


def signing_bytes(block: bytes) -> bytes:
    """What the signature of the commit in ``block`` is over (before SHA-256): the map without ``sig``."""
    return unsigned_bytes(decode_commit(block))


def unsigned_bytes(commit: Commit) -> bytes:
    """`signing_bytes` of a commit that is decoded already."""
    return _canonical(commit, signed=False)


def _canonical(commit: Commit, signed: bool) -> bytes:
    did, rev, sig = commit.did.encode(), commit.rev.encode(), commit.sig
    prev = b"\xf6" if commit.prev is None else _LINK + commit.prev
    return b"".join((
        b"\xa6cdid" if signed else b"\xa5cdid", _head(0x60, len(did)), did,
        b"crev", _head(0x60, len(rev)), rev,
        *((b"csig", _head(0x40, len(sig)), sig) if signed else ()),
        b"ddata", _LINK, commit.data, b"dprev", prev, b"gversion\x03",
    ))  # fmt: skip


def _head(major: int, length: int) -> bytes:
    if length < 24:
        return bytes((major | length,))
    if length < 256:
        return bytes((major | 24, length))
    return bytes((major | 25,)) + length.to_bytes(2, "big")


def verify_commit_signature(block: bytes, key: DidKey) -> None:
    """Raise `SignatureInvalid` unless ``key`` signed the commit in ``block``."""
    check_signature(decode_commit(block), key)


def check_signature(commit: Commit, key: DidKey) -> None:
    """`verify_commit_signature` of a commit that is decoded already."""
    if not crypto.verify(key, unsigned_bytes(commit), commit.sig):
        raise SignatureInvalid(
            f"the signature of commit {commit.rev} of {commit.did} does not verify with {key}"
        )
