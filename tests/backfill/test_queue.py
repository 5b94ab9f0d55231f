"""The order of the queue and the window on it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from indexer.backfill.queue import (
    CLAIMED_DUE,
    FOUND_SPAN,
    Entry,
    ReadPosition,
    ReadyQueue,
    explicit_due,
    found_due,
)
from indexer.backfill.service import OVERLAP_US

NOW = 1_800_000_000_000_000


def test_what_was_asked_for_comes_before_what_was_seen_and_after_what_was_begun() -> None:
    assert CLAIMED_DUE < explicit_due(NOW) < explicit_due(NOW + 1) < NOW - 10 * 365 * 86400 * 1_000_000


@given(st.integers(NOW, NOW + 10 * FOUND_SPAN))
def test_what_is_found_together_is_due_together_and_is_read_by_the_next_pass(now: int) -> None:
    assert now - OVERLAP_US // 2 <= found_due(now) <= now
    assert found_due(found_due(now) + FOUND_SPAN - 1) == found_due(now)


def test_the_earliest_of_the_allowed_hosts_comes_first() -> None:
    ready = ReadyQueue(10)
    for due, did, host in ((5, "d5", "a"), (3, "d3", "b"), (1, "d1", "a"), (4, "d4", "b")):
        ready.add(Entry(due, did, host))
    assert ready.pop(lambda host: True) == Entry(1, "d1", "a")
    assert ready.pop(lambda host: host != "b") == Entry(5, "d5", "a")
    assert ready.pop(lambda host: host == "a") is None
    assert ready.pop(lambda host: True) == Entry(3, "d3", "b")
    assert len(ready) == 1


def test_a_repository_is_in_the_window_once() -> None:
    ready = ReadyQueue(10)
    ready.add(Entry(5, "did", "a"))
    ready.add(Entry(1, "did", "b"))
    assert len(ready) == 1
    assert "did" in ready
    ready.pop(lambda host: True)
    assert "did" not in ready
    assert ready.hosts() == []


def test_a_host_that_rests_gives_up_its_entries() -> None:
    ready = ReadyQueue(4)
    for number in range(3):
        ready.add(Entry(number, f"d{number}", "a"))
    ready.add(Entry(9, "other", "b"))
    assert ready.room == 0
    assert [entry.did for entry in ready.pop_host("a", 2)] == ["d0", "d1"]
    assert ready.pop_host("none", 5) == []
    assert ready.room == 2


def test_one_host_takes_an_eighth_of_the_window_and_the_rest_is_read_again() -> None:
    ready = ReadyQueue(64)
    for number in range(12):
        ready.add(Entry(number, f"d{number:02}", "a"))
    ready.add(Entry(20, "other", "b"))
    assert len(ready) == 9
    assert (ready.crowded(), ready.left_out("a"), ready.left_out("b")) == (["a"], None, None)
    assert [entry.due for entry in ready.pop_host("a", 6)] == [0, 1, 2, 3, 4, 5]
    assert ready.left_out("a") == (8, "d08")
    assert (ready.crowded(), ready.left_out("a")) == ([], None)


def test_what_was_asked_for_finds_room_in_a_full_window() -> None:
    ready = ReadyQueue(4)
    for number in range(5, 20):
        ready.add(Entry(number, f"d{number}", "a"))
    ready.add(Entry(1, "asked", "a"), always=True)
    popped = ready.pop(lambda _host: True)
    assert popped is not None
    assert popped.did == "asked"


def test_what_could_begin_is_counted_by_host() -> None:
    ready = ReadyQueue(100)
    for number in range(5):
        ready.add(Entry(number, f"a{number}", "a"))
        ready.add(Entry(number, f"b{number}", "b"))
    assert ready.startable(lambda _host: True, 10)
    assert not ready.startable(lambda host: host == "a", 6)
    assert ready.startable(lambda host: host == "a", 5)


def test_reading_goes_back_to_what_had_no_room_and_never_ahead() -> None:
    position = ReadPosition(overlap_us=5, rewind_us=1_000_000)
    position.start(10)
    position.page_end((7, "d7"))
    position.back_to((9, "d9"))
    assert position.start(11) == (7, "d7\0")
    position.back_to((3, "d3"))
    assert position.start(12) == (3, "d3")


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 40)), max_size=80),
    st.integers(1, 10),
)
def test_a_pass_reads_every_row_that_is_due(rows: list[tuple[int, int]], page: int) -> None:
    keys = sorted({(due, f"did{number:02}") for due, number in rows})
    position = ReadPosition(overlap_us=5, rewind_us=1000)
    now, found = 30, []
    while True:
        start = position.start(now)
        part = [key for key in keys if start <= key < (now + 1, "")][:page]
        found += part
        if len(part) < page:
            position.pass_end(now)
            break
        position.page_end(part[-1])
    assert found == [key for key in keys if key[0] <= now]
    assert position.start(now) == (25, "")


def test_the_front_is_read_again_in_time_and_when_asked() -> None:
    position = ReadPosition(overlap_us=5, rewind_us=1000)
    assert position.start(10_000) == (0, "")
    position.pass_end(10_000)
    assert position.start(10_500) == (9_995, "")
    position.rewind()
    assert position.start(10_600) == (0, "")
    position.pass_end(10_600)
    assert position.start(11_599) == (10_595, "")
    assert position.start(11_600) == (0, "")
