"""Changes of bytes and of values: at random from a seed, with an eye for lengths, heads and links.

Pure; the same generator gives the same changes.
"""

from __future__ import annotations

from random import Random
from typing import Any

from indexer.simulator.cbor import Link

#: Heads of CBOR items and numbers at the edges of their forms.
_HEADS = bytes.fromhex("0017181b203b405f607f809b9fa0bbbfc0d8f4f6f7f9fafbff")
_LENGTHS = (
    b"\x00", b"\x01", b"\x7f", b"\x80\x01", b"\xff\xff\x7f", b"\xff\xff\xff\xff\x0f", b"\x80" * 9 + b"\x01",
    b"\xff" * 10, b"\x1b\xff\xff\xff\xff\xff\xff\xff\xff", b"\x5b\x00\x00\x00\x01\x00\x00\x00\x00",
    b"\x9b\x00\x00\x00\x00\xff\xff\xff\xff", b"\xbb\x00\x00\x00\x00\xff\xff\xff\xff", b"\x3b" + b"\xff" * 8,
)  # fmt: skip
_NUMBERS = (0, 1, -1, 23, 24, 255, 256, 65535, 1 << 31, 1 << 32, 1 << 53, (1 << 63) - 1, 1 << 63, -(1 << 63),
            (1 << 64) - 1, -(1 << 64))  # fmt: skip
_TEXTS = ("", "x", "\0", "é", "\u202e", "a" * 300, "x" * 9000, "did:plc:" + "z" * 24, "app.bsky.feed.post/a",
          "3jzfcijpj2z2a", "2026-01-01T00:00:00Z", "create", "delete")  # fmt: skip
_MOST_BYTES = 2_500_000


def bytes_of(rng: Random, data: bytes, other: bytes) -> bytes:
    """One to four changes of ``data``; ``other`` is what pieces may be taken from."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        data = _changed(rng, data, other)
    return data[:_MOST_BYTES]


def _changed(rng: Random, data: bytes, other: bytes) -> bytes:
    if not data:
        return other[: rng.randrange(len(other) + 1)]
    at = rng.randrange(len(data))
    end = min(len(data), at + rng.choice((1, 2, 4, 9, 36, 41, 300)))
    match rng.randrange(11):
        case 0:
            return data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]
        case 1:
            return data[:at] + bytes((rng.choice(_HEADS),)) + data[at + 1 :]
        case 2:
            return data[:at] + rng.choice(_LENGTHS) + data[at + rng.randrange(3) :]
        case 3:
            return data[:at] + bytes(((data[at] + rng.choice((1, -1, 16, -16))) % 256,)) + data[at + 1 :]
        case 4:
            return data[:at] + data[end:]
        case 5:
            return data[:end] + data[at:end] * rng.choice((1, 1, 2, 50)) + data[end:]
        case 6:
            return data[:at]
        case 7:
            start = rng.randrange(len(other) + 1)
            return data[:at] + other[start : start + end - at] + data[rng.choice((at, end)) :]
        case 8:
            return data[:at] + rng.randbytes(end - at) + data[end:]
        case 9:
            start = rng.randrange(len(other) + 1)
            return data[:at] + other[start:]
        case _:
            return data + rng.choice((data[at:end], b"\0", rng.choice(_LENGTHS), rng.randbytes(40)))


def value_of(rng: Random, value: Any, depth: int = 0) -> Any:
    """A value like ``value`` in which something is otherwise."""
    inner = isinstance(value, (dict, list)) and value and depth < 6
    if inner and rng.random() < 0.8:
        return _inside(rng, value, depth)
    match value:
        case Link():
            other = Link(value[:4] + rng.randbytes(32))
            odd = (Link(rng.randbytes(36)), Link(value[:-1]), Link(b"\x01\x55" + value[2:]), Link(b""))
            return rng.choice((other, *odd, bytes(value), None))
        case bool() | None:
            return rng.choice((True, False, None, 0, "", []))
        case int():
            return rng.choice((rng.choice(_NUMBERS), value + 1, value - 1, str(value)))
        case str():
            return rng.choice((rng.choice(_TEXTS), value[: len(value) // 2], value + "x", value.encode()))
        case bytes():
            return rng.choice((bytes_of(rng, value, value), b"", value + b"x", value.hex()))
        case _:
            return rng.choice((rng.choice(_NUMBERS), rng.choice(_TEXTS), [], {}, None, [value], _nested(rng)))


def _inside(rng: Random, value: Any, depth: int) -> Any:
    if isinstance(value, dict):
        changed = dict(value)
        name = rng.choice(list(changed))
        match rng.randrange(8):
            case 0:
                del changed[name]
            case 1:
                changed[rng.choice(_TEXTS)] = changed[name]
            case _:
                changed[name] = value_of(rng, changed[name], depth + 1)
        return changed
    items = list(value)
    at = rng.randrange(len(items))
    match rng.randrange(8):
        case 0:
            del items[at]
        case 1:
            items.insert(at, items[rng.randrange(len(items))])
        case 2:
            rng.shuffle(items)
        case 3:
            items = items * rng.choice((2, 10, 300))
        case _:
            items[at] = value_of(rng, items[at], depth + 1)
    return items


def _nested(rng: Random) -> Any:
    value: Any = 1
    for _ in range(rng.choice((2, 31, 33, 200))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value
