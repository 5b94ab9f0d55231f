"""The DAG-CBOR border: canonical form, the data model, JSON, and values that look like links."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from typing import Any

import dag_cbor
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multiformats import CID

from indexer.atproto import dagcbor
from indexer.atproto.cid import DAG_CBOR_PREFIX, RAW_PREFIX, dag_cbor_cid, format_cid, raw_cid
from indexer.atproto.dagcbor import Link
from indexer.errors import BadInput, DagCborError, RecordInvalid
from tests.paths import interop

CID_BYTES = dag_cbor_cid(b"anything")
LINK = b"\xd8\x2a\x58\x25\x00" + CID_BYTES
AS_BYTES = b"\x58\x24" + CID_BYTES


def vectors(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(interop(f"data-model/{name}.json").read_text())
    return found


# --- interop vectors --------------------------------------------------------------------------------------


def test_interop_fixtures_give_the_same_block_cid_and_json() -> None:
    fixtures = vectors("data-model-fixtures")
    assert len(fixtures) == 3
    for fixture in fixtures:
        block = b64decode(fixture["cbor_base64"] + "==")
        assert dagcbor.record_from_json(fixture["json"]) == block
        assert format_cid(dag_cbor_cid(block)) == fixture["cid"]
        assert json.loads(dagcbor.record_to_json(block)) == fixture["json"]
        assert dagcbor.encode_exact(dagcbor.decode_exact(block)) == block
        dagcbor.check_record(block)


def test_interop_valid_values_are_accepted() -> None:
    for vector in vectors("data-model-valid"):
        dagcbor.check_record(dagcbor.record_from_json(vector["json"]))


def test_interop_invalid_values_are_refused() -> None:
    for vector in vectors("data-model-invalid"):
        try:
            dagcbor.record_from_json(vector["json"])
        except RecordInvalid:
            continue
        pytest.fail(f"accepted: {vector['note']}")


# --- canonical form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xf9\x3c\x00",  # half float
        b"\xf7",  # undefined
        b"\x9f\xff",  # indefinite
        b"\xa2aa\x01aa\x02",  # a key twice
        b"\xa2bbb\x01ac\x02",  # keys out of order
        b"\xa1\x01\x01",  # a key that is no string
        b"\x01\x01",  # something behind
        b"\x61\xff",  # not UTF-8
        b"\xc1\x01",  # another tag
        b"\xd8\x2a\x58\x24" + CID_BYTES,  # a link without its zero byte
        b"\x81" * 5000 + b"\x01",
        b"\x9b\x7f" + b"\xff" * 7,
    ],
)
def test_not_dag_cbor(data: bytes) -> None:
    with pytest.raises(DagCborError, match="not DAG-CBOR"):
        dagcbor.decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x18\x01",  # 1 in two bytes
        b"\x78\x01a",  # a length in two bytes
        b"\xd9\x00\x2a\x58\x25\x00" + CID_BYTES,  # tag 42 in three bytes
        b"\xd8\x2a\x59\x00\x25\x00" + CID_BYTES,
    ],
)
def test_a_head_that_is_too_long_does_not_come_back(data: bytes) -> None:
    assert dagcbor.encode_exact(dagcbor.decode_exact(data)) != data


def test_a_byte_string_that_looks_like_a_cid_stays_a_byte_string() -> None:
    assert dagcbor.decode(LINK) == dagcbor.decode(AS_BYTES) == CID_BYTES
    exact = dagcbor.decode_exact(b"\x82" + LINK + AS_BYTES)
    assert [type(item) for item in exact] == [Link, bytes]
    assert dagcbor.encode_exact(exact) == b"\x82" + LINK + AS_BYTES


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(max_size=20)
    | st.binary(max_size=40)
    | st.binary(max_size=40).map(raw_cid)
    | st.binary(max_size=40).map(raw_cid).map(Link),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=20,
)


def independent(value: Any) -> Any:
    """The value as the `dag_cbor` package wants it."""
    if isinstance(value, Link):
        return CID.decode(bytes(value))
    if isinstance(value, list):
        return [independent(item) for item in value]
    if isinstance(value, dict):
        return {key: independent(item) for key, item in value.items()}
    return value


@settings(deadline=None, max_examples=100)
@given(VALUES)
def test_exact_codec_agrees_with_an_independent_one(value: Any) -> None:
    block = dagcbor.encode_exact(value)
    assert block == dag_cbor.encode(independent(value))
    back = dagcbor.decode_exact(block)
    assert back == value
    assert dagcbor.encode_exact(back) == block


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=80))
def test_whatever_comes_only_our_errors_go_out(data: bytes) -> None:
    for function in (
        dagcbor.decode,
        dagcbor.decode_exact,
        dagcbor.record_to_json,
        dagcbor.check_record,
    ):
        try:
            function(data)
        except BadInput:
            continue


@settings(deadline=None, max_examples=100)
@given(VALUES.map(dagcbor.encode_exact), st.data())
def test_a_damaged_value_raises_only_our_errors(block: bytes, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(block) - 1))
    damaged = bytearray(block)
    damaged[index] ^= 1 << data.draw(st.integers(0, 7))
    test_whatever_comes_only_our_errors_go_out.hypothesis.inner_test(bytes(damaged))  # type: ignore[attr-defined]


@pytest.mark.parametrize("depth", [300, 800, 2000, 100_000])
def test_deep_nesting_is_our_error_everywhere(depth: int) -> None:
    block = b"\xa1aa" + b"\x81" * depth + b"\x01"
    for call in (
        dagcbor.record_to_json,
        dagcbor.check_record,
        dagcbor.decode_exact,
    ):
        try:
            call(block)
        except BadInput:
            continue
        assert depth < 1000
        assert call is not dagcbor.check_record
    tagged = b"\xa2aa" + b"\x81" * depth + b"\x01ab" + LINK
    for call in (dagcbor.record_to_json, dagcbor.check_record):
        with pytest.raises(BadInput):
            call(tagged)


def test_encoding_what_cannot_be_encoded() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for value in (object(), {1: 2}, 2**64, float("nan"), endless, "\ud800"):
        with pytest.raises(DagCborError):
            dagcbor.encode(value)
        with pytest.raises(DagCborError):
            dagcbor.encode_exact(value)


# --- JSON -------------------------------------------------------------------------------------------------


def record(**fields: Any) -> bytes:
    return dagcbor.encode_exact({"$type": "com.example.thing", **fields})


def test_json_tells_links_and_bytes_apart_even_when_they_are_equal() -> None:
    block = record(a=Link(CID_BYTES), b=CID_BYTES, c=b"\xd8\x2a", d="plain")
    assert json.loads(dagcbor.record_to_json(block)) == {
        "$type": "com.example.thing",
        "a": {"$link": format_cid(CID_BYTES)},
        "b": {"$bytes": b64encode(CID_BYTES).decode()},
        "c": {"$bytes": "2Co"},
        "d": "plain",
    }


def test_json_of_bytes_without_any_link_in_the_block() -> None:
    assert json.loads(dagcbor.record_to_json(record(b=CID_BYTES)))["b"].keys() == {"$bytes"}


def test_json_of_a_link_in_a_long_head_is_a_link() -> None:
    block = b"\xa1aa\xd9\x00\x2a\x58\x25\x00" + CID_BYTES
    assert json.loads(dagcbor.record_to_json(block)) == {"a": {"$link": format_cid(CID_BYTES)}}


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=5))
def test_json_comes_back_to_the_same_block(value: dict[str, Any]) -> None:
    block = dagcbor.encode_exact(value)
    try:
        dagcbor.check_record(block)
        again = dagcbor.record_from_json(orjson.loads(dagcbor.record_to_json(block)))
    except RecordInvalid:
        return
    assert again == block


def test_json_with_padding_is_understood() -> None:
    assert dagcbor.record_from_json({"a": {"$bytes": "YQ=="}}) == dagcbor.encode_exact({"a": b"a"})


@pytest.mark.parametrize(
    "value",
    [
        [],
        None,
        {"a": {"$bytes": "a"}},
        {"a": {"$bytes": "*"}},
        {"a": {"$link": "bafkqaaik"}},
        {"a": 1.5},
        {"a": float("inf")},
        {"a": 2**53},
        {"a": "\ud800"},
        {"a": object()},
    ],
)
def test_json_that_is_no_record(value: Any) -> None:
    with pytest.raises(RecordInvalid):
        dagcbor.record_from_json(value)


def test_json_nested_too_deeply() -> None:
    value: Any = 1
    for _ in range(5000):
        value = [value]
    with pytest.raises(RecordInvalid, match="deeper"):
        dagcbor.record_from_json({"a": value})


# --- the data model ---------------------------------------------------------------------------------------


def nested(levels: int) -> bytes:
    value: Any = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return dagcbor.encode_exact(value)


@pytest.mark.parametrize(
    "block",
    [
        record(),
        record(a=2**53 - 1, b=-(2**53) + 1, c=[None, True, "x", b"", {}]),
        record(a=Link(raw_cid(b"")), b=Link(CID_BYTES), c=CID_BYTES),
        record(ref={"$type": "blob", "ref": Link(raw_cid(b"")), "mimeType": "image/png", "size": 0}),
        record(old={"cid": "bafk", "mimeType": "image/png"}),
        record(text="🦋 Ünïcode مرحبا ڀ ۀ"),
        record(**{"$other": 5}),
        nested(32),
        b"\xa1aa\x18\x01",  # not canonical, but a record's bytes are kept as they are
    ],
)
def test_good_records(block: bytes) -> None:
    dagcbor.check_record(block)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (b"\x80", "map"),
        (b"\xa1aa", "DAG-CBOR"),
        (b"\xa0\xa0", "DAG-CBOR"),
        (record(a=1.5), "float"),
        (record(a=[{"b": 0.0}]), "float"),
        (record(a=2**53), "53 bits"),
        (record(a=[-(2**53)]), "53 bits"),
        (b"\xa1aa\x1b" + b"\xff" * 8, "53 bits"),
        (nested(33), "deeper"),
        (b"\xa1aa\x61\xff", "DAG-CBOR"),
        (b"\xa1aa\xd8\x2a\x58\x23\x00\x12\x20" + bytes(32), "CIDv0"),
        (b"\xa1aa\xd8\x2a\x45\x00\x01\x55\x00\x00", "sha-256"),
        (b"\xa1aa\xd8\x2a\x58\x25\x00\x01\x70\x12\x20" + bytes(32), "codec"),
        (record(**{"$type": ""}), "type"),
        (record(**{"$type": 1}), "type"),
        (record(a={"$type": None}), "type"),
        (record(a={"$type": "blob"}), "blob"),
        (record(a={"$type": "blob", "ref": raw_cid(b""), "mimeType": "a/b", "size": 1}), "blob"),
        (record(a={"$type": "blob", "ref": b"\xd8\x2a", "mimeType": "a/b", "size": 1}), "blob"),
        (record(a={"$type": "blob", "ref": b"abc", "mimeType": "a/b", "size": 1}, b=Link(CID_BYTES)), "blob"),
        (record(a={"$type": "blob", "ref": b"", "mimeType": "a/b", "size": 1}, b=Link(CID_BYTES)), "blob"),
        (
            record(a={"$type": "blob", "ref": CID_BYTES, "mimeType": "a/b", "size": 1}, b=Link(CID_BYTES)),
            "blob",
        ),
        (record(a={"$type": "blob", "ref": Link(raw_cid(b"")), "mimeType": "a/b", "size": -1}), "blob"),
        (record(a={"$type": "blob", "ref": Link(raw_cid(b"")), "mimeType": "a/b", "size": "1"}), "blob"),
    ],
)
def test_bad_records(block: bytes, words: str) -> None:
    with pytest.raises(RecordInvalid, match=words):
        dagcbor.check_record(block)


def exactly(block: bytes) -> str:
    """The exact decoder's verdict, "" for a good record."""
    try:
        dagcbor._check_model(dagcbor._typed(block), 32)
    except (DagCborError, RecordInvalid) as error:
        return str(error)
    return ""


