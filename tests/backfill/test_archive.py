"""Fetched CARs are archived as they came, with the repository that they made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from indexer.cas import FsBlobStore
from indexer.errors import WriterPoisoned
from indexer.simulator.account import Account
from indexer.store.archive_check import check_archives
from indexer.store.archives import Archives
from indexer.store.codecs import AccountStatus, SyncState
from tests.backfill.world import Host, World, account, answer_car, car_of, edit, rev

POST = "app.bsky.feed.post/"


class Killed(Exception):
    """The process ends here: nothing more is written."""


def one_with(count: int) -> Account:
    return account("one", {f"{POST}3k{number:011d}": f"text {number}" for number in range(count)})


def archive_into(world: World, *, keep: int = 1) -> tuple[Archives, FsBlobStore]:
    """Switches the archive of a world on."""
    blobs = FsBlobStore(world.settings.data_dir / "cas", level=3)
    settings = world.settings.model_copy(
        update={"archive": world.settings.archive.model_copy(update={"cars": True, "keep_per_repo": keep})}
    )
    archives = Archives(world.db, world.writer, blobs, settings)
    world.backfill.tools = dataclasses.replace(world.backfill.tools, archives=archives)
    return archives, blobs


async def test_a_fetched_car_is_archived_to_the_byte(tmp_path: Path) -> None:
    one = one_with(20)
    async with Host() as host, World(tmp_path, host) as world:
        archives, blobs = archive_into(world)
        host.serve(one)
        row = await world.fetch(one)
        assert row.state is SyncState.SYNCED
        [archive] = archives.of(one.did)
        assert archive.rev == row.rev
        assert blobs.get(archive.digest) == car_of(one)
        assert archive.size == len(car_of(one))
        assert world.spooled() == []


async def test_without_the_setting_nothing_is_archived(tmp_path: Path) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.fetch(one)
        assert not (tmp_path / "cas").exists()


async def test_a_refetch_of_the_same_rev_is_one_archive_and_a_newer_one_replaces_it(tmp_path: Path) -> None:
    one = one_with(5)
    async with Host() as host, World(tmp_path, host) as world:
        archives, blobs = archive_into(world)
        host.serve(one)
        await world.fetch(one)
        await world.fetch(one)
        assert [row.rev for row in archives.of(one.did)] == [rev(1)]
        edit(one, 2, {f"{POST}3kzzzzzzzzzzz": "new"})
        host.serve(one)
        await world.fetch(one)
        assert [row.rev for row in archives.of(one.did)] == [rev(2)]
        await archives.run_once()
        assert [blobs.get(blob.digest) for blob in blobs.files()] == [car_of(one)]


async def test_a_car_that_is_refused_is_not_archived(tmp_path: Path) -> None:
    one = one_with(5)
    async with Host() as host, World(tmp_path, host) as world:
        archives, blobs = archive_into(world)
        host.serve(one)
        damaged = bytearray(car_of(one))
        damaged[-3] ^= 1
        host.answers[one.did] = answer_car(one, body=bytes(damaged))
        row = await world.fetch(one)
        assert row.state is not SyncState.SYNCED
        assert archives.of(one.did) == []
        assert list(blobs.files()) == []


async def test_a_wipe_in_the_middle_leaves_no_archive(tmp_path: Path) -> None:
    one = one_with(12)
    async with Host() as host, World(tmp_path, host) as world:
        archives, blobs = archive_into(world)
        host.serve(one)

        async def wipe(name: str) -> None:
            if name == "archive":
                world.writer.hook = None
                await world.writer.run("wipe", lambda tx: tx.wipe_repo(one.did, AccountStatus.DELETED))

        world.writer.hook = wipe
        await world.fetch(one)
        assert archives.of(one.did) == []
        assert (await archives.run_once()).removed == 1
        assert list(blobs.files()) == []


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        ("before archive", 1),
        ("after archive", 1),
        ("after backfill_apply", 1),
        ("before backfill_apply", 3),
        ("after backfill_apply", 3),
    ],
)
async def test_killed_anywhere_it_ends_with_exactly_one_archive(tmp_path: Path, point: str, nth: int) -> None:
    one = one_with(12)  # 5 a unit
    async with Host() as host:
        host.serve(one)
        async with World(tmp_path, host) as world:
            archive_into(world)
            seen: list[str] = []

            def at(name: str) -> None:
                seen.append(name)
                if seen.count(point) == nth:
                    raise Killed

            world.at = at
            await world.backfill.add([one.did])
            with pytest.raises(WriterPoisoned):
                await world.backfill.run()
        async with World(tmp_path, host) as world:
            archives, blobs = archive_into(world)
            await world.running(lambda: world.row(one).state is SyncState.SYNCED)
            await archives.run_once()
            assert [blobs.get(row.digest) for row in archives.of(one.did)] == [car_of(one)]
            assert len(list(blobs.files())) == 1
            assert list(check_archives(world.db, blobs)) == []
