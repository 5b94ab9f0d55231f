"""Opening, refusing, reading."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from indexer.errors import StoreCorrupt, StoreLocked, StoreModeMismatch, StoreVersion
from indexer.store.codecs import Mode, pack
from indexer.store.database import FORMAT, Database
from indexer.store.keyspaces import CURSORS, KEYSPACES, RECORDS
from tests.store.support import ALICE, BOB, REV, SYNCED, opened, put_step


def put_cursor(path: Path, name: str, value: object) -> None:
    """Write a row past the writer, as damage would."""
    with Database.open(path) as db:
        db.family(CURSORS.name)[name.encode()] = pack(value)


def test_a_new_database_remembers_format_and_mode(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db", mode=Mode(ephemeral=True)) as db:
        assert db.get(CURSORS, "format") == [FORMAT, 1]
    with Database.open(tmp_path / "db") as db:
        assert db.mode == Mode(ephemeral=True)


def test_a_new_database_is_small(tmp_path: Path) -> None:
    Database.open(tmp_path / "db").close()
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "db").iterdir()) < 2 << 20


@pytest.mark.parametrize("mode", [Mode(ephemeral=True), Mode(blocks=False)])
def test_another_mode_is_refused_by_name(tmp_path: Path, mode: Mode) -> None:
    Database.open(tmp_path / "db").close()
    with pytest.raises(StoreModeMismatch, match=r"made in full mode.*" + str(mode)):
        Database.open(tmp_path / "db", mode=mode)
    Database.open(tmp_path / "db", mode=Mode()).close()


def test_an_open_database_is_locked(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db"):
        with pytest.raises(StoreLocked, match="stop it first"):
            Database.open(tmp_path / "db")
        with pytest.raises(StoreLocked, match="stop it first"):
            Database.open(tmp_path / "db", read_only=True)


def test_closing_gives_the_lock_back_even_with_an_open_iterator(tmp_path: Path) -> None:
    db = Database.open(tmp_path / "db")
    rows = db.scan(CURSORS)
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    db.close()
    db.close()
    Database.open(tmp_path / "db").close()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    put_cursor(tmp_path / "db", "format", [FORMAT + 5, FORMAT + 1])
    with pytest.raises(StoreVersion, match=f"format {FORMAT + 5}"):
        Database.open(tmp_path / "db")


def test_a_newer_format_that_we_may_read_is_opened(tmp_path: Path) -> None:
    put_cursor(tmp_path / "db", "format", [FORMAT + 5, FORMAT])
    Database.open(tmp_path / "db").close()


@pytest.mark.parametrize(("name", "value"), [("format", "x"), ("format", [1]), ("mode", 3)])
def test_malformed_marks_are_named(tmp_path: Path, name: str, value: object) -> None:
    put_cursor(tmp_path / "db", name, value)
    with pytest.raises(StoreCorrupt, match=rf"cursors: {name}"):
        Database.open(tmp_path / "db")


def test_a_damaged_database_is_one_named_error(tmp_path: Path) -> None:
    Database.open(tmp_path / "db").close()
    for manifest in (tmp_path / "db").glob("MANIFEST-*"):
        manifest.write_bytes(b"garbage" * 100)
    with pytest.raises(StoreCorrupt, match="damaged"):
        Database.open(tmp_path / "db")


def test_a_missing_database_is_named_when_it_must_exist(tmp_path: Path) -> None:
    with pytest.raises(StoreCorrupt, match="no database there"):
        Database.open(tmp_path / "db", create=False)
    assert not (tmp_path / "db").exists()


def test_a_row_that_does_not_decode_is_named(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as db:
        db.family("repos")[ALICE.encode()] = b"\xc1"
        with pytest.raises(StoreCorrupt, match=r"repos: row .*aaaa"):
            db.repo(ALICE)


async def test_reads_of_one_repository_stay_within_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for did in (ALICE, BOB):
            for path in ("a.b.c/1", "a.b.c/2", "a.b.c.d/1", "a.b.d/1"):
                await store.put(did, path, did + path)
        db = store.db
        everything = [path for path, _ in db.records(ALICE)]
        assert everything == sorted(["a.b.c/1", "a.b.c/2", "a.b.c.d/1", "a.b.d/1"])
        assert [path for path, _ in db.records(ALICE, "a.b.c")] == ["a.b.c/1", "a.b.c/2"]
        assert [path for path, _ in db.records(ALICE, "a.b.c", reverse=True, limit=1)] == ["a.b.c/2"]
        assert [path for path, _ in db.records(ALICE, "a.b.c", start="2")] == ["a.b.c/2"]
        assert [path for path, _ in db.records(ALICE, "a.b.c", stop="2", reverse=True)] == ["a.b.c/1"]
        assert [path for path, _ in db.records(ALICE, start="a.b.c/2")] == ["a.b.c/2", "a.b.d/1"]
        assert db.records(ALICE, limit=0) == []


async def test_pages_of_repositories_join(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        dids = [f"did:web:{name}" for name in ("a", "a.b", "ab", "b")]
        await store.do(*[lambda tx, did=did: tx.set_repo(did, SYNCED) for did in dids])
        seen: list[str] = []
        while page := store.db.repos(after=seen[-1] if seen else "", limit=1):
            seen += [did for did, _ in page]
        assert seen == sorted(dids)


async def test_a_snapshot_stays_at_its_point_in_time(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        first = await store.put(ALICE, "a.b.c/1", "one")
        with store.db.snapshot() as snapshot:
            await store.put(ALICE, "a.b.c/1", "two")
            await store.put(ALICE, "a.b.c/2", "three")
            row = snapshot.record(ALICE, "a.b.c/1")
            assert row is not None
            assert row.cid == first
            assert snapshot.record(ALICE, "a.b.c/2") is None
            assert snapshot.block(ALICE, first) is not None
            assert len(snapshot.records(ALICE)) == 1
            assert snapshot.count("records") == 1
            assert snapshot.multi_get(RECORDS, [(ALICE, "a.b.c/0"), (ALICE, "a.b.c/1")])[0] is None
        assert len(store.db.records(ALICE)) == 2


async def test_scans_of_a_snapshot_are_as_whole_as_its_gets(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        paths = [f"a.b.c/{number:04d}" for number in range(600)]
        await store.do(*[put_step(ALICE, path, path) for path in paths])
        with store.db.snapshot() as snapshot:
            await store.do(*[lambda tx, p=p: tx.delete_record(ALICE, p, REV, live=True) for p in paths[::2]])
            await store.put(ALICE, "a.b.c/0000a", "new")
            assert [path for path, _ in snapshot.records(ALICE)] == paths
            assert [path for path, _ in snapshot.records(ALICE, reverse=True)] == paths[::-1]
            assert [path for path, _ in snapshot.records(ALICE, "a.b.c", start="0300", stop="0302")] == paths[
                300:302
            ]
            nested = [
                (a, b) for (a, _), (b, _) in zip(snapshot.scan(RECORDS), snapshot.scan(RECORDS), strict=True)
            ]
            assert [path for (_, path), _ in nested] == paths
            assert all(a == b for a, b in nested)


def test_scans_go_both_ways_within_bounds(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as db:
        for name in ("a", "b", "c", "d"):
            db.family("cursors")[name.encode()] = pack(1)

        def names(
            start: bytes | None, stop: bytes | None, reverse: bool = False, limit: int | None = None
        ) -> str:
            rows = db.scan(CURSORS, start, stop, reverse=reverse, limit=limit)
            return "".join(name for name, _ in rows if len(name) == 1)

        assert names(b"b", b"d") == "bc"
        assert names(b"b", b"d", reverse=True) == "cb"
        assert names(None, b"c", reverse=True) == "ba"
        assert names(b"c", None) == "cd"
        assert names(b"b", None, reverse=True, limit=99) == "dcb"
        assert names(b"b", b"d", limit=1) == "b"
        assert names(b"b", b"d", limit=0) == ""


@pytest.mark.parametrize("how", ["rows", "backwards", "keys", "snapshot", "snapshot backwards"])
def test_a_scan_that_meets_a_damaged_block_does_not_pass_for_the_end(tmp_path: Path, how: str) -> None:
    with Database.open(tmp_path / "db") as db:
        family = db.family("blocks")
        for number in range(2000):
            family[b"%06d" % number] = os.urandom(100)
        family.flush(True)
    largest = max((tmp_path / "db").glob("*.sst"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with Database.open(tmp_path / "db") as db, db.snapshot() as snapshot:
        rows: dict[str, Callable[[], Iterator[object]]] = {
            "rows": lambda: db.raw_scan("blocks", None, None),
            "backwards": lambda: db.raw_scan("blocks", None, None, reverse=True),
            "keys": lambda: db.raw_keys("blocks", b"", b"\xff"),
            "snapshot": lambda: snapshot.raw_scan("blocks", None, None),
            "snapshot backwards": lambda: snapshot.raw_scan("blocks", None, None, reverse=True),
        }
        with pytest.raises(StoreCorrupt, match=f"checksum.*{largest.name}"):
            for _ in rows[how]():
                pass


def test_statistics_cover_the_table(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db", memory_mib=32) as db:
        stats = db.stats()
        assert set(stats) == set(KEYSPACES)
        assert stats["cursors"]["rows"] > 0
        assert db.memory()["limit_bytes"] == 32 << 20
        db.compact(CURSORS)
        assert db.stats()["cursors"]["sst_bytes"] > 0
