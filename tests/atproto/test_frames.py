from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libipld import decode_dag_cbor_multi, encode_dag_cbor

from indexer.atproto import frames
from indexer.atproto.frames import (
    AccountFrame,
    CommitFrame,
    ErrorFrame,
    FrameOp,
    IdentityFrame,
    InfoFrame,
    SyncFrame,
    UnknownFrame,
    decode_frame,
    encode_error_frame,
    encode_frame,
)
from indexer.errors import FrameError
from tests.paths import DATA

DID = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"
REV = "3k2yihcrp6f2c"
SINCE = "3k2yihcrp6e2c"
TIME = "2026-11-21T15:45:07.933Z"
CID = b"\x01\x71\x12\x20" + bytes(range(32))
RAW_CID = b"\x01\x55\x12\x20" + bytes(range(32))
SHA512_CID = b"\x01\x71\x13\x40" + bytes(64)


def op(**changes: Any) -> dict[str, Any]:
    return edited({"action": "create", "path": "app.bsky.feed.post/self", "cid": CID}, changes)


def commit(**changes: Any) -> dict[str, Any]:
    payload = {
        "seq": 7, "repo": DID, "commit": CID, "rev": REV, "since": SINCE, "prevData": CID, "blocks": b":car",
        "ops": [op()], "blobs": [], "time": TIME, "tooBig": False, "rebase": False,
    }  # fmt: skip
    return edited(payload, changes)


def sync(**changes: Any) -> dict[str, Any]:
    return edited({"seq": 7, "did": DID, "blocks": b":car", "rev": REV, "time": TIME}, changes)


def identity(**changes: Any) -> dict[str, Any]:
    return edited({"seq": 7, "did": DID, "time": TIME, "handle": "ann.example.com"}, changes)


def account(**changes: Any) -> dict[str, Any]:
    return edited({"seq": 7, "did": DID, "time": TIME, "active": False, "status": "takendown"}, changes)


ABSENT = object()


def edited(payload: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**payload, **changes}.items() if value is not ABSENT}


def message(name: str, payload: Any, **header: Any) -> bytes:
    """A frame by plain cbor2, with links wherever a value is 36 bytes of a CID."""
    head = cbor2.dumps({"t": name, "op": 1, **header}, canonical=True)
    return head + cbor2.dumps(linked(payload), canonical=True)


def linked(value: Any) -> Any:
    if isinstance(value, bytes) and value in (CID, RAW_CID, SHA512_CID):
        return cbor2.CBORTag(42, b"\x00" + value)
    if isinstance(value, dict):
        return {key: linked(item) for key, item in value.items()}
    return [linked(item) for item in value] if isinstance(value, list) else value


def captured(path: Path) -> Iterator[bytes]:
    data, at = path.read_bytes(), 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 4 + size]
        at += 4 + size


SESSION = [DATA / "session" / "pds0.frames", DATA / "session" / "pds1.frames"]


def test_every_frame_of_the_captured_session_is_read() -> None:
    kinds = Counter(type(decode_frame(frame)).__name__ for path in SESSION for frame in captured(path))
    assert kinds == {"CommitFrame": 937, "AccountFrame": 34, "IdentityFrame": 33, "SyncFrame": 26}


def test_captured_frames_say_what_another_decoder_reads_in_them() -> None:
    names = {"repo", "did", "seq", "rev", "since", "time", "blocks", "commit", "handle", "active", "status"}
    for path in SESSION:
        for data in captured(path):
            _, payload = decode_dag_cbor_multi(data)
            frame = decode_frame(data)
            assert not isinstance(frame, InfoFrame | ErrorFrame | UnknownFrame)
            shown = frame._asdict()
            assert all(shown[name] == payload[name] for name in names & payload.keys())
            if isinstance(frame, CommitFrame):
                assert frame.prev_data == payload.get("prevData")
                assert frame.has_prev_data == ("prevData" in payload)
                assert frame.ops == [
                    (item["action"], item["path"], item["cid"], item.get("prev")) for item in payload["ops"]
                ]


