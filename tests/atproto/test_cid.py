"""CIDs: text and binary forms, and the refusal of every other kind."""

from __future__ import annotations

from hashlib import sha256

import dag_cbor
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multiformats import CID

from indexer.atproto.cid import (
    DAG_CBOR_PREFIX,
    RAW_PREFIX,
    check_cid,
    dag_cbor_cid,
    format_cid,
    parse_cid,
    raw_cid,
    verify_block,
)
from indexer.errors import CarError, SyntaxInvalid

KNOWN = "bafyreidfayvfuwqa7qlnopdjiqrxzs6blmoeu4rujcjtnci5beludirz2a"


def test_known_cid_of_an_encoded_value() -> None:
    block = dag_cbor.encode({"hello": "world"})
    assert format_cid(dag_cbor_cid(block)) == "bafyreidykglsfhoixmivffc5uwhcgshx4j465xwqntbmu43nb2dzqwfvae"


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=32, max_size=32), st.sampled_from([DAG_CBOR_PREFIX, RAW_PREFIX]))
def test_text_form_agrees_with_multiformats_and_comes_back(digest: bytes, prefix: bytes) -> None:
    text = format_cid(prefix + digest)
    assert text == CID.decode(prefix + digest).encode("base32")
    assert parse_cid(text) == prefix + digest


def test_raw_and_dag_cbor_differ_in_the_codec_only() -> None:
    assert raw_cid(b"x")[4:] == dag_cbor_cid(b"x")[4:] == sha256(b"x").digest()
    assert format_cid(raw_cid(b"x")).startswith("bafkrei")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        KNOWN[:-1],
        KNOWN + "a",
        KNOWN.upper(),
        " " + KNOWN,
        KNOWN + "\n",
        KNOWN[:-1] + "b",  # stray bits behind the last byte
        "z" + KNOWN[1:],
        "QmbWqxBEKC3P8tqsKc98xmWNzrzDtRLMiMPL8wBuTGsMnR",
        "bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi",  # dag-pb
        "bafkqaaik",  # identity hash
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(SyntaxInvalid):
        parse_cid(text)


def test_only_text_is_parsed() -> None:
    with pytest.raises(SyntaxInvalid):
        parse_cid(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cid", "words"),
    [
        (b"\x12\x20" + bytes(32), "CIDv0"),
        (b"\x02\x71\x12\x20" + bytes(32), "version"),
        (b"\x01\x70\x12\x20" + bytes(32), "codec"),
        (b"\x01\x71\x13\x20" + bytes(32), "sha-256"),
        (b"\x01\x71\x12\x1f" + bytes(31), "digest"),
        (b"\x01\x71\x12\x20" + bytes(33), "37 bytes"),
        (b"", "empty"),
    ],
)
def test_check_names_what_a_cid_is_instead(cid: bytes, words: str) -> None:
    with pytest.raises(SyntaxInvalid, match=words):
        check_cid(cid)


def test_a_block_must_hash_to_its_cid() -> None:
    verify_block(dag_cbor_cid(b"x"), b"x")
    with pytest.raises(CarError, match="does not hash"):
        verify_block(dag_cbor_cid(b"x"), b"y")
