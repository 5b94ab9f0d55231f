"""`indexer get`, `stream` and `repo` against running servers."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

from indexer.cli import main
from indexer.store.codecs import SyncState
from tests.serve.node import ALICE, BOB, POST, Node, fill, put, running


async def _call(node: Node, *arguments: str) -> int:
    """Runs the command beside the servers; its exit code."""
    where = ["--url", node.public.url, "--management-url", node.management.url]
    return await asyncio.to_thread(_exit_code, [*arguments, *where])


def _exit_code(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


Output = pytest.CaptureFixture[str]


async def test_get_prints_a_record(tmp_path: Path, capsys: Output) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        assert await _call(node, "get", f"at://{ALICE}/{POST}/a", "--json") == 0
        line = capsys.readouterr().out
        assert json.loads(line)["value"]["text"] == f"{POST}/a"
        assert line.count("\n") == 1
        assert await _call(node, "get", f"at://{ALICE}/{POST}/a") == 0
        assert '\n  "value": {' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        (f"at://{ALICE}/{POST}/b", "RecordNotFound"),
        (f"at://{BOB}/{POST}/b", "RepoNotFound"),
        (f"at://{ALICE}", "names no record"),
        ("nonsense", "not a valid AT-URI"),
    ],
)
async def test_get_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: Output, uri: str, why: str) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        assert await _call(node, "get", uri) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("error: ")
        assert why in output.err
        assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["get", f"at://{ALICE}/{POST}/a"],
        ["stream"],
        ["stream", "--cursor", "0"],
        ["repo", "list"],
        ["repo", "status", ALICE],
        ["repo", "add", ALICE],
    ],
)
def test_a_daemon_that_is_not_there_is_one_clear_line(capsys: Output, arguments: list[str]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # bound, never listening
        url = f"http://127.0.0.1:{holder.getsockname()[1]}"
        assert _exit_code([*arguments, "--url", url, "--management-url", url]) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"error: no daemon answers at {url} ")
    assert output.err.count("\n") == 1


async def test_stream_prints_events_and_goes_on_where_it_was(tmp_path: Path, capsys: Output) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/{number}" for number in range(5)])
        assert await _call(node, "stream", "--cursor", "2", "--limit", "3", "--json") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [json.loads(line)["id"] for line in lines] == [2, 3, 4]
        assert await _call(node, "stream", "--cursor", "0", "--limit", "1", "--did", ALICE) == 0
        assert f"create at://{ALICE}/{POST}/0" in capsys.readouterr().out


async def test_stream_reconnects_without_losing_or_repeating(tmp_path: Path, capsys: Output) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/{number}" for number in range(3)])
        tail = asyncio.create_task(_call(node, "stream", "--cursor", "0", "--limit", "6", "--json"))
        async with asyncio.timeout(10):
            while not (readers := list(node.public.streams.readers)) or readers[0].position < 4:
                await asyncio.sleep(0.01)
        readers[0].leave(1001, "Test")

        def more(tx: object) -> None:
            for number in range(3, 6):
                put(tx, ALICE, f"{POST}/{number}")  # type: ignore[arg-type]

        await node.writer.run("more", more)
        assert await tail == 0
        output = capsys.readouterr()
        assert [json.loads(line)["id"] for line in output.out.splitlines()] == [1, 2, 3, 4, 5, 6]
        assert "connecting again" in output.err


async def test_repositories_are_added_listed_and_shown(tmp_path: Path, capsys: Output) -> None:
    async with running(tmp_path, filter={"excludes": [BOB]}) as node:
        assert await _call(node, "repo", "add", ALICE) == 0
        assert capsys.readouterr().out.startswith(f"{ALICE} pending")
        assert await _call(node, "repo", "add", BOB) == 1
        assert "error: " in capsys.readouterr().err
        await fill(node, ALICE, [f"{POST}/a"], state=SyncState.SYNCED, handle="alice.test")
        assert await _call(node, "repo", "add", ALICE, "--wait") == 0
        assert f"{ALICE} synced" in capsys.readouterr().out
        assert await _call(node, "repo", "list", "--state", "synced", "--json") == 0
        assert json.loads(capsys.readouterr().out)["handle"] == "alice.test"
        assert await _call(node, "repo", "list", "--state", "pending") == 0
        assert capsys.readouterr().out == ""
        assert await _call(node, "repo", "status", ALICE) == 0
        assert f"{POST}" in capsys.readouterr().out
        assert await _call(node, "repo", "status", "alice") == 1
        assert "not a valid DID" in capsys.readouterr().err


async def test_the_token_is_sent(tmp_path: Path, capsys: Output) -> None:
    async with running(tmp_path, management={"token": "s3cret"}) as node:
        assert await _call(node, "repo", "list") == 1
        assert "AuthenticationRequired" in capsys.readouterr().err
        assert await _call(node, "repo", "list", "--token", "s3cret") == 0
