"""Archived CARs: every file is held by a row or on its way out, also after a kill."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from indexer.cas import FsBlobStore, MemBlobStore, digest_of
from indexer.errors import StoreError
from indexer.store.archive_check import check_archives
from indexer.store.archives import Archived, Archives, settle
from indexer.store.check import check
from indexer.store.codecs import AccountStatus, ArchiveRow
from indexer.store.database import Database
from indexer.store.keyspaces import ARCHIVE_QUEUE, ARCHIVES, KEYSPACES
from tests.store.support import ALICE, BOB, Store, opened, settings_of

REVS = [f"3kbbbbbbbbb{digit}b" for digit in "234567"]


class Kept:
    """An archive over a store, with the files of a folder or of memory."""

    def __init__(self, store: Store, folder: Path, *, cars: bool = True, keep: int = 1) -> None:
        self.store = store
        self.folder = folder
        self.blobs = FsBlobStore(folder / "cas", level=3)
        settings = settings_of(archive={"cars": cars, "keep_per_repo": keep})
        self.archives = Archives(store.db, store.writer, self.blobs, settings)

    def car(self, data: bytes) -> Path:
        path = self.folder / "fetched.car"
        path.write_bytes(data)
        return path

    async def keep(self, did: str, rev: str, data: bytes, *, hold: bool = True) -> None:
        async with self.archives.keeping(did, self.car(data)) as archived:
            assert archived is not None
            if hold:
                await self.store.do(partial(archived.hold, did=did, rev=rev))

    def of(self, did: str) -> list[tuple[str, bytes]]:
        return [(row.rev, self.blobs.get(row.digest)) for row in self.archives.of(did)]

    def files(self) -> set[bytes]:
        return {blob.digest for blob in self.blobs.files()}

    def queued(self) -> set[bytes]:
        return {digest for (_, digest), _ in self.store.db.scan(ARCHIVE_QUEUE)}

    def held(self) -> set[bytes]:
        return {digest for (_, digest), _ in self.store.db.scan(ARCHIVES)}

    def assert_exact(self) -> None:
        """After a pass: the files are those that rows hold, the totals are right."""
        assert self.queued() == set()
        assert self.files() == self.held()
        assert list(check_archives(self.store.db, self.blobs)) == []
        self.store.assert_clean()


async def test_a_kept_car_is_listed_and_read(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path)
        await kept.keep(ALICE, REVS[0], b"car of alice" * 100)
        [archive] = kept.archives.of(ALICE)
        assert (archive.rev, archive.size) == (REVS[0], 1200)
        assert archive.digest == digest_of(b"car of alice" * 100)
        assert archive.time_us > 0
        with await kept.archives.open(archive) as file:
            assert file.read() == b"car of alice" * 100
        assert kept.archives.of(BOB) == []
        assert kept.archives.stats["files"] == 1
        assert kept.archives.stats["bytes"] == 1200
        assert (await kept.archives.run_once()).removed == 0
        kept.assert_exact()


async def test_nothing_is_kept_unless_asked_for(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path, cars=False)
        async with kept.archives.keeping(ALICE, kept.car(b"car")) as archived:
            assert archived is None
        assert not (tmp_path / "cas").exists()
        assert kept.queued() == set()


async def test_a_car_that_no_row_holds_goes_with_the_next_pass(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path)
        async with kept.archives.keeping(ALICE, kept.car(b"car")):
            assert (await kept.archives.run_once()).looked == 0  # it is still worked on
            assert kept.files() == kept.queued() == {digest_of(b"car")}
        report = await kept.archives.run_once()
        assert (report.looked, report.removed) == (1, 1)
        assert kept.files() == set()
        kept.assert_exact()


async def test_the_newest_stay_and_one_of_each_rev(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path, keep=2)
        for number in range(4):
            await kept.keep(ALICE, REVS[number], b"car %d" % number)
        await kept.keep(BOB, REVS[0], b"car of bob")
        assert kept.of(ALICE) == [(REVS[3], b"car 3"), (REVS[2], b"car 2")]
        await kept.keep(ALICE, REVS[3], b"car 3 in another order")
        assert kept.of(ALICE) == [(REVS[3], b"car 3 in another order"), (REVS[2], b"car 2")]
        assert (await kept.archives.run_once()).removed == 3
        assert len(kept.files()) == 3
        kept.assert_exact()


async def test_the_same_car_again_is_one_file_and_one_row(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path)
        for _ in range(3):
            await kept.keep(ALICE, REVS[0], b"car")
        await kept.keep(ALICE, REVS[0], b"car", hold=False)  # and a fetch that came to nothing
        assert kept.of(ALICE) == [(REVS[0], b"car")]
        assert store.db.count("archives") == 1
        report = await kept.archives.run_once()
        assert (report.looked, report.removed) == (1, 0)
        assert kept.of(ALICE) == [(REVS[0], b"car")]
        kept.assert_exact()


async def test_a_wipe_takes_the_archived_cars_along(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path, keep=5)
        for number in range(3):
            await kept.keep(ALICE, REVS[number], b"car %d" % number)
        await kept.keep(BOB, REVS[0], b"car of bob")
        await store.do(lambda tx: tx.wipe_repo(ALICE, AccountStatus.DELETED))
        assert kept.archives.of(ALICE) == []
        await kept.keep(ALICE, REVS[1], b"car 1")  # the account came back with what it had
        assert (await kept.archives.run_once()).removed == 2
        assert kept.of(ALICE) == [(REVS[1], b"car 1")]
        assert kept.of(BOB) == [(REVS[0], b"car of bob")]
        kept.assert_exact()


async def test_a_row_that_is_lost_between_plan_and_commit_keeps_its_entry(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path)
        await kept.keep(ALICE, REVS[0], b"car")
        key = (ALICE, digest_of(b"car"))
        await store.do(
            lambda tx: tx.queue_archive(*key),
            lambda tx: tx.wipe_repo(ALICE, AccountStatus.DELETED),
            partial(settle, [key], frozenset()),
        )
        assert kept.queued() == {key[1]}
        assert (await kept.archives.run_once()).removed == 1
        kept.assert_exact()


@pytest.mark.parametrize("moment", ["named", "written", "removed", "held", "replaced", "wiped"])
async def test_killed_at_any_moment_no_file_is_forgotten(tmp_path: Path, moment: str) -> None:
    async with opened(tmp_path, clean=False) as store:
        kept = Kept(store, tmp_path)
        await kept.keep(ALICE, REVS[0], b"old car")
        if moment == "named":
            await store.do(lambda tx: tx.queue_archive(ALICE, digest_of(b"car")))
        else:
            await kept.keep(ALICE, REVS[1], b"car", hold=moment not in ("written", "removed"))
        if moment == "removed":
            kept.blobs.remove(digest_of(b"car"))
        if moment == "replaced":
            await kept.keep(ALICE, REVS[2], b"newer car")
        if moment == "wiped":
            await store.do(lambda tx: tx.wipe_repo(ALICE, AccountStatus.DELETED))
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path)
        assert kept.files() <= kept.held() | kept.queued()
        await kept.archives.run_once()
        left = dict.fromkeys(("named", "written", "removed"), b"old car")
        left |= {"held": b"car", "replaced": b"newer car"}
        assert [data for _, data in kept.of(ALICE)] == ([left[moment]] if moment in left else [])
        kept.assert_exact()


async def test_a_power_cut_cannot_part_file_and_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file depends on is synced before it is written, and before it is removed."""
    done: list[str] = []

    class Noted(MemBlobStore):
        def put_file(
            self, source: Path, *, digest: bytes | None = None, between: Callable[[], None] | None = None
        ) -> bytes:
            done.append("written")
            return super().put_file(source, digest=digest, between=between)

        def remove(self, digest: bytes) -> bool:
            done.append("removed")
            return super().remove(digest)

    async with opened(tmp_path, durability={"flush_interval": 3600}) as store:
        kept = Kept(store, tmp_path)
        kept.archives.blobs = Noted()

        def synced(_db: Database) -> None:
            done.append("synced with " + ("its name" if kept.queued() else "no name"))

        with monkeypatch.context() as patch:
            patch.setattr(Database, "sync_wal", synced)
            await kept.keep(ALICE, REVS[0], b"car", hold=False)
            await kept.archives.run_once()
        assert done == ["synced with its name", "written", "synced with its name", "removed"]


