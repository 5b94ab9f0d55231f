"""Reading the seq out of a frame without decoding the rest.

Owns a skipper over well-formed CBOR, for playback of many captured frames. Pure; any thread.
"""

from __future__ import annotations

_SEQ = b"\x63seq"


def frame_seq(frame: bytes) -> int:
    """The value of ``seq`` in the payload; 0 when it has none (#info, errors)."""
    at = _skip(frame, 0)
    major, count, at = _head(frame, at)
    if major != 5:
        return 0
    for _ in range(count):
        found = frame.startswith(_SEQ, at)
        at = _skip(frame, at)
        if found:
            return _head(frame, at)[1]
        at = _skip(frame, at)
    return 0


def _head(data: bytes, at: int) -> tuple[int, int, int]:
    """(major type, argument, offset behind the head)."""
    first = data[at]
    short = first & 31
    if short < 24:
        return first >> 5, short, at + 1
    size = 1 << (short - 24)
    return first >> 5, int.from_bytes(data[at + 1 : at + 1 + size], "big"), at + 1 + size


def _skip(data: bytes, at: int) -> int:
    """The offset behind the item at ``at``."""
    major, argument, at = _head(data, at)
    if major in (2, 3):
        return at + argument
    children = argument if major == 4 else 2 * argument if major == 5 else 1 if major == 6 else 0
    for _ in range(children):
        at = _skip(data, at)
    return at
