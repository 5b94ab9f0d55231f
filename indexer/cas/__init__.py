"""Content-addressed byte stores: what does not belong in the LSM, found by its SHA-256.

Archived repository CARs and mirrored blobs. One protocol (`BlobStore`), one store on the filesystem and
one in memory. Nothing here knows what the bytes mean or who refers to them.
"""

from indexer.cas.blob_store import Blob, BlobStore, Digest, digest_of, digest_of_file
from indexer.cas.filesystem import ARCHIVE_LEVEL, ZSTD_LEVEL, FsBlobStore
from indexer.cas.memory import MemBlobStore

__all__ = [
    "ARCHIVE_LEVEL",
    "ZSTD_LEVEL",
    "Blob",
    "BlobStore",
    "Digest",
    "FsBlobStore",
    "MemBlobStore",
    "digest_of",
    "digest_of_file",
]
