"""`indexer get`, `stream` and `repo` against running servers."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from indexer.cli import main
from indexer.commands.client import Daemon
from indexer.store.codecs import AccountStatus, SyncState
from indexer.store.transaction import Transaction
from tests.serve.node import ALICE, BOB, POST, Node, fill, put, running

CAROL = "did:plc:cccccccccccccccccccccccc"


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


async def test_repositories_are_added_listed_and_shown(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, filter={"excludes": [BOB]}) as node:
        assert await _call(node, "repo", "add", ALICE) == 0
        assert capsys.readouterr().out.startswith(f"{ALICE} pending")
        assert await _call(node, "repo", "add", BOB) == 1
        assert "error: " in capsys.readouterr().err
        await fill(node, ALICE, [f"{POST}/a"], state=SyncState.SYNCED, handle="alice.test")
        bars: list[tuple[str | int, ...]] = []

        def told(*parts: str | int) -> None:
            bars.append(parts)

        monkeypatch.setattr("indexer.commands.repo.bar", lambda _title: nullcontext(told))
        assert await _call(node, "repo", "add", ALICE, "--wait") == 0
        assert f"{ALICE} synced" in capsys.readouterr().out
        assert bars == [(f"{ALICE} synced, 1 record", 0, 1)]
        assert await _call(node, "repo", "list", "--state", "synced", "--json") == 0
        assert json.loads(capsys.readouterr().out)["handle"] == "alice.test"
        assert await _call(node, "repo", "list", "--state", "pending") == 0
        assert capsys.readouterr().out == ""
        assert await _call(node, "repo", "status", ALICE) == 0
        assert f"{POST}" in capsys.readouterr().out
        assert await _call(node, "repo", "status") == 0
        shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line)
        assert (shown["repos"], shown["synced"], shown["pending"]) == ("1", "1", "0")
        await fill(node, ALICE, [], due=1_000_000)
        assert await _call(node, "repo", "status", ALICE) == 0
        assert "due              1970-01-01T00:00:01Z (now)" in capsys.readouterr().out
        assert await _call(node, "repo", "status", "alice") == 1
        assert "not a valid DID" in capsys.readouterr().err


async def test_control_characters_of_strangers_do_not_reach_the_terminal(
    tmp_path: Path, capsys: Output
) -> None:
    text = "a\x9b31m\x7f\x85é\U0001f600\nb\x1b[2J"

    def work(tx: Transaction) -> None:
        put(tx, ALICE, f"{POST}/a", text=text)
        tx.append_event("identity", ALICE, fields={"handle": "a\x9b2J\x1b.test"})

    async with running(tmp_path) as node:
        await node.writer.run("work", work)
        await fill(node, ALICE, [], handle="a\x9bb", error="odd\nline\x1b[2J")
        shown = []
        for arguments in (
            ["get", f"at://{ALICE}/{POST}/a"],
            ["get", f"at://{ALICE}/{POST}/a", "--json"],
            ["stream", "--cursor", "0", "--limit", "2"],
            ["stream", "--cursor", "0", "--limit", "2", "--json"],
            ["repo", "list"],
            ["repo", "status", ALICE],
        ):
            assert await _call(node, *arguments) == 0
            shown.append(capsys.readouterr().out)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", "".join(shown))
    assert json.loads(shown[0])["value"]["text"] == json.loads(shown[1])["value"]["text"] == text
    assert "é\U0001f600" in shown[0]
    assert "odd\\u000aline" in shown[5]


def test_what_is_not_a_url_is_said(capsys: Output) -> None:
    for option in ("--url", "--management-url"):
        assert _exit_code(["repo", "list", option, "foo"]) == 2
        error = capsys.readouterr().err
        assert f"'{option}'" in error
        assert "not a URL of the form http://host: 'foo'" in error


async def test_waiting_ends_when_nothing_will_come(tmp_path: Path, capsys: Output) -> None:
    async with running(tmp_path, filter={"excludes": [CAROL]}) as node:
        gone = "identity_gone: no such DID"
        far = {"due": 1 << 50, "attempt": 1, "rev": "", "commit": b"", "tracked": True}
        await fill(node, ALICE, [], state=SyncState.PENDING, error=gone, **far)
        await fill(node, BOB, [], state=SyncState.PENDING, status=AccountStatus.DELETED, tracked=True)
        assert await _call(node, "repo", "add", ALICE, BOB, CAROL, "--wait") == 1
        error = capsys.readouterr().err
        assert f"{ALICE} cannot be synced: {gone}" in error
        assert f"the account {BOB} is deleted" in error
        assert f"{CAROL} is excluded" in error
        assert await _call(node, "repo", "list", "--status", "deleted") == 0
        assert capsys.readouterr().out == f"{BOB} pending deleted 3jzfcijpj2z2a -\n"


async def test_waiting_ends_although_another_repository_is_tried_again_and_again(
    tmp_path: Path, capsys: Output
) -> None:
    async with running(tmp_path) as node:
        far = {"state": SyncState.PENDING, "due": 1 << 50, "rev": "", "commit": b"", "tracked": True}
        await fill(node, ALICE, [], **far, attempt=3, error="slow: tried again")
        await fill(node, BOB, [], **far, attempt=1, error="identity_gone: no such DID")
        resting = "host_rests: pds is left alone"  # asked once more when it rests no longer
        await fill(node, CAROL, [], **far, status=AccountStatus.DEACTIVATED, error=resting)
        assert await _call(node, "repo", "add", ALICE, CAROL, BOB, "--wait") == 1
        output = capsys.readouterr()
        assert f"{BOB} cannot be synced: identity_gone: no such DID; 2 repositories not synced" in output.err
        assert [line.split()[0] for line in output.out.splitlines()] == [BOB]


@pytest.mark.parametrize("rate", [None, 2.5])
def test_what_waits_for_a_later_try_is_told_where_no_end_can_be(
    capsys: Output, monkeypatch: pytest.MonkeyPatch, rate: float | None
) -> None:
    async def stats(_daemon: Daemon) -> dict[str, Any]:
        figures = {"due": 0, "later": 19, "oldest_due_us": None, "next_due_us": 1_000_000, "eta_s": rate}
        return {"backfill": figures, "repos": {"total": 50, "by_state": {}}}

    monkeypatch.setattr(Daemon, "stats", stats)
    assert _exit_code(["repo", "status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "oldest_due       -" in lines
    told = "19 repositories wait for a later try, the next at 1970-01-01T00:00:01Z (now)"
    assert (told in lines) == (rate is None)


async def test_the_token_is_sent(tmp_path: Path, capsys: Output) -> None:
    async with running(tmp_path, management={"token": "s3cret"}) as node:
        assert await _call(node, "repo", "list") == 1
        assert "AuthenticationRequired" in capsys.readouterr().err
        assert await _call(node, "repo", "list", "--token", "s3cret") == 0


async def test_repositories_are_left_purged_and_fetched_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        assert await _call(node, "repo", "resync", ALICE, BOB) == 1
        told = capsys.readouterr()
        assert f"{ALICE} queued" in told.out.splitlines()
        assert f"{BOB} is not followed" in told.err
        assert (row := node.services.db.repo(ALICE)) is not None
        assert row.state is SyncState.DESYNCHRONIZED
        assert await _call(node, "repo", "remove", ALICE) == 0
        assert (row := node.services.db.repo(ALICE)) is not None
        assert not row.tracked
        assert [path for path, _ in node.services.db.records(ALICE)] == [f"{POST}/a"]
        assert await _call(node, "repo", "remove", ALICE, "--purge", "--json") == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"did": ALICE}
        assert not list(node.services.db.records(ALICE))
        assert await _call(node, "repo", "remove", BOB) == 1
        assert f"{BOB} is not known here" in capsys.readouterr().err


async def test_nothing_is_fetched_again_in_ephemeral_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path, ephemeral={"enabled": True}) as node:
        assert await _call(node, "repo", "resync", ALICE) == 1
        assert "nothing is fetched in ephemeral mode" in capsys.readouterr().err
