"""Reading what was stored, and believing it only when it hashes to its name.

The last piece of a stream is held back until everything hashed to the digest, so that nobody who
reads to the end can hold damaged bytes for whole. Any thread, one at a time.
"""

from __future__ import annotations

import errno
import hashlib
import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO, Final

import zstandard

from indexer.cas.blob_store import Digest
from indexer.errors import BlobCorrupt, BlobUnreadable, StoreError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: The disk has lost the bytes, or something else lies where they should.
_DAMAGE: Final = {errno.EIO, errno.EISDIR, errno.EUCLEAN}


def verified(pieces: Iterable[bytes], digest: Digest) -> Iterator[bytes]:
    """The pieces, the last one only when all of them hash to ``digest``; else `BlobCorrupt`."""
    hasher, held = hashlib.sha256(), b""
    try:
        for piece in pieces:
            hasher.update(piece)
            if held:
                yield held
            held = piece
    except zstandard.ZstdError as error:
        raise BlobCorrupt(digest, f"it does not decompress ({error})") from error
    except OSError as error:
        raise unreadable(digest, error) from error
    if hasher.digest() != digest:
        raise BlobCorrupt(digest, f"it hashes to {hasher.hexdigest()}")
    if held:
        yield held


def unreadable(digest: Digest, error: OSError) -> StoreError:
    """What an error of the system says of the bytes: damage when the disk cannot give them, else nothing."""
    if error.errno in _DAMAGE:
        return BlobCorrupt(digest, f"it cannot be read ({error})")
    return BlobUnreadable(digest, str(error))


class VerifiedReader(io.RawIOBase):
    """A stream of pieces over a file that it closes. Once failed it stays so: it does not end instead."""

    def __init__(self, file: BinaryIO, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self._file = file
        self._pieces = pieces
        self._left = memoryview(b"")
        self._failed: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if self._failed is not None:
            raise self._failed
        if not self._left:
            try:
                self._left = memoryview(next(self._pieces, b""))
            except Exception as error:
                self._failed = error
                raise
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._left))
        target[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
