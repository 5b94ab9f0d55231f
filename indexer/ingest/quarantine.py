"""The quarantine for people: which frames were refused and why, and what is in one.

Owns the reading of the ring, a bounded piece at a time, and the description of a frame that may be anything:
what can be read of it is shown, down to the fields before the first broken byte. Reads only; any thread.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import cbor2

from indexer.atproto.car import iter_blocks
from indexer.atproto.cid import DAG_CBOR_PREFIX, RAW_PREFIX, format_cid
from indexer.atproto.frames import CommitFrame, ErrorFrame, Frame, InfoFrame, decode_frame
from indexer.atproto.types import Did
from indexer.errors import BadInput, CarError, FrameError
from indexer.store.codecs import QuarantineRow, encode_u64
from indexer.store.keyspaces import QUARANTINE
from indexer.store.reads import Reads

#: Rows looked at for one page: with entries of 64 KiB that is 128 MiB at most.
SCANNED_ROWS: Final = 2_000
MAX_PAGE: Final = 1_000
_CID_BYTES: Final = 36
_MAX_FIELDS: Final = 64
_MAX_ITEMS: Final = 200
_MAX_TEXT: Final = 500
_SHOWN_BYTES: Final = 64
_HEAD_ERRORS: Final = (
    cbor2.CBORError,
    ValueError,
    EOFError,
    RecursionError,
    OverflowError,
    MemoryError,
    TypeError,
)


class Wanted(NamedTuple):
    """Which entries: None is any."""

    did: Did | None = None
    reason: str | None = None
    source: str | None = None

    def matches(self, row: QuarantineRow) -> bool:
        """Whether the entry is one of them."""
        return (
            self.did in (None, row.did)
            and self.reason in (None, row.reason)
            and self.source in (None, row.source)
        )


class Listed(NamedTuple):
    """Entries, newest first; ``cursor``: ask again with it, None at the end."""

    entries: Sequence[tuple[int, QuarantineRow]]
    cursor: int | None


def list_refused(db: Reads, wanted: Wanted, *, before: int | None, limit: int) -> Listed:
    """The newest entries below number ``before``; it may be fewer than there are, for it looks at so many."""
    found: list[tuple[int, QuarantineRow]] = []
    stop = None if before is None else encode_u64(before)
    number: int | None = None
    looked = 0
    for number, row in db.scan(QUARANTINE, None, stop, reverse=True, limit=SCANNED_ROWS):
        looked += 1
        if wanted.matches(row):
            found.append((number, row))
            if len(found) == limit:
                return Listed(found, number)
    return Listed(found, number if looked == SCANNED_ROWS else None)


def summary(number: int, row: QuarantineRow) -> dict[str, Any]:
    """One entry as JSON, without its bytes."""
    return {
        "id": number,
        "time": datetime.fromtimestamp(row.time_us / 1e6, UTC).isoformat(timespec="milliseconds"),
        "source": row.source,
        "seq": row.seq,
        "did": row.did or None,
        "reason": row.reason,
        "message": row.message,
        "size": row.size,
        "kept": len(row.data),
    }


def details(number: int, row: QuarantineRow) -> dict[str, Any]:
    """One entry and what can be read of its frame."""
    return {**summary(number, row), "frame": explain(row.data)}


def explain(data: bytes) -> dict[str, Any]:
    """What is in a frame: ``type``, ``fields``, and ``problem`` where it is not a frame in full."""
    try:
        return _known(decode_frame(data, max_bytes=max(len(data), 1)))
    except FrameError as error:
        return {**_raw(data), "problem": str(error)[:_MAX_TEXT]}


def _known(frame: Frame) -> dict[str, Any]:
    if isinstance(frame, ErrorFrame):
        return {"type": "error", "fields": {"error": frame.error, "message": frame.message}}
    if isinstance(frame, InfoFrame):
        return {"type": "#info", "fields": dict(frame._asdict())}
    name = type(frame).__name__.removesuffix("Frame").lower()
    fields = {key: _plain(value) for key, value in frame._asdict().items() if key not in ("ops", "blocks")}
    if isinstance(frame, CommitFrame):
        fields["commit"] = _cid(frame.commit)
        fields["ops"] = [
            {"action": op.action, "path": op.path, "cid": _cid(op.cid), "prev": _cid(op.prev)}
            for op in frame.ops[:_MAX_ITEMS]
        ]
    blocks = getattr(frame, "blocks", None)
    if isinstance(blocks, bytes):
        fields["blocks"] = _blocks(blocks)
    return {"type": f"#{name}", "fields": fields}


def _blocks(blocks: bytes) -> dict[str, Any]:
    """The CAR of a frame: its length, its blocks, and what is wrong with it."""
    sizes: dict[str, int] = {}
    count = 0
    found: dict[str, Any] = {"bytes": len(blocks), "blocks": sizes}
    try:
        for cid, start, end in iter_blocks(blocks):
            count += 1
            if count <= _MAX_ITEMS:
                sizes[format_cid(cid)] = end - start
    except (CarError, BadInput) as error:
        found["problem"] = str(error)[:_MAX_TEXT]
    return {**found, "count": count}


def _raw(data: bytes) -> dict[str, Any]:
    """Header and fields as far as they can be read, whatever they hold."""
    source = io.BytesIO(data)
    found: dict[str, Any] = {"type": None, "fields": {}}
    try:
        header = cbor2.CBORDecoder(source, tag_hook=_tag).decode()
    except _HEAD_ERRORS:
        return found
    if isinstance(header, Mapping):
        found["type"] = "error" if header.get("op") == -1 else _plain(header.get("t"))
    found["fields"] = _fields(source)
    return found


def _fields(source: io.BytesIO) -> dict[str, Any]:
    """The pairs of the map that begins here, up to the first that cannot be read."""
    fields: dict[str, Any] = {}
    head = source.read(1)
    if not head or head[0] >> 5 != 5 or head[0] & 31 > 24:
        return fields
    count = head[0] & 31
    if count == 24:
        more = source.read(1)
        count = more[0] if more else 0
    decoder = cbor2.CBORDecoder(source, tag_hook=_tag)
    try:
        for _ in range(min(count, _MAX_FIELDS)):
            key = decoder.decode()
            fields[str(key)[:_MAX_TEXT]] = _plain(decoder.decode())
    except _HEAD_ERRORS:
        fields["…"] = "cannot be read from here on"
    return fields


def _tag(*arguments: Any) -> Any:
    # cbor2 5 passes the decoder and the tag, cbor2 6 the tag and a flag
    tag = next(item for item in arguments if isinstance(item, cbor2.CBORTag))
    return tag.value[1:] if tag.tag == 42 and isinstance(tag.value, bytes) else f"tag {tag.tag}"


def _plain(value: Any, depth: int = 4) -> Any:
    """A value of a stranger as JSON of bounded size."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if -(2**53) < value < 2**53 else str(value)[:_MAX_TEXT]
    if isinstance(value, str):
        return value[:_MAX_TEXT]
    if isinstance(value, bytes):
        return _cid(value) if _is_cid(value) else {"bytes": len(value), "begin": value[:_SHOWN_BYTES].hex()}
    if depth and isinstance(value, list | tuple):
        return [_plain(item, depth - 1) for item in value[:_MAX_ITEMS]]
    if depth and isinstance(value, Mapping):
        items = list(value.items())[:_MAX_FIELDS]
        return {str(key)[:_MAX_TEXT]: _plain(item, depth - 1) for key, item in items}
    return str(value)[:_MAX_TEXT]


def _is_cid(value: bytes) -> bool:
    return len(value) == _CID_BYTES and value.startswith((DAG_CBOR_PREFIX, RAW_PREFIX))


def _cid(value: bytes | None) -> str | None:
    return None if value is None else format_cid(value)
