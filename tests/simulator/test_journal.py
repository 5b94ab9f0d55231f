from __future__ import annotations

from pathlib import Path

import pytest

from indexer.simulator.cbor import encode
from indexer.simulator.framelog import FrameLog, Lane
from indexer.simulator.journal import Journal, JournalError

HALVES = [b"before", b"after"]


def fill(journal: Journal, count: int) -> None:
    for number in range(count):
        journal.append({"kind": "test", "number": number}, HALVES)


def numbers(folder: Path, **limits: int) -> list[int]:
    journal = Journal(folder, keep_bytes=1 << 20, **limits)
    try:
        return [row["number"] for row, _ in journal.rows()]
    finally:
        journal.close()


def test_rows_come_back_with_the_place_of_their_frames(tmp_path: Path) -> None:
    journal = Journal(tmp_path, keep_bytes=1 << 20, segment_bytes=200)
    list(journal.rows())
    fill(journal, 20)
    journal.close()
    assert len(list(tmp_path.glob("journal.*"))) > 3
    journal = Journal(tmp_path, keep_bytes=1 << 20, segment_bytes=200)
    rows = list(journal.rows())
    assert [row["number"] for row, _ in rows] == list(range(20))
    assert {journal.read(*place, 11) for _, place in rows} == {b"beforeafter"}
    journal.close()


def test_a_torn_last_row_is_dropped_wherever_it_is_cut(tmp_path: Path) -> None:
    journal = Journal(tmp_path, keep_bytes=1 << 20)
    fill(journal, 3)
    journal.close()
    file = tmp_path / "journal.000000"
    whole = file.read_bytes()
    row = len(whole) // 3
    for cut in range(len(whole) - row, len(whole)):
        file.write_bytes(whole[:cut])
        assert numbers(tmp_path) == [0, 1]
        assert file.stat().st_size == 2 * row
    file.write_bytes(whole[:-1] + b"?")
    assert numbers(tmp_path) == [0, 1]
    journal = Journal(tmp_path, keep_bytes=1 << 20)
    list(journal.rows())
    journal.append({"kind": "test", "number": 7}, HALVES)
    journal.close()
    assert numbers(tmp_path) == [0, 1, 7]


def test_damage_before_the_end_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path, keep_bytes=1 << 20, segment_bytes=200)
    fill(journal, 20)
    journal.close()
    file = tmp_path / "journal.000000"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(JournalError, match=r"journal\.000000"):
        numbers(tmp_path, segment_bytes=200)


def test_a_folder_has_one_user(tmp_path: Path) -> None:
    journal = Journal(tmp_path, keep_bytes=1 << 20)
    with pytest.raises(JournalError, match="in use"):
        Journal(tmp_path, keep_bytes=1 << 20)
    journal.close()
    Journal(tmp_path, keep_bytes=1 << 20).close()


def test_without_a_folder_the_oldest_frames_are_given_up() -> None:
    journal = Journal(None, keep_bytes=1000, segment_bytes=500)
    log = FrameLog(journal)
    lane = Lane(log)
    for number in range(100):
        place = journal.append({"number": number}, [b"b" * 20, b"a" * 20])
        lane.add(10 * number + 10, log.add(place, [(20, 20)])[0])
    floor = lane.floor()
    assert 60 < floor < 100
    oldest = 10 * floor + 10
    assert lane.outdated(oldest - 15)
    assert not any(map(lane.outdated, (0, oldest - 1, oldest, lane.seq)))
    frames = lane.read(floor, 1 << 20)
    assert len(frames) == 100 - floor
    assert frames[0] == b"b" * 20 + encode(oldest) + b"a" * 20
    journal.close()


def test_a_lane_finds_its_place_after_a_cursor() -> None:
    journal = Journal(None, keep_bytes=1 << 20)
    log = FrameLog(journal)
    lane = Lane(log)
    for seq in (3, 4, 9):
        lane.add(seq, log.add(journal.append({}, HALVES), [(6, 5)])[0])
    assert [lane.after(seq) for seq in (0, 2, 3, 4, 8, 9, 10)] == [0, 0, 1, 2, 2, 3, 3]
    assert (lane.seq, lane.end, len(lane.read(0, 1)), len(lane.read(0, 1 << 20))) == (9, 3, 1, 3)
    journal.close()
