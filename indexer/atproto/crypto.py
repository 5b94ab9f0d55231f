"""Public keys and signatures: did:key, multikeys, ECDSA over P-256 and secp256k1 (atproto cryptography).

Owns parsing and formatting of public keys and the verification of raw 64-byte r‖s signatures with
low S; signing is not ours. Pure functions, any thread or process. Hot: `verify` runs once a commit;
the parse of a key is kept in a bounded cache, and secp256k1 goes straight to libsecp256k1 through
coincurve's cffi handle (its DER-only method costs 4 µs more). Without coincurve, `cryptography`
verifies both curves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from typing import Literal, NamedTuple, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from indexer.atproto.types import DidKey
from indexer.errors import SignatureInvalid

try:
    from coincurve import GLOBAL_CONTEXT
    from coincurve import PublicKey as _CoinKey
    from coincurve._libsecp256k1 import ffi as _ffi
    from coincurve._libsecp256k1 import lib as _lib
except ImportError:  # no wheel for this Python: `cryptography` does the work, slower
    HAVE_COINCURVE = False
else:
    HAVE_COINCURVE = True

Curve: TypeAlias = Literal["p256", "k256"]
#: Says whether a 64-byte low-S signature over a message is good.
Verifier: TypeAlias = Callable[[bytes, bytes], bool]

#: Parsed keys kept by `verify`: up to 3 KiB each, so at most about 24 MiB a process.
PARSED_KEYS = 8192
#: Longest text that is looked at as a key; a real one has 48 or 57 characters after the prefix.
_MAX_KEY_TEXT = 256

_DID_KEY = "did:key:"
_MULTICODEC: dict[Curve, bytes] = {"p256": b"\x80\x24", "k256": b"\xe7\x01"}  # 0x1200 and 0xE7 as varints
_EC_CURVES: dict[Curve, ec.EllipticCurve] = {"p256": ec.SECP256R1(), "k256": ec.SECP256K1()}
#: Half the group order, big-endian: S above it has a twin below it and is refused.
_HALF_ORDER: dict[Curve, bytes] = {
    "p256": bytes.fromhex("7fffffff800000007fffffffffffffffde737d56d38bcf4279dce5617e3192a8"),
    "k256": bytes.fromhex("7fffffffffffffffffffffffffffffff5d576e7357a4501ddfe92f46681b20a0"),
}
_LEGACY_SUITES: dict[str, Curve] = {
    "EcdsaSecp256r1VerificationKey2019": "p256",
    "EcdsaSecp256k1VerificationKey2019": "k256",
}

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE58_VALUE = {char: value for value, char in enumerate(_BASE58)}


class PublicKey(NamedTuple):
    """A point that is known to lie on its curve, as 33 compressed bytes."""

    curve: Curve
    point: bytes


def base58_decode(text: str) -> bytes:
    """Bytes of base58btc ``text``; `SignatureInvalid` for a character outside the alphabet."""
    number = 0
    try:
        for char in text:
            number = number * 58 + _BASE58_VALUE[char]
    except KeyError as error:
        raise SignatureInvalid(f"not base58btc: {text[:80]!r}") from error
    zeros = len(text) - len(text.lstrip("1"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


def base58_encode(data: bytes) -> str:
    """``data`` in base58btc."""
    number = int.from_bytes(data, "big")
    chars = []
    while number:
        number, digit = divmod(number, 58)
        chars.append(_BASE58[digit])
    zeros = len(data) - len(data.lstrip(b"\x00"))
    return "1" * zeros + "".join(reversed(chars))


def _multibase(text: object) -> bytes:
    if not isinstance(text, str) or not text.startswith("z") or len(text) > _MAX_KEY_TEXT:
        raise SignatureInvalid(f"a public key must be multibase base58btc ('z…'): {str(text)[:80]!r}")
    return base58_decode(text[1:])


def _on_curve(curve: Curve, encoded: bytes) -> PublicKey:
    """The key of an encoded point; `SignatureInvalid` when there is no such point."""
    try:
        if HAVE_COINCURVE and curve == "k256":
            return PublicKey(curve, _CoinKey(encoded).format())
        key = ec.EllipticCurvePublicKey.from_encoded_point(_EC_CURVES[curve], encoded)
    except ValueError as error:
        raise SignatureInvalid(f"not a point on {curve}: {encoded.hex()}") from error
    numbers = key.public_numbers()
    return PublicKey(curve, bytes((2 + (numbers.y & 1),)) + numbers.x.to_bytes(32, "big"))


def _split_multikey(text: object) -> PublicKey:
    """Curve and 33 bytes of a multikey, not yet known to be a point."""
    data = _multibase(text)
    for curve, prefix in _MULTICODEC.items():
        if data.startswith(prefix):
            if len(data) != 35 or data[2] not in (2, 3):
                raise SignatureInvalid(f"a {curve} multikey must hold a 33-byte compressed point: {text!r}")
            return PublicKey(curve, data[2:])
    raise SignatureInvalid(f"unknown kind of multikey (neither p256 nor k256): {text!r}")


def parse_multikey(multibase: str) -> PublicKey:
    """The key of a ``publicKeyMultibase`` of type ``Multikey``; raises `SignatureInvalid`."""
    return _on_curve(*_split_multikey(multibase))


def parse_legacy_key(suite: str, multibase: str) -> PublicKey:
    """The key of one of the two 2019 verification suites: a plain point, uncompressed as a rule."""
    curve = _LEGACY_SUITES.get(suite)
    if curve is None:
        raise SignatureInvalid(f"unknown verification method type: {suite!r}")
    point = _multibase(multibase)
    if (len(point), point[:1]) not in ((65, b"\x04"), (33, b"\x02"), (33, b"\x03")):
        raise SignatureInvalid(f"not an encoded {curve} point: {multibase!r}")
    return _on_curve(curve, point)


def parse_did_key(text: str) -> PublicKey:
    """The key of a ``did:key:z…``; raises `SignatureInvalid`."""
    if not isinstance(text, str) or not text.startswith(_DID_KEY):
        raise SignatureInvalid(f"not a did:key: {str(text)[:80]!r}")
    return parse_multikey(text[len(_DID_KEY) :])


def format_multikey(key: PublicKey) -> str:
    """``z…`` of a key."""
    return "z" + base58_encode(_MULTICODEC[key.curve] + key.point)


def format_did_key(key: PublicKey) -> DidKey:
    """``did:key:z…`` of a key."""
    return _DID_KEY + format_multikey(key)


def _portable_verifier(key: PublicKey) -> Verifier:
    """Both curves by `cryptography`."""
    public = ec.EllipticCurvePublicKey.from_encoded_point(_EC_CURVES[key.curve], key.point)
    half_order, algorithm = _HALF_ORDER[key.curve], ec.ECDSA(SHA256())

    def verifier(message: bytes, signature: bytes) -> bool:
        if len(signature) != 64 or signature[32:] > half_order:
            return False
        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
        try:
            public.verify(encode_dss_signature(r, s), message, algorithm)
        except InvalidSignature:
            return False
        return True

    return verifier


def _coincurve_verifier(key: PublicKey) -> Verifier:
    """secp256k1 by libsecp256k1, which itself refuses a high S and r or s out of range."""
    public = _CoinKey(key.point)  # keeps the C key alive
    point, context = public.public_key, GLOBAL_CONTEXT.ctx
    new, parse, check = _ffi.new, _lib.secp256k1_ecdsa_signature_parse_compact, _lib.secp256k1_ecdsa_verify

    def verifier(message: bytes, signature: bytes) -> bool:
        if len(signature) != 64:
            return False
        parsed = new("secp256k1_ecdsa_signature *")
        if not parse(context, parsed, signature):
            return False
        return bool(check(context, parsed, sha256(message).digest(), point))

    return verifier


def _make_verifier(did_key: DidKey) -> Verifier:
    if not isinstance(did_key, str) or not did_key.startswith(_DID_KEY):
        raise SignatureInvalid(f"not a did:key: {str(did_key)[:80]!r}")
    key = _split_multikey(did_key[len(_DID_KEY) :])
    try:
        if HAVE_COINCURVE and key.curve == "k256":
            return _coincurve_verifier(key)
        return _portable_verifier(key)
    except ValueError as error:
        raise SignatureInvalid(f"not a point on {key.curve}: {did_key}") from error


_verifier = lru_cache(maxsize=PARSED_KEYS)(_make_verifier)


def verify(key: DidKey, message: bytes, signature: bytes) -> bool:
    """True when ``signature`` (raw r‖s, 64 bytes, low S) by ``key`` covers SHA-256 of ``message``.

    DER and high-S signatures are plainly false. `SignatureInvalid` when the key itself is unusable.
    """
    return _verifier(key)(message, signature)
