"""Which content is compressed already, so that zstd would only cost time.

Told by the first bytes alone: the same content is then always kept in the same form, whoever brings
it and whatever they call it. Pure.
"""

from __future__ import annotations

from typing import Final

#: Bytes that are enough to tell.
HEAD_BYTES: Final = 16

_MAGIC: Final = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"OggS",
    b"fLaC",
    b"ID3",  # MP3
    b"\x1f\x8b",  # gzip
    b"\x28\xb5\x2f\xfd",  # zstd
    b"\xfd7zXZ\x00",
    b"BZh",
    b"PK\x03\x04",
)


def is_compressed(head: bytes) -> bool:
    """Whether content that begins with ``head`` is a compressed image, film, sound or archive."""
    if head.startswith(_MAGIC):
        return True
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    return head[4:8] == b"ftyp"  # MP4, HEIC, AVIF