def test_the_single_captures() -> None:
    folder = DATA / "frames"
    told = InfoFrame("OutdatedCursor", "Requested cursor exceeded limit. Possibly missing events")
    assert [decode_frame(f) for f in captured(folder / "info_outdated_idle.bin")] == [told]
    first, *replay = [decode_frame(f) for f in captured(folder / "info_outdated.bin")]
    assert first == told
    assert Counter(type(frame).__name__ for frame in replay) == {"CommitFrame": 28, "SyncFrame": 1}
    (future,) = captured(folder / "error_futurecursor.bin")
    assert decode_frame(future) == ErrorFrame("FutureCursor", "Cursor in the future.")
    (slow,) = captured(folder / "error_consumertooslow.bin")
    assert decode_frame(slow) == ErrorFrame("ConsumerTooSlow", "Stream consumer too slow")


def test_captured_frames_are_encoded_as_the_server_did() -> None:
    for data in captured(SESSION[0]):
        header, payload = decode_dag_cbor_multi(data)
        assert encode_frame(header["t"], payload) == data
    for path in (DATA / "frames").glob("error_*.bin"):
        (data,) = captured(path)
        error = decode_frame(data)
        assert isinstance(error, ErrorFrame)
        assert encode_error_frame(error.error, error.message) == data


def test_each_type() -> None:
    assert decode_frame(message("#commit", commit())) == CommitFrame(
        7, DID, CID, REV, SINCE, CID, True, b":car",
        [FrameOp("create", "app.bsky.feed.post/self", CID, None)], TIME, False, False,
    )  # fmt: skip
    assert decode_frame(message("#sync", sync())) == SyncFrame(7, DID, b":car", REV, TIME)
    assert decode_frame(message("#identity", identity())) == IdentityFrame(7, DID, TIME, "ann.example.com")
    assert decode_frame(message("#account", account())) == AccountFrame(7, DID, TIME, False, "takendown")
    assert decode_frame(message("#info", {"name": "OutdatedCursor"})) == InfoFrame("OutdatedCursor", None)
    assert decode_frame(encode_error_frame("FutureCursor")) == ErrorFrame("FutureCursor", None)


def test_what_may_be_absent_or_null() -> None:
    first = decode_frame(message("#commit", commit(since=None, prevData=ABSENT, ops=[])))
    assert isinstance(first, CommitFrame)
    assert (first.since, first.prev_data, first.has_prev_data, first.ops) == (None, None, False, [])
    null = decode_frame(message("#commit", commit(prevData=None)))
    assert isinstance(null, CommitFrame)
    assert (null.prev_data, null.has_prev_data) == (None, True)
    assert decode_frame(message("#identity", identity(handle=ABSENT))) == IdentityFrame(7, DID, TIME, None)
    assert decode_frame(message("#account", account(status=ABSENT, active=True))) == AccountFrame(
        7, DID, TIME, True, None
    )


def test_the_kinds_of_operation() -> None:
    ops = [
        op(cid=RAW_CID),
        op(action="update", path="a.b.c/d", prev=CID),
        op(action="delete", path="a.b.c/e", cid=None, prev=CID),
        op(action="later", path="a.b.c/f"),
    ]
    frame = decode_frame(message("#commit", commit(ops=ops)))
    assert isinstance(frame, CommitFrame)
    assert frame.ops == [
        ("create", "app.bsky.feed.post/self", RAW_CID, None),
        ("update", "a.b.c/d", CID, CID),
        ("delete", "a.b.c/e", None, CID),
        ("later", "a.b.c/f", CID, None),
    ]


@pytest.mark.parametrize("name", ["#handle", "#migrate", "#tombstone", "#brandnew", ""])
def test_unknown_types_are_told_and_skipped(name: str) -> None:
    assert decode_frame(message(name, {"seq": 9, "anything": [1, {}]})) == UnknownFrame(name, 9)
    assert decode_frame(message(name, {})) == UnknownFrame(name, None)


def test_an_unknown_op_is_skipped() -> None:
    assert decode_frame(message("#commit", {"seq": 9}, op=2)) == UnknownFrame("op 2", 9)


