"""A small canonical DAG-CBOR encoder, CIDs, and the JSON form of record values.

Owns the value model of the simulator: plain Python values, `bytes`, and `Link` for CIDs; floats only
as `Float`, which lies use. Held byte for byte to `dag_cbor` and `multiformats` in tests. Pure functions;
any thread.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from functools import lru_cache
from typing import Any

DAG_CBOR = b"\x01\x71\x12\x20"
RAW = b"\x01\x55\x12\x20"


class Link(bytes):
    """A binary CIDv1 (36 bytes: version, codec, sha-256, 32, digest)."""

    __slots__ = ()


class Float(float):
    """A number that no record may hold, for records that break the data model."""

    __slots__ = ()


def block_cid(block: bytes) -> Link:
    """The CID of a DAG-CBOR block."""
    return Link(DAG_CBOR + hashlib.sha256(block).digest())


def blob_cid(content: bytes) -> Link:
    """The CID of raw bytes (a blob)."""
    return Link(RAW + hashlib.sha256(content).digest())


def cid_text(cid: bytes) -> str:
    return "b" + base64.b32encode(cid).decode().rstrip("=").lower()


def cid_bytes(text: str) -> Link:
    body = text[1:].upper()
    return Link(base64.b32decode(body + "=" * (-len(body) % 8)))


def head(major: int, number: int) -> bytes:
    """The shortest head of an item; ``major`` is already shifted (0x40 bytes, 0xa0 map, …)."""
    if number < 24:
        return bytes((major | number,))
    if number < 0x100:
        return bytes((major | 24, number))
    if number < 0x10000:
        return bytes((major | 25,)) + number.to_bytes(2, "big")
    if number < 0x100000000:
        return bytes((major | 26,)) + number.to_bytes(4, "big")
    return bytes((major | 27,)) + number.to_bytes(8, "big")


@lru_cache(8192)
def _map_key(key: str) -> tuple[int, bytes]:
    """The sort key of a map key: its length, then its bytes."""
    raw = key.encode()
    return len(raw), head(0x60, len(raw)) + raw


def encode(value: Any) -> bytes:
    out = bytearray()
    _encode(value, out)
    return bytes(out)


def _encode(value: Any, out: bytearray) -> None:
    kind = type(value)
    if kind is str:
        raw = value.encode()
        out += head(0x60, len(raw))
        out += raw
    elif kind is int:
        out += head(0x00, value) if value >= 0 else head(0x20, -1 - value)
    elif kind is dict:
        out += head(0xA0, len(value))
        for _, raw, item in sorted(((*_map_key(key), item) for key, item in value.items()), key=_order):
            out += raw
            _encode(item, out)
    elif kind is Link:
        out += b"\xd8\x2a\x58\x25\x00"
        out += value
    elif kind is list or kind is tuple:
        out += head(0x80, len(value))
        for item in value:
            _encode(item, out)
    elif kind is bytes:
        out += head(0x40, len(value))
        out += value
    elif value is None:
        out.append(0xF6)
    elif kind is bool:
        out.append(0xF5 if value else 0xF4)
    elif kind is Float:
        out += b"\xfb" + struct.pack(">d", value)
    else:
        raise TypeError(f"no DAG-CBOR form for {kind.__name__}: {value!r}")


def _order(item: tuple[int, bytes, Any]) -> tuple[int, bytes]:
    return item[0], item[1]


def to_json(value: Any) -> Any:
    """The JSON form as XRPC shows it: ``{"$link": …}``, ``{"$bytes": …}`` (no padding)."""
    kind = type(value)
    if kind is dict:
        return {key: to_json(item) for key, item in value.items()}
    if kind is list:
        return [to_json(item) for item in value]
    if kind is Link:
        return {"$link": cid_text(value)}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode().rstrip("=")}
    if kind is Float:
        return {"$float": repr(float(value))}
    return value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`."""
    if isinstance(value, dict):
        if len(value) == 1:
            name, item = next(iter(value.items()))
            if name == "$link":
                return cid_bytes(item)
            if name == "$bytes":
                return base64.b64decode(item + "=" * (-len(item) % 4))
            if name == "$float":
                return Float(item)
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return value
