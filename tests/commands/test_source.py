"""`indexer source` and `indexer debug` as an operator calls them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from indexer.cli import main
from indexer.store.transaction import Transaction
from tests.ingest.forge import Forge
from tests.ingest.upstream import scripted
from tests.serve.node import ALICE, BOB
from tests.serve.test_management_ingest import Managed, managed, until_cursors
from tests.store.support import opened

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_log_lines() -> Iterator[None]:
    """The daemon in the same process logs where the commands print."""
    with structlog.testing.capture_logs():
        yield


def _code(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


async def call(node: Managed, *arguments: str) -> int:
    """Runs the command beside the daemon; its exit code."""
    return await asyncio.to_thread(_code, *arguments, "--management-url", node.daemon.management_url)


async def test_upstreams_are_added_listed_moved_and_removed(tmp_path: Path, capsys: Output) -> None:
    async with scripted() as upstream, managed(tmp_path, []) as node:
        assert await call(node, "source", "add", upstream.url, "--cursor", "oldest") == 0
        await until_cursors(upstream, 1)
        assert await call(node, "source", "cursor", upstream.url, "5") == 0
        await until_cursors(upstream, 2)
        assert upstream.cursors == ["0", "5"]
        while not node.daemon.ingest.status()[0]["connected"]:
            await asyncio.sleep(0.005)
        capsys.readouterr()
        assert await call(node, "source", "list") == 0
        assert capsys.readouterr().out == f"{upstream.url}  connected  cursor 5, lag 0.0 s, 0 frames\n"
        assert await call(node, "source", "list", "--json") == 0
        assert json.loads(capsys.readouterr().out)["cursor"] == 5
        assert await call(node, "source", "compare", upstream.url) == 0
        assert await call(node, "source", "remove", upstream.url, "--forget") == 0
        assert capsys.readouterr().out.endswith(f"{upstream.url}: removed, cursor forgotten\n")
        assert node.daemon.ingest.status() == []


async def test_what_is_wrong_with_an_upstream_is_one_line(tmp_path: Path, capsys: Output) -> None:
    async with managed(tmp_path, ["ws://127.0.0.1:9"]) as node:
        for arguments, why in (
            (("add", "https://relay.test"), "not a URL of the form"),
            (("add", "ws://127.0.0.1:9", "--cursor", "soon"), "oldest or live"),
            (("remove", "ws://127.0.0.1:10"), "no such upstream"),
            (("cursor", "ws://127.0.0.1:9", "accept"), "numbering"),
            (("add", "ws://127.0.0.1:8?x=1"), "no query"),
            (("remove", "pds::ws://127.0.0.1:9"), "it is followed as ws://127.0.0.1:9"),
        ):
            assert await call(node, "source", *arguments) == 1
            error = capsys.readouterr().err
            assert why in error
            assert error.count("\n") == 1
        assert await call(node, "source", "remove", "ws://127.0.0.1:9") == 0
        capsys.readouterr()
        assert await call(node, "source", "list") == 0
        assert "  off  " in capsys.readouterr().out


def refuse(tx: Transaction) -> None:
    """Six refused frames."""
    data = Forge().posts(1).encode()
    for number in range(6):
        did = (ALICE, BOB)[number % 2]
        tx.quarantine("ws://up", number, did, "signature" if number else "hash", "bad\x1b[31m", data)


def check_listing(capsys: Output, tmp_path: Path, *where: str) -> None:
    """What the command tells of the six frames of `refuse`."""
    assert _code("debug", "quarantine", "--did", ALICE, "--limit", "2", "--json", *where) == 0
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == [4, 2]
    assert _code("debug", "quarantine", "--reason", "hash", *where) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["id", "time"]
    assert lines[1].split()[0] == "0"
    assert "\x1b" not in lines[1]
    assert _code("debug", "quarantine", "--reason", "none", *where) == 0
    assert capsys.readouterr().err == "no refused frame that is kept fits --reason none\n"
    assert _code("debug", "quarantine", "--show", "3", *where) == 0
    shown = capsys.readouterr().out
    assert "type:    #commit" in shown
    assert f'"repo": "{Forge().did}"' in shown
    assert _code("debug", "quarantine", "--show", "3", "--json", *where) == 0
    assert json.loads(capsys.readouterr().out)["frame"]["fields"]["seq"] == 1
    file = tmp_path / "frame.bin"
    assert _code("debug", "quarantine", "--extract", "3", str(file), *where) == 0
    assert file.read_bytes() == Forge().posts(1).encode()
    capsys.readouterr()
    assert _code("debug", "quarantine", "--show", "77", *where) == 1
    assert capsys.readouterr().err.startswith("error: no refused frame has the number 77")
    assert _code("debug", "quarantine", "--did", "alice", *where) == 1


def test_refused_frames_of_a_closed_database(tmp_path: Path, capsys: Output) -> None:
    async def make() -> None:
        async with opened(tmp_path / "data") as store:
            await store.writer.run("t", refuse)

    asyncio.run(make())
    check_listing(capsys, tmp_path, "--data-dir", str(tmp_path / "data"))


async def test_refused_frames_of_a_running_daemon(tmp_path: Path, capsys: Output) -> None:
    async with managed(tmp_path / "data", []) as node:
        await node.daemon.writer.run("t", refuse)
        where = ("--data-dir", str(tmp_path / "data"), "--management-url", node.daemon.management_url)
        await asyncio.to_thread(check_listing, capsys, tmp_path, *where)


async def test_refused_frames_of_a_daemon_that_was_named_and_runs_elsewhere(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with managed(tmp_path / "theirs", []) as node:
        where = ("--management-url", node.daemon.management_url)
        monkeypatch.setenv("INDEXER_DATA_DIR", str(tmp_path / "none"))
        assert await asyncio.to_thread(_code, "debug", "quarantine", *where) == 0
        assert capsys.readouterr().err == "no refused frame is kept\n"
        await node.daemon.writer.run("t", refuse)
        await asyncio.to_thread(check_listing, capsys, tmp_path, *where)
    assert await asyncio.to_thread(_code, "debug", "quarantine", *where) == 1
    assert "no daemon answers at" in capsys.readouterr().err
