"""Places of blocks: found in memory and in the file, and no CID is taken for another."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from indexer.atproto.cid import dag_cbor_cid
from indexer.errors import DiskError
from indexer.store.spill import DiskBuilder
from indexer.store.spill_file import SpillFile
from indexer.store.spill_index import SpillIndex

CIDS = [dag_cbor_cid(number.to_bytes(4, "big")) for number in range(3000)]


def test_places_are_found_in_memory_and_in_the_file(tmp_path: Path) -> None:
    file = SpillFile(tmp_path)
    index = SpillIndex(file, 20_000)  # a thousand rows
    for first in range(0, len(CIDS), 300):
        part = CIDS[first : first + 300]
        index.add(part, range(first << 40, (first + len(part)) << 40, 1 << 40))
    assert file.size > 20_000
    assert index.first(CIDS) == [number << 40 for number in range(len(CIDS))]
    assert index.first([dag_cbor_cid(b"stranger")]) == [-1]
    index.add(CIDS[:1], [7])
    assert sorted(index.candidates(CIDS[0])) == [0, 7]
    file.close()


def twins() -> list[bytes]:
    """Two CIDs that the index cannot tell apart, by the secret hash of this run."""
    head = b"\x01\x71\x12\x20" + sha256(b"head").digest()[:8]
    seen: dict[int, bytes] = {}
    for number in range(1 << 16):
        cid = head + sha256(number.to_bytes(4, "big")).digest()[:24]
        other = seen.setdefault(hash(cid) & 0x3FFF, cid)
        if other != cid:
            return [other, cid]
    raise AssertionError("no twins")


def test_two_cids_with_the_same_row_are_told_apart(tmp_path: Path) -> None:
    first, second = twins()
    with DiskBuilder(cache_mb=1).open(tmp_path / "spill") as store:
        store.put_many([(first, b"one")])
        assert store.get_many([second]) == [None]
        store.put_many([(second, b"two")])
        assert store.get_many([first, second]) == [b"one", b"two"]


@pytest.mark.parametrize("gap", [1, 400_000])
def test_blocks_that_lie_close_together_and_far_apart(tmp_path: Path, gap: int) -> None:
    blocks = [(cid, cid[4:] * 3) for cid in CIDS[:20]]
    with DiskBuilder(cache_mb=1).open(tmp_path / "spill") as store:
        for number, block in enumerate(blocks):
            store.put_many([block, (dag_cbor_cid(b"gap%d" % number), bytes(gap))])
        cids = [cid for cid, _ in reversed(blocks)]
        assert store.get_many(cids) == [block for _, block in reversed(blocks)]


def test_sections_are_kept_where_they_lie(tmp_path: Path) -> None:
    data = b"head" + CIDS[0] + b"block" + b"\x29" + CIDS[1] + b"other" + b"tail"
    with DiskBuilder(cache_mb=1, max_stored_mb=0.0002).open(tmp_path / "spill") as store:
        store.put_sections(data, CIDS[:2], [40, 82], [45, 87])
        assert store.get_many(CIDS[:2]) == [b"block", b"other"]
        store.put_sections(data, CIDS[:2], [40, 82], [45, 87])
        with pytest.raises(DiskError, match="max_stored_mb"):
            store.put_sections(data, CIDS[:2], [40, 82], [45, 87])


def test_a_block_that_no_place_can_name_is_refused(tmp_path: Path) -> None:
    with DiskBuilder(cache_mb=1).open(tmp_path / "spill") as store:
        with pytest.raises(DiskError, match="more than the 16777215 that a disk store takes"):
            store.put_many([(CIDS[0], bytes(1 << 24))])
        assert store.get_many(CIDS[:1]) == [None]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with DiskBuilder(cache_mb=1).open(tmp_path / "spill") as store:
        store.put_many([(CIDS[0], b"block")])
        monkeypatch.setattr("indexer.store.spill_file.os.pwrite", full)
        with pytest.raises(DiskError, match="writing to the disk store .*: No space left on device"):
            store.put_many([(CIDS[1], b"block")])
        monkeypatch.setattr("indexer.store.spill_file.os.pread", lambda *_: b"less")
        with pytest.raises(DiskError, match="less than was written"):
            store.get_many(CIDS[:1])
