"""The `/stream` wire format: log entries as JSON texts, JSON texts as WebSocket frames.

Pure functions on values, no I/O. Hot: an event's JSON is composed from its checked, ASCII-only fields
(DIDs, collections, record keys and revs hold nothing that JSON escapes) around the record's own JSON,
which costs a fifth of building a dict and dumping it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import orjson
import zstandard

from indexer.atproto.cid import format_cid

if TYPE_CHECKING:
    from indexer.store.codecs import Event

TEXT = 0x1
BINARY = 0x2
CLOSE = 0x8
PING = 0x9
PONG = 0xA

_SHORT = struct.Struct(">BBH")
_LONG = struct.Struct(">BBQ")
_FIN = 0x80
_ZSTD_LEVEL = 3


def frame(opcode: int, payload: bytes) -> bytes:
    """One unmasked, unfragmented server frame (RFC 6455 §5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((_FIN | opcode, size)) + payload
    if size < 65536:
        return _SHORT.pack(_FIN | opcode, 126, size) + payload
    return _LONG.pack(_FIN | opcode, 127, size) + payload


def payload_of(frame_bytes: bytes) -> bytes:
    """The payload of a frame made by `frame`."""
    size = frame_bytes[1]
    return frame_bytes[2 if size < 126 else 4 if size == 126 else 10 :]


def pack(text: bytes) -> bytes:
    """A message as one zstd frame of its own, for readers that asked for it."""
    return zstandard.compress(text, _ZSTD_LEVEL)


def close_frame(code: int, reason: str) -> bytes:
    """A close frame; ``reason`` is cut to the 123 bytes that fit."""
    return frame(CLOSE, code.to_bytes(2, "big") + reason.encode()[:123])


def record_frame(event: Event, body: bytes | None) -> bytes:
    """A record event's frame; ``body`` is the record's JSON, None for deletes and in index-only mode."""
    event_id, _, live, _, did, _, rev, collection, rkey, action, cid, _ = event
    head = (
        f'{{"id":{event_id},"type":"record","record":{{"live":{"true" if live else "false"},"did":"{did}",'
        f'"rev":"{rev}","collection":"{collection}","rkey":"{rkey}","action":"{action}"'
    )
    if cid is not None:
        head = f'{head},"cid":"{format_cid(cid)}"'
    if body is None:
        return frame(TEXT, head.encode() + b"}}")
    size = len(head) + 12 + len(body)
    if size < 126 or size > 65535:
        return frame(TEXT, b'%b,"record":%b}}' % (head.encode(), body))
    return b'%b%b,"record":%b}}' % (_SHORT.pack(_FIN | TEXT, 126, size), head.encode(), body)


def account_text(event: Event) -> bytes:
    """An identity or account event with the fields of its kind."""
    if event.kind == "identity":
        fields: dict[str, Any] = {"did": event.did, "handle": event.fields.get("handle")}
    else:
        fields = {
            "did": event.did,
            "active": event.fields.get("active"),
            "status": event.fields.get("status"),
        }
    return orjson.dumps({"id": event.id, "type": event.kind, event.kind: fields})


def notice_text(name: str, next_id: int) -> bytes:
    """A notice; ``next_id`` is where the reader goes on, and what it may save as its cursor."""
    return b'{"type":"info","name":"%b","id":%d}' % (name.encode(), next_id)


def error_text(name: str, message: str) -> bytes:
    """The last message before the server closes the stream on an error."""
    return orjson.dumps({"type": "error", "name": name, "message": message})
