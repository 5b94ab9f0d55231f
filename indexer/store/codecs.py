"""Rows and their bytes.

Owns the types of everything the store keeps and the codecs between them and bytes. Keys keep their
order as bytes; values are MessagePack arrays, but for record rows (fixed layout) and blocks (raw).
Pure; the encoders share one packer and belong to the writer's thread, the decoders to any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from enum import IntEnum, IntFlag
from typing import Any, Final, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import msgpack

from indexer.atproto.types import Cid, Did, DidKey, EventId, Handle, Micros, Nsid, Rev, Rkey

T = TypeVar("T")

Kind: TypeAlias = Literal["record", "identity", "account", "sync"]
Action: TypeAlias = Literal["create", "update", "delete"]
FrameKind: TypeAlias = Literal["commit", "sync"]

CID_BYTES: Final = 36
U64_MAX: Final = 2**64 - 1
pack: Final[Callable[[Any], bytes]] = msgpack.Packer().pack
unpack: Final[Callable[[bytes], Any]] = msgpack.unpackb


class SyncState(IntEnum):
    """How our copy of a repository stands to the network's."""

    PENDING = 0
    BACKFILLING = 1
    SYNCED = 2
    DESYNCHRONIZED = 3

    @property
    def label(self) -> str:
        return self.name.lower()


class AccountStatus(IntEnum):
    """The effective status of an account; every one but ACTIVE stops serving its content."""

    ACTIVE = 0
    DEACTIVATED = 1
    SUSPENDED = 2
    TAKENDOWN = 3
    DELETED = 4
    DESYNCHRONIZED = 5
    THROTTLED = 6
    UNKNOWN = 7

    @property
    def label(self) -> str:
        return self.name.lower()

    @property
    def active(self) -> bool:
        return self is AccountStatus.ACTIVE


class Work(IntFlag):
    """What the ordered pass left to others; kept in the repo's row so that a kill does not lose it."""

    RESOLVE = 1
    CHECK_STATUS = 2
    COMPARE_REV = 4
    DRAIN = 8
    PURGE = 16
    VERIFY_HANDLE = 32


OVERSIZE: Final = 1  # record flag: larger than the limit; no block, no reference, not served
INVALID: Final = 2  # record flag: breaks the data model; block kept, not served


class Mode(NamedTuple):
    """What a database keeps; remembered in it."""

    ephemeral: bool = False  # no records, only the log within its retention
    blocks: bool = True  # False: index-only

    def __str__(self) -> str:
        if self.ephemeral:
            return "ephemeral" if self.blocks else "ephemeral, index-only"
        return "full" if self.blocks else "index-only"


class RepoRow(NamedTuple):
    """Everything known about one repository but its records."""

    tracked: bool
    state: SyncState
    status: AccountStatus
    epoch: int  # raised by every wipe; changed by `Transaction.wipe_repo` alone
    complete: bool
    rev: Rev
    min_rev: Rev
    commit: bytes  # the signed commit block, b"" when none
    data: Cid  # the tree's root, b"" when none
    signing_key: DidKey
    pds: str
    handle: Handle
    due: Micros  # when background work is due; 0 is never
    work: int  # `Work` flags
    error: str
    attempt: int
    identity_at: Micros = 0  # when key and PDS were asked for; 0 is not known
    hearsay: bool = False  # a frame or a list named it, nobody asked for it, no directory knows it so far
    sparse: bool = False  # the tree behind ``data`` was only verified where records are wanted


NEW_REPO: Final = RepoRow(
    tracked=False, state=SyncState.PENDING, status=AccountStatus.ACTIVE, epoch=0, complete=False,
    rev="", min_rev="", commit=b"", data=b"", signing_key="", pds="", handle="",
    due=0, work=0, error="", attempt=0,
)  # fmt: skip


class RecordRow(NamedTuple):
    cid: Cid
    rev: Rev  # the rev at which this version arrived
    flags: int = 0

    @property
    def served(self) -> bool:
        return self.flags == 0