def cid_like() -> st.SearchStrategy[bytes]:
    heads = st.sampled_from(
        [
            DAG_CBOR_PREFIX,
            RAW_PREFIX,
            b"\x01\x70\x12\x20",
            b"\x12\x20",
            b"\x01\x55\x00",
            b"\x81\x00",
            b"",
            b"\x00",
            b"abc",
        ]
    )
    return st.builds(
        bytes.__add__,
        heads,
        st.sampled_from([bytes(32), bytes(31), b"", b"\xd8\x2a\x58\x25\x00" + bytes(27)]),
    )


FIELDS = st.dictionaries(
    st.sampled_from(["a", "b", "ref", "link", "size"]),
    st.one_of(
        cid_like(),
        cid_like().map(Link),
        st.integers(-(2**54), 2**54),
        st.builds(
            lambda ref: {"$type": "blob", "ref": ref, "mimeType": "a/b", "size": 1},
            cid_like() | cid_like().map(Link),
        ),
        st.binary(max_size=3),
    ),
    max_size=4,
)


@given(FIELDS)
@settings(max_examples=300)
def test_links_are_told_from_bytes_as_the_exact_decoder_does(fields: dict[str, Any]) -> None:
    block = dagcbor.encode_exact({"$type": "a.b.c", "link": Link(CID_BYTES), **fields})
    fault = exactly(block)
    if not fault:
        dagcbor.check_record(block)
        return
    with pytest.raises(RecordInvalid) as caught:
        dagcbor.check_record(block)
    assert str(caught.value) == fault or "not DAG-CBOR" in str(caught.value)