def test_unknown_fields_are_skipped() -> None:
    extra = {"zz": {"deep": [1, None, {"x": True}]}, "looksLikeALink": b"\x01\x71\x12\x20" + bytes(32)}
    for name, build in BUILDERS.items():
        plain, more = message(name, build()), message(name, {**build(), **extra})
        assert decode_frame(more) == decode_frame(plain)
    assert decode_frame(message("#commit", commit(), extra=1)) == decode_frame(message("#commit", commit()))


BUILDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "#commit": commit,
    "#sync": sync,
    "#identity": identity,
    "#account": account,
}
REQUIRED = {
    "#commit": [
        "seq",
        "repo",
        "commit",
        "rev",
        "since",
        "blocks",
        "ops",
        "blobs",
        "time",
        "tooBig",
        "rebase",
    ],
    "#sync": ["seq", "did", "blocks", "rev", "time"],
    "#identity": ["seq", "did", "time"],
    "#account": ["seq", "did", "time", "active"],
}


@pytest.mark.parametrize(("name", "field"), [(name, f) for name, fields in REQUIRED.items() for f in fields])
def test_an_absent_field_refuses_the_message_and_names_it(name: str, field: str) -> None:
    with pytest.raises(FrameError, match=f"{name} without '{field}'") as raised:
        decode_frame(message(name, BUILDERS[name](**{field: ABSENT})))
    assert (raised.value.fatal, raised.value.reason) == (False, "fields")
    assert raised.value.seq == (None if field == "seq" else 7)
    assert raised.value.did == ("" if field in ("repo", "did") else DID)


GARBAGE: list[Any] = [None, {}, "text", 7]
WRONG: list[tuple[str, str, Any]] = [
    *(("#commit", "seq", value) for value in (0, -1, 2**53, True, "7", None, 1.1)),
    *(("#commit", "repo", value) for value in ("did:plc", "ann.example.com", 7, None, "did:a:" + "b" * 2050)),
    *(("#commit", "commit", value) for value in (None, b"x", RAW_CID, SHA512_CID, "bafy", 7)),
    *(("#commit", "rev", value) for value in ("", "3k2yihcrp6f2", REV.upper(), 7, None, REV + " " + REV)),
    *(("#commit", "since", value) for value in ("", "x", 7, 0, False, f"{REV} {REV}")),
    *(("#commit", "prevData", value) for value in (b"x", RAW_CID, SHA512_CID, "bafy", 7, False)),
    *(("#commit", "blocks", value) for value in (None, "text", 7)),
    *(("#commit", name, value) for name in ("ops", "blobs") for value in GARBAGE),
    *(
        ("#commit", "time", value)
        for value in ("", "2026-11-21", "2026-02-30T00:00:00Z", 7, None, TIME + "\n")
    ),
    ("#commit", "time", "0000-01-01T00:00:00+01:00"),
    *(("#commit", name, value) for name in ("tooBig", "rebase") for value in (None, 0, "false")),
    ("#sync", "blocks", "text"),
    ("#sync", "rev", "x"),
    ("#sync", "did", "did:plc"),
    ("#identity", "handle", 7),
    ("#identity", "time", "yesterday"),
    ("#account", "active", "true"),
    ("#account", "status", 7),
]


@pytest.mark.parametrize(("name", "field", "value"), WRONG)
def test_a_wrong_field_refuses_the_message_and_names_it(name: str, field: str, value: Any) -> None:
    with pytest.raises(FrameError, match=f"'{field}' must be") as raised:
        decode_frame(message(name, BUILDERS[name](**{field: value})))
    assert (raised.value.fatal, raised.value.reason) == (False, "fields")


