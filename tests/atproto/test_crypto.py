from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from indexer.atproto import crypto
from indexer.errors import SignatureInvalid
from tests.paths import DATA, interop

K256 = "did:key:zQ3shqwJEJyMBsBXCWyCBpUBMqxcon9oHB7mCvx4sSpMdLJwc"


def padded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4))


@pytest.fixture(params=["coincurve", "cryptography"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on both libraries."""
    if request.param == "coincurve" and not crypto.HAVE_COINCURVE:
        pytest.skip("coincurve has no wheel for this Python")
    monkeypatch.setattr(crypto, "HAVE_COINCURVE", request.param == "coincurve")
    crypto._verifier.cache_clear()
    return str(request.param)


def own_vectors() -> list[dict[str, Any]]:
    vectors: list[dict[str, Any]] = json.loads((DATA / "vectors" / "signatures.json").read_text())["vectors"]
    return vectors


def test_interop_signatures() -> None:
    cases = json.loads(interop("crypto/signature-fixtures.json").read_text())
    assert len(cases) == 6
    for case in cases:
        message, signature = padded(case["messageBase64"]), padded(case["signatureBase64"])
        key = crypto.parse_did_key(case["publicKeyDid"])
        assert crypto.parse_legacy_key(case["didDocSuite"], case["publicKeyMultibase"]) == key
        assert crypto.verify(case["publicKeyDid"], message, signature) is case["validSignature"], case[
            "comment"
        ]


@pytest.mark.parametrize(
    ("file", "curve"), [("w3c_didkey_K256", ec.SECP256K1()), ("w3c_didkey_P256", ec.SECP256R1())]
)
def test_interop_did_keys(file: str, curve: ec.EllipticCurve) -> None:
    for case in json.loads(interop(f"crypto/{file}.json").read_text()):
        secret = case.get("privateKeyBytesHex")
        number = bytes.fromhex(secret) if secret else crypto.base58_decode(case["privateKeyBytesBase58"])
        numbers = ec.derive_private_key(int.from_bytes(number, "big"), curve).public_key().public_numbers()
        key = crypto.parse_did_key(case["publicDidKey"])
        assert key.point[1:] == numbers.x.to_bytes(32, "big")
        assert key.point[0] == 2 + numbers.y % 2
        assert crypto.format_did_key(key) == case["publicDidKey"]


@pytest.mark.parametrize(
    "vector", own_vectors(), ids=lambda vector: f"{vector['curve']}-{vector['did_key'][-4:]}"
)
def test_own_signatures_and_keys(vector: dict[str, Any]) -> None:
    key = crypto.PublicKey(vector["curve"], bytes.fromhex(vector["point"]))
    assert crypto.parse_did_key(vector["did_key"]) == key
    assert crypto.parse_multikey(vector["multikey"]) == key
    assert crypto.parse_legacy_key(vector["legacy_suite"], vector["legacy_multibase"]) == key
    assert crypto.format_did_key(key) == vector["did_key"]
    message = base64.b64decode(vector["message"])
    wrong = [
        case["what"]
        for case in vector["signatures"]
        if crypto.verify(vector["did_key"], message, base64.b64decode(case["signature"])) is not case["valid"]
    ]
    assert wrong == []


def test_a_signature_is_of_one_message_and_one_key() -> None:
    first, second = own_vectors()[:2]
    message, signature = (
        base64.b64decode(first["message"]),
        base64.b64decode(first["signatures"][0]["signature"]),
    )
    assert crypto.verify(first["did_key"], message, signature)
    assert not crypto.verify(first["did_key"], message + b"\x00", signature)
    assert not crypto.verify(second["did_key"], message, signature)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("", "not a did:key"),
        ("did:plc:ewvi7nxzyoun6zhxrhs64oiz", "not a did:key"),
        ("did:key:", "multibase"),
        ("did:key:mAbc", "multibase"),
        ("did:key:z0OIl", "base58btc"),
        ("did:key:z" + "1" * 5000, "multibase"),
        ("did:key:z6MkhaXgBZDvotDkL5257faiztiGiC2QtKLGpbnnEGta2doK", "neither p256 nor k256"),  # Ed25519
        ("did:key:z" + crypto.base58_encode(b"\xe7\x01" + b"\x02" * 32), "33-byte"),
        ("did:key:z" + crypto.base58_encode(b"\xe7\x01\x04" + b"\x02" * 32), "33-byte"),
        ("did:key:z" + crypto.base58_encode(b"\xe7\x01\x02" + b"\xff" * 32), "not a point"),
        ("did:key:z" + crypto.base58_encode(b"\x80\x24\x02" + b"\xff" * 32), "not a point"),
        ("did:key:z" + crypto.base58_encode(b"\x80\x24\x02" + bytes(31) + b"\x01"), "not a point"),
    ],
)
def test_an_unusable_key_is_named(key: str, problem: str) -> None:
    with pytest.raises(SignatureInvalid, match=problem):
        crypto.verify(key, b"", bytes(64))
    with pytest.raises(SignatureInvalid, match=problem):
        crypto.parse_did_key(key)


@pytest.mark.parametrize(
    ("suite", "multibase", "problem"),
    [
        ("Ed25519VerificationKey2020", "zAbc", "unknown verification method type"),
        ("EcdsaSecp256k1VerificationKey2019", "zAbc", "not an encoded"),
        (
            "EcdsaSecp256k1VerificationKey2019",
            "z" + crypto.base58_encode(b"\x04" + b"\x01" * 64),
            "not a point",
        ),
    ],
)
def test_an_unusable_legacy_key_is_named(suite: str, multibase: str, problem: str) -> None:
    with pytest.raises(SignatureInvalid, match=problem):
        crypto.parse_legacy_key(suite, multibase)


def test_parsed_keys_are_kept_within_a_bound() -> None:
    assert crypto._verifier.cache_info().maxsize == crypto.PARSED_KEYS
    crypto.verify(K256, b"", bytes(64))
    crypto.verify(K256, b"other", bytes(64))
    assert crypto._verifier.cache_info().hits == 1


@given(st.binary(max_size=40))
def test_base58_comes_back(data: bytes) -> None:
    assert crypto.base58_decode(crypto.base58_encode(data)) == data


@given(st.binary(max_size=80))
def test_no_signature_bytes_are_an_error_or_accepted(signature: bytes) -> None:
    for vector in own_vectors():
        assert crypto.verify(vector["did_key"], b"message", signature) is False