@pytest.mark.parametrize("first", range(256))
def test_only_two_bytes_begin_what_the_encoder_takes_for_a_cid(first: int) -> None:
    """`_proper_links` stands on this."""
    for rest in (b"", b"\x20" + bytes(32), b"\x55\x12\x20" + bytes(32), b"\x00\x01\x55\x12\x20" + bytes(32)):
        data = bytes([first]) + rest
        if data[:1] not in dagcbor._CID_BEGINS:
            assert dagcbor.encode(data) == dagcbor.encode_exact(data)


def test_a_record_has_a_largest_size_and_depth() -> None:
    block = record(text="x" * 1_000_000)
    with pytest.raises(RecordInvalid, match="more than 1000000") as caught:
        dagcbor.check_record(block)
    assert caught.value.reason == "record_size"
    dagcbor.check_record(block, max_bytes=len(block))
    dagcbor.check_record(nested(40), max_depth=40)


@pytest.mark.parametrize(
    "body",
    [
        b"\x9a\x00\x02\x00\x01" + b"\x01" * 131_073,  # elements of one list
        b"\x82" + 2 * (b"\x9a\x00\x01\x00\x00" + b"\xa0" * 65_536),  # maps in two lists
        b"\x82\x9a\x00\x01\x86\xa0" + b"\x81\x80" * 100_000 + LINK,  # beside a link
    ],
    ids=["elements", "containers", "beside a link"],
)
def test_a_record_of_too_many_containers_is_refused_before_they_are_looked_at(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def expensive(*_arguments: object) -> None:
        raise AssertionError("looked at")

    monkeypatch.setattr(dagcbor, "_check_model", expensive)
    monkeypatch.setattr(dagcbor, "_typed", expensive)
    with pytest.raises(RecordInvalid) as caught:
        dagcbor.check_record(b"\xa1\x61a" + body)
    assert caught.value.reason == "record_containers"


def test_a_record_of_as_many_containers_as_are_allowed() -> None:
    dagcbor.check_record(b"\xa1\x61a\x9a\x00\x01\xff\xfe" + b"\xa0" * 131_070)
    dagcbor.check_record(b"\xa1\x61a\x9a\x00\x02\x00\x00" + b"\x01" * 131_072)
