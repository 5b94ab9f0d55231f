"""`/db/backup`, `/db/stats` and `/repos/{did}/verify` of the management API, and the auditor's figures."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import aiohttp
import pytest

from indexer.errors import StoreError
from indexer.ingest.audit import Auditor
from indexer.pool import Pool
from indexer.serve import health, listener, management_db
from indexer.serve.management import ManagementServer
from indexer.serve.metrics import Metrics
from indexer.store import backup as backups
from indexer.store.archives import Archives
from indexer.store.check import check
from indexer.store.database import Database
from indexer.store.restore import RESTORE_IDS, restore
from tests.serve.node import ALICE, BOB, POST, fill, load_car, messages, put, running


async def test_a_backup_is_made_while_records_come_in(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as node:
        await fill(node, ALICE, [f"{POST}/{number}" for number in range(200)])
        await fill(node, BOB, [])
        asked = asyncio.create_task(node.manage("POST", "/db/backup", json={"to": str(tmp_path / "copy")}))
        written = 0
        while not asked.done():
            await node.writer.run("test", partial(put, did=BOB, path=f"{POST}/{written}"))
            written += 1
        status, made = await asked
        assert status == 200
        assert made["path"] == str(tmp_path / "copy")
        assert 201 <= made["head"] <= node.writer.head
    restored = restore(tmp_path / "copy", tmp_path / "again")
    assert restored.head == made["head"]
    with Database.open(tmp_path / "again" / "db") as db:
        assert check(db).problems == []


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ("{}", 400, "the body must be"),
        ("nonsense", 400, "the body must be"),
        ('{"to": "relative"}', 400, "absolute path"),
        ('{"to": 3}', 400, "absolute path"),
        ('{"to": "/"}', 409, "exists already"),
        ('{"to": "/proc/new"}', 409, "writing the backup"),
    ],
)
async def test_a_backup_needs_a_new_folder(tmp_path: Path, body: str, status: int, why: str) -> None:
    async with running(tmp_path) as node:
        answered, answer = await node.manage("POST", "/db/backup", data=body)
        assert answered == status
        assert why in answer["message"]


async def test_archives_hold_still_and_backups_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as node:
        held = []

        class Still(Archives):
            def __init__(self) -> None:
                """Only `still` is asked of it."""

            @asynccontextmanager
            async def still(self):  # type: ignore[no-untyped-def]
                held.append("in")
                yield
                held.append("out")

        busy: list[int] = []

        def copied(db: Database, target: Path, *, progress: object) -> backups.Backup:
            again = asyncio.run_coroutine_threadsafe(
                node.manage("POST", "/db/backup", json={"to": "/x/y"}), loop
            )
            busy.append(again.result(10)[0])
            held.append("copied")
            return backups.Backup(str(target), 1, 1, 1, 0, 0)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(management_db, "backup", copied)
        server = ManagementServer(dataclasses.replace(node.services, archives=Still()))
        await server.start()
        try:
            node = node._replace(management=server)
            status, _ = await node.manage("POST", "/db/backup", json={"to": str(tmp_path / "copy")})
        finally:
            await server.stop()
        assert (status, busy, held) == (200, [409], ["in", "copied", "out"])


async def test_stats_tell_the_compression(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        await node.manage("POST", "/db/compact")
        _, stats = await node.manage("GET", "/db/stats")
        assert stats["keyspaces"]["blocks"]["raw_bytes"] > 0
        assert stats["totals"]["data_bytes"] > 0


async def test_verify_answers_what_it_found(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        did = (await load_car(node, "ten"))["did"]
        status, found = await node.manage("POST", f"/repos/{did}/verify")
        assert status == 200
        assert (found["outcome"], found["signature"], found["records"]) == ("ok", "valid", 10)
        await node.writer.run("test", lambda tx: put(tx, did, f"{POST}/stray"))
        status, found = await node.manage("POST", f"/repos/{did}/verify")
        assert (status, found["outcome"]) == (200, "tree")
        assert found["rebuilt"] != found["data"]


async def test_verify_refuses_by_name(tmp_path: Path) -> None:
    async with running(tmp_path / "full") as node:
        await fill(node, ALICE, [f"{POST}/a"], complete=False)
        for did, status, name in (
            (ALICE, 400, "RepoIncomplete"), (BOB, 404, "RepoNotFound"), ("x", 400, "InvalidRequest"),
        ):  # fmt: skip
            answered, answer = await node.manage("POST", f"/repos/{did}/verify")
            assert (answered, answer["error"]) == (status, name)
    async with running(tmp_path / "ephemeral", ephemeral={"enabled": True}) as node:
        assert (await node.manage("POST", f"/repos/{ALICE}/verify"))[0] == 501


async def test_audits_show_in_statistics_and_metrics(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await load_car(node, "ten")
        auditor = Auditor(node.services.db, node.writer, Pool(0), node.services.settings)
        services = dataclasses.replace(node.services, workers={"audit": auditor})
        await auditor.run_once()
        assert health.statistics(services, None, None)["workers"]["audit"]["ok"] == 1
        text = Metrics(services, None, None).render().decode()
        assert 'indexer_worker{figure="tree",worker="audit"} 0.0' in text


async def test_a_stream_over_a_restore_goes_on_and_tells_of_the_hole(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as node:
        await fill(node, ALICE, [f"{POST}/a", f"{POST}/b"])
        backups.backup(node.services.db, tmp_path / "copy")
        await fill(node, ALICE, [f"{POST}/c"])  # event 3, lost with the old machine
    restored = restore(tmp_path / "copy", tmp_path / "again")
    assert restored.next >= 3 + RESTORE_IDS
    async with running(tmp_path / "again") as node:
        await node.writer.run("test", lambda tx: put(tx, ALICE, f"{POST}/new"))
        for cursor in (3, 4):  # readers that had, or had not, seen the lost event
            url = f"{node.public.url}/stream?cursor={cursor}"
            async with node.http.ws_connect(url) as socket:
                notice, event = await messages(socket, 2)
            assert (notice["type"], notice["name"], notice["id"]) == ("info", "Skipped", restored.next)
            assert (event["id"], event["record"]["rkey"]) == (restored.next, "new")


async def test_a_stop_does_not_wait_for_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, over, ended = threading.Event(), threading.Event(), list[str]()

    def endless(_db: Database, _target: Path, *, progress: Callable[[str, int, int], None]) -> NoReturn:
        try:
            while not over.wait(0.001):  # the loop needs its turns
                progress("files", 1, 2)
                began.set()
            raise AssertionError("it ended by itself")
        except StoreError as error:
            ended.append(str(error))
            over.set()
            raise

    monkeypatch.setattr(management_db, "backup", endless)
    monkeypatch.setattr(listener, "_SHUTDOWN_S", 0.1)
    async with running(tmp_path) as node:
        asked = asyncio.create_task(node.manage("POST", "/db/backup", json={"to": str(tmp_path / "copy")}))
        await asyncio.to_thread(began.wait)
        await node.management.stop()
        await asyncio.to_thread(over.wait)
        assert ended == ["the work was given up: the daemon stops"]  # and its thread is free
        with pytest.raises(aiohttp.ClientError):
            await asked
