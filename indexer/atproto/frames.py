"""Firehose frames: bytes to typed messages and back (sync.md §1 and rows 0–2 of §2).

Owns the two-object framing, its canonical form, and the types, presence, syntax and size of fields.
What a message means (signatures, trees, order) is decided elsewhere. Pure; any thread or process.

Hot and plainer for it: a commit of 5 KB takes about 4 µs over the 1 µs of libipld's decoding. Known
headers are compared as bytes; one re-encoding (0.5 µs) proves canonical form and that links are links;
the identifiers of a message are matched by one joined expression, and only a mismatch is explained
field by field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from secrets import token_bytes
from typing import Any, NamedTuple, NoReturn, TypeAlias

import cbor2
from libipld import decode_dag_cbor, decode_dag_cbor_multi, encode_dag_cbor

from indexer.atproto.frame_fields import DATA_PREFIX, MAX_SEQ, find_fault, is_seq, shown
from indexer.atproto.heads import has_more_items
from indexer.atproto.syntax import DATETIME_RE, DID_RE, MAX_DID, RKEY_RE, TID_RE, is_datetime, is_did, is_nsid
from indexer.atproto.types import Cid, Did, Path, Rev, Seq
from indexer.errors import FrameError

MAX_FRAME_BYTES = 5_000_000
MAX_BLOCKS_BYTES = 2_000_000
MAX_OPS = 200
#: All of a frame but its ``blocks``: 200 operations with paths of 830 bytes and two links are 190 KB.
MAX_FIELDS_BYTES = 256 << 10
#: Most CBOR items of a frame: 200 operations are 1,800, the other fields 40, `blobs` one for each.
MAX_ITEMS = 4096


class FrameOp(NamedTuple):
    """One operation; ``cid`` is None for a delete, ``prev`` None where absent."""

    action: str
    path: Path
    cid: Cid | None
    prev: Cid | None


class CommitFrame(NamedTuple):
    """``#commit``. ``prev_data`` is None when null or absent; ``has_prev_data`` tells the two apart."""

    seq: Seq
    repo: Did
    commit: Cid
    rev: Rev
    since: Rev | None
    prev_data: Cid | None
    has_prev_data: bool
    blocks: bytes
    ops: list[FrameOp]
    time: str
    too_big: bool
    rebase: bool


class SyncFrame(NamedTuple):
    """``#sync``: the repository is at this commit, whose block ``blocks`` (a CAR) holds."""

    seq: Seq
    did: Did
    blocks: bytes
    rev: Rev
    time: str


class IdentityFrame(NamedTuple):
    """``#identity``: something of the identity may have changed; ``handle`` proves nothing."""

    seq: Seq
    did: Did
    time: str
    handle: str | None


class AccountFrame(NamedTuple):
    """``#account``: the sending host's word on the account."""

    seq: Seq
    did: Did
    time: str
    active: bool
    status: str | None


class InfoFrame(NamedTuple):
    """``#info``, which has no seq."""

    name: str
    message: str | None


class ErrorFrame(NamedTuple):
    """``op`` -1; the server closes after it."""

    error: str
    message: str | None


class UnknownFrame(NamedTuple):
    """A type that is not ours to handle (removed or new), to be counted and skipped."""

    type: str
    seq: Seq | None


Frame: TypeAlias = (
    CommitFrame | SyncFrame | IdentityFrame | AccountFrame | InfoFrame | ErrorFrame | UnknownFrame
)
Payload: TypeAlias = dict[str, Any]

_MESSAGE_TYPES = ("#commit", "#sync", "#identity", "#account", "#info")
_HEADERS: dict[str, bytes] = {name: encode_dag_cbor({"op": 1, "t": name}) for name in _MESSAGE_TYPES}
_ERROR_HEADER: bytes = encode_dag_cbor({"op": -1})
_COMMIT_HEADER = _HEADERS["#commit"]
_COMMIT_HEADER_LEN = len(_COMMIT_HEADER)
#: Key and head of `blocks` of 64 KiB to 16 MiB. No field before it can hold a zero byte.
_LONG_BLOCKS = b"\x66blocks\x5a\x00"
_LONG = 1 << 16
#: Frames up to this size are decoded with their items uncounted.
_UNCOUNTED = 16 << 10
_STAND_IN = token_bytes(16)  # nobody else knows it

