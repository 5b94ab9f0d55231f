"""The protocol of the byte stores, and the digest that names their content.

Bytes go in, a SHA-256 comes out and gets the same bytes back or an error, never other bytes. What a
store does to keep them is its own affair. Plain blocking calls, safe from any thread.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, Protocol, TypeAlias

from indexer.errors import StoreError, StoreFull

Digest: TypeAlias = bytes

DIGEST_BYTES: Final = 32
#: Bytes that are read, hashed and compressed at once.
CHUNK: Final = 1 << 20

_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


class Blob(NamedTuple):
    """One stored file: its digest, where it is, and the bytes that it takes."""

    digest: Digest
    path: Path
    physical_bytes: int


class BlobStore(Protocol):
    """Bytes under their SHA-256."""

    def put(self, data: bytes) -> Digest:
        """Stores ``data``, durable on return; what is there already is left as it is."""

    def put_file(
        self, source: Path, *, digest: Digest | None = None, between: Callable[[], None] | None = None
    ) -> Digest:
        """Stores the content of a file without holding it in memory.

        ``digest`` spares a pass over the file when it is known; ``between`` is called between chunks,
        and what it raises ends the put and leaves nothing behind.
        """

    def get(self, digest: Digest) -> bytes:
        """The bytes. Raises `BlobMissing`, `BlobCorrupt` or `BlobUnreadable`."""

    def open_read(self, digest: Digest) -> BinaryIO:
        """The bytes as a stream, to be closed; no seeking.

        Raises `BlobMissing` here, and `BlobCorrupt` while it is read: the last bytes of a stream come
        only when all of it hashed to ``digest``, and a stream that failed once fails for good. Either may
        raise `BlobUnreadable`, which says nothing of the bytes.
        """

    def contains(self, digest: Digest) -> bool:
        """Whether something is stored under the digest."""

    def remove(self, digest: Digest) -> bool:
        """Deletes it; false when there was nothing. A stream that is open reads on."""

    def digests(self) -> Iterator[Digest]:
        """Everything that is stored, in order."""

    def physical_bytes(self) -> int:
        """Bytes taken by everything that is stored."""


def digest_of(data: bytes) -> Digest:
    """The name of ``data``."""
    return hashlib.sha256(data).digest()


def digest_of_file(source: Path, between: Callable[[], None] | None = None) -> Digest:
    """The name of a file's content. Raises `StoreError` when it cannot be read."""
    hasher = hashlib.sha256()
    with translated(f"reading {source}"), source.open("rb") as file:
        for chunk in chunks_of(file):
            if between is not None:
                between()
            hasher.update(chunk)
    return hasher.digest()


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Around what the system may refuse; ``what`` begins the message. Raises `StoreFull`, `StoreError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull(f"{what}: the disk is full; free some space and start again") from error
        raise StoreError(f"{what}: {error}") from error


def chunks_of(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a file, piece by piece."""
    while chunk := file.read(CHUNK):
        yield chunk


def checked(digest: Digest) -> Digest:
    """``digest``, when it can be one."""
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"not a binary SHA-256: {digest!r}")
    return digest
