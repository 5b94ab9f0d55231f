"""Hosts that refuse, stall, lie or break off: nothing half applied, the reason kept, another try planned."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from indexer.atproto.car import iter_blocks
from indexer.backfill.fetch import Deadline
from indexer.simulator.account import Account
from indexer.simulator.cbor import block_cid
from indexer.simulator.keys import SigningKey
from indexer.simulator.wire import car, commit_block
from indexer.store.codecs import AccountStatus, AccountWord, RepoRow, SyncState
from indexer.store.writer import clock_us
from tests.backfill.world import (
    Handler,
    Host,
    World,
    account,
    answer_car,
    answer_with,
    car_of,
    cids_of,
    edit,
    refusal,
    rev,
)

POST = "app.bsky.feed.post/"


def one_with(count: int) -> Account:
    return account("one", {f"{POST}3k{number:011d}": f"text {number}" for number in range(count)})


def reason(row: RepoRow) -> str:
    return row.error.partition(":")[0]


def wait_s(row: RepoRow) -> float:
    return (row.due - clock_us()) / 1e6


def answer_body(body: bytes) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body)

    return answer


def answer_name(name: str, status: int = 400) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return refusal(name, status)

    return answer


async def test_a_car_cut_at_any_block_never_deletes_a_record(tmp_path: Path) -> None:
    one = one_with(12)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.fetch(one)
        kept = world.records(one)
        edit(one, 2, {f"{POST}3k{3:011d}": None, f"{POST}3kzzzzzzzzzzz": "new"})
        whole = car_of(one)
        for _, _, end in list(iter_blocks(whole))[:-1]:
            host.answers[one.did] = answer_body(whole[:end])
            row = await world.fetch(one)
            assert reason(row) == "incomplete"
            assert world.records(one) == kept
            assert row.rev == rev(1)
            assert row.complete
            world.forgive()  # what it did wrong a few times makes the host rest
        assert world.spooled() == []
        host.answers.clear()
        host.serve(one)
        await world.fetch(one)
        assert world.records(one) == cids_of(one)


async def test_every_flipped_bit_is_refused_and_nothing_stored(tmp_path: Path) -> None:
    one = one_with(3)
    whole = car_of(one)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        for at in range(0, len(whole), 97):
            host.answers[one.did] = answer_body(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            row = await world.fetch(one)
            assert row.state is SyncState.PENDING
            assert row.attempt > 0
            assert world.records(one) == {}


async def test_a_wrong_signature_is_refused_after_one_look_at_the_directory(tmp_path: Path) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        host.keys[one.did] = SigningKey.derive("k256", "another").multikey
        row = await world.fetch(one)
        assert reason(row) == "signature"
        assert host.documents == 2
        assert host.asked == [one.did]
        assert world.records(one) == {}
        assert world.db.count("backfill/corrupt/signature") == 1


async def test_a_rotated_key_is_found_in_the_directory(tmp_path: Path) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.resolver.resolve(one.did)
        one.key = SigningKey.derive("p256", "rotated")
        host.serve(edit(one, 2, {}))
        row = await world.fetch(one)
        assert (row.state, row.signing_key) == (SyncState.SYNCED, one.key.did_key)


async def test_another_account_s_repository_is_refused(tmp_path: Path) -> None:
    one, two = one_with(3), account("two", {POST + "3kaaaaaaaaaaa": "x"})
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        two.key = one.key
        host.answers[one.did] = answer_car(edit(two, 2, {}))
        row = await world.fetch(one)
        assert row.attempt == 1
        assert world.records(one) == {}


async def test_a_rev_in_the_future_is_refused(tmp_path: Path) -> None:
    one = edit(one_with(1), 100_000_000, {})
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        assert reason(await world.fetch(one)) == "future_rev"


async def test_a_fetched_tree_that_breaks_the_rules_is_refused(tmp_path: Path) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        record = next(iter(one.records.values()))
        head = commit_block(one.did, rev(2), record.cid, one.key)  # the root is a record
        host.answers[one.did] = answer_body(car(block_cid(head), [(block_cid(head), head), *one.blocks()]))
        row = await world.fetch(one)
        assert row.attempt == 1
        assert world.records(one) == {}


@pytest.mark.parametrize(
    ("headers", "least"),
    [({"Retry-After": "600"}, 600), ({"RateLimit-Reset": "500"}, 500), ({}, 5)],
    ids=["retry-after", "ratelimit-reset", "neither"],
)
async def test_a_rate_limit_is_obeyed_by_row_and_host(
    tmp_path: Path, headers: dict[str, str], least: float
) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        host.answers[one.did] = answer_with(429, headers)
        row = await world.fetch(one)
        assert reason(row) == "rate_limited"
        assert least - 2 <= wait_s(row) <= least + 10
        assert not world.backfill.tools.hosts.free(host.url.removeprefix("http://"))


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_a_server_error_is_tried_again_later_and_later(tmp_path: Path, status: int) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        host.answers[one.did] = answer_with(status)
        waits = []
        for attempt in (1, 2, 3):
            row = await world.fetch(one)
            assert (row.state, row.attempt, reason(row)) == (SyncState.PENDING, attempt, "http_5xx")
            waits.append(wait_s(row))
        assert waits[0] < waits[1] < waits[2]
        host.answers.clear()
        for name in list(world.backfill.tools.hosts._hosts):
            world.backfill.tools.hosts.success(name)
            world.backfill.tools.hosts._hosts[name].not_before = 0.0
        assert (await world.fetch(one)).state is SyncState.SYNCED


async def test_an_endless_body_is_cut_at_the_limit(tmp_path: Path) -> None:
    one = one_with(3)

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(1 << 16))
        except ConnectionError:
            return response

    async with Host() as host, World(tmp_path, host, backfill={"max_car_mib": 1}) as world:
        host.serve(one)
        host.answers[one.did] = endless
        row = await world.fetch(one)
        assert reason(row) == "too_large"
        assert world.spooled() == []
        assert world.backfill.status()["in_flight_bytes"] == 0


async def test_a_body_that_stalls_is_given_up(tmp_path: Path) -> None:
    one = one_with(3)
    never = asyncio.Event()

    async def stalled(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"some")
        await never.wait()
        return response

    async with Host() as host, World(tmp_path, host, backfill={"timeout": 0.2}) as world:
        host.serve(one)
        host.answers[one.did] = stalled
        row = await world.fetch(one)
        never.set()
        assert reason(row) == "timeout"


def test_a_trickle_is_given_up_before_the_total_time() -> None:
    deadline = Deadline(300.0, 8192.0, 20.0, started=1000.0)
    assert deadline.at(0) == 1020.0
    assert deadline.at(8192 * 10) == 1030.0
    assert deadline.at(1 << 40) == 1300.0
    assert Deadline(300.0, 0.0, 20.0, started=1000.0).at(0) == 1300.0


async def test_a_connection_cut_in_the_body_is_tried_again(tmp_path: Path) -> None:
    one = one_with(12)
    body = car_of(one)

    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        assert request.transport is not None
        request.transport.close()
        return response

    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        host.answers[one.did] = cut
        row = await world.fetch(one)
        assert (row.state, row.attempt) == (SyncState.PENDING, 1)
        assert world.records(one) == {}


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("RepoDeactivated", AccountStatus.DEACTIVATED),
        ("RepoTakendown", AccountStatus.TAKENDOWN),
        ("RepoSuspended", AccountStatus.SUSPENDED),
        ("RepoNotFound", AccountStatus.UNKNOWN),
    ],
)
async def test_what_the_pds_says_of_the_account_is_its_status(
    tmp_path: Path, name: str, status: AccountStatus
) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.fetch(one)
        host.answers[one.did] = answer_name(name)
        row = await world.fetch(one)
        assert (row.status, row.state) == (status, SyncState.DESYNCHRONIZED)
        assert wait_s(row) > 400
        assert world.records(one) == cids_of(one)
        assert world.statuses(one) == [status.label]
        assert world.backfill.tools.hosts.free(host.url.removeprefix("http://"))
        host.answers.clear()
        row = await world.fetch(one)
        assert (row.status, row.state) == (AccountStatus.ACTIVE, SyncState.SYNCED)
        assert world.statuses(one) == [status.label, "active"]


async def test_a_relay_s_takedown_stands_although_the_pds_serves(tmp_path: Path) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        word = AccountWord("wss://relay", AccountStatus.TAKENDOWN, False, 5, 5)
        await world.writer.run("word", lambda tx: tx.set_account_word(one.did, *word))
        await world.backfill.add([one.did])
        await world.change(one, status=AccountStatus.TAKENDOWN)
        row = await world.fetch(one)
        assert (row.status, row.state) == (AccountStatus.TAKENDOWN, SyncState.SYNCED)
        assert world.statuses(one) == []


async def test_a_deleted_identity_takes_the_repository_along(tmp_path: Path) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        await world.fetch(one)
        host.tombstones.add(one.did)
        world.resolver.purge(one.did)
        row = await world.fetch(one)
        assert (row.status, row.tracked, row.due, row.rev) == (AccountStatus.DELETED, True, 0, "")
        assert world.records(one) == {}


async def test_an_unknown_identity_waits_long_and_an_unreachable_directory_short(tmp_path: Path) -> None:
    one, two = one_with(1), account("two", {})
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        row = await world.fetch(two)
        assert (reason(row), row.status) == ("identity_gone", AccountStatus.ACTIVE)
        assert wait_s(row) > 400
        await host.__aexit__()
        row = await world.fetch(one)
        assert reason(row) == "identity_unavailable"
        assert wait_s(row) < 20


async def test_a_repository_below_min_rev_is_retried_and_in_the_end_accepted_with_a_mark(
    tmp_path: Path,
) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host, backfill={"min_rev_tries": 2}) as world:
        host.serve(one)
        await world.backfill.add([one.did])
        await world.change(one, min_rev=rev(5))
        for attempt in (1, 2):
            row = await world.fetch(one)
            assert (reason(row), row.attempt, row.state) == ("below_min_rev", attempt, SyncState.PENDING)
            assert world.records(one) == {}
        row = await world.fetch(one)
        assert (row.state, reason(row)) == (SyncState.SYNCED, "accepted_below_min_rev")
        assert (row.rev, row.min_rev) == (rev(1), rev(1))
        assert world.records(one) == cids_of(one)
        assert world.db.count("backfill/done/below_min_rev") == 1


async def test_tries_that_failed_otherwise_do_not_count_towards_accepting(tmp_path: Path) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host, backfill={"min_rev_tries": 2}) as world:
        host.serve(one)
        await world.backfill.add([one.did])
        await world.change(one, min_rev=rev(5), attempt=7, error="http_5xx: …")
        row = await world.fetch(one)
        assert (reason(row), row.attempt) == ("below_min_rev", 1)


async def test_a_repository_older_than_the_stored_one_is_never_applied(tmp_path: Path) -> None:
    one = one_with(3)
    old = answer_car(one)
    async with Host() as host, World(tmp_path, host, backfill={"min_rev_tries": 1}) as world:
        host.serve(edit(one, 5, {POST + "3kzzzzzzzzzzz": "new"}))
        await world.fetch(one)
        host.answers[one.did] = old
        for _ in range(3):
            row = await world.fetch(one)
            assert (row.state, row.rev) == (SyncState.DESYNCHRONIZED, rev(5))
            assert world.records(one) == cids_of(one)


async def test_the_other_host_is_asked_when_one_cannot_answer(tmp_path: Path) -> None:
    one = one_with(3)
    async with Host() as relay, Host() as host:
        relay.cars[one.did] = car_of(one)
        upstreams = [relay.url.replace("http", "ws")]
        async with World(tmp_path, host, upstreams=upstreams) as world:
            host.serve(one)
            host.answers[one.did] = answer_with(502)
            assert (await world.fetch(one)).state is SyncState.SYNCED
            assert relay.asked == [one.did]


async def test_the_pds_has_the_last_word_where_the_relay_is_asked_first(tmp_path: Path) -> None:
    one = one_with(3)
    async with Host() as relay, Host() as host:
        relay.cars[one.did] = car_of(one)
        host.serve(edit(one, 2, {POST + "3kzzzzzzzzzzz": "new"}))
        upstreams = [relay.url.replace("http", "ws")]
        async with World(tmp_path, host, upstreams=upstreams, backfill={"source": "relay"}) as world:
            await world.fetch(one)
            assert (relay.asked, host.asked) == ([one.did], [])
            assert world.row(one).rev == rev(1)
            await world.change(one, min_rev=rev(2))
            await world.fetch(one)
            assert (len(relay.asked), len(host.asked)) == (2, 1)
            fetched = [len(relay.cars[one.did])] * 2 + [len(host.cars[one.did])]
            assert world.backfill.status()["bytes"] == sum(fetched)
            assert (world.row(one).rev, world.row(one).state) == (rev(2), SyncState.SYNCED)


async def test_a_bug_of_ours_fails_the_repository_not_the_backfill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = one_with(3)

    def broken(*_: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("indexer.backfill.job.verify_car", broken)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        assert reason(await world.fetch(one)) == "internal"


async def test_frames_that_wait_survive_a_failed_fetch(tmp_path: Path) -> None:
    one = one_with(3)
    async with Host() as host, World(tmp_path, host) as world:
        host.serve(one)
        host.answers[one.did] = answer_car(one, lambda: world.buffer(one, 2))
        await world.backfill.add([one.did])
        await world.change(one, min_rev=rev(3))
        row = await world.fetch(one)
        assert row.state is SyncState.PENDING
        await world.change(one, min_rev="")
        host.answers.clear()
        await world.fetch(one)
        assert world.drained == [one.did]