_LINKS = (DATA_PREFIX, b"\x01\x55\x12\x20")  # a record's may also be raw
_new: Any = tuple.__new__  # a NamedTuple without its slower constructor
# No identifier holds a space, so the joined text matches exactly when each part does.
_commit_texts = re.compile(rf"{DID_RE} {TID_RE}(?: {TID_RE})? {DATETIME_RE}").fullmatch
_rkey = re.compile(RKEY_RE).fullmatch
_known_nsid = lru_cache(maxsize=4096)(is_nsid)


def decode_frame(data: bytes, *, max_bytes: int = MAX_FRAME_BYTES) -> Frame:
    """The message in one binary WebSocket message.

    Raises `FrameError`: ``fatal`` when the connection cannot be trusted any more (row 0: size, CBOR,
    canonical form, framing); otherwise only this message is bad (rows 1 and 2), with ``reason``
    ``fields``, ``blocks_size`` or ``ops_count``. `MAX_FIELDS_BYTES` and `MAX_ITEMS` bound what it costs.
    """
    if len(data) > max_bytes:
        raise FrameError(f"a frame of {len(data)} bytes; the limit is {max_bytes}")
    if len(data) > MAX_FIELDS_BYTES + _LONG:
        return _decode_long(data)
    if len(data) > _UNCOUNTED:
        _check_items(data)
    if data[:_COMMIT_HEADER_LEN] == _COMMIT_HEADER:
        body = data[_COMMIT_HEADER_LEN:]
        try:
            payload = decode_dag_cbor(body)
            canonical = encode_dag_cbor(payload) == body
        except Exception as error:  # libipld: mostly ValueError, RecursionError for deep nesting
            raise FrameError(f"a frame's payload is not DAG-CBOR: {error}") from error
        if canonical and type(payload) is dict:
            return _commit(payload)
    return _decode_any(data)


def _check_items(data: bytes) -> None:
    if has_more_items(data, MAX_ITEMS):
        raise FrameError(f"a frame of more than {MAX_ITEMS} CBOR items", reason="fields", fatal=False)


def _decode_long(data: bytes) -> Frame:
    """A frame that is only worth decoding when nearly all of it is `blocks`, which are set aside for that.

    What stands for them is unknown to the sender, so finding it as the value of ``blocks`` proves that the
    bytes left out are just that value.
    """
    head = data.find(_LONG_BLOCKS) + len(_LONG_BLOCKS) - 2
    start = head + 5
    size = int.from_bytes(data[head + 1 : start], "big") if head > len(_COMMIT_HEADER) else 0
    rest = len(data) - size
    if size < _LONG or rest < start or rest > MAX_FIELDS_BYTES:
        text = f"a frame of {len(data)} bytes, of which more than {MAX_FIELDS_BYTES} are not 'blocks'"
        raise FrameError(text, reason="fields", fatal=False)
    short = data[:head] + b"\x50" + _STAND_IN + data[start + size :]
    _check_items(short)
    return _decode_any(short, data[start : start + size])


