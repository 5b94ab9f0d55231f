from __future__ import annotations

import hashlib
from typing import Any

import dag_cbor
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiformats import CID

from indexer.simulator.cbor import Link, blob_cid, block_cid, cid_bytes, cid_text, encode, from_json, to_json

LINKS = st.binary(min_size=1, max_size=8).map(block_cid)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text()
    | st.binary(max_size=300)
    | LINKS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=30), inner, max_size=6),
    max_leaves=20,
)


def reference(value: Any) -> Any:
    """The same value with the CIDs that `dag_cbor` wants."""
    if isinstance(value, Link):
        return CID.decode(bytes(value))
    if isinstance(value, dict):
        return {key: reference(item) for key, item in value.items()}
    if isinstance(value, list):
        return [reference(item) for item in value]
    return value


@given(VALUES)
def test_encodes_byte_for_byte_as_dag_cbor(value: Any) -> None:
    assert encode(value) == dag_cbor.encode(reference(value))


@pytest.mark.parametrize(
    "number", [0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**53, -1, -24, -25, -256, -257]
)
def test_integers_take_the_shortest_form(number: int) -> None:
    assert encode(number) == dag_cbor.encode(number)


def test_floats_have_no_form() -> None:
    with pytest.raises(TypeError):
        encode({"half": 0.5})


@given(st.binary(max_size=50))
def test_cids_are_those_of_multiformats(block: bytes) -> None:
    digest = ("sha2-256", hashlib.sha256(block).digest())
    assert cid_text(block_cid(block)) == str(CID("base32", 1, "dag-cbor", digest))
    assert cid_text(blob_cid(block)) == str(CID("base32", 1, "raw", digest))
    assert cid_bytes(cid_text(block_cid(block))) == block_cid(block)


#: Names that the data model reserves are not used by people as plain keys.
@given(VALUES)
def test_json_form_comes_back(value: Any) -> None:
    assert from_json(to_json(value)) == value
    assert encode(from_json(to_json(value))) == encode(value)


def test_json_form_names_links_and_bytes() -> None:
    link = block_cid(b"x")
    assert to_json({"a": [link], "b": b"\x00\x01\x02\x03"}) == {
        "a": [{"$link": cid_text(link)}],
        "b": {"$bytes": "AAECAw"},
    }
