"""Records by number: cheap to make, shaped and sized like the network's, different in every version.

Owns a numbering only: record ``n`` lies in repository ``n // PER_REPO``. Nothing here is signed; for benches
of the store alone.
"""

from __future__ import annotations

from base64 import b32encode
from hashlib import sha256
from typing import Any, Final, NamedTuple

from indexer.atproto.dagcbor import encode
from indexer.atproto.syntax import tid_from_micros
from indexer.atproto.types import Cid, Did, Path

PER_REPO: Final = 200
_LIKE, _POST = "app.bsky.feed.like", "app.bsky.feed.post"
_POSTS_IN_TEN: Final = 3
_EPOCH_US: Final = 1_735_689_600_000_000
_STEP_US: Final = 7_001_003
# fmt: off
_WORDS: Final = (
    "after", "again", "almost", "always", "another", "around", "because", "before", "behind", "between",
    "beyond", "bread", "bridge", "bright", "called", "cannot", "city", "cloud", "coffee", "cold", "could",
    "dinner", "early", "enough", "every", "evening", "family", "finally", "finished", "first", "friend",
    "garden", "going", "happy", "house", "hours", "kitchen", "later", "letter", "light", "little", "looking",
    "maybe", "morning", "mountain", "music", "never", "nothing", "ocean", "often", "orange", "other",
    "paper", "people", "perhaps", "photo", "quiet", "rain", "reading", "really", "river",
)
# fmt: on
_DAG_CBOR: Final = b"\x01\x71\x12\x20"


class Made(NamedTuple):
    """A version of a record."""

    path: Path
    cid: Cid
    block: bytes


def owner(repo: int) -> Did:
    """The DID of repository ``repo``."""
    return "did:plc:" + _letters(b"repo %d" % repo)[:24]


def made(number: int, version: int = 0) -> Made:
    """Record ``number`` in its ``version``; the path is the same in all."""
    chance = sha256(b"%d %d" % (number, version)).digest()
    target = _letters(chance)
    micros = _EPOCH_US + number * _STEP_US
    when = f"2025-{1 + number // 28 % 12:02}-{1 + number % 28:02}T12:{chance[0] % 60:02}:{chance[1] % 60:02}."
    when += f"{int.from_bytes(chance[2:4], 'big') % 1000:03}Z"
    is_post = number % 10 < _POSTS_IN_TEN
    uri = (
        f"at://did:plc:{target[:24]}/{_POST}/{tid_from_micros(_EPOCH_US + int.from_bytes(chance[:5], 'big'))}"
    )
    reference = {"cid": "bafyrei" + target, "uri": uri}
    if is_post:
        text = " ".join(_WORDS[byte % len(_WORDS)] for byte in chance[: 6 + chance[7] % 26])
        value: dict[str, Any] = {"$type": _POST, "text": text, "langs": ["en"], "createdAt": when}
        if chance[6] < 100:
            value["reply"] = {"root": reference, "parent": reference}
    else:
        value = {"$type": _LIKE, "subject": reference, "createdAt": when}
    block = encode(value)
    path = f"{_POST if is_post else _LIKE}/{tid_from_micros(micros)}"
    return Made(path, _DAG_CBOR + sha256(block).digest(), block)


def _letters(data: bytes) -> str:
    return b32encode(sha256(data).digest()).decode().rstrip("=").lower()