def _decode_any(data: bytes, blocks: bytes | None = None) -> Frame:
    """Any frame, without the short cuts. ``blocks``: what `_STAND_IN` stands for, None where it does not."""
    try:
        objects = decode_dag_cbor_multi(data)
        canonical = b"".join([encode_dag_cbor(item) for item in objects]) == data
        if not canonical:
            objects = _decode_exactly(data, objects[0])
    except FrameError:
        raise
    except Exception as error:
        raise FrameError(f"a frame is not DAG-CBOR: {error}") from error
    if len(objects) != 2 or type(objects[0]) is not dict or type(objects[1]) is not dict:
        raise FrameError(f"a frame must be a header map and a payload map; {len(objects)} objects found")
    header, payload = objects
    if blocks is not None:
        if payload.get("blocks") != _STAND_IN:
            raise FrameError("a long frame hides its 'blocks'", reason="fields", fatal=False)
        payload["blocks"] = blocks
    op, name = header.get("op"), header.get("t")
    if type(op) is not int:
        raise FrameError("a frame's header has no integer 'op'")
    if op == -1:
        return _error(payload)
    if op != 1:
        return UnknownFrame(f"op {op}", _seq_of(payload))
    if type(name) is not str:
        raise FrameError("a message frame's header has no 't'")
    decoder = _DECODERS.get(name)
    return decoder(payload) if decoder is not None else UnknownFrame(name[:64], _seq_of(payload))


class _ByteString(bytes):
    """A CBOR byte string, where plain ``bytes`` is a link."""


def _decode_exactly(data: bytes, header: object) -> list[Any]:
    """The frame's two objects by the slow, exact way.

    libipld cannot tell a byte string from a link, so a re-encoding that differs means either a frame
    that is not canonical (refused here) or a byte string that looks like a CID, which is legal in a
    field that we do not know and a wrong type where a link belongs. Items cost ten times as much here.
    """
    _check_items(data)
    head = encode_dag_cbor(header)
    body = data[len(head) :]
    payload = cbor2.loads(body)
    if not data.startswith(head) or cbor2.dumps(payload, canonical=True) != body:
        raise FrameError("a frame is not two objects of canonical DAG-CBOR")
    return [header, _links_as_bytes(payload)]


def _links_as_bytes(value: Any) -> Any:
    if isinstance(value, cbor2.CBORTag):
        return bytes(value.value[1:])
    if isinstance(value, bytes):
        return _ByteString(value)
    if isinstance(value, list):
        return [_links_as_bytes(item) for item in value]
    if isinstance(value, dict):
        return {key: _links_as_bytes(item) for key, item in value.items()}
    return value


def _commit(payload: Payload) -> CommitFrame:
    """`CommitFrame` of a payload; what is wrong is looked up in the table only when something is."""
    try:
        seq, repo, rev, since, time = (
            payload["seq"],
            payload["repo"],
            payload["rev"],
            payload["since"],
            payload["time"],
        )
        commit, blocks, ops = payload["commit"], payload["blocks"], payload["ops"]
        too_big, rebase, blobs = payload["tooBig"], payload["rebase"], payload["blobs"]
        has_prev = "prevData" in payload
        prev_data = payload["prevData"] if has_prev else None
        texts = " ".join((repo, rev, time)) if since is None else " ".join((repo, rev, since, time))
        wrong = (
            _commit_texts(texts) is None
            or len(repo) > MAX_DID
            or ((time[8:10] > "28" or time < "0001") and not is_datetime(time))
            or type(seq) is not int
            or not 0 < seq <= MAX_SEQ
            or type(commit) is not bytes
            or len(commit) != 36
            or not commit.startswith(DATA_PREFIX)
            or (
                prev_data is not None
                and (
                    type(prev_data) is not bytes
                    or len(prev_data) != 36
                    or not prev_data.startswith(DATA_PREFIX)
                )
            )
            or not isinstance(blocks, bytes)
            or type(ops) is not list
            or type(too_big) is not bool
            or type(rebase) is not bool
            or type(blobs) is not list
        )
    except (KeyError, TypeError):  # a field is absent, or a text is none
        wrong = True
    if wrong:
        _refuse_fields("#commit", payload)
    if not 0 < len(blocks) <= MAX_BLOCKS_BYTES:
        _refuse_blocks(payload, blocks)
    if len(ops) > MAX_OPS:
        _refuse(payload, f"{len(ops)} operations; the limit is {MAX_OPS}", "ops_count")
    checked = _ops(payload, ops)
    values = (seq, repo, commit, rev, since, prev_data, has_prev, blocks, checked, time, too_big, rebase)
    frame: CommitFrame = _new(CommitFrame, values)
    return frame


