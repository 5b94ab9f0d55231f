"""Audits tell a sound index from one that contradicts its commit, and the auditor gets around."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog

from indexer.atproto.cid import format_cid
from indexer.errors import RequestError
from indexer.ingest.audit import Auditor, audit
from indexer.ingest.rebuild import grown
from indexer.pool import Pool
from indexer.repo.walker import load_repo
from indexer.simulator.corpus import build_car
from indexer.store.codecs import NEW_REPO, OVERSIZE, SyncState
from indexer.store.keyspaces import RECORDS
from indexer.store.raw import RawRows
from indexer.store.transaction import Transaction
from tests.commands.real_repos import repo_file, truth_of
from tests.store.support import ALICE, BOB, SYNCED, Store, cid_of, opened, settings_of

ANOTHER_KEY = "did:key:zQ3shokFTS3brHcDQrn82RUDfCZESWL1ZdCEJwekUDPQiYBme"


async def load(store: Store, car: bytes | None = None) -> str:
    """Stores a repository, a small captured one where no other is given; its DID."""
    repo = load_repo(car or repo_file("ten.car").read_bytes())
    key = "" if car else truth_of("ten")["signingKey"]
    did = repo.commit.did

    def work(tx: Transaction) -> None:
        for path, cid, block in repo.records:
            tx.put_record(did, path, cid, block, repo.commit.rev, live=False)
        row = NEW_REPO._replace(
            tracked=True, state=SyncState.SYNCED, complete=True, rev=repo.commit.rev,
            commit=repo.commit_block, data=repo.commit.data, signing_key=key,
        )  # fmt: skip
        tx.set_repo(did, row)

    await store.writer.run("load", work)
    return did


@asynccontextmanager
async def loaded(tmp_path: Path) -> AsyncIterator[tuple[Store, str]]:
    async with opened(tmp_path) as store:
        yield store, await load(store)


async def test_a_sound_repository_is_found_sound(tmp_path: Path) -> None:
    async with loaded(tmp_path) as (store, did):
        found = await audit(store.db, Pool(0), did)
        row = store.db.repo(did)
        assert row is not None
        assert (found.outcome, found.signature, found.message) == ("ok", "valid", "")
        assert found.rebuilt == found.data == format_cid(row.data)
        assert found.records == len(store.db.records(did))


@pytest.mark.parametrize("flags", [0, OVERSIZE])
async def test_flagged_rows_are_part_of_the_tree(tmp_path: Path, flags: int) -> None:
    async with loaded(tmp_path) as (store, did):
        path, row = store.db.records(did, limit=1)[0]
        block = store.db.block(did, row.cid)
        assert block is not None
        await store.do(lambda tx: tx.put_record(did, path, row.cid, block, row.rev, live=False, flags=flags))
        assert (await audit(store.db, Pool(0), did)).outcome == "ok"


async def test_a_lost_an_added_and_a_changed_record_are_found(tmp_path: Path) -> None:
    async with loaded(tmp_path) as (store, did):
        (path, row), *_ = store.db.records(did, limit=1)
        block = store.db.block(did, row.cid)
        assert block is not None
        await store.delete(did, path)
        lost = await audit(store.db, Pool(0), did)
        assert lost.outcome == "tree"
        assert lost.signature == "valid"
        assert f"the root {lost.rebuilt}, signed is {lost.data}" in lost.message
        await store.put(did, path, "changed")
        assert (await audit(store.db, Pool(0), did)).outcome == "tree"
        await store.do(lambda tx: tx.put_record(did, path, row.cid, block, row.rev, live=True))
        assert (await audit(store.db, Pool(0), did)).outcome == "ok"
        await store.put(did, path + "x", "added")
        assert (await audit(store.db, Pool(0), did)).outcome == "tree"


@pytest.mark.parametrize(
    ("changes", "outcome", "message"),
    [
        ({"rev": "3jzfcijpj2z2a"}, "commit", "another rev"),
        ({"data": cid_of(b"x")}, "commit", "another data"),
        ({"commit": b"\xa0"}, "commit", "commit fields: missing"),
        ({"signing_key": ANOTHER_KEY}, "signature", "changed its key"),
    ],
)  # fmt: skip
async def test_a_row_that_contradicts_its_commit_is_found(
    tmp_path: Path, changes: dict[str, object], outcome: str, message: str
) -> None:
    async with loaded(tmp_path) as (store, did):
        row = store.db.repo(did)
        assert row is not None
        await store.do(lambda tx: tx.set_repo(did, row._replace(**changes)))  # type: ignore[arg-type]
        found = await audit(store.db, Pool(0), did)
        assert found.outcome == outcome
        assert message in found.message


async def test_without_a_key_the_signature_is_unchecked(tmp_path: Path) -> None:
    async with loaded(tmp_path) as (store, did):
        row = store.db.repo(did)
        assert row is not None
        await store.do(lambda tx: tx.set_repo(did, row._replace(signing_key="")))
        found = await audit(store.db, Pool(0), did)
        assert (found.outcome, found.signature) == ("ok", "unchecked")


async def test_what_cannot_be_audited_is_refused_by_name(tmp_path: Path) -> None:
    async with loaded(tmp_path) as (store, _did):
        await store.do(lambda tx: tx.set_repo(ALICE, SYNCED))
        for repo, name in ((ALICE, "RepoIncomplete"), (BOB, "RepoNotFound")):
            with pytest.raises(RequestError) as refused:
                await audit(store.db, Pool(0), repo)
            assert refused.value.name == name


async def test_an_audit_speaks_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.ingest.audit._STEP_ROWS", 1)
    async with loaded(tmp_path) as (store, did):
        running = asyncio.create_task(audit(store.db, Pool(0), did))
        await asyncio.sleep(0)
        await store.delete(did, store.db.records(did, reverse=True, limit=1)[0][0])
        assert (await running).outcome == "ok"


class Watched(Pool):
    """A pool that tells how large what it was given is."""

    def __init__(self) -> None:
        super().__init__(0)
        self.rows: list[int] = []
        self.largest = 0

    async def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if function is grown:
            self.rows.append(len(args[1]))
        passed = pickle.dumps(args)
        result = pickle.dumps(await super().run(function, *pickle.loads(passed), **kwargs))
        self.largest = max(self.largest, len(passed), len(result))
        return pickle.loads(result)


async def test_a_large_repository_passes_page_by_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexer.ingest.audit._STEP_ROWS", 20)
    async with opened(tmp_path) as store:
        did = await load(store, build_car(seed=1, records=2_010))
        pool = Watched()
        found = await audit(store.db, pool, did)
        assert (found.outcome, found.records) == ("ok", 2_010)
        assert pool.rows == [200] * 10 + [10]
        assert pool.largest < 40_000  # a tenth of the whole


async def test_the_auditor_goes_round_skips_what_it_cannot_audit_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with loaded(tmp_path) as (store, did):
        for other in (ALICE, BOB, "did:web:zzz.example"):
            await store.do(partial(Transaction.set_repo, did=other, row=SYNCED))
        auditor = Auditor(store.db, store.writer, Pool(0), settings_of())
        for _ in range(3):
            found = await auditor.run_once()
            assert found is not None
            assert found.did == did
        assert auditor.stats["ok"] == store.db.count("audit/ok") == 3
        monkeypatch.setattr(auditor, "_next", lambda: ALICE)  # a resync took it away meanwhile
        assert await auditor.run_once() is None
        assert store.db.count("audit/skipped") == 1


async def test_a_mismatch_is_counted_and_loud(tmp_path: Path) -> None:
    async with loaded(tmp_path) as (store, did):
        await store.delete(did, store.db.records(did, limit=1)[0][0])
        auditor = Auditor(store.db, store.writer, Pool(0), settings_of())
        with structlog.testing.capture_logs() as logs:
            await auditor.run_once()
        assert store.db.count("audit/tree") == 1
        (line,) = [line for line in logs if line["event"] == "audit_mismatch"]
        assert (line["log_level"], line["did"], line["outcome"]) == ("error", did, "tree")
        store.assert_clean()  # tallies are no exact totals


@pytest.mark.parametrize("path", ["app.bsky.feed.post", "app.bsky.feed.post/a b", "a.b.c/x\ny"])
async def test_a_row_that_no_tree_can_hold_is_counted_and_loud(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexer.ingest.audit._STEP_ROWS", 1)
    monkeypatch.setattr("indexer.ingest.audit._PAGE_STEPS", 1)
    async with loaded(tmp_path) as (store, did):
        (_, row), *_ = store.db.records(did, limit=1)
        changes = [(RECORDS.name, RECORDS.key.encode((did, path)), RECORDS.value.encode(row))]
        RawRows(store.db).commit(changes)
        auditor = Auditor(store.db, store.writer, Pool(0), settings_of())
        with structlog.testing.capture_logs() as logs:
            found = await auditor.run_once()
        assert found is not None
        assert (found.outcome, found.rebuilt, found.signature) == ("tree", "", "unchecked")
        assert found.records == len(store.db.records(did))
        assert "no tree can" in found.message
        assert store.db.count("audit/tree") == 1
        assert [line["log_level"] for line in logs if line["event"] == "audit_mismatch"] == ["error"]


async def test_with_nothing_to_audit_it_rests(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        auditor = Auditor(store.db, store.writer, Pool(0), settings_of())
        assert await auditor.run_once() is None
        await store.do(lambda tx: tx.set_repo(ALICE, SYNCED))
        assert await auditor.run_once() is None
        assert auditor.stats["skipped"] == 0


async def test_the_rate_is_the_settings(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        auditor = Auditor(store.db, store.writer, Pool(0), settings_of(audit={"repos_per_minute": 120}))
        assert auditor.interval == 0.5
