"""Which unreadable frame is passed over, and which ends its connection."""

from __future__ import annotations

from indexer.ingest.unreadable import REMEMBERED, TRIES, Unreadable


def connection(unreadable: Unreadable, after: int, *frames: bytes) -> int:
    """Frames that a connection gets past before one ends it."""
    unreadable.connected()
    for number, frame in enumerate(frames):
        if not unreadable.passes(after, frame):
            return number
    return len(frames)


def test_the_frame_that_comes_again_is_passed_over_and_no_other() -> None:
    unreadable = Unreadable()
    assert [connection(unreadable, 7, b"a") for _ in range(TRIES - 1)] == [0] * (TRIES - 1)
    assert connection(unreadable, 7, b"a", b"other") == 1
    assert connection(unreadable, 7, b"a", b"a") == 1


def test_two_frames_in_a_row_are_both_passed_over_in_the_end() -> None:
    unreadable = Unreadable()
    passed = [connection(unreadable, 7, b"a", b"b") for _ in range(2 * TRIES - 1)]
    assert passed == [0] * (TRIES - 1) + [1] * (TRIES - 1) + [2]


def test_garbage_that_is_new_each_time_always_ends_the_connection() -> None:
    unreadable = Unreadable()
    assert not any(connection(unreadable, 7, b"%d" % number) for number in range(REMEMBERED + 50))


def test_what_was_seen_counts_behind_its_cursor_alone() -> None:
    unreadable = Unreadable()
    for _ in range(TRIES - 1):
        connection(unreadable, 7, b"a")
    assert connection(unreadable, 8, b"a") == 0


def test_no_more_than_a_bounded_number_is_remembered() -> None:
    unreadable = Unreadable()
    for _ in range(TRIES):
        for number in range(REMEMBERED + 1):
            connection(unreadable, 7, b"%d" % number)
    assert connection(unreadable, 7, b"0") == 1
    assert connection(unreadable, 7, b"%d" % REMEMBERED) == 0
