"""The table of keyspaces: name, key codec, value codec, tuning. One RocksDB column family each.

Opening, statistics, compaction, the integrity check and the debug commands derive from it; no other
module builds a key by hand. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar

from indexer.atproto.types import Cid, Did, EventId, Micros, Path, Rev
from indexer.store import codecs
from indexer.store.codecs import (
    AccountStatus,
    ArchiveRow,
    Codec,
    FrameKind,
    QuarantineRow,
    RecordRow,
    RefChanges,
    RepoRow,
    SourceRow,
    WaitingRow,
)
from indexer.store.host_rows import HostRow, decode_host, encode_host
from indexer.store.stranger_rows import StrangerRow, decode_stranger

K = TypeVar("K")
V = TypeVar("V")


class Tuning(NamedTuple):
    """How a keyspace is laid out on disk."""

    block_kib: int = 4
    bloom: bool = False  # lookups often miss
    collected: bool = False  # rows are deleted: compact where tombstones gather
    zstd_dictionary: bool = False  # many and alike: zstd with a dictionary at the bottom
    weight: int = 1  # share of the write buffers


_PLAIN: Final = Tuning()


@dataclass(frozen=True, slots=True)
class Keyspace(Generic[K, V]):
    name: str
    key: Codec[K]
    value: Codec[V]
    tuning: Tuning = _PLAIN
    show: Callable[[K, V], str] = lambda key, value: f"{key!r} {value!r}"


def _read_only(_value: Any) -> bytes:
    raise TypeError("rows of this keyspace are packed by the transaction alone")


_RAW: Final = Codec[bytes](bytes, bytes)
_EMPTY: Final = Codec[None](lambda _value: b"", lambda _data: None)
_U64: Final = Codec[int](codecs.encode_u64, codecs.decode_u64)
_INT: Final = Codec[int](codecs.pack, codecs.unpack)
_ANY: Final = Codec[Any](codecs.pack, codecs.unpack)
_NAME: Final = Codec[str](str.encode, bytes.decode)
_PAIR: Final = Codec[tuple[str, str]](codecs.encode_pair, codecs.decode_pair)
_DID_CID: Final = Codec[tuple[Did, Cid]](codecs.encode_cid_key, codecs.decode_cid_key)
_DUE: Final = Codec[tuple[Micros, Did]](codecs.encode_due, codecs.decode_due)
_FRAME: Final = Codec[tuple[Did, Rev, FrameKind, str]](codecs.encode_frame_key, codecs.decode_frame_key)
_REPO: Final = Codec[RepoRow](codecs.encode_repo, codecs.decode_repo)
_RECORD: Final = Codec[RecordRow](codecs.encode_record, codecs.decode_record)
_WORD: Final = Codec[tuple[AccountStatus, bool, int, Micros]](codecs.encode_word_value, codecs.decode_word)
_CHANGES: Final = Codec[list[RefChanges]](_read_only, codecs.decode_reflog)
_ARCHIVE: Final = Codec[ArchiveRow](codecs.encode_row, codecs.decode_archive)
_WAITING: Final = Codec[WaitingRow](codecs.encode_row, codecs.decode_waiting)
_SOURCE: Final = Codec[SourceRow](codecs.encode_row, codecs.decode_source)
_STRANGER: Final = Codec[StrangerRow](codecs.encode_row, decode_stranger)
_HOST: Final = Codec[HostRow](encode_host, decode_host)
_QUARANTINE: Final = Codec[QuarantineRow](codecs.encode_row, codecs.decode_quarantine)


def _show_cid(key: tuple[Did, Cid], value: object) -> str:
    return f"{key[0]} {key[1].hex()} {len(value) if isinstance(value, bytes) else value}"


REPOS: Final[Keyspace[Did, RepoRow]] = Keyspace("repos", _NAME, _REPO, Tuning(bloom=True))
ACCOUNT_STATUS: Final[Keyspace[tuple[Did, str], tuple[AccountStatus, bool, int, Micros]]] = Keyspace(
    "account_status", _PAIR, _WORD
)
RECORDS: Final[Keyspace[tuple[Did, Path], RecordRow]] = Keyspace(
    "records", _PAIR, _RECORD, Tuning(8, bloom=True, collected=True, zstd_dictionary=True, weight=4)
)
BLOCKS: Final[Keyspace[tuple[Did, Cid], bytes]] = Keyspace(
    "blocks",
    _DID_CID,
    _RAW,
    Tuning(16, bloom=True, collected=True, zstd_dictionary=True, weight=8),
    _show_cid,
)
BLOCK_REFS: Final[Keyspace[tuple[Did, Cid], int]] = Keyspace(
    "block_refs",
    _DID_CID,
    _INT,
    Tuning(8, bloom=True, collected=True, zstd_dictionary=True, weight=2),
    _show_cid,
)
REFLOG: Final[Keyspace[int, list[RefChanges]]] = Keyspace(
    "reflog", _U64, _CHANGES, Tuning(16, collected=True, weight=2)
)
GC_QUEUE: Final[Keyspace[tuple[Did, Cid], None]] = Keyspace(
    "gc_queue", _DID_CID, _EMPTY, Tuning(collected=True), _show_cid
)
#: The id is the key: `codecs.decode_event` joins the two.
EVENTS: Final[Keyspace[EventId, bytes]] = Keyspace(
    "events", _U64, _RAW, Tuning(16, collected=True, zstd_dictionary=True, weight=4),
    lambda key, value: repr(codecs.decode_event(key, value)),
)  # fmt: skip
CURSORS: Final[Keyspace[str, Any]] = Keyspace("cursors", _NAME, _ANY)
COUNTS: Final[Keyspace[str, int]] = Keyspace("counts", _NAME, _INT, Tuning(bloom=True))
PENDING: Final[Keyspace[tuple[Micros, Did], None]] = Keyspace("pending", _DUE, _EMPTY, Tuning(collected=True))
RESYNC_BUFFER: Final[Keyspace[tuple[Did, Rev, FrameKind, str], WaitingRow]] = Keyspace(
    "resync_buffer", _FRAME, _WAITING, Tuning(16, collected=True, weight=2)
)
FILTER: Final[Keyspace[tuple[str, str], None]] = Keyspace("filter", _PAIR, _EMPTY)
#: By kind ("firehose") and name.
SOURCES: Final[Keyspace[tuple[str, str], SourceRow]] = Keyspace("sources", _PAIR, _SOURCE)
#: By name, with a port where it is not the default one.
HOSTS: Final[Keyspace[str, HostRow]] = Keyspace("hosts", _NAME, _HOST)
#: By kind and name: where the crawler is at its sources and at the hosts that they list, the accounts whose
#: collections are to be asked for, and those that were found without a signal.
CRAWL: Final[Keyspace[tuple[str, str], Any]] = Keyspace(
    "crawl", _PAIR, _ANY, Tuning(bloom=True, collected=True)
)
QUARANTINE: Final[Keyspace[int, QuarantineRow]] = Keyspace(
    "quarantine", _U64, _QUARANTINE, Tuning(16, collected=True)
)
#: By source and place in its row: the number in `quarantine`.
REFUSED: Final[Keyspace[tuple[str, bytes], int]] = Keyspace(
    "refused", _DID_CID, _INT, Tuning(collected=True), _show_cid
)
#: Accounts without a row that a PDS named, until a directory says whether they live there; by the PDS too.
STRANGERS: Final[Keyspace[tuple[Did, str], StrangerRow]] = Keyspace(
    "strangers", _PAIR, _STRANGER, Tuning(bloom=True, collected=True)
)
#: By the SHA-256 under which the bytes lie in `cas`.
ARCHIVES: Final[Keyspace[tuple[Did, bytes], ArchiveRow]] = Keyspace(
    "archives", _DID_CID, _ARCHIVE, Tuning(collected=True)
)
#: Files of which the archive must look whether a row still holds them.
ARCHIVE_QUEUE: Final[Keyspace[tuple[Did, bytes], None]] = Keyspace(
    "archive_queue", _DID_CID, _EMPTY, Tuning(collected=True), _show_cid
)

KEYSPACES: Final[dict[str, Keyspace[Any, Any]]] = {
    keyspace.name: keyspace
    for keyspace in (
        REPOS, ACCOUNT_STATUS, RECORDS, BLOCKS, BLOCK_REFS, REFLOG, GC_QUEUE, EVENTS, CURSORS, COUNTS,
        PENDING, RESYNC_BUFFER, FILTER, SOURCES, HOSTS, CRAWL, QUARANTINE, REFUSED, STRANGERS, ARCHIVES,
        ARCHIVE_QUEUE,
    )
}  # fmt: skip

# ---- names in `cursors` that the store keeps for itself; upstream cursors have names of their own

FORMAT_VERSION: Final = "format"  # [version, oldest format that may read it]
UNDER_WAY: Final = "migration"  # of a migration: [the format that it makes, position, rows handled]
MODE: Final = "mode"
HEAD: Final = "head"  # [next event id, time_us of the last event]
FLOOR: Final = "floor"  # the first retained event id
RESERVE: Final = "reserve"  # ids below it may have been given out; always synced before they are
BOOT: Final = "boot"  # the machine's boot id when the writer started
CLEAN: Final = "clean"  # set by a shutdown in good order
HOLE: Final = "hole/"  # + first missing id: the first id after the hole; a record for people
CHECKPOINT: Final = "checkpoint"  # the first row of `reflog` that is not folded
WATERMARK: Final = "watermark/"  # + the log's time in µs, 20 digits: the next event id at that time
LOG_CLOCK: Final = "log_clock"  # [the log's time, boot id, µs since that boot]: from where it goes on
WIPE: Final = "wipe/"  # + DID: a wiped life of which traces remain
SWEEP: Final = "sweep"  # [position, end] of the sweep under way
QUARANTINE_NEXT: Final = "quarantine/next"
QUARANTINE_SHARED: Final = "quarantine/shared"  # from this number on frames have a place in `refused`
QUARANTINE_SOURCE: Final = "quarantine/of/"  # + source: [its first taken place, the one after the last]
