"""What a fetched repository says of its account's status, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.simulator.account import Account
from indexer.store.codecs import AccountStatus, SyncState, Work
from tests.backfill.world import Host, World, account, answer_car, answer_with, car_of, cids_of

POST = "app.bsky.feed.post/"
RELAY = "wss://relay.test"


def one_with(count: int) -> Account:
    return account("one", {f"{POST}3k{number:011d}": f"text {number}" for number in range(count)})


def pds_of(host: Host) -> str:
    return "pds::" + host.url.replace("http", "ws")


async def hide(world: World, one: Account) -> None:
    """The account is deactivated, as its PDS says, and is to be fetched."""
    await world.fetch(one)
    await world.word(one, pds_of(world.host), False, "deactivated")
    assert world.row(one).status is AccountStatus.DEACTIVATED
    await world.backfill.add([one.did], again=True)


async def test_a_repository_that_its_pds_serves_is_back(tmp_path: Path) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await hide(world, one)
        await world.change(one, work=0)
        row = await world.fetch(one)
        assert (row.status, row.state) == (AccountStatus.ACTIVE, SyncState.SYNCED)
        assert not row.work & Work.CHECK_STATUS
        assert world.statuses(one) == ["deactivated", "active"]


@pytest.mark.parametrize(
    ("from_pds", "status"), [(True, AccountStatus.TAKENDOWN), (False, AccountStatus.DEACTIVATED)]
)
@pytest.mark.parametrize("moment", ["fetch", "apply"])
async def test_a_word_that_comes_meanwhile_stands(
    tmp_path: Path, moment: str, from_pds: bool, status: AccountStatus
) -> None:
    one = one_with(12)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)

        async def speak(name: str = "backfill_apply") -> None:
            if name == "backfill_apply":
                world.writer.hook = None
                await world.word(one, pds_of(host) if from_pds else RELAY, False, status.label)

        if moment == "fetch":
            host.answers[one.did] = answer_car(one, speak)
        else:
            world.writer.hook = speak
        row = await world.fetch(one)
        assert (row.status, row.state) == (status, SyncState.SYNCED)
        assert row.work & Work.CHECK_STATUS
        assert world.woken[-1] == one.did
        assert world.statuses(one) == [status.label]
        assert [word.status for word in world.db.account_words(one.did)] == [status]
        assert world.records(one) == cids_of(one)


async def test_a_word_that_comes_meanwhile_stands_although_its_host_s_clock_is_late(
    tmp_path: Path,
) -> None:
    one = one_with(12)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)

        async def speak() -> None:
            word = (pds_of(host), AccountStatus.TAKENDOWN, False, 9, 1)
            await world.writer.run("word", lambda tx: tx.set_account_word(one.did, *word))
            await world.change(one, status=AccountStatus.TAKENDOWN)

        host.answers[one.did] = answer_car(one, speak)
        row = await world.fetch(one)
        assert row.status is AccountStatus.TAKENDOWN
        assert row.work & Work.CHECK_STATUS


async def test_a_relay_s_copy_does_not_bring_an_account_back(tmp_path: Path) -> None:
    one = one_with(3)
    async with Host() as relay, Host() as host:
        relay.cars[one.did] = car_of(one)
        async with World(tmp_path, host, upstreams=[relay.url.replace("http", "ws")]) as world:
            host.serve(one)
            await hide(world, one)
            await world.change(one, work=0)
            host.answers[one.did] = answer_with(502)
            row = await world.fetch(one)
            assert relay.asked == [one.did]
            assert (row.status, row.state) == (AccountStatus.DEACTIVATED, SyncState.SYNCED)
            assert row.work & Work.CHECK_STATUS
            assert world.woken[-1] == one.did
            assert world.statuses(one) == ["deactivated"]