async def test_a_pass_takes_all_in_steps_of_any_size(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path)
        for number in range(25):
            await kept.keep(ALICE, REVS[0], b"car %d" % number)
        kept.archives._pace.rows = 4
        report = await kept.archives.run_once()
        assert (report.looked, report.removed) == (24, 24)
        assert kept.of(ALICE) == [(REVS[0], b"car 24")]
        kept.assert_exact()


async def test_nothing_is_removed_while_a_copy_is_made(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path)
        await kept.keep(ALICE, REVS[0], b"car", hold=False)
        async with kept.archives.still():
            done = asyncio.create_task(kept.archives.run_once())
            await asyncio.sleep(0)
            assert not done.done()
            assert kept.files() == {digest_of(b"car")}
        assert (await done).removed == 1


class Slow(MemBlobStore):
    """Stays in a put until it is given up or let go."""

    def __init__(self) -> None:
        super().__init__()
        self.began = threading.Event()
        self.go = threading.Event()
        self.ended: list[str] = []

    def put_file(
        self, source: Path, *, digest: bytes | None = None, between: Callable[[], None] | None = None
    ) -> bytes:
        self.began.set()
        try:
            while not self.go.wait(0.001):
                if between is not None:
                    between()
        except StoreError as error:
            self.ended.append(str(error))
            raise
        return super().put_file(source, digest=digest, between=between)