@pytest.mark.parametrize(
    "changes",
    [
        {"action": ABSENT},
        {"action": 7},
        {"path": ABSENT},
        {"path": 7},
        {"path": ""},
        {"path": "app.bsky.feed.post"},
        {"path": "app.bsky.feed.post/"},
        {"path": "app.bsky.feed.post/.."},
        {"path": "app.bsky.feed.post/a/b"},
        {"path": "post/self"},
        {"path": "/self"},
        {"cid": ABSENT},
        {"cid": "bafy"},
        {"cid": b"x"},
        {"cid": SHA512_CID},
        {"prev": "bafy"},
        {"prev": SHA512_CID},
        {"prev": 7},
    ],
)
def test_a_malformed_operation_refuses_the_message(changes: dict[str, Any]) -> None:
    with pytest.raises(FrameError, match="malformed operation") as raised:
        decode_frame(message("#commit", commit(ops=[op(), op(**changes)])))
    assert (raised.value.fatal, raised.value.reason, raised.value.seq, raised.value.did) == (
        False, "fields", 7, DID,
    )  # fmt: skip


def test_an_operation_that_is_no_object_refuses_the_message() -> None:
    for item in (None, 7, "create", [], ["action"]):
        with pytest.raises(FrameError, match="malformed operation"):
            decode_frame(message("#commit", commit(ops=[item])))


def test_a_byte_string_in_the_place_of_a_link_is_a_wrong_type() -> None:
    head = encode_dag_cbor({"op": 1, "t": "#commit"})
    for field in ("commit", "prevData"):
        payload = {**linked(commit()), field: CID}
        with pytest.raises(FrameError, match=f"'{field}' must be a link") as raised:
            decode_frame(head + cbor2.dumps(payload, canonical=True))
        assert raised.value.fatal is False
    payload = {**linked(commit()), "ops": [{**linked(op()), "cid": CID}]}
    with pytest.raises(FrameError, match="malformed operation"):
        decode_frame(head + cbor2.dumps(payload, canonical=True))


@pytest.mark.parametrize("build", [commit, sync])
@pytest.mark.parametrize("size", [65_535, 65_536, 262_000, 320_000, 400_000, 2_000_000])
def test_long_blocks_come_out_as_they_went_in(build: Callable[..., dict[str, Any]], size: int) -> None:
    name = "#commit" if build is commit else "#sync"
    blocks = (b"\x66blocks\x5a\x00\x01\x00\x00:" * size)[:size]
    long, short = (decode_frame(message(name, build(blocks=it))) for it in (blocks, b":car"))
    assert isinstance(long, CommitFrame | SyncFrame)
    assert isinstance(short, CommitFrame | SyncFrame)
    assert long.blocks == blocks
    assert long._replace(blocks=b":car") == short


def test_the_largest_honest_operations_fit() -> None:
    ops = [op(path=f"{'a' * 60}.{'b' * 60}.{'c' * 60}.{'d' * 60}.{'e' * 60}/{n:0512}") for n in range(200)]
    assert all(len(one["path"]) > 810 for one in ops)
    ops = [{**one, "action": "update", "prev": CID} for one in ops]
    frame = decode_frame(message("#commit", commit(ops=ops, blocks=b":" * 2_000_000)))
    assert isinstance(frame, CommitFrame)
    assert len(frame.ops) == 200


LONG_LIST = "a list goes here"


def with_long_list(data: bytes, items: int) -> bytes:
    """A frame whose `LONG_LIST` text is a list of so many empty maps (the reference encoder is slow)."""
    text = bytes([0x60 + len(LONG_LIST)]) + LONG_LIST.encode()
    head = b"\x99" + items.to_bytes(2, "big") if items < 1 << 16 else b"\x9a" + items.to_bytes(4, "big")
    return data.replace(text, head + b"\xa0" * items)


@pytest.mark.parametrize("name", ["#commit", "#sync", "#identity", "#account", "#info", "#brandnew"])
def test_a_frame_of_anything_but_blocks_is_refused_undecoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: bytes) -> None:
        raise AssertionError("it was decoded")

    build: Callable[..., dict[str, Any]] = BUILDERS.get(name, identity)
    data = with_long_list(message(name, {**build(), "x": LONG_LIST}), 400_000)
    monkeypatch.setattr(frames, "decode_dag_cbor", refused)
    monkeypatch.setattr(frames, "decode_dag_cbor_multi", refused)
    with pytest.raises(FrameError, match="not 'blocks'") as raised:
        decode_frame(data)
    assert (raised.value.fatal, raised.value.reason) == (False, "fields")


