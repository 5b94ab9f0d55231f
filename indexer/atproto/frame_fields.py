"""The fields of firehose messages, as a table (sync.md §1).

Owns which fields a message of each type has and what each must be. Tells the first fault in words;
`frames` uses it for the rare types and to explain what its own faster check refused. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from indexer.atproto.syntax import is_datetime, is_did, is_tid

MAX_SEQ = 2**53 - 1
DATA_PREFIX = b"\x01\x71\x12\x20"  # CIDv1, dag-cbor, SHA-256


def _is_data_link(value: object) -> bool:
    return type(value) is bytes and len(value) == 36 and value[:4] == DATA_PREFIX


def is_seq(value: object) -> bool:
    return type(value) is int and 0 < value <= MAX_SEQ


def _text_that(is_valid: Callable[[str], bool]) -> Callable[[object], bool]:
    return lambda value: type(value) is str and is_valid(value)


class Field(NamedTuple):
    """What a field must be. An optional one may be absent or null."""

    name: str
    expected: str
    is_valid: Callable[[Any], bool]
    optional: bool = False


_SEQ = Field("seq", "an integer from 1 to 2^53-1", is_seq)
_DID = Field("did", "a DID", _text_that(is_did))
_REV = Field("rev", "a TID", _text_that(is_tid))
_TIME = Field("time", "a datetime", _text_that(is_datetime))
_BLOCKS = Field("blocks", "bytes", lambda value: isinstance(value, bytes))

FIELDS: dict[str, tuple[Field, ...]] = {
    "#commit": (
        _SEQ,
        _DID._replace(name="repo"),
        Field("commit", "a link to dag-cbor by SHA-256", _is_data_link),
        _REV,
        Field("since", "a TID or null", lambda value: value is None or _REV.is_valid(value)),
        Field("prevData", "a link to dag-cbor by SHA-256", _is_data_link, optional=True),
        _BLOCKS,
        Field("ops", "a list", lambda value: type(value) is list),
        Field("blobs", "a list", lambda value: type(value) is list),
        _TIME,
        Field("tooBig", "a boolean", lambda value: type(value) is bool),
        Field("rebase", "a boolean", lambda value: type(value) is bool),
    ),
    "#sync": (_SEQ, _DID, _BLOCKS, _REV, _TIME),
    "#identity": (
        _SEQ,
        _DID,
        _TIME,
        Field("handle", "text", lambda value: type(value) is str, optional=True),
    ),
    "#account": (
        _SEQ,
        _DID,
        _TIME,
        Field("active", "a boolean", lambda value: type(value) is bool),
        Field("status", "text", lambda value: type(value) is str, optional=True),
    ),
    "#info": (
        Field("name", "text", lambda value: type(value) is str),
        Field("message", "text", lambda value: type(value) is str, optional=True),
    ),
}


def find_fault(name: str, payload: Mapping[str, Any]) -> str | None:
    """What is wrong with the fields of message ``name``, None when nothing is."""
    for field in FIELDS[name]:
        value = payload.get(field.name)
        if field.optional and value is None:
            continue
        if field.name not in payload:
            return f"{name} without {field.name!r}"
        if not field.is_valid(value):
            return f"{name}: {field.name!r} must be {field.expected}, not {shown(value)}"
    return None


def shown(value: object) -> str:
    """``repr`` of a value, cut to what an error message bears."""
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "…"
