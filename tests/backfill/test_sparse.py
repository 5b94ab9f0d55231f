"""Parts of repositories: exactly what is wanted, proven complete; and the whole where a part will not do."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from indexer.atproto.cid import dag_cbor_cid
from indexer.atproto.mst import build
from indexer.backfill.hosts import Hosts, host_of
from indexer.backfill.sparse import Unfit, go_through, unfit
from indexer.config import BackfillSettings
from indexer.errors import WriterPoisoned
from indexer.repo.ranges import Estimate, RangePlan, ranges_of
from indexer.simulator.account import Account
from indexer.simulator.keys import SigningKey
from indexer.store.codecs import SyncState
from indexer.store.transaction import Transaction
from tests.backfill.part_host import Blocks, PartHost
from tests.backfill.test_archive import archive_into
from tests.backfill.test_restart import kill_at, request_and_run
from tests.backfill.world import World, account, answer_with, cids_of, edit, refusal, rev

POST, LIKE, REPOST = "app.bsky.feed.post", "app.bsky.feed.like", "app.bsky.feed.repost"
FOLLOW = "app.bsky.graph.follow"
SMALL = {"sparse_min_records": 0, "sparse_share": 1.0}


def records(count: int = 30) -> dict[str, str]:
    names = (POST, LIKE, REPOST, FOLLOW)
    return {f"{name}/3k{number:011d}": f"text {number}" for name in names for number in range(count)}


def wanted(one: Account, *names: str) -> dict[str, bytes]:
    return {path: cid for path, cid in cids_of(one).items() if path.partition("/")[0] in names}


def world_of(path: Path, host: PartHost, *names: str, **backfill: Any) -> World:
    return World(path, host, filter={"collections": list(names)}, backfill=SMALL | backfill)


def outcome(world: World) -> tuple[int, dict[str, int]]:
    """Parts that were taken, and why wholes were."""
    status = world.backfill.status()
    return status["parts"], status["whole"]


async def test_only_what_is_wanted_is_fetched_and_a_second_fetch_tells_what_changed(tmp_path: Path) -> None:
    one = account("one", records())
    async with PartHost() as host, world_of(tmp_path, host, LIKE, "app.bsky.graph.*") as world:
        host.serve(one)
        row = await world.fetch(one)
        assert world.records(one) == wanted(one, LIKE, FOLLOW)
        assert (row.state, row.complete, row.sparse) == (SyncState.SYNCED, False, True)
        assert (row.rev, row.data, row.commit) == (one.rev, bytes(one.data), one.commit)
        assert outcome(world) == (1, {})
        assert host.asked == []
        assert all(world.db.block(one.did, cid) for cid in world.records(one).values())
        assert world.spooled() == []
        before = len(world.events(one))
        changed, gone, new = f"{LIKE}/3k{3:011d}", f"{FOLLOW}/3k{4:011d}", f"{LIKE}/3kz"
        edit(one, 2, {changed: "changed", gone: None, new: "new", f"{POST}/3k{5:011d}": None})
        await world.fetch(one)
        assert world.records(one) == wanted(one, LIKE, FOLLOW)
        assert sorted(world.events(one)[before:]) == [
            ("create", new, rev(2)), ("delete", gone, rev(2)), ("update", changed, rev(2)),
        ]  # fmt: skip


@pytest.mark.slow
async def test_a_repository_without_any_wanted_record_is_proven_to_have_none(tmp_path: Path) -> None:
    one, empty = account("one", records(10)), account("empty")
    async with PartHost() as host, world_of(tmp_path, host, "app.bsky.feed.none", "zz.*") as world:
        for each in (one, empty):
            host.serve(each)
            row = await world.fetch(each)
            assert (row.state, row.rev, world.records(each)) == (SyncState.SYNCED, each.rev, {})
        assert outcome(world) == (2, {})


@pytest.mark.slow
async def test_portions_stay_within_the_settings_and_what_the_host_allows(tmp_path: Path) -> None:
    one = account("one", records(40))
    bounds = {"sparse_blocks": 7, "sparse_parallel": 5, "per_host": 3}
    async with PartHost() as host, world_of(tmp_path, host, LIKE, **bounds) as world:
        active: list[int] = []

        async def note() -> None:
            active.append(world.backfill.tools.hosts._state(host_of(host.url)).active)

        host.before = note
        host.serve(one)
        await world.fetch(one)
        assert world.records(one) == wanted(one, LIKE)
        assert max(map(len, host.portions)) == 7
        assert max(active) == 3
        assert len({cid for portion in host.portions for cid in portion}) == sum(map(len, host.portions))
        assert world.backfill.tools.hosts.status()["active"] == 0


# ---- the whole in its place


@pytest.mark.parametrize(
    ("estimate", "rounds", "first", "reason"),
    [
        (Estimate(100, 10_000, 0.1, True), 128, True, ""),
        (Estimate(100, 1900, 0.1, False), 128, True, "small"),
        (Estimate(100, 900, 0.1, False), 128, False, ""),
        (Estimate(100, 10_000, 0.3, True), 128, True, "share"),
        (Estimate(52_000, 500_000, 0.1, True), 128, True, "rounds"),
        (Estimate(500, 50_000, 0.1, True), 1, False, "rounds"),
        (Estimate(65_000, 50_000, 1.0, False), 128, True, ""),
    ],
)
def test_when_the_whole_repository_is_the_better_choice(
    estimate: Estimate, rounds: int, first: bool, reason: str
) -> None:
    assert unfit(estimate, BackfillSettings(sparse_rounds=rounds), first=first) == reason


async def test_a_part_may_take_all_of_its_rounds(tmp_path: Path) -> None:
    """What was fetched already is not counted against those that are left."""
    one = account("one", records(40))
    bounds = {"sparse_blocks": 10, "sparse_parallel": 1}
    async with PartHost() as host, world_of(tmp_path, host, LIKE, **bounds) as world:
        host.serve(one)
        await world.fetch(one)
        rounds = len(host.portions)
        sparse = world.backfill.tools.sparse
        for changes, parts in (({"sparse_rounds": rounds}, 2), ({"sparse_rounds": rounds - 1}, 2)):
            sparse.settings = sparse.settings.model_copy(update=changes)
            await world.fetch(one)
            assert outcome(world)[0] == parts
        assert outcome(world)[1] == {"rounds": 1}


async def test_a_plan_holds_nothing_up_and_ends_once_it_misses_more_than_can_be_fetched() -> None:
    """Whatever a host sends in one round: others go on between its nodes, and not all of them are read."""
    paths = [f"{LIKE}/{number:04d}" for number in range(400)]
    tree = build([(path, dag_cbor_cid(path.encode())) for path in paths])
    turns, wanted = 0, ranges_of([LIKE])

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def taken(rounds: int, **changes: int) -> RangePlan:
        plan = RangePlan(tree.root, wanted, tree.nodes)
        settings = BackfillSettings(sparse_blocks=100, sparse_parallel=1, **changes)
        await go_through(plan, plan.begin(), settings, rounds, partial(next, count()))
        return plan

    waiting = asyncio.create_task(others())
    try:
        assert len((await taken(4, sparse_step=1)).missing(500)) == 400
        assert turns >= len(tree.nodes)
        turns = 0
        assert (await taken(4, sparse_step=100_000)).pending == 400
        assert turns <= 1
    finally:
        waiting.cancel()
    with pytest.raises(Unfit, match="rounds"):
        await taken(3)
    same = build([(path, dag_cbor_cid(b"the same")) for path in paths])
    plan = RangePlan(same.root, wanted, same.nodes)
    settings = BackfillSettings(sparse_blocks=100, sparse_parallel=1, sparse_rounds=3)
    with pytest.raises(Unfit, match="rounds"):
        await go_through(plan, plan.begin(), settings, 3, partial(next, count()))
    assert 300 < plan.found < 400


@pytest.mark.slow
async def test_it_is_fetched_then(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("share", {"sparse_share": 0.1}, "share"),
        ("small", {"sparse_min_records": 5000}, "small"),
        ("rounds", {"sparse_rounds": 1, "sparse_blocks": 1, "sparse_parallel": 1}, "rounds"),
    ]
    async with PartHost() as host, world_of(tmp_path, host, LIKE) as world:
        sparse = world.backfill.tools.sparse
        usual = sparse.settings
        for number, (name, changes, reason) in enumerate(cases, 1):
            one = account(name, records(20))
            host.serve(one)
            sparse.settings = usual.model_copy(update=changes)
            row = await world.fetch(one)
            assert (world.records(one), row.sparse) == (wanted(one, LIKE), False)
            assert (world.backfill.status()["whole"][reason], host.proofs) == (1, number)
            assert host.asked == [account(case[0]).did for case in cases[:number]]


async def test_a_part_that_gives_way_pays_for_the_whole_and_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paid: list[str] = []
    monkeypatch.setattr(Hosts, "pay", lambda _, host: paid.append(host))
    one, other = account("one", records(3)), account("two", records(3))
    bounds = {"sparse_min_records": 5000, "sparse_remembered": 1}
    async with PartHost() as host, world_of(tmp_path, host, LIKE, **bounds) as world:
        for number, each in enumerate((one, one, other, one), 1):
            host.serve(each)
            await world.fetch(each)
            assert world.records(each) == wanted(each, LIKE)
            assert len(paid) == host.proofs + len(host.asked)
            assert (outcome(world), len(host.asked)) == ((0, {"small": number}), number)
        assert host.proofs == 3  # of two, only the last is remembered
        for item in ("", LIKE, POST):
            await world.writer.run("filter", partial(Transaction.set_filter, kind="collections", item=item))
        await world.fetch(one)
        assert host.proofs == 4


async def test_a_host_that_is_to_rest_after_a_lie_is_not_asked_for_the_whole(tmp_path: Path) -> None:
    one = account("one", records(3))
    async with PartHost() as host, world_of(tmp_path, host, LIKE) as world:
        host.spoil_proof = flipped
        host.serve(one)
        state = world.backfill.tools.hosts._state(host_of(host.url))
        state.lies = world.settings.hosts.faults
        row = await world.fetch(one)
        assert (row.state, row.error.partition(":")[0], host.asked) == (SyncState.PENDING, "host_busy", [])
        assert (outcome(world), state.window) == ((0, {"content": 1}), 1)  # it did not answer well


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "sections"),
    [([LIKE], {"backfill": SMALL | {"sparse": False}}), ([LIKE], {"archive": {"cars": True}}), ([], {})],
    ids=["switched off", "archived", "all is wanted"],
)
async def test_parts_are_not_asked_for_where_the_whole_is_needed_or_they_are_switched_off(
    tmp_path: Path, names: list[str], sections: dict[str, Any]
) -> None:
    one = account("one", records())
    sections = {"filter": {"collections": names}, "backfill": SMALL} | sections
    async with PartHost() as host, World(tmp_path, host, **sections) as world:
        if world.settings.archive.cars:
            archive_into(world)
        host.serve(one)
        row = await world.fetch(one)
        assert (row.state, row.sparse, row.complete) == (SyncState.SYNCED, False, not names)
        assert (host.proofs, host.asked, outcome(world)) == (0, [one.did], (0, {}))


@pytest.mark.slow
async def test_a_part_that_is_larger_than_its_limit_gives_way_to_the_whole(tmp_path: Path) -> None:
    one = edit(account("one", records(40)), 2, {f"{LIKE}/3kz{n}": str(n) * 300_000 for n in range(5)})
    async with PartHost() as host, world_of(tmp_path, host, LIKE, sparse_mib=1) as world:
        host.serve(one)
        await world.fetch(one)
        assert world.records(one) == wanted(one, LIKE)
        assert outcome(world) == (0, {"bytes": 1})


async def test_under_a_wider_filter_the_rest_is_fetched_and_what_else_is_held_needs_the_whole(
    tmp_path: Path,
) -> None:
    one = account("one", records())
    async with PartHost() as host, world_of(tmp_path, host, LIKE) as world:
        host.serve(one)
        await world.fetch(one)
        for item in ("", LIKE, FOLLOW):
            await world.writer.run("filter", partial(Transaction.set_filter, kind="collections", item=item))
        row = await world.fetch(one)
        assert (world.records(one), row.sparse) == (wanted(one, LIKE, FOLLOW), True)
        await world.writer.run("filter", lambda tx: tx.drop_filter("collections", LIKE))
        edit(one, 2, {f"{LIKE}/3k{3:011d}": None, f"{LIKE}/3k{4:011d}": "changed"})
        host.serve(one)
        row = await world.fetch(one)
        stale = {f"{LIKE}/3k{4:011d}"}
        assert world.records(one) == {k: v for k, v in wanted(one, LIKE, FOLLOW).items() if k not in stale}
        assert (row.sparse, host.asked) == (False, [one.did])


@pytest.mark.slow
@pytest.mark.parametrize("status", [404, 405, 501])
async def test_a_host_without_getblocks_is_not_asked_for_parts_again(tmp_path: Path, status: int) -> None:
    one, other = account("one", records()), account("two", records())

    async def refuse() -> web.StreamResponse:
        return refusal("MethodNotImplemented", status)

    async with PartHost() as host, world_of(tmp_path, host, LIKE) as world:
        host.before = refuse
        for each in (one, other):
            host.serve(each)
            row = await world.fetch(each)
            assert (world.records(each), row.sparse) == (wanted(each, LIKE), False)
        assert (host.proofs, host.asked) == (1, [one.did, other.did])
        assert outcome(world) == (0, {"no_blocks": 1, "host": 1})
        hosts = world.backfill.tools.hosts
        now = hosts.clock()
        hosts.clock = lambda: now + world.settings.backfill.sparse_recheck
        assert hosts.gives_parts(host_of(host.url))


@pytest.mark.slow
async def test_a_host_in_trouble_is_not_asked_for_the_whole_instead(tmp_path: Path) -> None:
    one = account("one", records())

    async def limit() -> web.StreamResponse:
        return await answer_with(429, {"Retry-After": "30"})(None)  # type: ignore[arg-type]

    async with PartHost() as host, world_of(tmp_path, host, LIKE) as world:
        host.before = limit
        host.serve(one)
        row = await world.fetch(one)
        assert (row.state, row.error.partition(":")[0], row.attempt) == (SyncState.PENDING, "rate_limited", 1)
        assert world.backfill.tools.hosts.penalty_s(host_of(host.url)) > 20
        assert (host.asked, world.spooled()) == ([], [])
        world.forgive()
        await world.change(one, attempt=3)  # as long as parts fail, the whole is asked for in the end
        row = await world.fetch(one)
        assert (row.state, host.asked) == (SyncState.SYNCED, [one.did])


# ---- a repository that changes meanwhile


async def test_a_repository_that_moves_on_is_gone_on_with_from_its_newer_root(tmp_path: Path) -> None:
    one = account("one", records(40))
    truth: dict[str, dict[str, bytes]] = {}

    async def move() -> None:
        if (minutes := len(host.portions)) in (2, 4):
            edit(one, minutes, {f"{LIKE}/3k{n:011d}": f"changed {minutes}" for n in range(40)})
            truth[one.rev] = wanted(one, LIKE)

    bounds = {"sparse_blocks": 10, "sparse_parallel": 1, "sparse_restarts": 2}
    async with PartHost() as host, world_of(tmp_path, host, LIKE, **bounds) as world:
        host.before = move
        host.serve(one)
        row = await world.fetch(one)
        assert (row.rev, world.records(one)) == (rev(4), truth[rev(4)])
        assert (outcome(world), host.proofs) == ((1, {}), 3)


@pytest.mark.slow
async def test_one_that_moves_on_all_the_time_is_fetched_whole(tmp_path: Path) -> None:
    one = account("one", records())

    async def move() -> None:
        edit(one, len(host.portions) + 1, {f"{LIKE}/3kz{len(host.portions)}": "new"})
        host.serve(one)

    async with PartHost() as host, world_of(tmp_path, host, LIKE, sparse_restarts=2) as world:
        host.before = move
        host.serve(one)
        row = await world.fetch(one)
        assert (world.records(one), row.rev, row.sparse) == (wanted(one, LIKE), one.rev, False)
        assert outcome(world) == (0, {"moving": 1})
        assert host.proofs == 4


# ---- lies


def without_last(blocks: Blocks) -> Blocks:
    return blocks[:-1]


def flipped(blocks: Blocks) -> Blocks:
    (cid, block), *others = blocks
    return [(cid, block[:-1] + bytes((block[-1] ^ 1,))), *others]


def others(blocks: Blocks) -> Blocks:
    """True blocks under CIDs that nobody asked for."""
    return account("zzz", records(3)).blocks()[: len(blocks)]


def nothing(blocks: Blocks) -> Blocks:
    return []


LIES: list[tuple[str, Callable[[Blocks], Blocks], str]] = [
    ("spoil", without_last, "missing"),
    ("spoil", flipped, "content"),
    ("spoil", others, "missing"),
    ("spoil", nothing, "missing"),
    ("spoil_proof", flipped, "content"),
    ("spoil_proof", nothing, "content"),
]


async def test_lies_about_parts_are_met_by_fetching_the_whole(tmp_path: Path) -> None:
    async with PartHost() as host, world_of(tmp_path, host, LIKE) as world:
        for number, (hook, lie, reason) in enumerate(LIES):
            one = account(f"lie{'abcdef'[number]}", records(20))
            host.serve(one)
            world.forgive()
            setattr(host, hook, lie)
            row = await world.fetch(one)
            setattr(host, hook, lambda blocks: blocks)
            assert (world.records(one), row.state, row.sparse) == (wanted(one, LIKE), SyncState.SYNCED, False)
            reasons = [reason for _, _, reason in LIES[: number + 1]]
            assert outcome(world) == (0, Counter(reasons))
            assert not world.backfill.tools.hosts.gives_parts(host_of(host.url))


def junk(count: int, size: int) -> Blocks:
    made = [number.to_bytes(4, "big") * (size // 4) for number in range(count)]
    return [(dag_cbor_cid(block), block) for block in made]


@pytest.mark.parametrize(
    ("more", "reason", "parts"),
    [((400, 8), "no_proofs", False), ((4, 300_000), "bytes", True)],
    ids=["blocks", "bytes"],
)
async def test_what_a_proof_brings_along_is_bounded(
    tmp_path: Path, more: tuple[int, int], reason: str, parts: bool
) -> None:
    """By number, and what sends more of them is no proof; and by bytes, which is no fault of the host."""
    one = account("one", records(20))
    async with PartHost() as host, world_of(tmp_path, host, LIKE) as world:
        host.spoil_proof = lambda blocks: [*blocks, *junk(*more)]
        host.serve(one)
        row = await world.fetch(one)
        assert (world.records(one), row.sparse) == (wanted(one, LIKE), False)
        assert (outcome(world), host.asked) == ((0, {reason: 1}), [one.did])
        assert world.backfill.tools.hosts.gives_parts(host_of(host.url)) is parts


@pytest.mark.slow
async def test_a_proof_that_leaves_nodes_out_proves_no_absence(tmp_path: Path) -> None:
    """The commit and the root alone: what lies below is asked for, not taken for absent."""
    one = account("one", records())
    async with PartHost() as host, world_of(tmp_path, host, FOLLOW) as world:
        host.spoil_proof = lambda blocks: blocks[:2]
        host.serve(one)
        await world.fetch(one)
        assert world.records(one) == wanted(one, FOLLOW)
        assert outcome(world) == (1, {})


@pytest.mark.slow
async def test_an_older_root_than_is_stored_deletes_nothing(tmp_path: Path) -> None:
    one = account("one", records())
    old = one.copy()
    async with PartHost() as host, world_of(tmp_path, host, LIKE) as world:
        edit(one, 2, {f"{LIKE}/3kz": "new"})
        host.serve(one)
        await world.fetch(one)
        host.serve(old)
        row = await world.fetch(one)
        assert (row.error.partition(":")[0], row.rev) == ("below_min_rev", rev(2))
        assert world.records(one) == wanted(one, LIKE)


@pytest.mark.slow
async def test_another_key_s_signature_is_refused_and_the_whole_not_even_asked_for(tmp_path: Path) -> None:
    one, forged = account("one", records()), account("one", records())
    forged.key = SigningKey.derive("k256", "another")
    forged.sign(rev(3))
    async with PartHost() as host, world_of(tmp_path, host, LIKE) as world:
        host.serve(forged)
        host.keys[one.did] = one.key.multikey
        row = await world.fetch(one)
        assert (row.error.partition(":")[0], host.asked) == ("signature", [])
        assert world.records(one) == {}


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 3])
async def test_killed_while_a_part_is_applied_it_goes_on_and_tells_nothing_twice(
    tmp_path: Path, nth: int
) -> None:
    one = account("one", records(20))
    async with PartHost() as host:
        host.serve(one)
        async with world_of(tmp_path, host, LIKE) as world:
            kill_at(world, "after backfill_apply", nth)
            with pytest.raises(WriterPoisoned):
                await request_and_run(world, one)
        async with world_of(tmp_path, host, LIKE) as world:
            assert world.row(one).state is SyncState.BACKFILLING
            await world.running(lambda: world.row(one).state is SyncState.SYNCED)
            assert world.records(one) == wanted(one, LIKE)
            assert world.events(one) == [("create", path, one.rev) for path in sorted(wanted(one, LIKE))]
            assert (world.row(one).sparse, world.spooled()) == (True, [])
