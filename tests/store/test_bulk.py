"""put_records gives the very store that put_record gives, row by row, whatever was there before."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.errors import BadInput
from indexer.store.codecs import INVALID, OVERSIZE, AccountStatus, Mode
from indexer.store.database import Database
from indexer.store.keyspaces import BLOCK_REFS, CHECKPOINT, COUNTS, CURSORS, KEYSPACES, RECORDS, REFLOG
from indexer.store.refcounts import fold
from indexer.store.transaction import CountedBlocks, NewRecord, Transaction
from tests.store.support import ALICE, BOB, REV, SYNCED, Store, block_of, cid_of, founded, opened

Rows = dict[str, list[tuple[bytes, bytes]]]
Act = Callable[[Transaction], None]

PATHS = tuple(f"a.b.{collection}/{number}" for collection in "cd" for number in range(6))
records_of = st.dictionaries(
    st.sampled_from(PATHS),
    st.tuples(st.sampled_from(("one", "two", "three")), st.sampled_from((0, 0, 0, 0, INVALID, OVERSIZE))),
    max_size=8,
)


def records(texts: dict[str, tuple[str, int]]) -> list[NewRecord]:
    found = []
    for path, (text, flags) in sorted(texts.items()):
        block = block_of(text)
        found.append((path, cid_of(block), block, flags))
    return found


def in_bulk(did: str, items: Sequence[NewRecord]) -> Act:
    return lambda tx: tx.put_records(did, REV, items, live=False)


def one_by_one(did: str, items: Sequence[NewRecord]) -> Act:
    def act(tx: Transaction) -> None:
        for path, cid, block, flags in items:
            tx.put_record(did, path, cid, block, REV, live=False, flags=flags)

    return act


def rows(store: Store) -> Rows:
    return {name: list(store.db.raw_scan(name, None, None)) for name in KEYSPACES}


async def rows_at_rest(store: Store) -> Rows:
    """Every row once the log is folded, but for how far the fold is: its rows number what was logged."""
    await store.checkpoint.run_once()
    found = rows(store)
    assert found[REFLOG.name] == []
    found[CURSORS.name] = [row for row in found[CURSORS.name] if row[0] != CHECKPOINT.encode()]
    found[COUNTS.name] = [row for row in found[COUNTS.name] if row[0] != b"gc/checkpoints"]
    return found


class Frozen:
    """A clock that stands still, so that times depend on the number of events alone."""

    def __call__(self) -> int:
        return 1_700_000_000_000_000


async def outcome(put: Callable[[str, Sequence[NewRecord]], Act], plan: Plan) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        async with opened(Path(folder), mode=plan.mode, clock=Frozen()) as store:
            await store.do(lambda tx: tx.set_repo(ALICE, SYNCED))
            await store.do(one_by_one(ALICE, plan.before))
            await store.do(*plan.acts(put))
            if not plan.mode.ephemeral:
                store.assert_clean()
            return await rows_at_rest(store)


class Plan:
    """What is stored before, what the group does first, what it puts, what it does then."""

    def __init__(
        self, mode: Mode, before: list[NewRecord], pending: list[NewRecord], puts: list[list[NewRecord]],
        wiped: bool, deletes: list[str],
    ) -> None:  # fmt: skip
        self.mode = mode
        self.before = before
        self.pending = pending
        self.puts = puts
        self.wiped = wiped
        self.deletes = deletes

    def acts(self, put: Callable[[str, Sequence[NewRecord]], Act]) -> list[Act]:
        acts: list[Act] = []
        if self.wiped:
            acts.append(lambda tx: tx.wipe_repo(ALICE, AccountStatus.ACTIVE))
        acts.append(one_by_one(ALICE, self.pending))
        acts += [put(ALICE, part) for part in self.puts]
        acts += [
            lambda tx, path=path: tx.delete_record(ALICE, path, REV, live=True)  # type: ignore[misc]
            for path in self.deletes
        ]
        return acts


plans = st.builds(
    lambda mode, before, pending, puts, wiped, deletes: Plan(
        mode, records(before), records(pending), [records(part) for part in puts], wiped, deletes
    ),
    st.sampled_from((Mode(), Mode(), Mode(blocks=False), Mode(ephemeral=True))),
    st.just({}) | records_of,
    st.just({}) | records_of,
    st.lists(records_of, min_size=1, max_size=3),
    st.booleans(),
    st.lists(st.sampled_from(PATHS), max_size=3),
)


@given(plans)
@settings(max_examples=30, deadline=None)
def test_the_store_is_the_same_to_the_byte(plan: Plan) -> None:
    assert asyncio.run(outcome(in_bulk, plan)) == asyncio.run(outcome(one_by_one, plan))


@pytest.mark.parametrize("stored", [0, 3, 5])
@pytest.mark.parametrize("flags", [0, INVALID])
def test_where_one_of_them_is_stored_they_go_in_one_by_one(stored: int, flags: int) -> None:
    puts = records(dict.fromkeys(PATHS[:6], ("new", 0)))
    plan = Plan(Mode(), records({PATHS[stored]: ("old", flags)}), [], [puts], wiped=False, deletes=[])
    assert asyncio.run(outcome(in_bulk, plan)) == asyncio.run(outcome(one_by_one, plan))


#: How many records, whether they share the commit of those before, and whether a fold comes first.
pieces_of = st.lists(st.tuples(st.integers(0, len(PATHS)), st.booleans(), st.booleans()), max_size=6)


@given(records_of, records_of, pieces_of, st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_repository_put_piece_by_piece_is_the_same_too(
    before: dict[str, tuple[str, int]],
    whole: dict[str, tuple[str, int]],
    cuts: list[tuple[int, bool, bool]],
    gone: bool,
    folded: bool,
) -> None:
    async def rows_after(counted: CountedBlocks | None) -> Rows:
        with tempfile.TemporaryDirectory() as folder:
            async with opened(Path(folder), clock=Frozen()) as store:
                await store.do(partial(founded, did=ALICE), one_by_one(ALICE, records(before)))
                if gone:
                    await store.do(*[partial(deleted, path=path) for path in before])
                if folded:
                    await store.checkpoint.run_once()
                group: list[Act] = []
                rest = records(whole)
                for size, together, fold_first in [*cuts, (len(rest), False, False)]:
                    if not together:
                        await store.do(*group)
                        group = []
                    if fold_first:
                        await store.checkpoint.run_once()
                    part, rest = rest[:size], rest[size:]
                    put = partial(Transaction.put_records, did=ALICE, rev=REV, records=part, live=False)
                    group.append(partial(put, counted=counted) if counted else one_by_one(ALICE, part))
                await store.do(*group)
                store.assert_clean()
                return await rows_at_rest(store)

    def deleted(tx: Transaction, path: str) -> None:
        tx.delete_record(ALICE, path, REV, live=False)

    assert asyncio.run(rows_after(CountedBlocks(len(whole)))) == asyncio.run(rows_after(None))


async def test_counts_of_a_new_repository_are_looked_for_only_where_they_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    get = Database.raw_multi_get

    def watched(db: Database, name: str, keys: Sequence[bytes]) -> list[bytes | None]:
        asked.extend([len(keys)] if name == BLOCK_REFS.name else [])
        return get(db, name, keys)

    monkeypatch.setattr(Database, "raw_multi_get", watched)
    counted = CountedBlocks(2_000)
    put = partial(Transaction.put_records, did=ALICE, rev=REV, live=False, counted=counted)
    async with opened(tmp_path) as store:
        await store.do(partial(founded, did=ALICE), partial(put, records=some(1_000)))
        others = records({f"a.b.d/{number:04}": (f"other {number}", 0) for number in range(1_000)})
        await store.do(partial(put, records=others))
        assert sum(asked) < 100  # the filter is wrong for one in 64 at this load
        await store.do(partial(put, records=some(10, "e")))
        assert counts(store)[some(1)[0][1]] == 4
        store.assert_clean()


@pytest.mark.parametrize("together", [True, False])
async def test_counts_that_are_in_the_log_when_an_apply_begins_are_looked_for(
    tmp_path: Path, together: bool
) -> None:
    """A fold writes them into the rows between the units of the apply."""
    one = cid_of(block_of("one"))
    put = partial(Transaction.put_records, did=ALICE, rev=REV, live=False, counted=CountedBlocks(100))
    first = partial(put, records=records({"a.b.d/1": ("two", 0)}))
    logged = one_by_one(ALICE, records({"a.b.c/1": ("one", 0)}))
    async with opened(tmp_path) as store:
        await store.do(partial(founded, did=ALICE), logged, *([first] if together else []))
        if not together:
            await store.do(first)
        await store.checkpoint.run_once()
        await store.do(partial(put, records=records({"a.b.e/1": ("one", 0)})))
        assert counts(store)[one] == 4
        store.assert_clean()


async def test_counts_that_an_apply_finds_in_its_group_are_added_to(tmp_path: Path) -> None:
    one = cid_of(block_of("one"))
    put = partial(Transaction.put_records, did=ALICE, rev=REV, live=False, counted=CountedBlocks(100))
    async with opened(tmp_path) as store:
        await store.do(
            partial(founded, did=ALICE),
            in_bulk(ALICE, records({"a.b.c/1": ("one", 0)})),
            partial(put, records=records({"a.b.d/1": ("one", 0)})),
        )
        assert counts(store) == {one: 4}
        store.assert_clean()


def test_the_filter_forgets_nothing_and_has_a_bound() -> None:
    cids = [cid_of(str(number).encode()) for number in range(3_000)]
    counted = CountedBlocks(2_000)
    assert len(counted.add(cids[:1_000])) + len(counted.add(cids[1_000:2_000])) < 100
    assert counted.add(cids[:2_000]) == set(cids[:2_000])
    assert len(CountedBlocks(10**9)._bits) == 1 << 20
    assert CountedBlocks(0).add(cids[:2]) <= {cids[1]}


def some(count: int, collection: str = "c") -> list[NewRecord]:
    return records({f"a.b.{collection}/{number:04}": (f"text {number}", 0) for number in range(count)})


async def test_new_records_are_not_looked_up_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("put_record")

    async with opened(tmp_path) as store:
        await store.do(*[partial(founded, did=did) for did in (ALICE, BOB)], in_bulk(ALICE, some(20)))
        monkeypatch.setattr(Transaction, "put_record", refuse)
        await store.do(in_bulk(ALICE, some(20, "d")), in_bulk(BOB, some(20)))
        assert store.db.count("records") == 60
        store.assert_clean()


def counts(store: Store) -> dict[bytes, int]:
    return {cid: count for (_, cid), count in store.db.scan(BLOCK_REFS)}


async def test_new_records_are_counted_in_their_rows_without_the_log(tmp_path: Path) -> None:
    """Blocks under two keys of one batch, of one group and of two groups are counted each time."""
    one, two = cid_of(block_of("one")), cid_of(block_of("two"))
    first = records({"a.b.c/1": ("one", 0), "a.b.c/2": ("one", 0), "a.b.c/3": ("two", 0)})
    second = records({"a.b.d/1": ("two", 0), "a.b.d/2": ("three", 0)})
    async with opened(tmp_path) as store:
        await store.do(partial(founded, did=ALICE), in_bulk(ALICE, first), in_bulk(ALICE, second))
        assert sorted(counts(store).values()) == [2, 4, 4]
        await store.do(in_bulk(ALICE, records({"a.b.e/1": ("one", 0)})))
        assert (counts(store)[one], counts(store)[two]) == (6, 4)
        assert list(store.db.scan(REFLOG)) == []
        assert store.writer.state.refs.unfolded == 0
        store.assert_clean()


async def test_a_fold_under_way_undoes_no_count(tmp_path: Path) -> None:
    """What waits to be folded may have been read already, with the counts as they were."""
    one = cid_of(block_of("one"))
    again = in_bulk(ALICE, records({"a.b.d/1": ("one", 0)}))
    async with opened(tmp_path) as store:
        await store.put(ALICE, "a.b.c/1", "one")
        plan = store.checkpoint._plan(store.writer.state.refs.next_row)
        read = store.checkpoint._counts(plan)
        await store.do(again)
        await store.do(lambda tx: fold(plan, read, tx))
        assert await store.writer.run("count", lambda tx: tx.block_count(ALICE, one)) == 4
        store.assert_clean()
        await store.checkpoint.run_once()
        assert counts(store) == {one: 4}


async def test_after_the_fold_and_a_restart_the_log_is_not_needed_again(tmp_path: Path) -> None:
    one = cid_of(block_of("one"))
    async with opened(tmp_path) as store:
        await store.put(ALICE, "a.b.c/1", "one")
        await store.put(BOB, "a.b.c/1", "one")
    async with opened(tmp_path) as store:  # the rows of both wait in the log
        await store.do(in_bulk(ALICE, records({"a.b.d/1": ("one", 0)})))
        assert len(list(store.db.scan(REFLOG))) == 3
        await store.checkpoint.run_once()
        await store.do(in_bulk(ALICE, records({"a.b.e/1": ("one", 0)})))
        assert store.db.get(BLOCK_REFS, (ALICE, one)) == 6
        assert list(store.db.scan(REFLOG)) == []
        store.assert_clean()


async def test_a_life_begun_in_the_group_of_the_wipe_counts_from_nothing(tmp_path: Path) -> None:
    again = records({"a.b.c/1": ("one", 0)})
    for point_rows in (0, 1000):  # by range, and row by row
        async with opened(tmp_path / str(point_rows), gc={"wipe_point_rows": point_rows}) as store:
            await store.do(partial(founded, did=ALICE), in_bulk(ALICE, again))
            await store.do(
                lambda tx: tx.wipe_repo(ALICE, AccountStatus.ACTIVE),
                partial(founded, did=ALICE),
                in_bulk(ALICE, again),
            )
            assert not point_rows or list(store.db.scan(REFLOG))  # whose rows are deleted one by one
            store.assert_clean()
            await store.checkpoint.run_once()
            assert list(counts(store).values()) == [2]


async def test_a_count_that_was_wiped_row_by_row_is_none(tmp_path: Path) -> None:
    """The new path lies outside of what is stored, so that the counts are raised past the log."""
    async with opened(tmp_path, gc={"wipe_point_rows": 1000}) as store:
        await store.do(partial(founded, did=ALICE), in_bulk(ALICE, records({"a.b.c/1": ("one", 0)})))
        await store.do(
            lambda tx: tx.wipe_repo(ALICE, AccountStatus.ACTIVE),
            in_bulk(ALICE, records({"a.b.d/1": ("one", 0)})),
            in_bulk(ALICE, records({"a.b.e/1": ("one", 0)})),
        )
        assert list(counts(store).values()) == [4]
        assert list(store.db.scan(REFLOG)) == []
        store.assert_clean()


async def test_counts_of_a_step_that_fails_are_taken_back_with_its_wipe(tmp_path: Path) -> None:
    two = cid_of(block_of("two"))

    def bad(tx: Transaction) -> None:
        in_bulk(ALICE, records({"a.b.f/1": ("one", 0), "a.b.f/2": ("two", 0)}))(tx)
        in_bulk(ALICE, records({"a.b.g/1": ("two", 0)}))(tx)
        tx.wipe_repo(ALICE, AccountStatus.ACTIVE)
        in_bulk(ALICE, records({"a.b.h/1": ("one", 0)}))(tx)
        raise BadInput("no")

    good = [in_bulk(ALICE, records({f"a.b.{name}/1": ("two", 0)})) for name in "ij"]
    async with opened(tmp_path) as store:
        await store.do(partial(founded, did=ALICE))
        await store.writer.run_ordered("steps", [good[0], bad, good[1]], lambda _i, _e: lambda _tx: None)
        assert counts(store) == {two: 4}
        store.assert_clean()


async def test_a_negative_count_that_comes_to_zero_is_left_to_the_fold(tmp_path: Path) -> None:
    one = cid_of(block_of("one"))
    async with opened(tmp_path) as store:
        await store.do(partial(founded, did=ALICE), lambda tx: tx.put(BLOCK_REFS, (ALICE, one), -2))
        await store.do(in_bulk(ALICE, records({"a.b.c/1": ("one", 0)})))
        assert counts(store) == {one: -2}
        assert (await store.checkpoint.run_once()).zeroed == 1
        assert counts(store) == {}


async def test_a_step_that_fails_takes_all_of_them_back(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.do(partial(founded, did=ALICE), in_bulk(ALICE, some(3)))
        before = rows(store)

        def step(tx: Transaction) -> None:
            tx.put_records(ALICE, REV, some(5, "d"), live=False)
            tx.put_records(ALICE, REV, some(7, "e"), live=False)
            raise BadInput("no")

        await store.writer.run_ordered("frames", [step], lambda _index, _error: lambda _tx: None)
        assert rows(store) == before
        await store.do(in_bulk(ALICE, some(5, "d")))
        assert len(list(store.db.scan(RECORDS))) == 8
        store.assert_clean()


async def test_something_that_is_not_a_cid_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        bad = [*some(3), ("a.b.d/1", b"short", b"", 0)]
        with pytest.raises(ValueError, match="not a binary CID"):
            await store.do(in_bulk(ALICE, bad))
        assert list(store.db.scan(RECORDS)) == []
