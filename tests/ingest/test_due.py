"""The queue of due work: nothing is forgotten, nobody starves, questions keep their pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from indexer.config import Settings
from indexer.errors import FetchRefused, StoreFull, UrlRefused, WorkerDied
from indexer.ingest import due
from indexer.ingest.due import DueQueue, Pace, Waits
from indexer.store.codecs import NEW_REPO, Mode, Work
from indexer.store.database import Database
from indexer.store.writer import Writer

RESOLVE = Work.RESOLVE
SHORT = Waits(0.01, 0.05, 0.1)
OWED = NEW_REPO._replace(tracked=True, work=RESOLVE)


@asynccontextmanager
async def queue(
    folder: Path,
    work_off: Callable[[str], Awaitable[float | None]],
    *owed: str,
    limit: int = 100,
    concurrency: int = 4,
    waits: Waits = SHORT,
) -> AsyncIterator[DueQueue]:
    """A queue that runs over a store in which these repositories have work."""
    db = Database.open(folder / "db", memory_mib=16, mode=Mode())
    writer = Writer(db, Settings(data_dir=folder))
    await writer.start()
    for did in owed:
        await writer.run("owe", lambda tx, did=did: tx.set_repo(did, OWED))  # type: ignore[misc]
    made = DueQueue(db, RESOLVE, work_off, limit=limit, concurrency=concurrency, waits=waits)
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await writer.stop()
        db.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(due, "_PASS_S", 0.02)


@pytest.mark.parametrize(
    "error",
    [
        FetchRefused("too large", status=200), UrlRefused("private"), WorkerDied("twice"),
        UnicodeError("label too long"), ZeroDivisionError("ours"), StoreFull("no room"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
async def test_work_that_fails_in_any_way_is_tried_again(tmp_path: Path, error: Exception) -> None:
    tries: list[str] = []

    async def work_off(did: str) -> None:
        tries.append(did)
        if len(tries) < 3:
            raise error

    async with queue(tmp_path, work_off, "did:plc:a") as made:
        await until(lambda: len(tries) == 3 and not len(made))


async def test_who_waits_longest_makes_room_and_gets_its_turn_again(
    tmp_path: Path,
) -> None:
    dead = [f"did:plc:dead{n}" for n in range(8)]
    tried: list[str] = []

    async def work_off(did: str) -> None:
        tried.append(did)
        if "dead" in did:
            raise UrlRefused("never")

    async with queue(tmp_path, work_off, *dead, limit=3, waits=Waits(1000.0, 1000.0, 1000.0)) as made:
        await until(lambda: set(tried) == set(dead))
        assert len(made) <= 3
        assert made.add("did:plc:live")
        await until(lambda: "did:plc:live" in tried)
        before = len(tried)
        await until(lambda: set(tried[before:]) == set(dead))  # round after round


async def test_a_queue_of_nothing_but_work_under_way_refuses_and_looks_again(tmp_path: Path) -> None:
    gate, tried = asyncio.Event(), set[str]()

    async def work_off(did: str) -> None:
        tried.add(did)
        await gate.wait()

    dids = [f"did:plc:{n}" for n in range(5)]
    async with queue(tmp_path, work_off, *dids, limit=2) as made:
        await until(lambda: len(tried) == 2)
        assert not made.add("did:plc:other")
        gate.set()
        await until(lambda: tried >= set(dids))


async def test_new_work_cuts_a_pause_short_but_not_the_wait_after_a_failure(tmp_path: Path) -> None:
    tried: list[str] = []

    async def work_off(did: str) -> float | None:
        tried.append(did)
        if did == "did:plc:fails":
            raise FetchRefused("later", status=400)
        return 1000.0 if len(tried) == 1 else None

    async with queue(tmp_path, work_off) as made:
        made.add("did:plc:a")
        await until(lambda: tried == ["did:plc:a"] and not made._working)
        made.add("did:plc:a", fresh=False)
        assert len(made) == 1
        made.add("did:plc:a")
        await until(lambda: tried == ["did:plc:a"] * 2)
        made.add("did:plc:fails")
        await until(lambda: "did:plc:fails" in made._waiting and tried[-1] == "did:plc:fails")
        wait = made._waiting["did:plc:fails"]
        made.add("did:plc:fails")
        assert made._waiting["did:plc:fails"] is wait


async def test_work_that_comes_while_its_repository_is_worked_on_is_done_after_it(tmp_path: Path) -> None:
    gate, tried = asyncio.Event(), list[str]()

    async def work_off(did: str) -> None:
        tried.append(did)
        await gate.wait()

    async with queue(tmp_path, work_off) as made:
        made.add("did:plc:a")
        await until(lambda: len(tried) == 1)
        made.add("did:plc:a")
        gate.set()
        await until(lambda: len(tried) == 2 and not len(made))


async def test_the_heaps_do_not_grow_with_void_entries(tmp_path: Path) -> None:
    async def work_off(_did: str) -> float:
        return 1000.0

    async with queue(tmp_path, work_off) as made:
        for _ in range(3):
            for _ in range(2000):
                made._put("did:plc:a", 1000.0, 0)
            await asyncio.sleep(0)
        assert max(len(made._soonest), len(made._longest)) < 1000


async def test_questions_are_paced_each_by_itself() -> None:
    pace = Pace(60.0, 2)
    assert pace.wait_s("a", Work.RESOLVE) == 0
    assert pace.ask("a", Work.RESOLVE) == 0
    assert 59 < pace.wait_s("a", Work.RESOLVE) <= 60
    assert pace.wait_s("a", Work.CHECK_STATUS) == 0
    assert [pace.ask("a", Work.RESOLVE) for _ in range(2)] == [1, 2]
    pace.answered("a", Work.RESOLVE)
    assert pace.ask("a", Work.RESOLVE) == 0
    pace.ask("b", Work.RESOLVE)
    pace.ask("c", Work.RESOLVE)
    assert pace.wait_s("a", Work.RESOLVE) == 0  # forgotten: two are kept
