"""A compaction on request rewrites everything: what was deleted is gone, what is left is packed."""

from __future__ import annotations

from pathlib import Path

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


def test_one_compaction_packs_as_tight_as_two(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db", memory_mib=32) as db:
        rows = RawRows(db)
        rows.commit(("blocks", b"did:plc:a\0%08d" % number, _text(number)) for number in range(_ROWS))
        db.compact(BLOCKS)
        once = db.stats()["blocks"]["sst_bytes"]
        db.compact(BLOCKS)
        assert once == db.stats()["blocks"]["sst_bytes"]
        assert once < sum(len(_text(number)) for number in range(_ROWS)) / 5


def _text(number: int) -> bytes:
    return b"\xa2\x64text\x78\x40" + b"%032x" % (number * 0x9E3779B97F4A7C15) * 2 + b"\x65$typea"
