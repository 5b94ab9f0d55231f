"""Readers of the log see committed, retained events of current lives, in order, each once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from indexer.errors import StoreCorrupt
from indexer.store.codecs import AccountStatus
from indexer.store.keyspaces import BLOCKS, EVENTS
from indexer.store.transaction import Transaction
from tests.store.support import ALICE, BOB, LIKE, POST, Clock, ids, opened


def lose(event_id: int, tx: Transaction) -> None:
    tx.delete(EVENTS, event_id)


async def test_events_of_every_kind_come_back_as_they_were_appended(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(
            lambda tx: tx.append_event("identity", ALICE, fields={"handle": "a.test", "seq": 5}),
            lambda tx: tx.append_event("account", ALICE, live=False, fields={"active": True}),
            lambda tx: tx.append_event("sync", ALICE, rev="3ka", fields={"gap": True}),
        )
        first, second, third = store.events()
        assert (first.kind, first.fields, first.live) == ("identity", {"handle": "a.test", "seq": 5}, True)
        assert (second.kind, second.live, second.cid) == ("account", False, None)
        assert (third.kind, third.rev, third.id) == ("sync", "3ka", 3)


async def test_a_record_event_must_come_from_a_record(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        with pytest.raises(ValueError, match="put_record"):
            await store.do(lambda tx: tx.append_event("record", ALICE, fields={}))


async def test_pages_join_without_loss_or_repeat(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for number in range(25):
            await store.put(ALICE, f"a.b.c/{number}", str(number))
        for limit in (1, 4, 25, 99):
            seen: list[int] = []
            while events := store.log.read(seen[-1] + 1 if seen else 0, limit):
                assert len(events) <= limit
                seen += ids(events)
            assert seen == list(range(1, 26))
        assert store.log.read(26, 10) == []
        assert store.log.read(0, 0) == []


async def test_reading_skips_ended_lives_and_fills_the_page(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for number in range(20):
            await store.put(ALICE, f"a.b.c/{number}", str(number))
        await store.put(BOB, POST, "one")
        await store.do(lambda tx: tx.wipe_repo(ALICE, AccountStatus.DELETED))
        await store.put(BOB, LIKE, "two")
        assert ids(store.log.read(1, 2)) == [21, 22]
        assert store.log.page(1, 2, scanned=5) == ([], 6)
        assert ids(store.log.page(6, 2).events) == [21, 22]
        assert store.log.page(24, 2).next == 24


async def test_reading_starts_at_the_floor(tmp_path: Path) -> None:
    async with opened(tmp_path, clock=(clock := Clock()), events={"retention": 60}) as store:
        await store.put(ALICE, POST, "one")
        old = store.events()
        await store.retention.run_once()
        clock.forward(100)
        await store.put(ALICE, POST, "two")
        await store.retention.run_once()
        assert store.log.floor == 2
        assert ids(store.log.read(0, 10)) == [2]
        await store.checkpoint.run_once()
        await store.gc.run_once()
        assert store.log.blocks(old) == [None]


async def test_ids_go_on_after_a_kill_when_every_event_was_pruned(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock, clean=False, events={"retention": 60}) as store:
        await store.put(ALICE, POST, "one")
        await store.put(ALICE, POST, "two")
        await store.retention.run_once()
        clock.forward(100)
        await store.retention.run_once()
        assert (store.log.floor, store.events()) == (3, [])
    async with opened(tmp_path, clock=clock) as store:
        await store.put(ALICE, POST, "three")
        assert ids(store.events()) == [3]


async def test_a_lost_block_that_is_still_demanded_is_corruption(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        cid = await store.put(ALICE, POST, "one")
        events = store.events()
        await store.do(lambda tx: tx.delete(BLOCKS, (ALICE, cid)))
        with pytest.raises(StoreCorrupt, match="lost its block"):
            store.log.blocks(events)
        await store.do(lambda tx: tx.wipe_repo(ALICE, AccountStatus.DELETED))
        assert store.log.blocks(events) == [None]


async def test_a_time_is_found_by_its_first_event(tmp_path: Path) -> None:
    async with opened(tmp_path, clock=(clock := Clock())) as store:
        for number in range(10):
            await store.put(ALICE if number % 2 else BOB, f"a.b.c/{number}", str(number))
            clock.forward(1)
        times = [event.time_us for event in store.events()]
        assert [store.log.at_time(time) for time in times] == list(range(1, 11))
        assert [store.log.at_time(time + 1) for time in times] == list(range(2, 12))
        assert store.log.at_time(0) == 1
        await store.do(*[partial(lose, event_id) for event_id in (4, 5, 6)])
        found = [store.log.at_time(times[n - 1]) for n in (3, 4, 5, 6, 7)]
        assert [store.log.read(start, 1)[0].id for start in found] == [3, 7, 7, 7, 7]


async def test_an_event_that_does_not_decode_is_named(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, POST, "one")
        await store.do(lambda tx: tx.put(EVENTS, 1, b"\xc1"))
        with pytest.raises(StoreCorrupt, match="row 1 does not decode"):
            store.events()
