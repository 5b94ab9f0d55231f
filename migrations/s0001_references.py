"""Format 0 → 1: a database without references gets them.

Counts, for every block, the record rows and the retained events that hold it, into `block_refs`; then puts
every block that nothing holds into `gc_queue`. Flagged oversize rows and events of wiped lives hold nothing;
an index-only database keeps no blocks and has nothing to count. Keys and values as they were at format 0:

- records: DID 0x00 path → flags (1 byte; 1 is oversize), CID (36 bytes), rev
- events: u64 → [kind + 4·live, time, DID, epoch, rev, collection, rkey, action, CID or nil] for kind 0
- repos: DID → [tracked, state, status, epoch, …]; blocks: DID 0x00 CID → bytes
- cursors: "mode" → [ephemeral, blocks], "floor" → the first event id
- block_refs: DID 0x00 CID → count; gc_queue: DID 0x00 CID → nothing
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import msgpack

from indexer.store.migration import Batch, Migration
from indexer.store.raw import Change, RawRows

_BATCH_ROWS: Final = 2000
_OVERSIZE: Final = 1
_RECORD_KIND: Final = 0
_EPOCH: Final = 3  # its place in a row of `repos`
_PHASES: Final = ("records", "events", "blocks")


def total(rows: RawRows) -> int:
    return sum(rows.estimate(name) for name in _PHASES) if _keeps_blocks(rows) else 0


def run(rows: RawRows, position: Any) -> Iterator[Batch]:
    """Batches from ``position`` ([phase, first key]) on."""
    if not _keeps_blocks(rows):
        yield Batch([], None, 0)
        return
    phase, start = position or (_PHASES[0], b"")
    for name in _PHASES[_PHASES.index(phase) :]:
        while found := rows.after(name, start, _BATCH_ROWS):
            start = found[-1][0] + b"\0"
            yield Batch(_CHANGES[name](rows, found), [name, start], len(found))
        start = b""
    yield Batch([], None, 0)


def _keeps_blocks(rows: RawRows) -> bool:
    mode = rows.get("cursors", b"mode")
    return mode is None or bool(msgpack.unpackb(mode)[1])


def _records(rows: RawRows, found: list[tuple[bytes, bytes]]) -> list[Change]:
    held = (
        key[: key.index(b"\0") + 1] + value[1:37] for key, value in found if not value[0] & _OVERSIZE
    )  # fmt: skip
    return _counted(rows, Counter(held))


def _events(rows: RawRows, found: list[tuple[bytes, bytes]]) -> list[Change]:
    events = [event for event in (msgpack.unpackb(value) for _, value in found) if _holds(event)]
    dids = list({event[2].encode() for event in events})
    lives = dict(zip(dids, map(_epoch, rows.multi_get("repos", dids)), strict=True))
    held = (event[2].encode() + b"\0" + event[8] for event in events if lives[event[2].encode()] == event[3])
    return _counted(rows, Counter(held))


def _holds(event: list[Any]) -> bool:
    return event[0] & 3 == _RECORD_KIND and event[8] is not None


def _epoch(row: bytes | None) -> int:
    return 0 if row is None else int(msgpack.unpackb(row)[_EPOCH])


def _counted(rows: RawRows, more: Counter[bytes]) -> list[Change]:
    """The counts with ``more`` added."""
    keys = list(more)
    stored = rows.multi_get("block_refs", keys)
    return [
        ("block_refs", key, msgpack.packb((0 if old is None else msgpack.unpackb(old)) + more[key]))
        for key, old in zip(keys, stored, strict=True)
    ]


def _blocks(rows: RawRows, found: list[tuple[bytes, bytes]]) -> list[Change]:
    keys = [key for key, _ in found]
    counts = rows.multi_get("block_refs", keys)
    return [("gc_queue", key, b"") for key, count in zip(keys, counts, strict=True) if count is None]


_CHANGES: Final = {"records": _records, "events": _events, "blocks": _blocks}

MIGRATION: Final = Migration(1, 1, "counting references", total, run)
