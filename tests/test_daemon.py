"""The daemon as a process: it starts without its upstream, says so, and drains at SIGTERM."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from indexer.config import Settings, load
from indexer.daemon import Daemon
from indexer.errors import ConfigError, StoreCorrupt, WriterPoisoned
from indexer.ingest import Ingest
from indexer.setting_groups import FilterSettings
from indexer.store.codecs import NEW_REPO, Mode, SyncState
from indexer.store.database import Database
from tests.paths import ROOT

SETTINGS = """
data_dir = "{data}"
upstreams = ["ws://127.0.0.1:9"]
plc_urls = ["http://127.0.0.1:9"]
[network]
allow_private = true
[public]
bind = "127.0.0.1:0"
[management]
bind = "127.0.0.1:0"
[log]
format = "json"
{more}
"""


class Run:
    """`indexer run` as a child, with its log lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, object]] = []

    async def event(self, name: str) -> dict[str, object]:
        """Reads the log until an event of this name."""
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            entry: dict[str, object] = json.loads(line)
            self.lines.append(entry)
            if entry["event"] == name:
                return entry
        raise AssertionError(f"the daemon ended without the event {name}: {self.lines}")


@asynccontextmanager
async def _run(tmp_path: Path, more: str = "") -> AsyncIterator[Run]:
    file = tmp_path / "settings.toml"
    file.write_text(SETTINGS.format(data=tmp_path / "data", more=more))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "indexer", "run", "--config", str(file),
        stderr=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        yield Run(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _fails(tmp_path: Path, more: str = "") -> str:
    """The one error line of a daemon that does not start."""
    async with _run(tmp_path, more) as run:
        _, errors = await run.process.communicate()
        assert run.process.returncode == 1
    lines = [line for line in errors.decode().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors.decode()
    assert "Traceback" not in errors.decode()
    return lines[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_unreachable_relay_is_retried_and_a_signal_drains(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with _run(tmp_path) as run:
        listening = await run.event("listening")
        async with aiohttp.ClientSession() as http, http.get(f"{listening['public']}/health") as answer:
            assert answer.status == 200
            assert (await answer.json())["sources"] == {"total": 1, "connected": 0}
        await run.event("upstream_dropped")
        began = time.monotonic()
        run.process.send_signal(number)
        assert await run.process.wait() == 0
        assert time.monotonic() - began < 10
    with Database.open(tmp_path / "data" / "db", mode=Mode()) as db:
        assert db.mode == Mode()


def _settings(data_dir: Path) -> Settings:
    """Of a daemon in this process, without an upstream."""
    return load(
        overrides={
            "data_dir": data_dir, "upstreams": ["ws://127.0.0.1:9"], "verifiers": 0,
            "network": {"allow_private": True}, "public": {"bind": "127.0.0.1:0"},
            "management": {"bind": "127.0.0.1:0"},
        }
    )  # fmt: skip


async def test_what_a_killed_backup_left_is_gone_after_the_start(tmp_path: Path) -> None:
    left = tmp_path / ".checkpoint-4711"
    left.mkdir()
    (left / "000012.sst").write_bytes(b"a link that keeps its space")
    async with Daemon(_settings(tmp_path)):
        assert not left.exists()


async def test_a_failed_commit_takes_the_daemon_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise StoreCorrupt("a block of table 000012.sst does not match its checksum")

    async def another() -> None:
        await poisoned.wait()
        await daemon.writer.run("test", lambda tx: tx.set_cursor("test", 2))

    poisoned, until = asyncio.Event(), Daemon._until_writer_closes

    async def later(closed: Daemon) -> None:  # the writer's own part comes last
        try:
            await until(closed)
        finally:
            await asyncio.wait([closed._failed])

    monkeypatch.setattr(Daemon, "_until_writer_closes", later)
    async with Daemon(_settings(tmp_path)) as daemon:
        daemon._spawn("another", another)
        monkeypatch.setattr(Database, "write", broken)
        with pytest.raises(WriterPoisoned):
            await daemon.writer.run("test", lambda tx: tx.set_cursor("test", 1))
        poisoned.set()
        with pytest.raises(StoreCorrupt, match="000012.sst"):
            await daemon.wait_failed(20)
        async with aiohttp.ClientSession() as http, http.get(f"{daemon.management_url}/readyz") as answer:
            assert answer.status == 503


async def test_settings_that_keep_more_collections_queue_what_is_held(tmp_path: Path) -> None:
    did, kept = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", {"collections": ["app.bsky.feed.post"]}
    row = NEW_REPO._replace(tracked=True, state=SyncState.SYNCED, rev="3aaaaaaaaaa22")
    async with Daemon(_settings(tmp_path).model_copy(update={"filter": FilterSettings(**kept)})) as first:
        await first.writer.run("row", lambda tx: tx.set_repo(did, row))
    async with Daemon(_settings(tmp_path)) as second:
        while (held := second.db.repo(did)) is None or held.state is SyncState.SYNCED:
            await asyncio.sleep(0.01)
        assert held.due


async def test_queries_are_answered_before_the_disk_has_synced_and_before_background_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, listening = threading.Event(), asyncio.Event()
    sync, listen = Database.sync_wal, Daemon._listen
    began: list[str] = []

    def held(db: Database) -> None:
        assert release.wait(20)
        sync(db)

    async def seen(daemon: Daemon) -> None:
        await listen(daemon)
        listening.set()

    async def ran(ingest: Ingest) -> None:
        began.append("ingest")
        await asyncio.Event().wait()

    monkeypatch.setattr(Database, "sync_wal", held)
    monkeypatch.setattr(Daemon, "_listen", seen)
    monkeypatch.setattr(Ingest, "run", ran)
    settings = load(
        overrides={
            "data_dir": tmp_path, "upstreams": [], "verifiers": 0, "public": {"bind": "127.0.0.1:0"},
            "management": {"bind": "127.0.0.1:0"},
        }
    )  # fmt: skip
    daemon = Daemon(settings)
    starting = asyncio.create_task(daemon.__aenter__())
    try:
        await listening.wait()
        url = f"{daemon.public_url}/xrpc/com.atproto.sync.listRepos"
        async with aiohttp.ClientSession() as http, http.get(url) as answer:
            assert (answer.status, await answer.json()) == (200, {"repos": []})
        assert (starting.done(), began) == (False, [])
    finally:
        release.set()
        await starting
        await asyncio.sleep(0)  # what was let go has its first turn
        await daemon.__aexit__(None, None, None)
    assert began == ["ingest"]


async def test_a_stop_while_the_disk_syncs_closes_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncing, release = threading.Event(), threading.Event()
    sync = Database.sync_wal

    def held(db: Database) -> None:
        syncing.set()
        with db._blocking("syncing"):
            assert release.wait(20)
        sync(db)

    settings = load(
        overrides={
            "data_dir": tmp_path, "upstreams": [], "verifiers": 0, "public": {"bind": "127.0.0.1:0"},
            "management": {"bind": "127.0.0.1:0"},
        }
    )  # fmt: skip
    monkeypatch.setattr(Database, "sync_wal", held)
    starting = asyncio.create_task(Daemon(settings).__aenter__())
    await asyncio.to_thread(syncing.wait, 20)
    asyncio.get_running_loop().call_soon(release.set)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    monkeypatch.undo()
    Database.open(tmp_path / "db").close()


async def test_an_unknown_setting_is_named(tmp_path: Path) -> None:
    assert "unknown setting: verifierz" in await _fails(tmp_path, "[verifierz]")


async def test_another_mode_another_holder_and_a_ruined_database_are_named(tmp_path: Path) -> None:
    db = tmp_path / "data" / "db"
    db.parent.mkdir()
    with Database.open(db, mode=Mode()):
        assert "another process holds" in await _fails(tmp_path)
    assert "ephemeral" in await _fails(tmp_path, "[ephemeral]\nenabled = true")
    for manifest in db.glob("MANIFEST-*"):
        manifest.write_bytes(b"ruined")
    assert str(db) in await _fails(tmp_path)


async def test_a_signal_before_the_start_is_noted_and_said(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(SETTINGS.format(data=tmp_path / "data", more=""))
    program = (  # the signal comes as soon as the command is called, before it is even imported
        "import os, signal, indexer.cli as cli; imported = cli._imported\n"
        "cli._imported = lambda name: (os.kill(os.getpid(), signal.SIGTERM), imported(name))[1]\n"
        "cli.main()"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, "run", "--config", str(file), stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert json.loads(errors.splitlines()[-1])["event"] == "stopped"
    assert not (tmp_path / "data").exists()


async def test_a_start_that_is_broken_off_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_daemon: Daemon) -> None:
        await asyncio.Event().wait()

    said: list[str] = []
    monkeypatch.setattr(Daemon, "_listen", never)
    monkeypatch.setattr("indexer.daemon.log.info", lambda event, **_: said.append(event), raising=False)
    starting = asyncio.create_task(Daemon(_settings(tmp_path)).__aenter__())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert said == ["stopping", "stopped"]


@pytest.mark.parametrize("setting", ["public", "management", "metrics"])
async def test_an_address_in_use_is_named_before_there_is_a_database(tmp_path: Path, setting: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        free = {name: {"bind": "127.0.0.1:0"} for name in ("public", "management")}
        settings = load(overrides={"data_dir": tmp_path / "data", **free, setting: {"bind": bind}})
        with pytest.raises(ConfigError, match=f"cannot listen on {bind}: another.*{setting}.bind"):
            async with Daemon(settings):
                raise AssertionError("it runs")
    assert not (tmp_path / "data").exists()
