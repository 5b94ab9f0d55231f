"""The check of archived files: every row has its file, whole, and every file has a row or is on its way out.

Reads every file. Looks for the owners of files in partitions, so that memory does not grow with them.
Changes nothing. Blocking; offline, or with reads and files that hold still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, TypeAlias

from indexer.atproto.types import Did
from indexer.cas import BlobStore, Digest
from indexer.errors import BlobMissing, StoreError
from indexer.store.codecs import decode_cid_key, did_range
from indexer.store.keyspaces import ARCHIVE_QUEUE, ARCHIVES
from indexer.store.reads import Reads

#: Called after every file with how many were read and how many there are.
Progress: TypeAlias = Callable[[int, int], None]

_PARTITION_ROWS: Final = 500_000
_CHUNK: Final = 1 << 20


def _silent(_done: int, _total: int) -> None:
    """Nobody watches."""


def check_archives(
    reads: Reads, blobs: BlobStore, did: Did | None = None, *, progress: Progress = _silent
) -> Iterator[str]:
    """What is wrong with the archived files, in words; of one repository when ``did`` is given."""
    bounds = (None, None) if did is None else did_range(did)
    rows, files = 0, reads.count("archives")
    for (owner, digest), row in reads.scan(ARCHIVES, *bounds):
        what = f"archives: the CAR of {owner} at {row.rev}"
        try:
            size = _size(blobs, digest)
        except BlobMissing:
            yield f"{what} has no file (sha256 {digest.hex()})"
        except StoreError as error:
            yield f"{what}: {error}"
        else:
            if size != row.size:
                yield f"{what} has {size} bytes, its row says {row.size}"
        rows += 1
        progress(rows, files)
    if did is None:
        yield from _without_row(reads, blobs, rows)


def _size(blobs: BlobStore, digest: Digest) -> int:
    with blobs.open_read(digest) as file:
        return sum(len(piece) for piece in iter(partial(file.read, _CHUNK), b""))


def _without_row(reads: Reads, blobs: BlobStore, rows: int) -> Iterator[str]:
    """Files that no row and no entry of the queue knows: nobody would ever remove them."""
    parts = 1 + rows // _PARTITION_ROWS
    for part in range(parts):
        known = {
            digest
            for keyspace in (ARCHIVES, ARCHIVE_QUEUE)
            for raw, _ in reads.raw_scan(keyspace.name, None, None)
            if _part(digest := decode_cid_key(raw)[1], parts) == part
        }
        for digest in blobs.digests():
            if _part(digest, parts) == part and digest not in known:
                yield f"archives: the file of sha256 {digest.hex()} belongs to no row; it may be deleted"


def _part(digest: Digest, parts: int) -> int:
    return int.from_bytes(digest[:4]) % parts