def _ops(payload: Payload, ops: list[Any]) -> list[FrameOp]:
    result = []
    for op in ops:
        try:
            action, path, cid, prev = op["action"], op["path"], op["cid"], op.get("prev")
            collection, _, rkey = path.partition("/")
            valid = (
                type(action) is str
                and _rkey(rkey) is not None
                and _known_nsid(collection)
                and (cid is None or (len(cid) == 36 and type(cid) is bytes and cid.startswith(_LINKS)))
                and (prev is None or (len(prev) == 36 and type(prev) is bytes and prev.startswith(_LINKS)))
            )
        except (KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            _refuse(payload, f"a malformed operation: {shown(op)}")
        result.append(_new(FrameOp, (action, path, cid, prev)))
    return result


def _sync(payload: Payload) -> SyncFrame:
    _check_fields("#sync", payload)
    blocks = payload["blocks"]
    if not 0 < len(blocks) <= MAX_BLOCKS_BYTES:
        _refuse_blocks(payload, blocks)
    return SyncFrame(payload["seq"], payload["did"], blocks, payload["rev"], payload["time"])


def _identity(payload: Payload) -> IdentityFrame:
    _check_fields("#identity", payload)
    return IdentityFrame(payload["seq"], payload["did"], payload["time"], payload.get("handle"))


def _account(payload: Payload) -> AccountFrame:
    _check_fields("#account", payload)
    return AccountFrame(
        payload["seq"], payload["did"], payload["time"], payload["active"], payload.get("status")
    )


def _info(payload: Payload) -> InfoFrame:
    _check_fields("#info", payload)
    return InfoFrame(payload["name"], payload.get("message"))


def _error(payload: Payload) -> ErrorFrame:
    error, message = payload.get("error"), payload.get("message")
    if type(error) is not str or not isinstance(message, str | None):
        raise FrameError("an error frame without a name")
    return ErrorFrame(error, message)


_DECODERS: dict[str, Callable[[Payload], Frame]] = {
    "#commit": _commit,
    "#sync": _sync,
    "#identity": _identity,
    "#account": _account,
    "#info": _info,
}


def _check_fields(name: str, payload: Payload) -> None:
    fault = find_fault(name, payload)
    if fault is not None:
        _refuse(payload, fault)


def _refuse_fields(name: str, payload: Payload) -> NoReturn:
    _check_fields(name, payload)
    _refuse(payload, f"{name} is malformed")


def _refuse_blocks(payload: Payload, blocks: bytes) -> NoReturn:
    message = f"'blocks' holds {len(blocks)} bytes; 1 to {MAX_BLOCKS_BYTES} are allowed"
    _refuse(payload, message, "blocks_size")


def _refuse(payload: Payload, message: str, reason: str = "fields") -> NoReturn:
    did = payload.get("repo", payload.get("did"))
    known_did = did if type(did) is str and is_did(did) else ""
    raise FrameError(message, reason=reason, fatal=False, seq=_seq_of(payload), did=known_did)


def _seq_of(payload: Payload) -> Seq | None:
    seq = payload.get("seq")
    return seq if is_seq(seq) else None


def encode_frame(name: str, payload: Mapping[str, Any]) -> bytes:
    """The frame of message ``name`` (``#commit``, …). Links in ``payload`` are binary CIDs."""
    header = _HEADERS.get(name) or encode_dag_cbor({"op": 1, "t": name})
    return header + bytes(encode_dag_cbor(dict(payload)))


def encode_error_frame(error: str, message: str | None = None) -> bytes:
    """The frame that announces the server's close."""
    payload = {"error": error} if message is None else {"error": error, "message": message}
    return _ERROR_HEADER + bytes(encode_dag_cbor(payload))