@pytest.mark.parametrize("name", ["#commit", "#identity", "#brandnew"])
@pytest.mark.parametrize("size", [17_000, 300_000])
def test_a_frame_of_many_items_is_refused_undecoded(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: bytes) -> None:
        raise AssertionError("it was decoded")

    build: Callable[..., dict[str, Any]] = BUILDERS.get(name, identity)
    data = with_long_list(message(name, {**build(), "x": LONG_LIST}), size)
    monkeypatch.setattr(frames, "decode_dag_cbor", refused)
    monkeypatch.setattr(frames, "decode_dag_cbor_multi", refused)
    with pytest.raises(FrameError, match="4096 CBOR items") as raised:
        decode_frame(data)
    assert (raised.value.fatal, raised.value.reason) == (False, "fields")


def test_the_items_of_a_long_frame_are_counted_too() -> None:
    data = with_long_list(message("#commit", commit(blocks=b":" * 1_500_000, x=LONG_LIST)), 5000)
    with pytest.raises(FrameError, match="4096 CBOR items"):
        decode_frame(data)


@pytest.mark.parametrize("items", [4000, 5000])
def test_the_slow_way_is_only_taken_for_few_items(items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that look like a CID in an unknown field lead there, at ten times the cost of an item."""
    taken: list[int] = []

    def loads(data: bytes) -> Any:
        taken.append(len(data))
        return cbor2.loads(data)

    monkeypatch.setattr(frames, "cbor2", SimpleNamespace(
        loads=loads, dumps=cbor2.dumps, CBORTag=cbor2.CBORTag
    ))  # fmt: skip
    fake = "a CID, nearly: thirty-six characters"
    data = with_long_list(message("#identity", identity(x=LONG_LIST, y=fake)), items)
    data = data.replace(b"\x78\x24" + fake.encode(), b"\x58\x24" + CID)
    if items > frames.MAX_ITEMS:
        with pytest.raises(FrameError, match="4096 CBOR items"):
            decode_frame(data)
        assert not taken
    else:
        assert isinstance(decode_frame(data), IdentityFrame)
        assert taken


def test_a_text_that_pretends_to_be_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list in ``z`` lies where the text says that `blocks` are: it is neither decoded nor lost."""
    size = 0x061A00
    pretence = b"\x66blocks\x5a\x00" + size.to_bytes(3, "big")
    seen: list[int] = []

    def decode(data: bytes) -> Any:
        seen.append(len(data))
        return decode_dag_cbor_multi(data)

    monkeypatch.setattr(frames, "decode_dag_cbor_multi", decode)
    text = "T" * len(pretence)
    for after in (0, 1, 19, 20):  # what is taken for the text once the list is left out
        data = message("#commit", {"a": text + "." * after, **commit(), "z": LONG_LIST})
        data = with_long_list(data, size - 5 + after)
        with pytest.raises(FrameError):
            decode_frame(data.replace(text.encode(), pretence))
    assert seen
    assert max(seen) < frames.MAX_FIELDS_BYTES


@pytest.mark.parametrize("build", [commit, sync])
def test_the_size_of_blocks(build: Callable[..., dict[str, Any]]) -> None:
    name = "#commit" if build is commit else "#sync"
    at_limit = decode_frame(message(name, build(blocks=b":" * 2_000_000)))
    assert isinstance(at_limit, CommitFrame | SyncFrame)
    for blocks in (b"", b":" * 2_000_001):
        with pytest.raises(FrameError, match="blocks") as raised:
            decode_frame(message(name, build(blocks=blocks)))
        assert (raised.value.fatal, raised.value.reason, raised.value.seq, raised.value.did) == (
            False, "blocks_size", 7, DID,
        )  # fmt: skip


def test_the_number_of_operations() -> None:
    many = [op(path=f"a.b.c/{number}") for number in range(201)]
    frame = decode_frame(message("#commit", commit(ops=many[:200])))
    assert isinstance(frame, CommitFrame)
    assert len(frame.ops) == 200
    with pytest.raises(FrameError, match="201 operations") as raised:
        decode_frame(message("#commit", commit(ops=many)))
    assert (raised.value.fatal, raised.value.reason) == (False, "ops_count")


GOOD = message("#commit", commit())
HEAD = encode_dag_cbor({"op": 1, "t": "#commit"})
SYNC = message("#sync", sync())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        HEAD,  # no payload
        HEAD + b"\x80",  # a payload that is a list
        b"\x80" + GOOD[len(HEAD) :],
        GOOD + b"\x00",
        GOOD + b"\xa0",
        SYNC + b"\xa0",
        GOOD[:-1],
        SYNC[:-1],
        HEAD + HEAD + GOOD[len(HEAD) :],
        encode_dag_cbor({"op": 1}) + b"\xa0",
        encode_dag_cbor({"t": "#commit"}) + b"\xa0",
        encode_dag_cbor({"op": True, "t": "#commit"}) + b"\xa0",
        encode_dag_cbor({"op": "1", "t": "#commit"}) + b"\xa0",
        encode_dag_cbor({"op": 1, "t": 7}) + b"\xa0",
        encode_dag_cbor({"op": -1}) + b"\xa0",
        encode_dag_cbor({"op": -1}) + encode_dag_cbor({"error": 7}),
        encode_dag_cbor({"op": -1}) + encode_dag_cbor({"error": "x", "message": 7}),
        b"not a frame at all, but a text of some length",
        HEAD + b"\xbf\xff",  # indefinite length
        HEAD + b"\xa1\x61a\x1b" + bytes(8),  # an integer in more bytes than it needs
        HEAD + b"\xb8\x01\x61a\x00",  # a length in more bytes than it needs
        HEAD + b"\xa2\x61b\x00\x61a\x00",  # keys out of order
        HEAD + b"\xa2\x61a\x00\x61a\x00",  # a key twice
        HEAD + b"\xa1\x00\x00",  # a key that is no text
        HEAD + b"\xa1\x61a\xc0\x60",  # a tag other than 42
        HEAD + b"\xa1\x61a\xf9\x00\x00",  # a half-precision float
        HEAD + b"\xa1\x61a\x62\xff\xff",  # not UTF-8
        HEAD + b"\xa1\x61a" + b"\x81" * 5_000 + b"\x00",
        b"\xa2\x62op\x01\x61tg#commit" + GOOD[len(HEAD) :],  # a header out of order
    ],
)
def test_a_broken_frame_ends_the_connection(data: bytes) -> None:
    with pytest.raises(FrameError) as raised:
        decode_frame(data)
    assert (raised.value.fatal, raised.value.reason) == (True, "frame")


