"""`indexer filter` against a running server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands.test_client import _call
from tests.serve.node import ALICE, POST, fill, running

LIKE = "app.bsky.feed.like"
Output = pytest.CaptureFixture[str]


async def test_the_filter_is_shown_replaced_patched_and_purged(tmp_path: Path, capsys: Output) -> None:
    async with running(tmp_path, filter={"signals": [POST]}) as node:
        await fill(node, ALICE, [f"{POST}/a", f"{LIKE}/a"])
        assert await _call(node, "filter", "show") == 0
        shown = ["mode         filter", f"signals      {POST}", "collections  all", "excludes     none"]
        assert capsys.readouterr().out.splitlines()[-4:] == shown
        steps: list[tuple[list[str], str, object]] = [
            (["mode", "full"], "mode", "full"),
            (["signals", LIKE, "--add"], "signals", [POST, LIKE]),
            (["signals", POST, "--drop"], "signals", [LIKE]),
            (["signals", "com.example.*"], "signals", ["com.example.*"]),
            (["signals", "--clear"], "signals", []),
            (["excludes", "did:web:bad.example"], "excludes", ["did:web:bad.example"]),
            (["collections", POST, "--purge"], "collections", [POST]),
        ]
        for arguments, field, value in steps:
            assert await _call(node, "filter", "set", *arguments, "--json") == 0
            answer = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert answer[field] == value
        assert answer["purged"] == 1
        assert [path for path, _ in node.services.db.records(ALICE)] == [f"{POST}/a"]
        assert await _call(node, "filter", "set", "collections", "--clear") == 0
        assert "queued       1 repositories" in capsys.readouterr().out


async def test_taking_the_last_collection_off_does_not_keep_all_of_them(
    tmp_path: Path, capsys: Output
) -> None:
    async with running(tmp_path, filter={"collections": [POST]}) as node:
        assert await _call(node, "filter", "set", "collections", POST, "--drop") == 1
        assert "--clear" in capsys.readouterr().err
        assert node.services.db.filters() == []
        assert await _call(node, "filter", "set", "collections", LIKE, "--add") == 0
        assert await _call(node, "filter", "set", "collections", POST, "--drop") == 0
        assert "collections  app.bsky.feed.like" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["mode"], 2, "one word"),
        (["mode", "--clear"], 2, "--clear"),
        (["signals"], 2, "at least one"),
        (["signals", POST, "--clear"], 2, "--clear"),
        (["mode", "half"], 1, "mode must be"),
        (["collections", "nonsense"], 1, "pattern"),
        (["excludes", "alice"], 1, "DID"),
        (["signals", POST, "--add", "--drop"], 2, "two commands"),
        (["signals", POST, LIKE, "--drop"], 1, f"not in signals: {POST} {LIKE}"),
    ],
)
async def test_what_is_wrong_is_said(
    tmp_path: Path, capsys: Output, arguments: list[str], code: int, why: str
) -> None:
    async with running(tmp_path) as node:
        assert await _call(node, "filter", "set", *arguments) == code
        assert why in capsys.readouterr().err
        assert node.services.db.filters() == []