class Event(NamedTuple):
    """One entry of the log. ``fields`` belongs to identity, account and sync events."""

    id: EventId
    kind: Kind
    live: bool
    time_us: Micros
    did: Did
    epoch: int
    rev: Rev
    collection: Nsid
    rkey: Rkey
    action: Action | Literal[""]
    cid: Cid | None
    fields: Mapping[str, Any]


class AccountWord(NamedTuple):
    """One source's last word on an account."""

    source: str
    status: AccountStatus
    active: bool
    seq: int
    time: Micros


class BufferedFrame(NamedTuple):
    """A frame that waits for its repository."""

    rev: Rev
    kind: FrameKind
    source: str
    data: bytes
    arrived: Micros = 0  # when it came in; 0 is not known
    vouched: bool = True  # the account's key, as it was then, had signed it, and its source may speak for it


class WaitingRow(NamedTuple):
    """What is stored of a `BufferedFrame` beside its key."""

    epoch: int
    data: bytes
    arrived: Micros = 0
    vouched: bool = True


class QuarantineRow(NamedTuple):
    """A frame that failed. ``data`` may be cut; ``size`` is its whole length."""

    time_us: Micros
    source: str
    seq: int
    did: Did
    reason: str
    message: str
    size: int
    data: bytes


class SourceRow(NamedTuple):
    """An upstream that was added, or one of the settings that was switched off (not ``added``)."""

    added: bool
    enabled: bool
    time_us: Micros


class ArchiveRow(NamedTuple):
    """An archived CAR: which rev of its repository, when it was fetched, its length."""

    rev: Rev
    time_us: Micros
    size: int


class RefChanges(NamedTuple):
    """What one commit changed in the references of a life."""

    did: Did
    epoch: int
    cids: dict[Cid, int]


class Codec(NamedTuple, Generic[T]):
    encode: Callable[[T], bytes]
    decode: Callable[[bytes], T]


# ---- keys -------------------------------------------------------------------------------------

_U64 = struct.Struct(">Q")
encode_u64: Final = _U64.pack


def decode_u64(data: bytes) -> int:
    value: int = _U64.unpack(data)[0]
    return value


def encode_pair(key: tuple[str, str]) -> bytes:
    return f"{key[0]}\0{key[1]}".encode()


def decode_pair(data: bytes) -> tuple[str, str]:
    first, _, second = data.decode().partition("\0")
    return first, second


def encode_cid_key(key: tuple[Did, Cid]) -> bytes:
    return key[0].encode() + b"\0" + key[1]


def decode_cid_key(data: bytes) -> tuple[Did, Cid]:
    did, _, cid = data.partition(b"\0")
    return did.decode(), cid


def encode_due(key: tuple[Micros, Did]) -> bytes:
    return _U64.pack(key[0]) + key[1].encode()


def decode_due(data: bytes) -> tuple[Micros, Did]:
    return decode_u64(data[:8]), data[8:].decode()


FRAME_KINDS: Final[tuple[FrameKind, ...]] = ("commit", "sync")


def encode_frame_key(key: tuple[Did, Rev, FrameKind, str]) -> bytes:
    did, rev, kind, source = key
    return f"{did}\0{rev}\0{FRAME_KINDS.index(kind)}{source}".encode()


def decode_frame_key(data: bytes) -> tuple[Did, Rev, FrameKind, str]:
    did, rev, rest = data.decode().split("\0", 2)
    return did, rev, FRAME_KINDS[int(rest[0])], rest[1:]


def did_prefix(did: Did) -> bytes:
    return did.encode() + b"\0"


def did_range(did: Did) -> tuple[bytes, bytes]:
    """The bytes from which and before which all keys of a repository lie."""
    raw = did.encode()
    return raw + b"\0", raw + b"\x01"


