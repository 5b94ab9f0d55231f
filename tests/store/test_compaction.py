"""A compaction on request rewrites everything: what was deleted is gone, what is left is packed. Every
compaction yields to answers and ingest."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest

from indexer.store.codecs import encode_u64
from indexer.store.database import Database
from indexer.store.keyspaces import BLOCKS, EVENTS
from indexer.store.raw import RawRows

_ROWS = 2_000


def test_a_file_of_tombstones_does_not_reach_the_last_level(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db", memory_mib=32) as db:
        rows = RawRows(db)
        rows.commit(("events", encode_u64(number), b"event" * 50) for number in range(_ROWS))
        rows.commit(("events", encode_u64(number), None) for number in range(_ROWS))
        db.compact(EVENTS)
        assert db.stats()["events"]["sst_bytes"] == 0


def test_what_comes_straight_from_memory_gets_the_dictionary_of_the_last_level(tmp_path: Path) -> None:
    choice = Random(1)
    common = choice.randbytes(4_000)  # a block of the file holds four: without a dictionary each costs 1,000
    with Database.open(tmp_path / "db", memory_mib=32) as db:
        rows = RawRows(db)
        rows.commit(("blocks", b"%08d" % number, choice.randbytes(64) + common) for number in range(_ROWS))
        db.compact(BLOCKS)
        assert db.stats()["blocks"]["sst_bytes"] < _ROWS * 300


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_compactions_yield_the_processor_and_flushes_do_not(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db", memory_mib=32) as db:
        RawRows(db).commit(("events", encode_u64(number), b"event") for number in range(10))
        db.compact(EVENTS)
        nice: dict[str, set[int]] = {}
        for task in Path("/proc/self/task").iterdir():
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            nice.setdefault((task / "comm").read_text().strip(), set()).add(int(fields[16]))
        assert nice["rocksdb:low"] == {19}
        assert min(nice["rocksdb:high"]) < 19
