"""The store in memory behaves as the one on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.cas import BlobStore, FsBlobStore, MemBlobStore, digest_of
from indexer.errors import BlobMissing, StoreError
from tests.cas.support import CONTENTS


@pytest.mark.parametrize("data", CONTENTS.values(), ids=CONTENTS.keys())
def test_memory_round_trip(tmp_path: Path, data: bytes) -> None:
    blobs = MemBlobStore()
    source = tmp_path / "source"
    source.write_bytes(data)
    digest = blobs.put(data)
    assert blobs.put_file(source) == blobs.put_file(source, digest=digest) == digest == digest_of(data)
    assert blobs.get(digest) == data
    with blobs.open_read(digest) as stream:
        assert stream.read() == data
    assert blobs.physical_bytes() == len(data)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_both_stores_answer_alike(tmp_path: Path, kind: str) -> None:
    blobs: BlobStore = MemBlobStore() if kind == "memory" else FsBlobStore(tmp_path / "cas", level=3)
    digest = digest_of(b"later")
    for read in (blobs.get, blobs.open_read):
        with pytest.raises(BlobMissing) as caught:
            read(digest)
        assert caught.value.digest == digest
    assert (blobs.contains(digest), blobs.remove(digest)) == (False, False)
    blobs.put(b"later")
    assert blobs.contains(digest)
    assert list(blobs.digests()) == [digest]
    with pytest.raises(StoreError, match="reading .*nowhere"):
        blobs.put_file(tmp_path / "nowhere")
    before = blobs.physical_bytes()
    blobs.put(b"later")
    assert blobs.physical_bytes() == before > 0
    assert (blobs.remove(digest), blobs.contains(digest), blobs.physical_bytes()) == (True, False, 0)
    source = tmp_path / "source"
    source.write_bytes(b"not that")
    with pytest.raises(StoreError, match="change"):
        blobs.put_file(source, digest=digest)
    with pytest.raises(ValueError, match="not a binary SHA-256"):
        blobs.get(b"short")
