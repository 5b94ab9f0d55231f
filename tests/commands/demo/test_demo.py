"""The demo as a person runs it: its summary, its exit code, and that it notices a wrong index."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from websockets.asyncio.client import connect

from indexer.cli import main
from indexer.commands.demo import oracle
from indexer.commands.demo.command import _free_address
from indexer.store.check import check
from indexer.store.codecs import Mode
from indexer.store.database import Database
from tests.paths import ROOT

KEYS = {
    "repos", "records", "commits_verified", "events", "rejected", "checkpoints", "blocks_reclaimed",
    "events_pruned", "differences",
}  # fmt: skip


def _demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "indexer", "demo", "--json", "--accounts", "10", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.limit(90)
def test_the_index_equals_the_ledger_and_the_summary_says_so(tmp_path: Path) -> None:
    done = _demo("--seconds", "4", "--retention", "1s", "--archive", "--data-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"index       {tmp_path}/index" in done.stderr
    assert "repo archive --list did:plc:" in done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary.keys() >= KEYS
    assert summary["differences"] == 0
    assert summary["commits_verified"] > 100
    assert summary["records"] > 500
    assert summary["events_pruned"] > 0
    with Database.open(tmp_path / "index" / "db", mode=Mode()) as db:
        assert check(db).problems == []
        assert db.count("archives") > 0
        _notices_what_differs(db)


def _notices_what_differs(db: Database) -> None:
    rows = oracle.all_repos(db)
    did, row = next((did, row) for did, row in rows if row.status.active and db.records(did, limit=1))
    account = {"status": "active", "rev": row.rev, "data": "bafyother", "commit": "bafyother", "records": {}}
    lines = oracle.differences(db, {"accounts": {did: account}}, ephemeral=False)
    assert any("data root" in line for line in lines)
    assert any("ledger None" in line for line in lines)
    assert len([line for line in lines if "not in the ledger" in line]) == len(rows) - 1
    late = oracle.behind(db, {"accounts": {did: account | {"rev": "3zzzzzzzzzzzz"}}}, ephemeral=False)
    assert late == [did]


@pytest.mark.slow
@pytest.mark.limit(120)
async def test_ephemeral_mode_prunes_reclaims_and_tells_a_late_reader(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "indexer", "demo", "--ephemeral", "--retention", "2s", "--public"]
    demo = await asyncio.create_subprocess_exec(
        *command, "127.0.0.1:0", "--management", "127.0.0.1:0", "--data-dir", str(tmp_path),
        stdout=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        assert demo.stdout is not None
        public = re.search(r"http://\S+", (await demo.stdout.readline()).decode())
        assert public is not None
        async with aiohttp.ClientSession() as http:
            while True:
                async with http.get(f"{public[0]}/stats") as answer:
                    stats = await answer.json()
                if stats["events"]["floor"] > 1 and stats["workers"]["blocks_gc"]["reclaimed"]:
                    break
                await asyncio.sleep(0.1)
            async with http.get(
                f"{public[0]}/xrpc/com.atproto.repo.getRecord?repo=did:plc:a&collection=a.b.c&rkey=x"
            ) as answer:
                assert answer.status == 501
        async with connect(public[0].replace("http", "ws", 1) + "/stream?cursor=0") as socket:
            first = json.loads(await socket.recv())
        assert (first["type"], first["name"]) == ("info", "OutdatedCursor")
        assert first["id"] > 1
        demo.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(demo.wait(), 20) == 0
    finally:
        if demo.returncode is None:
            demo.kill()
            await demo.wait()


def test_a_busy_port_falls_back_to_a_free_one_unless_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert _free_address(f"127.0.0.1:{port}") == "127.0.0.1:0"
        for option in ("--public", "--management"):
            with pytest.raises(SystemExit):
                main(["demo", option, f"127.0.0.1:{port}", "--data-dir", str(tmp_path / "demo")])
            error = capsys.readouterr().err
            assert error.startswith(f"error: cannot listen on 127.0.0.1:{port}: another program listens")
            assert option in error
        assert not (tmp_path / "demo").exists()
    assert _free_address(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["demo", "--public", "127.0.0.1:0", "--data-dir", str(tmp_path / "file" / "demo")])
    assert capsys.readouterr().err == f"error: cannot make {tmp_path}/file/demo: Not a directory\n"


@pytest.mark.slow
@pytest.mark.limit(60)
async def test_a_signal_at_the_start_leaves_nothing_behind(tmp_path: Path) -> None:
    for number, arguments, code in (
        (signal.SIGTERM, [], 0),
        (signal.SIGINT, ["--seconds", "600"], 130),
    ):
        demo = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "indexer", "demo", "--public", "127.0.0.1:0", *arguments,
            cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path), "INDEXER_UPSTREAMS": "ws://127.0.0.1:9"},
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            while not (made := list(tmp_path.glob("indexer-demo-*"))):
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)  # into whatever the start is doing
            demo.send_signal(number)
            assert await asyncio.wait_for(demo.wait(), 20) == code
            assert not any(folder.exists() for folder in made)
        finally:
            if demo.returncode is None:
                demo.kill()
                await demo.wait()


def test_an_archive_of_nothing_is_refused() -> None:
    done = _demo("--ephemeral", "--archive")
    assert done.returncode == 2
    assert "nothing to --archive" in done.stderr


def test_a_malformed_address_is_named() -> None:
    done = _demo("--public", "foo")
    assert done.returncode == 2
    assert "not an address:port: 'foo'" in done.stderr
    assert "Traceback" not in done.stderr