def after_prefix(prefix: bytes) -> bytes | None:
    """The first key beyond every key that begins with ``prefix``; None when there is no end."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else None


# ---- values -----------------------------------------------------------------------------------

_STATES = tuple(SyncState)
_STATUSES = tuple(AccountStatus)


def encode_repo(row: RepoRow) -> bytes:
    return pack(tuple(row))


def decode_repo(data: bytes) -> RepoRow:
    fields = unpack(data)
    fields[1] = _STATES[fields[1]]
    fields[2] = _STATUSES[fields[2]]
    return RepoRow(*fields)  # rows of old have fewer


def encode_record(row: RecordRow) -> bytes:
    return b"%c%b%b" % (row.flags, row.cid, row.rev.encode())


def decode_record(data: bytes) -> RecordRow:
    return RecordRow(data[1:37], data[37:].decode(), data[0])


KINDS: Final[tuple[Kind, ...]] = ("record", "identity", "account", "sync")
ACTIONS: Final[tuple[Action, ...]] = ("create", "update", "delete")
RECORD, IDENTITY, ACCOUNT, SYNC = range(4)
CREATE, UPDATE, DELETE = range(3)
LIVE: Final = 4  # added to the kind
_NO_FIELDS: Final[Mapping[str, Any]] = {}


def encode_event(event: Event) -> bytes:
    """The stored form; the id is the key. `Transaction` packs record events itself."""
    head = KINDS.index(event.kind) + LIVE * event.live
    if event.kind == "record":
        assert event.action != ""
        action = ACTIONS.index(event.action)
        return pack(
            (
                head,
                event.time_us,
                event.did,
                event.epoch,
                event.rev,
                event.collection,
                event.rkey,
                action,
                event.cid,
            )
        )
    return pack((head, event.time_us, event.did, event.epoch, event.rev, event.fields))


def decode_event(event_id: EventId, data: bytes) -> Event:
    fields = unpack(data)
    head = fields[0]
    if head & 3 == RECORD:
        _, time_us, did, epoch, rev, collection, rkey, action, cid = fields
        return Event(
            event_id, "record", head >= LIVE, time_us, did, epoch, rev,
            collection, rkey, ACTIONS[action], cid, _NO_FIELDS,
        )  # fmt: skip
    _, time_us, did, epoch, rev, extra = fields
    return Event(event_id, KINDS[head & 3], head >= LIVE, time_us, did, epoch, rev, "", "", "", None, extra)


def encode_reflog(changes: Mapping[tuple[Did, int], Mapping[Cid, int]]) -> bytes:
    """One commit's reference changes: [[DID, epoch, {CID: delta}], …]."""
    return pack([(did, epoch, cids) for (did, epoch), cids in changes.items()])


def decode_reflog(data: bytes) -> list[RefChanges]:
    found = [RefChanges._make(changes) for changes in msgpack.unpackb(data, strict_map_key=False)]
    for changes in found:
        if not isinstance(changes.cids, dict):
            raise ValueError(f"{changes.cids!r} where the changes by CID belong")
    return found


def encode_row(row: tuple[Any, ...]) -> bytes:
    """Rows whose fields are packed as they are."""
    return pack(tuple(row))


def decode_quarantine(data: bytes) -> QuarantineRow:
    return QuarantineRow._make(unpack(data))


def decode_source(data: bytes) -> SourceRow:
    return SourceRow._make(unpack(data))


def decode_archive(data: bytes) -> ArchiveRow:
    return ArchiveRow._make(unpack(data))


def decode_waiting(data: bytes) -> WaitingRow:
    return WaitingRow(*unpack(data))  # rows of old are an epoch and a frame


def decode_word(data: bytes) -> tuple[AccountStatus, bool, int, Micros]:
    status, active, seq, time = unpack(data)
    return _STATUSES[status], active, seq, time


def encode_word_value(value: tuple[AccountStatus, bool, int, Micros]) -> bytes:
    return pack((int(value[0]), *value[1:]))
