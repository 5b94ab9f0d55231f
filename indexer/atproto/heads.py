"""The heads of CBOR items, read without decoding anything, so that what a stranger sent is counted first.

Pure; any thread or process.
"""

from __future__ import annotations

#: Major types 2 and 3: the head of bytes or text, behind which lie as many bytes as it says.
_BYTES, _PAST_TEXT = 0x40, 0x80


def has_more_items(data: bytes, limit: int) -> bool:
    """Whether ``data`` holds more than ``limit`` CBOR items, as far as libipld would read it.

    Heads follow each other whatever the nesting. The count ends where the data do, or at a head that
    libipld does not take (indefinite or reserved): it gets no further either.
    """
    at, size = 0, len(data)
    for _ in range(limit + 1):
        if at >= size:
            return False
        head = data[at]
        at += 1
        number = head & 31
        if number > 23:
            if number > 27:
                return False
            end = at + (1 << number - 24)
            number = int.from_bytes(data[at:end], "big")
            at = end
        if _BYTES <= head < _PAST_TEXT:
            at += number
    return True
