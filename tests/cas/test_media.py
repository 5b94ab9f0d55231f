"""What is compressed already is told by its first bytes."""

from __future__ import annotations

import gzip

import pytest
import zstandard

from indexer.cas.media import HEAD_BYTES, is_compressed


@pytest.mark.parametrize(
    "head",
    [
        b"\xff\xd8\xff\xe0\x00\x10JFIF",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"GIF89a",
        b"RIFF\x24\x00\x00\x00WEBPVP8 ",
        b"\0\0\0\x20ftypisom",
        b"\0\0\0\x1cftypavif",
        b"\x1a\x45\xdf\xa3\x01",
        b"ID3\x04",
        gzip.compress(b"text"),
        zstandard.compress(b"text"),
    ],
)
def test_media_are_told(head: bytes) -> None:
    assert is_compressed(head[:HEAD_BYTES])


@pytest.mark.parametrize(
    "head", [b"", b"x", b"plain text", b"RIFF\x24\x00\x00\x00WAVEfmt ", b"\x3a\xa2eroots", b"<svg>", b"{}"]
)
def test_other_content_is_not(head: bytes) -> None:
    assert not is_compressed(head[:HEAD_BYTES])