async def test_a_put_does_not_hold_up_the_loop_and_can_be_given_up(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept, blobs = Kept(store, tmp_path), Slow()
        kept.archives.blobs = blobs

        async def keep() -> None:
            await kept.keep(ALICE, REVS[0], b"car")

        given_up = asyncio.create_task(keep())
        await asyncio.to_thread(blobs.began.wait)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert len(blobs.ended) == 1  # the thread is done too
        assert not blobs.contains(digest_of(b"car"))
        blobs.began.clear()
        patient = asyncio.create_task(keep())
        await asyncio.to_thread(blobs.began.wait)
        blobs.go.set()
        await patient
        assert blobs.contains(digest_of(b"car"))
        assert kept.held() == {digest_of(b"car")}


async def test_the_check_names_what_is_wrong(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path, keep=5)
        for number in range(3):
            await kept.keep(ALICE, REVS[number], b"car %d" % number)
        files = {row.rev: row.digest for row in kept.archives.of(ALICE)}
        paths = {blob.digest: blob.path for blob in kept.blobs.files()}
        paths[files[REVS[0]]].unlink()
        paths[files[REVS[1]]].write_bytes(b"damaged")
        digest = files[REVS[2]]
        await store.do(lambda tx: tx.put(ARCHIVES, (ALICE, digest), ArchiveRow(REVS[2], 1, 99)))
        problems = sorted(check_archives(store.db, kept.blobs))
        assert [text.partition(REVS[number])[2][:12] for number, text in enumerate(problems)] == [
            " has no file",
            ": what is st",
            " has 5 bytes",
        ]
        assert list(check_archives(store.db, kept.blobs, BOB)) == []


async def test_a_wrong_total_is_found(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(lambda tx: Archived(digest_of(b"car"), 3, 1).hold(tx, ALICE, REVS[0]))
        store.assert_clean()
        await store.do(lambda tx: tx.add_count("archives/bytes", 1))
        assert check(store.db).problems == ["counts: archives/bytes says 4, a recount 3"]


async def test_new_cars_are_kept_while_a_copy_is_made(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path)
        await kept.keep(ALICE, REVS[0], b"old car")
        async with kept.archives.still(), kept.archives.still():
            await kept.keep(ALICE, REVS[1], b"car")  # would wait for ever if it waited for the copy
            waiting = asyncio.create_task(kept.archives.run_once())
            await asyncio.sleep(0)
            await kept.keep(BOB, REVS[1], b"car of bob")
            assert not waiting.done()
            assert len(kept.files()) == 3
        assert (await waiting).removed == 1
        kept.assert_exact()


async def test_a_file_that_cannot_be_removed_holds_up_no_other(tmp_path: Path) -> None:
    class Stubborn(FsBlobStore):
        def remove(self, digest: bytes) -> bool:
            if digest == digest_of(b"car 1"):
                raise StoreError("Operation not permitted")
            return super().remove(digest)

    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path)
        for number in range(4):
            await kept.keep(ALICE, REVS[0], b"car %d" % number)
        kept.archives.blobs = Stubborn(tmp_path / "cas", level=3)
        assert await kept.archives.run_once() == (3, 2, 1)
        assert kept.queued() == {digest_of(b"car 1")}
        assert kept.archives.stats["refused"] == 1
        kept.archives.blobs = kept.blobs
        assert await kept.archives.run_once() == (1, 1, 0)
        assert kept.archives.stats["refused"] == 0
        kept.assert_exact()


async def test_a_file_is_busy_until_the_last_who_keeps_it_is_done(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path)
        async with kept.archives.keeping(ALICE, kept.car(b"car")) as outer:
            await kept.keep(ALICE, REVS[0], b"car", hold=False)
            assert (await kept.archives.run_once()).looked == 0
            assert outer is not None
            await store.do(partial(outer.hold, did=ALICE, rev=REVS[0]))
        await kept.archives.run_once()
        assert kept.of(ALICE) == [(REVS[0], b"car")]
        kept.assert_exact()


async def test_a_car_that_is_gone_is_an_error_of_ours(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path)
        with pytest.raises(StoreError, match="reading .*nowhere"):
            async with kept.archives.keeping(ALICE, tmp_path / "nowhere"):
                raise AssertionError("it was kept")
        car = kept.car(b"car")

        class Loses(MemBlobStore):
            def put_file(self, source: Path, **_: object) -> bytes:
                source.unlink()
                return digest_of(b"car")

        kept.archives.blobs = Loses()
        with pytest.raises(StoreError, match="reading .*fetched.car"):
            async with kept.archives.keeping(ALICE, car):
                raise AssertionError("it was kept")
        assert await kept.archives.run_once() == (1, 0, 0)  # nobody is busy with it any more


@pytest.mark.parametrize("partition_rows", [1, 1000])
async def test_a_file_that_nobody_knows_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition_rows: int
) -> None:
    monkeypatch.setattr("indexer.store.archive_check._PARTITION_ROWS", partition_rows)
    async with opened(tmp_path) as store:
        kept = Kept(store, tmp_path, keep=9)
        for number in range(5):
            await kept.keep(ALICE, REVS[number], b"car %d" % number)
        await kept.keep(BOB, REVS[0], b"on its way out", hold=False)
        told: list[tuple[int, int]] = []
        found = check_archives(store.db, kept.blobs, progress=lambda done, files: told.append((done, files)))
        assert list(found) == []
        assert told == [(number, 5) for number in range(1, 6)]
        stray = kept.blobs.put(b"nobody's")
        [problem] = check_archives(store.db, kept.blobs)
        assert f"{stray.hex()} belongs to no row" in problem
        assert list(check_archives(store.db, kept.blobs, ALICE)) == []


@pytest.mark.parametrize("name", ["archives", "archive_queue"])
def test_the_rows_are_compacted_where_they_were_deleted(name: str) -> None:
    assert KEYSPACES[name].tuning.collected
