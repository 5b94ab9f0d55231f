"""Commits, CARs, firehose frames, TIDs and times as bytes on the wire.

Owns their layout only; what they say is decided by `world`. A frame is kept as two halves around its
``seq`` value, because a PDS and the relay send the same frame under different numbers. Pure.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from indexer.simulator.cbor import Link, encode, head
from indexer.simulator.keys import SigningKey

_TID = "234567abcdefghijklmnopqrstuvwxyz"


class FrameHalves(NamedTuple):
    """A frame without its seq: ``before + CBOR(seq) + after``."""

    before: bytes
    after: bytes

    def numbered(self, seq: int) -> bytes:
        return self.before + head(0, seq) + self.after


def frame(kind: str, payload: Mapping[str, Any]) -> FrameHalves:
    """``payload`` comes without seq; its keys are put in canonical order around it."""
    names = sorted((*payload, "seq"), key=lambda name: (len(name), name))
    at = names.index("seq")
    before = [encode({"op": 1, "t": kind}), head(0xA0, len(names))]
    for name in names[:at]:
        before += (encode(name), encode(payload[name]))
    before.append(b"\x63seq")
    after = [part for name in names[at + 1 :] for part in (encode(name), encode(payload[name]))]
    return FrameHalves(b"".join(before), b"".join(after))


def info_frame(name: str, message: str) -> bytes:
    return encode({"op": 1, "t": "#info"}) + encode({"name": name, "message": message})


def error_frame(error: str, message: str) -> bytes:
    return encode({"op": -1}) + encode({"error": error, "message": message})


def websocket_message(payload: bytes, first: int = 0x82) -> bytes:
    """One unmasked binary WebSocket message, as a server sends it (RFC 6455 §5.2). 0x81: a text one."""
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 0x10000:
        return bytes((first, 126)) + size.to_bytes(2, "big") + payload
    return bytes((first, 127)) + size.to_bytes(8, "big") + payload


def commit_block(did: str, rev: str, data: bytes, key: SigningKey) -> bytes:
    """A signed version 3 commit object."""
    body: dict[str, Any] = {"did": did, "version": 3, "data": Link(data), "rev": rev, "prev": None}
    return encode(body | {"sig": key.sign(encode(body))})


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def car_header(root: bytes | None) -> bytes:
    """Without a root: of blocks that were asked for by their CIDs."""
    body = encode({"roots": [] if root is None else [Link(root)], "version": 1})
    return varint(len(body)) + body


def car_section(cid: bytes, block: bytes) -> bytes:
    return varint(len(cid) + len(block)) + cid + block


def car(root: bytes | None, blocks: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join((car_header(root), *(car_section(cid, block) for cid, block in blocks)))


def car_chunks(root: bytes, blocks: Iterable[tuple[bytes, bytes]], size: int = 1 << 16) -> Iterator[bytes]:
    """The same CAR in pieces of about ``size`` bytes."""
    out = bytearray(car_header(root))
    for cid, block in blocks:
        out += car_section(cid, block)
        if len(out) >= size:
            yield bytes(out)
            out.clear()
    if out:
        yield bytes(out)


def tid(micros: int, clock_id: int = 0) -> str:
    number = (micros & (1 << 53) - 1) << 10 | clock_id & 1023
    return "".join(_TID[number >> shift & 31] for shift in range(60, -1, -5))


def timestamp(micros: int) -> str:
    """RFC 3339 in UTC with milliseconds."""
    moment = datetime.datetime.fromtimestamp(micros // 1000 / 1000, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{micros // 1000 % 1000:03d}Z"
