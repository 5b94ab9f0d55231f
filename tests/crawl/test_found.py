"""What is to be done about each entry of a list, and that a step counts only where its sweep still is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from indexer.atproto.syntax import tid_from_micros
from indexer.config import Settings
from indexer.crawl import service
from indexer.crawl.found import Finding, FoundUnit, Lister, MoveUnit, pieces
from indexer.crawl.pages import BY_COLLECTION, LIST_REPOS, Listed
from indexer.crawl.service import Crawler
from indexer.crawl.sweep import Sweep
from indexer.ingest.apply import Applier
from indexer.ingest.filters import Filters
from indexer.store.codecs import NEW_REPO, AccountStatus, RepoRow, SyncState
from indexer.store.counts import HEARSAY
from indexer.store.database import Database
from indexer.store.keyspaces import CRAWL
from tests.store.support import opened

DID = "did:plc:" + "a" * 24
NOW = 1_800_000_000_000_000
OLD, NEW, FUTURE = (tid_from_micros(NOW + delta) for delta in (-(10**6), 0, 10**6))
FULL, SIGNALS = Filters("full"), Filters("filter", ("a.b.c",))
HELD = NEW_REPO._replace(tracked=True, state=SyncState.SYNCED, rev=OLD, pds="https://pds.test")
HIDDEN = HELD._replace(status=AccountStatus.SUSPENDED)
GONE = HELD._replace(tracked=False)


def decided(listed: Listed, row: RepoRow | None, filters: Filters = FULL, **lister: Any) -> list[str]:
    """The names of what is done."""
    own: dict[str, Any] = {"url": "https://pds.test", "mode": LIST_REPOS, "of_pds": False} | lister
    without = own.pop("without", set())
    finding = Lister(filters=filters, **own).decide([(listed, row)], without, NOW)
    return [name for name, items in finding._asdict().items() if items]


OFF = Listed(DID, NEW, False, "takendown")


@pytest.mark.parametrize(
    ("listed", "row", "more", "expected"),
    [
        (Listed(DID), None, {}, ["queue"]),
        (OFF, None, {}, ["words"]),
        (Listed(DID), None, {"filters": SIGNALS}, ["ask"]),
        (Listed(DID), None, {"filters": SIGNALS, "without": {DID}}, []),
        (Listed(DID), None, {"filters": SIGNALS, "mode": BY_COLLECTION}, ["queue"]),
        (OFF, None, {"filters": SIGNALS}, []),
        (Listed(DID), None, {"filters": Filters("full", excludes=frozenset({DID}))}, []),
        (Listed(DID, OLD), HELD, {}, []),
        (Listed(DID, NEW), HELD, {}, ["behind"]),
        (Listed(DID, FUTURE), HELD, {}, []),
        (Listed(DID, NEW), GONE, {}, []),
        (Listed(DID, NEW), HELD._replace(state=SyncState.PENDING), {}, []),
        (OFF, HELD, {}, ["words"]),
        (OFF, HELD, {"of_pds": True}, ["words"]),
        (OFF, HELD, {"of_pds": True, "url": "https://old.test"}, []),
        (OFF, HELD, {"mode": BY_COLLECTION}, []),
        (OFF, HIDDEN, {}, []),
        (Listed(DID), HIDDEN, {}, ["words"]),
    ],
)
def test_what_is_done_about_an_entry(
    listed: Listed, row: RepoRow | None, more: dict[str, Any], expected: list[str]
) -> None:
    assert decided(listed, row, **more) == expected


def test_a_finding_falls_into_pieces_that_lose_nothing() -> None:
    finding = Finding([f"q{n}" for n in range(5)], ["a"], [Listed("b")], [Listed("w"), OFF, Listed("x")])
    parts = pieces(finding, 2)
    sizes = [len(part.queue) + len(part.ask) + len(part.behind) + len(part.words) for part in parts]
    assert sizes == [2, 2, 1, 1, 1, 2, 1]
    assert [did for part in parts for did in part.queue] == finding.queue
    assert [did for part in parts for did in part.ask] == finding.ask
    assert [item for part in parts for item in part.behind] == finding.behind
    assert [item for part in parts for item in part.words] == finding.words
    assert pieces(Finding([], [], [], []), 2) == [Finding([], [], [], [])]


async def test_a_page_of_a_sweep_that_is_elsewhere_changes_nothing(tmp_path: Path) -> None:
    lister = Lister("https://pds.test", LIST_REPOS, FULL, False)
    before, key = Sweep(cursor="b", started_us=5), ("source", "s")
    after = before._replace(cursor="c", pages=1)
    room = SimpleNamespace(room=lambda _tx: 1)
    finding = Finding([DID, "did:plc:over"], [], [], [])
    unit = FoundUnit(key, before, after, finding, lister, room, False, {"pages": 1})  # type: ignore[arg-type]
    async with opened(tmp_path) as store:
        for stored in (None, list(before._replace(cursor="a")), list(before._replace(started_us=6))):
            await store.writer.run("set", lambda tx: tx.set_crawl_row(*key, stored))  # noqa: B023
            assert await store.writer.run("page", unit) is None
            assert not await store.writer.run("move", MoveUnit(key, before, after, {"done": 1}))
            assert store.db.counts("crawler/") == {}
            assert store.db.repo(DID) is None
        await store.writer.run("set", lambda tx: tx.set_crawl_row(*key, list(before)))
        assert await store.writer.run("page", unit) == 1
        assert store.db.counts("crawler/") == {
            "crawler/pages": 1, "crawler/found": 1, "crawler/unresolved_full": 1,
        }  # fmt: skip
        assert store.db.count("crawl/source") == 1
        row = store.db.repo(DID)
        assert row is not None
        assert (row.tracked, row.state, row.due > 0) == (True, SyncState.PENDING, True)


def applier_of(db: Database, max_unresolved: int) -> Applier:
    settings = Settings.model_validate({"ingest": {"max_unresolved": max_unresolved}})
    bans = SimpleNamespace(covers=lambda *_: False)
    tools: Any = SimpleNamespace(db=db, settings=settings, bans=bans)
    return Applier(FULL, tools, lambda *_: None, ephemeral=False)


@pytest.mark.parametrize("of_pds", [True, False])
async def test_accounts_that_are_not_active_are_bounded_and_counted_as_others_are(
    tmp_path: Path, of_pds: bool
) -> None:
    lister = Lister("https://pds.test", LIST_REPOS, FULL, of_pds)
    key, sweep = ("source", "s"), Sweep(started_us=5)
    listed = [Listed(f"did:plc:{n:024}", "", False, "deactivated") for n in range(8)]
    finding = Finding([], [], [], [*listed, *listed[:2]])  # whom it names again is known by then
    async with opened(tmp_path) as store:
        await store.do(lambda tx: tx.set_crawl_row(*key, list(sweep)))
        unit = FoundUnit(key, sweep, None, finding, lister, applier_of(store.db, 5), False, {})
        assert await store.writer.run("page", unit) == 5
        assert (store.db.count(HEARSAY), Sweep.of(store.db.get(CRAWL, key)).found) == (5, 5)
        assert store.db.counts("crawler/") == {
            "crawler/found": 5, "crawler/unresolved_full": 3, "crawler/words": 5 + 2 * of_pds,
        }  # fmt: skip


async def test_a_queue_with_room_is_looked_at_again_since_others_fill_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.model_validate({"crawler": {"max_queued": 3}})
    ingest: Any = SimpleNamespace(applier=None, due=0)
    none: Any = None
    async with opened(tmp_path) as store:
        crawler = Crawler(store.db, store.writer, none, none, none, ingest, settings)
        assert await crawler._has_room()
        ingest.due = 3
        assert await crawler._has_room()  # as was seen just now
        monkeypatch.setattr(service, "_ROOM_S", 0.0)
        monkeypatch.setattr(service, "_FULL_S", 0.0)
        assert not await crawler._has_room()
        assert crawler.status()["paused"] == "queue"
