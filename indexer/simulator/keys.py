"""Signing keys of both curves: derived from text, so that a seed gives the same keys again.

Signatures are the protocol's: ECDSA over SHA-256, raw 64-byte r‖s, low-S. secp256k1 uses coincurve
where it can be imported and `cryptography` elsewhere. Pure; any thread.
"""

from __future__ import annotations

import hashlib
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

try:
    import coincurve
except ImportError:  # no wheel for this interpreter
    coincurve = None  # type: ignore[assignment]

K256 = "k256"
P256 = "p256"

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ORDER = {
    K256: 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141,
    P256: 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
}
_CODEC = {K256: b"\xe7\x01", P256: b"\x80\x24"}
_ECDSA = ec.ECDSA(hashes.SHA256())


def base58btc(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _ALPHABET[digit] + digits
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + digits


class SigningKey:
    """A private key; ``secret`` is its 32-byte number."""

    __slots__ = ("_fast", "_slow", "curve", "multikey", "secret")

    def __init__(self, curve: str, secret: bytes) -> None:
        self.curve = curve
        self.secret = secret
        kind: ec.EllipticCurve = ec.SECP256K1() if curve == K256 else ec.SECP256R1()
        self._slow = ec.derive_private_key(int.from_bytes(secret, "big"), kind)
        self._fast: Any = coincurve.PrivateKey(secret) if coincurve and curve == K256 else None
        point = self._slow.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        self.multikey = "z" + base58btc(_CODEC[curve] + point)

    @classmethod
    def derive(cls, curve: str, text: str) -> SigningKey:
        number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") % (_ORDER[curve] - 1) + 1
        return cls(curve, number.to_bytes(32, "big"))

    @property
    def did_key(self) -> str:
        return "did:key:" + self.multikey

    def high(self, signature: bytes) -> bytes:
        """The other signature of the same message, which the protocol refuses: s in its upper half."""
        s = _ORDER[self.curve] - int.from_bytes(signature[32:], "big")
        return signature[:32] + s.to_bytes(32, "big")

    @staticmethod
    def der(signature: bytes) -> bytes:
        """The same signature in the form that other protocols use."""
        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
        return encode_dss_signature(r, s)

    def sign(self, message: bytes) -> bytes:
        if self._fast is not None:
            compact: bytes = self._fast.sign_recoverable(message)[:64]
            return compact
        r, s = decode_dss_signature(self._slow.sign(message, _ECDSA))
        order = _ORDER[self.curve]
        return r.to_bytes(32, "big") + min(s, order - s).to_bytes(32, "big")
