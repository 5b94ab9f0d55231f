"""A changed filter reaches every repository that is held, in bounded steps, whatever is killed when."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from indexer.atproto.cid import dag_cbor_cid
from indexer.atproto.dagcbor import record_from_json
from indexer.config import Settings
from indexer.errors import WriterPoisoned
from indexer.ingest.filters import Filters
from indexer.ingest.revisit import PLAN, Progress, Revisit, Task, revisited, task_of
from indexer.store.codecs import NEW_REPO, AccountStatus, Mode, RepoRow, SyncState, Work
from indexer.store.database import Database
from indexer.store.events import EventLog
from indexer.store.keyspaces import CURSORS
from indexer.store.transaction import Transaction
from indexer.store.writer import Writer

POST, LIKE, PROFILE = "app.bsky.feed.post", "app.bsky.feed.like", "app.bsky.actor.profile"
REV = "3aaaaaaaaaa22"
DIDS = [f"did:plc:{letter * 24}" for letter in "abcdefg"]
ALL, POSTS = Filters(), Filters(collections=(POST,))
NOW = 1_000
SYNCED = NEW_REPO._replace(tracked=True, state=SyncState.SYNCED, rev=REV, min_rev=REV, complete=True)


class Store(NamedTuple):
    db: Database
    writer: Writer
    revisit: Revisit

    async def fill(self, dids: Sequence[str], paths: Sequence[str], row: RepoRow = SYNCED) -> None:
        def work(tx: Transaction) -> None:
            for did in dids:
                tx.set_repo(did, row)
                for path in paths:
                    block = record_from_json({"$type": path.partition("/")[0], "text": path})
                    tx.put_record(did, path, dag_cbor_cid(block), block, REV, live=True)

        await self.writer.run("fill", work)

    async def change(self, old: Filters, new: Filters, *, purge: bool = False) -> None:
        """As the management API does it."""

        def work(tx: Transaction) -> None:
            for item in old.rows():
                tx.drop_filter(*item)
            for item in new.rows():
                tx.set_filter(*item)
            self.revisit.plan(tx, old, new, purge=purge)

        async with self.revisit.changing():
            await self.writer.run("filter_patch", work)

    async def widen(self) -> None:
        await self.change(POSTS, ALL)
        await self.revisit.run_once()

    def paths(self, did: str) -> list[str]:
        return [path for path, _ in self.db.records(did)]

    def row(self, did: str) -> RepoRow:
        row = self.db.repo(did)
        assert row is not None
        return row

    def folded(self) -> dict[str, set[str]]:
        """What a reader of the log holds; every event must fit what came before it."""
        held: dict[str, set[str]] = {}
        epochs: dict[str, int] = {}
        log = EventLog(self.db, self.writer)
        for event in log.read(log.floor, 10_000):
            if event.epoch > epochs.get(event.did, 0):
                epochs[event.did], held[event.did] = event.epoch, set()
            if event.kind != "record":
                continue
            mine, path = held.setdefault(event.did, set()), f"{event.collection}/{event.rkey}"
            assert (path in mine) == (event.action != "create")
            (mine.discard if event.action == "delete" else mine.add)(path)
        return held


@asynccontextmanager
async def store(
    folder: Path, *, step: int = 3, at: Callable[[str], None] | None = None, **tables: Any
) -> AsyncIterator[Store]:
    settings = Settings(data_dir=folder, gc={"step_rows": step}, **tables)
    mode = Mode(ephemeral=settings.ephemeral.enabled, blocks=True)
    with Database.open(folder / "db", memory_mib=32, mode=mode) as db:
        writer = Writer(db, settings, crash_point=at)
        await writer.start()
        try:
            yield Store(db, writer, Revisit(db, writer, settings))
        finally:
            await writer.stop()


class Killed(Exception):
    """The process ends here."""


def kill_at(name: str, nth: int) -> Callable[[str], None]:
    seen: list[str] = []

    def at(point: str) -> None:
        seen.append(point)
        if point == name and seen.count(name) == nth:
            raise Killed

    return at


@pytest.mark.parametrize(
    ("old", "new", "task"),
    [
        (ALL, ALL, 0),
        (ALL, Filters(mode="full", signals=(POST,)), 0),
        (ALL, POSTS, Task.COLLECTIONS),
        (POSTS, ALL, Task.COLLECTIONS | Task.REFETCH),
        (Filters(collections=(POST, LIKE)), Filters(collections=(LIKE, POST)), 0),
        (Filters(collections=("app.bsky.*",)), POSTS, Task.COLLECTIONS),
        (ALL, Filters(excludes=frozenset(DIDS)), Task.EXCLUDE),
        (Filters(excludes=frozenset(DIDS)), Filters(excludes=frozenset(DIDS[:1])), Task.INCLUDE),
    ],
)
def test_what_a_change_asks_of_what_is_held(old: Filters, new: Filters, task: int) -> None:
    assert task_of(old, new, purge=False) == task
    assert task_of(old, new, purge=True) == task | Task.PURGE


WIDER, NARROWER = Task.COLLECTIONS | Task.REFETCH, int(Task.COLLECTIONS)
BROKEN = SYNCED._replace(state=SyncState.DESYNCHRONIZED)


@pytest.mark.parametrize(
    ("row", "task", "changes"),
    [
        (SYNCED, WIDER, {"state": SyncState.DESYNCHRONIZED, "due": NOW, "complete": False}),
        (
            SYNCED._replace(work=int(Work.VERIFY_HANDLE | Work.RESOLVE)),
            WIDER,
            {"state": SyncState.DESYNCHRONIZED, "due": NOW, "complete": False},
        ),
        (SYNCED, NARROWER, {"complete": False}),
        (SYNCED, Task.INCLUDE, {}),
        (
            SYNCED._replace(status=AccountStatus.SUSPENDED),
            WIDER,
            {"state": SyncState.DESYNCHRONIZED, "complete": False},
        ),
        # Who waits for a fetch gets it under the new filter anyhow, at its own time.
        (BROKEN._replace(due=NOW + 9, attempt=3), WIDER, {"complete": False}),
        (SYNCED._replace(state=SyncState.BACKFILLING, due=1), WIDER,
         {"state": SyncState.DESYNCHRONIZED, "due": NOW, "complete": False}),
        (SYNCED._replace(state=SyncState.BACKFILLING, due=1), NARROWER,
         {"state": SyncState.DESYNCHRONIZED, "due": NOW, "complete": False}),
        (SYNCED._replace(state=SyncState.BACKFILLING, due=1), Task.INCLUDE, {}),
        (BROKEN, Task.INCLUDE, {"due": NOW}),
        (BROKEN, Task.EXCLUDE | Task.PURGE, {}),
        (BROKEN._replace(work=int(Work.RESOLVE)), Task.INCLUDE, {}),
        (BROKEN._replace(work=int(Work.VERIFY_HANDLE)), Task.INCLUDE, {"due": NOW}),
    ],
)  # fmt: skip
def test_a_row_under_a_new_filter(row: RepoRow, task: int, changes: dict[str, Any]) -> None:
    assert revisited(row, False, False, int(task), NOW) == row._replace(**changes)


def test_without_collections_to_leave_out_a_repository_stays_complete() -> None:
    assert revisited(SYNCED, False, True, WIDER, NOW).complete


def test_an_excluded_repository_rests() -> None:
    row = SYNCED._replace(work=int(Work.RESOLVE))
    resting = SYNCED._replace(state=SyncState.DESYNCHRONIZED)
    assert revisited(row, True, True, int(Task.EXCLUDE), NOW) == resting
    assert revisited(resting, True, True, WIDER, NOW) == resting
    assert revisited(resting, False, True, int(Task.INCLUDE), NOW) == resting._replace(due=NOW)


#: The steps: three repositories, three, one, and the one that finds nothing left.
_POINTS = [("before filter_patch", 1), ("after filter_patch", 1)]
_POINTS += [(f"{when} filter_revisit", nth) for when in ("before", "after") for nth in range(1, 5)]


@pytest.mark.parametrize(("point", "nth"), _POINTS)
async def test_killed_at_any_moment_a_wider_filter_queues_all_or_nothing_was_changed(
    tmp_path: Path, point: str, nth: int
) -> None:
    async with store(tmp_path, at=kill_at(point, nth)) as before:
        await before.fill(DIDS, [f"{POST}/a"])
        with pytest.raises(WriterPoisoned):
            await before.widen()
    async with store(tmp_path) as after:
        stored = after.db.filters()
        await after.revisit.run_once()
        if point == "before filter_patch":
            assert stored == []
            assert all(after.row(did) == SYNCED for did in DIDS)
        else:
            assert POSTS.with_rows(stored) == ALL
            assert all(after.row(did).due and after.row(did).state is not SyncState.SYNCED for did in DIDS)
        assert after.db.get(CURSORS, PLAN) is None


@pytest.mark.parametrize("nth", [0, 1, 3, 6])
async def test_a_purge_deletes_what_is_not_wanted_and_tells_it_across_a_kill(
    tmp_path: Path, nth: int
) -> None:
    wanted = [f"{POST}/{number}" for number in range(4)]
    paths = [*wanted, *(f"{LIKE}/{number}" for number in range(5)), f"{PROFILE}/self"]
    async with store(tmp_path, at=kill_at("after filter_revisit", nth)) as before:
        await before.fill(DIDS[:3], paths)
        await before.fill(DIDS[3:4], paths, NEW_REPO._replace(rev=REV))  # followed no longer, still held
        await before.change(ALL, POSTS, purge=True)
        if nth:
            with pytest.raises(WriterPoisoned):
                await before.revisit.run_once()
    async with store(tmp_path) as after:
        progress = await after.revisit.run_once()
        assert progress == Progress(True, 0, 4 * 6)
        for did in DIDS[:4]:
            assert after.paths(did) == wanted
            assert after.folded()[did] == set(wanted)
            assert not after.row(did).complete


async def test_a_step_of_a_purge_is_bounded(tmp_path: Path) -> None:
    async with store(tmp_path, step=5) as made:
        await made.fill(DIDS[:1], [f"{LIKE}/{number:03d}" for number in range(40)])
        await made.change(ALL, POSTS, purge=True)
        left = [40]
        while await made.revisit._step():
            left.append(len(made.paths(DIDS[0])))
            assert left[-2] - left[-1] <= 5
        assert left[-1] == 0


async def test_a_step_ends_after_the_wipe_that_fills_it(tmp_path: Path) -> None:
    without = Filters(excludes=frozenset(DIDS))
    async with store(tmp_path, step=5) as made:
        await made.fill(DIDS, [f"{POST}/{number}" for number in range(4)])
        await made.change(ALL, without, purge=True)
        assert await made.revisit._step()
        assert [len(made.paths(did)) for did in DIDS] == [0] + [4] * 6
        assert await made.revisit.run_once() == Progress(True, 0, 28)


async def test_excluded_accounts_are_purged_on_request_and_queued_when_they_are_included_again(
    tmp_path: Path,
) -> None:
    without = Filters(excludes=frozenset(DIDS[:2]))
    async with store(tmp_path) as made:
        await made.fill(DIDS[:3], [f"{POST}/a"])
        await made.change(ALL, without)
        assert await made.revisit.run_once() == Progress(True, 0, 0)
        assert made.paths(DIDS[0])
        await made.change(without, without, purge=True)
        assert (await made.revisit.run_once()).purged == 2
        assert [made.paths(did) for did in DIDS[:3]] == [[], [], [f"{POST}/a"]]
        assert made.row(DIDS[2]) == SYNCED
        await made.change(without, ALL)
        assert (await made.revisit.run_once()).queued == 2
        assert [made.row(did).due > 0 for did in DIDS[:3]] == [True, True, False]


async def test_a_newer_change_starts_the_round_again_with_what_both_ask(tmp_path: Path) -> None:
    wider = Filters(collections=(POST, LIKE))
    async with store(tmp_path) as made:
        await made.fill(DIDS, [])
        await made.change(POSTS, wider)
        assert await made.revisit._step()
        await made.change(wider, Filters(collections=(POST, LIKE), excludes=frozenset(DIDS[:1])))
        await made.revisit.run_once()
        assert [made.row(did).due > 0 for did in DIDS] == [False] + [True] * 6


@pytest.mark.parametrize("kept", [[], [POST]])
async def test_a_filter_that_the_settings_changed_is_a_change_like_others(
    tmp_path: Path, kept: list[str]
) -> None:
    async with store(tmp_path) as first:
        await first.fill(DIDS, [])
        await first.revisit.adopt(POSTS)
        assert await first.revisit.run_once() == Progress(True, 0, 0)
    async with store(tmp_path, filter={"collections": kept}) as second:
        await second.revisit.adopt(Filters(collections=tuple(kept)))
        assert (await second.revisit.run_once()).queued == (0 if kept else len(DIDS))


async def test_ephemeral_mode_has_no_round(tmp_path: Path) -> None:
    async with store(tmp_path, ephemeral={"enabled": True}) as made:
        await made.change(POSTS, ALL)
        assert made.db.get(CURSORS, PLAN) is None
