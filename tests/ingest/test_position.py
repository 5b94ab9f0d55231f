"""Streams that begin anew, cursors from the future or too old, losses: seen, told, and nothing skipped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from indexer.errors import RequestError
from indexer.ingest.account import micros_of
from indexer.ingest.position import batch_time
from indexer.ingest.revs import ROWS
from indexer.simulator.wire import error_frame, frame, info_frame, timestamp
from indexer.store.keyspaces import CURSORS
from tests.ingest.node import Node
from tests.ingest.test_pipeline import world
from tests.ingest.test_sources import of
from tests.ingest.upstream import Scripted, scripted

NOW_US = 1_760_000_000_000_000
MINUTE = 60_000_000


def event(seq: int, at: int = 0) -> bytes:
    """An `#identity` of somebody whom nobody follows."""
    payload = {"did": "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", "time": timestamp(NOW_US + at)}
    return frame("#identity", payload).numbered(seq)


def notes(node: Node, upstream: Scripted) -> dict[str, int]:
    """The durable counts of alarms."""
    prefix = f"ingest/{upstream.url}/note/"
    return {name.removeprefix(prefix): n for name, n in node.db.counts(prefix).items()}


@asynccontextmanager
async def following(tmp_path: Path, upstream: Scripted, **tables: Any) -> Any:
    filters = {"mode": "filter"}
    async with world() as net, net.node(tmp_path, upstreams=[upstream.url], filter=filters, **tables) as node:
        yield node


def stored(node: Node, upstream: Scripted, seq: int) -> Callable[[], bool]:
    return lambda: node.db.cursor(f"upstream/{upstream.url}") == seq


async def test_a_reset_stream_is_read_from_its_oldest_message_and_the_cursor_stays(tmp_path: Path) -> None:
    async with scripted() as upstream:
        upstream.answer = lambda _cursor: [event(n) for n in range(91, 101)]
        async with following(tmp_path, upstream) as node:
            await node.until(stored(node, upstream, 100))
            # The new numbering: a host that does not know our cursor sends its live tail.
            upstream.answer = lambda cursor: [event(n) for n in (range(1, 6) if cursor == "0" else (5,))]
            await upstream.drop()
            await node.until(
                lambda: of(node, upstream.url)["renumbered"] and of(node, upstream.url)["seq"] == 5
            )
            assert upstream.cursors == [None, "100", "0"]
            assert of(node, upstream.url)["frames"] == 10 + 1 + 5
            assert notes(node, upstream) == {"stream_reset": 1}
            assert node.db.count(ROWS + "scheduled") == 1
            await upstream.drop()  # and goes on in the new numbering
            await node.until(lambda: len(upstream.cursors) >= 4)
            assert upstream.cursors[3] == "5"
            assert stored(node, upstream, 100)()


async def test_a_reset_is_seen_again_after_a_restart_until_it_is_accepted(tmp_path: Path) -> None:
    async with scripted() as upstream:
        upstream.answer = lambda _cursor: [event(100)]
        async with following(tmp_path, upstream) as node:
            await node.until(stored(node, upstream, 100))
        upstream.answer = lambda cursor: [event(n) for n in range(int(cursor or 0) % 100 + 1, 8)]
        async with following(tmp_path, upstream) as node:
            with pytest.raises(RequestError, match="goes on with the numbering"):
                await node.ingest.sources.accept(upstream.url)
            await node.until(lambda: of(node, upstream.url)["seq"] == 7)
            assert notes(node, upstream) == {"stream_reset": 1}
            assert await node.ingest.sources.accept(upstream.url) == 7
            assert not of(node, upstream.url)["renumbered"]
        upstream.cursors.clear()
        upstream.answer = lambda cursor: [event(8)]
        async with following(tmp_path, upstream) as node:
            await node.until(stored(node, upstream, 8))
            assert upstream.cursors[0] == "7"
            assert notes(node, upstream) == {"stream_reset": 1}


async def test_a_numbering_that_is_accepted_before_its_first_message_is_read_from_its_oldest(
    tmp_path: Path,
) -> None:
    async with scripted() as upstream:
        upstream.answer = lambda _cursor: [event(100)]
        async with following(tmp_path, upstream) as node:
            await node.until(stored(node, upstream, 100))
            upstream.answer = lambda cursor: [] if cursor == "0" else [error_frame("FutureCursor", "no")]
            await upstream.drop()
            await node.until(lambda: of(node, upstream.url)["renumbered"])
            assert await node.ingest.sources.accept(upstream.url) == 0
            assert stored(node, upstream, 0)()
            assert not of(node, upstream.url)["renumbered"]


async def test_a_cursor_from_the_future_skips_nothing_that_is_retained(tmp_path: Path) -> None:
    async with scripted() as upstream:
        upstream.answer = lambda _cursor: [event(100)]
        async with following(tmp_path, upstream) as node:
            await node.until(stored(node, upstream, 100))

            def answer(cursor: str | None) -> list[bytes]:
                if int(cursor or 0) > 9:
                    return [error_frame("FutureCursor", "no such thing yet")]
                return [event(n) for n in range(int(cursor or 0) + 1, 10)]

            upstream.answer = answer
            await upstream.drop()
            await node.until(lambda: of(node, upstream.url)["seq"] == 9)
            assert upstream.cursors == [None, "100", "0"]
            assert notes(node, upstream) == {"future_cursor": 1}
            assert of(node, upstream.url)["renumbered"]
            assert stored(node, upstream, 100)()


async def test_a_new_numbering_that_overtakes_the_old_one_is_the_cursor_s(tmp_path: Path) -> None:
    async with scripted() as upstream:
        upstream.answer = lambda _cursor: [event(10)]
        async with following(tmp_path, upstream) as node:
            await node.until(stored(node, upstream, 10))
            upstream.answer = lambda cursor: [event(n) for n in range(int(cursor or 0) % 10 + 1, 21)]
            await upstream.drop()
            await node.until(stored(node, upstream, 20))
            upstream.answer = lambda _cursor: []
            await upstream.drop()
            await node.until(lambda: upstream.cursors[-1] == "20")
            assert not of(node, upstream.url)["renumbered"]


@pytest.mark.parametrize(("jump", "lost"), [(2 * MINUTE, True), (MINUTE // 2, False)])
async def test_a_jump_in_numbers_and_in_time_is_a_possible_loss(
    tmp_path: Path, jump: int, lost: bool
) -> None:
    async with scripted() as upstream:
        upstream.answer = lambda _cursor: [event(10)]
        async with following(tmp_path, upstream) as node:
            await node.until(stored(node, upstream, 10))
            upstream.answer = lambda _cursor: [event(50, jump), event(60, 10 * MINUTE)]
            await upstream.drop()
            await node.until(stored(node, upstream, 60))
            assert notes(node, upstream) == ({"possible_loss": 1} if lost else {})


def test_the_time_of_a_batch_is_its_middle_one_and_never_in_the_future() -> None:
    def at(minute: int) -> str:
        return f"2026-11-21T10:{minute:02d}:00Z"

    now_s = micros_of(at(30)) / 1e6
    assert batch_time([], now_s) == 0
    assert batch_time(["9999-12-31T00:00:00Z"], now_s) == micros_of(at(30))
    assert batch_time([at(1), "9999-12-31T00:00:00Z"], now_s) == micros_of(at(1))
    assert batch_time([at(1), "0001-01-01T00:00:00Z", at(2)], now_s) == micros_of(at(1))


async def test_an_outdated_cursor_is_told_and_the_window_taken(tmp_path: Path) -> None:
    async with scripted() as upstream:
        upstream.answer = lambda _cursor: [event(10)]
        async with following(tmp_path, upstream) as node:
            await node.until(stored(node, upstream, 10))
            upstream.answer = lambda _cursor: [info_frame("OutdatedCursor", "too old"), event(500)]
            await upstream.drop()
            await node.until(stored(node, upstream, 500))
            assert notes(node, upstream) == {"outdated_cursor": 1}
            assert node.db.count(ROWS + "scheduled") == 1


async def test_ephemeral_mode_counts_the_alarm_and_compares_nothing(tmp_path: Path) -> None:
    async with scripted() as upstream:
        upstream.answer = lambda _cursor: [event(10)]
        async with following(tmp_path, upstream, ephemeral={"enabled": True}) as node:
            await node.until(stored(node, upstream, 10))
            upstream.answer = lambda _cursor: [info_frame("OutdatedCursor", ""), event(11)]
            await upstream.drop()
            await node.until(stored(node, upstream, 11))
            assert notes(node, upstream) == {"outdated_cursor": 1}
            assert node.db.get(CURSORS, ROWS + upstream.url) is None
