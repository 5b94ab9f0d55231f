"""The disk of a walk: bounded, emptied, never mixed with anything that somebody keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from indexer import DiskBuilder, DiskError, DriveError, Driver, DriverBuilder
from indexer.atproto.cid import dag_cbor_cid
from tests.repo.archives import bodies, pieces, repository
from tests.repo.test_driver import drained

BLOCKS = [(dag_cbor_cid(bytes((number,))), bytes((number,)) * 1000) for number in range(50)]


def test_blocks_come_back_by_their_cids(tmp_path: Path) -> None:
    with DiskBuilder(cache_mb=1).open(tmp_path / "spill") as store:
        store.put_many(BLOCKS)
        assert store.get_many([cid for cid, _ in BLOCKS]) == [block for _, block in BLOCKS]
        assert store.get_many([dag_cbor_cid(b"other"), BLOCKS[3][0]]) == [None, BLOCKS[3][1]]
        assert store.get_many([]) == []
        assert store.stored == 50 * 1036
        store.reset()
        assert store.get_many([BLOCKS[3][0]]) == [None]
        assert store.stored == 0
        store.put_many(BLOCKS[:1])
        assert store.get_many([BLOCKS[0][0]]) == [BLOCKS[0][1]]
    assert not (tmp_path / "spill").exists()
    store.close()
    with pytest.raises(DiskError, match="is closed"):
        store.get_many([BLOCKS[0][0]])


def test_it_is_bounded(tmp_path: Path) -> None:
    with DiskBuilder(cache_mb=1, max_stored_mb=0.03).open(tmp_path / "spill") as store:
        store.put_many(BLOCKS[:20])
        with pytest.raises(DiskError, match="max_stored_mb") as caught:
            store.put_many(BLOCKS[20:])
        assert caught.value.reason == "spill_full"
    for cache, most in ((0, 1.0), (1, -1.0), (1, float(1 << 20))):
        with pytest.raises(ValueError, match=f"cache_mb is {cache}"):
            DiskBuilder(cache_mb=cache, max_stored_mb=most)


def test_a_folder_with_other_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DiskError, match="holds other files"):
        DiskBuilder().open(tmp_path)
    with pytest.raises(DiskError, match="cannot be used"):
        DiskBuilder().open(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_a_killed_process_left_is_destroyed(tmp_path: Path) -> None:
    script = (
        "import os, sys; from indexer import DiskBuilder; store = DiskBuilder(cache_mb=1).open(sys.argv[1]);"
        "store.put_many([(b'k' * 36, b'v' * 100000)]); os._exit(9)"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "spill")], cwd=root, check=False)
    assert done.returncode == 9
    assert [each.name for each in (tmp_path / "spill").iterdir()] == ["SPILL"], "its blocks are on the disk"
    left = tmp_path / "spill" / "blocks"
    left.mkdir()
    (left / "000001.sst").write_bytes(b"of an older version")
    with DiskBuilder(cache_mb=1).open(tmp_path / "spill") as store:
        assert not left.exists()
        assert store.get_many([b"k" * 36]) == [None]


def test_a_folder_in_use_is_refused_and_stays_whole(tmp_path: Path) -> None:
    with DiskBuilder(cache_mb=1).open(tmp_path / "spill") as store:
        store.put_many(BLOCKS)
        with pytest.raises(DiskError, match="another store has it"):
            DiskBuilder(cache_mb=1).open(tmp_path / "spill")
        assert store.get_many([BLOCKS[9][0]]) == [BLOCKS[9][1]]


async def test_walks_one_after_the_other_through_one_store(tmp_path: Path) -> None:
    with DiskBuilder(cache_mb=1, max_stored_mb=0.1).open(tmp_path / "spill") as store:
        for seed in (1, 2):
            made = repository(bodies(200, seed))
            loaded = await DriverBuilder(0, streaming=False).load_car(pieces(made.shuffled(seed)))
            assert isinstance(loaded, Driver.Disk)
            commit, driver = await loaded.need_disk.finish_loading(store)
            assert commit.data == made.root
            assert [each[:3] for each in await drained(driver)] == made.rows
            assert store.stored > 10_000
            store.reset()
        loaded = await DriverBuilder(0, streaming=False).load_car(repository(bodies(1000)).shuffled())
        assert isinstance(loaded, Driver.Disk)
        with pytest.raises(DriveError, match="max_stored_mb") as caught:
            await loaded.need_disk.finish_loading(store)
        assert caught.value.kind == "disk"
        assert isinstance(caught.value.__cause__, DiskError)
        assert store.stored == 0
