"""Content identifiers: the two binary forms that repositories use, and their text form.

Inside the program a CID is its 36 bytes: ``01`` (version), ``71`` (DAG-CBOR) or ``55`` (raw), ``12 20``
(SHA-256, 32 bytes), digest. The text form is ``b`` + base32 in lower case without padding (59 characters).
Anything else is refused here, at the border. Pure functions, any thread.
"""

from __future__ import annotations

import re
from hashlib import sha256

import libipld

from indexer.atproto.types import Cid
from indexer.errors import CarError, SyntaxInvalid

DAG_CBOR_PREFIX = b"\x01\x71\x12\x20"
RAW_PREFIX = b"\x01\x55\x12\x20"
CID_LENGTH = 36
TEXT_LENGTH = 59

_TEXT = re.compile(r"b[a-z2-7]{58}")


def dag_cbor_cid(data: bytes) -> Cid:
    """The CID of a DAG-CBOR block (a record, a tree node, a commit)."""
    return DAG_CBOR_PREFIX + sha256(data).digest()


def raw_cid(data: bytes) -> Cid:
    """The CID of raw bytes (a blob)."""
    return RAW_PREFIX + sha256(data).digest()


def format_cid(cid: Cid) -> str:
    """The text form of a binary CID. The caller knows that it is one (see `check_cid`)."""
    text: str = libipld.encode_multibase("b", cid)
    return text


def parse_cid(text: str) -> Cid:
    """The binary CID of its text form; `SyntaxInvalid` for every other form of CID and for anything else."""
    if not isinstance(text, str) or _TEXT.fullmatch(text) is None:
        raise SyntaxInvalid(f"not a CID in base32 of 59 characters: {_shown(text)}")
    try:
        cid: bytes = libipld.decode_multibase(text)[1]
    except ValueError as error:
        raise SyntaxInvalid(f"not a CID in base32: {_shown(text)}") from error
    if format_cid(cid) != text:
        raise SyntaxInvalid(f"a CID with stray bits at its end: {_shown(text)}")
    return check_cid(cid)


def check_cid(cid: bytes) -> Cid:
    """``cid`` itself when it is CIDv1, DAG-CBOR or raw, SHA-256; `SyntaxInvalid` names what it is instead."""
    if len(cid) == CID_LENGTH and cid[:4] in (DAG_CBOR_PREFIX, RAW_PREFIX):
        return cid
    raise SyntaxInvalid(f"unusable CID {cid[:40].hex() or '(empty)'}: {cid_fault(cid)}")


def cid_fault(cid: bytes) -> str:
    """What keeps ``cid`` from being a CID that repositories use, in words."""
    if cid[:2] == b"\x12\x20":
        return "CIDv0 is not supported"
    if cid[:1] != b"\x01":
        return "its version is not 1"
    if cid[1:2] not in (b"\x71", b"\x55"):
        return "its codec is neither dag-cbor (0x71) nor raw (0x55)"
    if cid[2:3] != b"\x12":
        return "its hash is not sha-256 (0x12)"
    if cid[3:4] != b"\x20":
        return "its digest is not 32 bytes long"
    return f"it is {len(cid)} bytes long instead of {CID_LENGTH}"


def verify_block(cid: Cid, data: bytes) -> None:
    """Raise `CarError` unless ``data`` hashes to ``cid``."""
    if cid[4:] != sha256(data).digest():
        raise CarError(f"block {format_cid(cid)} does not hash to its CID", reason="bad_hash")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