def test_the_size_of_a_frame() -> None:
    with pytest.raises(FrameError, match="5000001 bytes") as raised:
        decode_frame(bytes(5_000_001))
    assert raised.value.fatal
    with pytest.raises(FrameError, match="the limit is 100"):
        decode_frame(GOOD, max_bytes=100)


def test_an_error_survives_the_way_between_processes() -> None:
    import pickle

    error = FrameError("bad", reason="fields", fatal=False, seq=7, did=DID)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.reason, copy.fatal, copy.seq, copy.did) == ("bad", "fields", False, 7, DID)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from([b"", HEAD, encode_dag_cbor({"op": -1})]))
def test_garbage_raises_only_our_error(data: bytes, head: bytes) -> None:
    try:
        decode_frame(head + data)
    except FrameError:
        pass


@settings(max_examples=300)
@given(st.data())
def test_damaged_frames_raise_only_our_error(data: st.DataObject) -> None:
    frame = bytearray(data.draw(st.sampled_from([GOOD, SYNC, message("#account", account())])))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_frame(bytes(frame))
    except FrameError:
        pass


def test_the_fast_and_the_slow_way_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [GOOD, *list(captured(SESSION[0]))[:200]]
    fast = [decode_frame(data) for data in samples]
    monkeypatch.setattr(frames, "_COMMIT_HEADER", b"")
    assert [decode_frame(data) for data in samples] == fast
