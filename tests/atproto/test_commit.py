"""Commit objects: exact bytes, fields, signatures."""

from __future__ import annotations

from typing import Any

import dag_cbor
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multiformats import CID

from indexer.atproto.car import read_car
from indexer.atproto.cid import dag_cbor_cid, format_cid, raw_cid
from indexer.atproto.commit import (
    Commit,
    decode_commit,
    encode_commit,
    signing_bytes,
    verify_commit_signature,
)
from indexer.errors import BadInput, CommitError, SignatureInvalid
from tests.repo.repos import NAMES, sample, session_cars, session_truth

DATA = dag_cbor_cid(b"root")
FIELDS: dict[str, Any] = {
    "did": "did:plc:ewvi7nxzyoun6zhxrhs64oiz",
    "version": 3,
    "data": CID.decode(DATA),
    "rev": "3jzfcijpj2z2a",
    "prev": None,
    "sig": bytes(64),
}


def block(**changes: Any) -> bytes:
    fields = {name: value for name, value in {**FIELDS, **changes}.items() if value is not ...}
    return dag_cbor.encode(fields)


def test_fields_and_bytes_come_back() -> None:
    commit = decode_commit(block())
    assert commit == Commit(FIELDS["did"], 3, DATA, FIELDS["rev"], None, bytes(64))
    assert encode_commit(commit) == block()
    assert decode_commit(block(prev=CID.decode(DATA))).prev == DATA


@settings(deadline=None, max_examples=60)
@given(
    st.from_regex(r"did:web:[a-z]{1,300}", fullmatch=True),
    st.binary(max_size=400),
    st.none() | st.binary(max_size=3).map(dag_cbor_cid),
)
def test_lengths_of_all_sizes(did: str, sig: bytes, prev: bytes | None) -> None:
    encoded = block(did=did, sig=sig, prev=None if prev is None else CID.decode(prev))
    commit = decode_commit(encoded)
    assert (commit.did, commit.sig, commit.prev) == (did, sig, prev)
    assert encode_commit(commit) == encoded
    unsigned = dag_cbor.decode(encoded)
    assert isinstance(unsigned, dict)
    del unsigned["sig"]
    assert signing_bytes(encoded) == dag_cbor.encode(unsigned)


def test_a_signature_that_looks_like_a_cid_is_still_a_signature() -> None:
    lookalike = b"\x01\x55\x12\x3c" + bytes(60)
    assert decode_commit(block(sig=lookalike)).sig == lookalike


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"did": ...}, "missing"),
        ({"sig": ...}, "missing"),
        ({"prev": ...}, "missing"),
        ({"extra": 1}, "unknown"),
        ({"version": 2}, "version 2"),
        ({"version": True}, "version True"),
        ({"did": 5}, "did is not a string"),
        ({"did": "did:x"}, "not a DID"),
        ({"rev": "abc"}, "not a TID"),
        ({"rev": b"3jzfcijpj2z2a"}, "rev is not a string"),
        ({"sig": "text"}, "sig is not bytes"),
        ({"sig": CID.decode(DATA)}, "canonical"),
        ({"data": None}, "data is not a link"),
        ({"data": DATA}, "canonical"),
        ({"data": CID.decode(raw_cid(b""))}, "data is not a link"),
        ({"data": CID.decode("bafkqaaik")}, "data is not a link"),
        ({"prev": 5}, "prev is neither"),
        ({"prev": DATA}, "canonical"),
        ({"sig": bytes(9000)}, "more than 8192"),
    ],
)
def test_malformed_commits(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CommitError, match=words):
        decode_commit(block(**changes))


@pytest.mark.parametrize(
    "junk", [b"", b"\x80", b"\x05", b"\xa0", block() + b"\x00", block().replace(b"\x03", b"\x18\x03")]
)
def test_other_bytes(junk: bytes) -> None:
    with pytest.raises(CommitError):
        decode_commit(junk)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300))
def test_garbage(data: bytes) -> None:
    with pytest.raises(CommitError):
        decode_commit(data)


@pytest.mark.parametrize("name", NAMES)
def test_real_commits_verify_with_the_key_of_their_truth_only(name: str) -> None:
    _, car, truth = sample(name)
    archive = read_car(car)
    found = archive.blocks[archive.roots[0]]
    commit = decode_commit(found)
    assert (commit.did, commit.rev, format_cid(commit.data)) == (truth["did"], truth["rev"], truth["data"])
    assert format_cid(archive.roots[0]) == truth["commit"]
    verify_commit_signature(found, truth["signingKey"])
    other = sample("ten" if name == "empty" else "empty").truth["signingKey"]
    with pytest.raises(SignatureInvalid, match="does not verify"):
        verify_commit_signature(found, other)


def test_commits_of_the_session_verify() -> None:
    truth = session_truth()
    for path in session_cars():
        archive = read_car(path.read_bytes())
        found = archive.blocks[archive.roots[0]]
        verify_commit_signature(found, truth[decode_commit(found).did]["signingKey"])


def test_every_flipped_bit_of_a_commit_is_noticed() -> None:
    _, car, truth = sample("ten")
    archive = read_car(car)
    found = archive.blocks[archive.roots[0]]
    for position in range(0, len(found) * 8, 3):
        damaged = bytearray(found)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(BadInput):
            verify_commit_signature(bytes(damaged), truth["signingKey"])
