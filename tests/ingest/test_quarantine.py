"""Refused frames for people: which, why, and what can be read of a frame that may be anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.ingest import quarantine
from indexer.ingest.quarantine import Wanted, explain, list_refused
from indexer.simulator.wire import error_frame, frame, info_frame
from indexer.store.transaction import Transaction
from tests.ingest.forge import Forge
from tests.store.support import opened


def test_a_commit_is_shown_with_its_operations_and_blocks() -> None:
    forge = Forge()
    parts = forge.posts(2)
    shown = explain(parts.encode())
    assert shown["type"] == "#commit"
    assert "problem" not in shown
    fields = shown["fields"]
    assert (fields["seq"], fields["repo"], fields["rev"]) == (1, forge.did, forge.account.rev)
    assert [op["action"] for op in fields["ops"]] == ["create", "create"]
    assert fields["ops"][0]["cid"] in fields["blocks"]["blocks"]
    assert fields["commit"] in fields["blocks"]["blocks"]
    assert fields["blocks"]["count"] >= 4


def test_the_small_kinds_are_shown() -> None:
    forge = Forge()
    assert explain(forge.identity("a.test"))["fields"]["handle"] == "a.test"
    assert explain(forge.status(False, "takendown"))["fields"]["status"] == "takendown"
    assert explain(forge.sync().encode())["type"] == "#sync"
    assert explain(info_frame("OutdatedCursor", "old"))["fields"]["name"] == "OutdatedCursor"
    assert explain(error_frame("FutureCursor", "no"))["fields"]["error"] == "FutureCursor"
    assert explain(frame("#newer", {"x": 1}).numbered(5))["type"] == "#unknown"


def test_a_cut_frame_is_shown_up_to_the_cut() -> None:
    forge = Forge()
    whole = forge.posts(1).encode()
    shown = explain(whole[: whole.index(b"blocks") + 20])
    assert shown["type"] == "#commit"
    assert shown["fields"]["repo"] == forge.did
    assert "problem" in shown
    assert explain(b"")["type"] is None


def test_a_frame_with_wrong_fields_is_shown_with_them() -> None:
    shown = explain(
        frame("#commit", {"repo": 5, "rev": "x" * 9_000, "ops": [1, {"a": b"\x01" * 500}]}).numbered(3)
    )
    assert shown["problem"]
    assert (shown["fields"]["repo"], shown["fields"]["seq"]) == (5, 3)
    assert len(shown["fields"]["rev"]) <= 500
    assert shown["fields"]["ops"][1]["a"]["bytes"] == 500


@given(st.binary(max_size=300))
def test_whatever_was_refused_can_be_shown(data: bytes) -> None:
    assert set(explain(data)) >= {"type", "fields"}


@given(st.data())
def test_a_frame_with_flipped_bytes_can_be_shown(data: st.DataObject) -> None:
    whole = bytearray(Forge().posts(1).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    assert set(explain(bytes(whole))) >= {"type", "fields"}


async def test_entries_come_newest_first_chosen_and_paged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:

        def fill(tx: Transaction) -> None:
            for number in range(30):
                reason = "signature" if number % 3 else "frame"
                tx.quarantine(
                    "ws://a", number, f"did:web:{number % 2}.test", reason, "because", b"x" * number
                )

        await store.writer.run("t", fill)
        every = list_refused(store.db, Wanted(), before=None, limit=100)
        assert [number for number, _ in every.entries] == list(range(29, -1, -1))
        assert every.cursor is None
        page = list_refused(store.db, Wanted(reason="frame"), before=None, limit=2)
        assert ([number for number, _ in page.entries], page.cursor) == ([27, 24], 24)
        page = list_refused(store.db, Wanted(reason="frame"), before=24, limit=2)
        assert [number for number, _ in page.entries] == [21, 18]
        both = Wanted(did="did:web:1.test", reason="frame", source="ws://a")
        assert [n for n, _ in list_refused(store.db, both, before=None, limit=9).entries] == [
            27,
            21,
            15,
            9,
            3,
        ]
        monkeypatch.setattr(quarantine, "SCANNED_ROWS", 10)
        few = list_refused(store.db, Wanted(reason="nothing"), before=None, limit=9)
        assert few == ([], 20)
