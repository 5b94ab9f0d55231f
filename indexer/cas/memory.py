"""A byte store in memory: raw bytes, for tests and for daemons that keep nothing.

Lost with the process. Any thread.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from indexer.cas.blob_store import Digest, checked, chunks_of, digest_of, translated
from indexer.errors import BlobMissing, StoreError


class MemBlobStore:
    """A `BlobStore` that is a dict."""

    def __init__(self) -> None:
        self._blobs: dict[Digest, bytes] = {}

    def put(self, data: bytes) -> Digest:
        digest = digest_of(data)
        self._blobs.setdefault(digest, bytes(data))
        return digest

    def put_file(
        self, source: Path, *, digest: Digest | None = None, between: Callable[[], None] | None = None
    ) -> Digest:
        hasher, pieces = hashlib.sha256(), list[bytes]()
        with translated(f"reading {source}"), source.open("rb") as file:
            for chunk in chunks_of(file):
                if between is not None:
                    between()
                hasher.update(chunk)
                pieces.append(chunk)
        found = hasher.digest()
        if digest is not None and found != digest:
            raise StoreError(f"{source} is not what it was said to be, or it changed while it was read")
        self._blobs.setdefault(found, b"".join(pieces))
        return found

    def get(self, digest: Digest) -> bytes:
        data = self._blobs.get(checked(digest))
        if data is None:
            raise BlobMissing(digest)
        return data

    def open_read(self, digest: Digest) -> BinaryIO:
        return io.BytesIO(self.get(digest))

    def contains(self, digest: Digest) -> bool:
        return checked(digest) in self._blobs

    def remove(self, digest: Digest) -> bool:
        return self._blobs.pop(checked(digest), None) is not None

    def digests(self) -> Iterator[Digest]:
        return iter(sorted(self._blobs))

    def physical_bytes(self) -> int:
        return sum(map(len, self._blobs.values()))
