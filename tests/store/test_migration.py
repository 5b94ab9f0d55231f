"""The framework of migrations: order, atomic batches with their position, the version with the last one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from indexer.errors import StoreVersion
from indexer.store import database
from indexer.store.codecs import pack, unpack
from indexer.store.database import FORMAT, Database, format_version
from indexer.store.keyspaces import COUNTS, CURSORS, UNDER_WAY
from indexer.store.migration import Batch, Migrated, Migration, known_steps, migrate
from indexer.store.raw import RawRows

COUNT = COUNTS.name


class Stop(Exception):
    """A kill, where a test can see it."""


def counting(to: int, until: int = 3) -> Migration:
    """A step that adds one to a count in every batch."""

    def run(rows: RawRows, position: Any) -> Iterator[Batch]:
        for number in range(position or 0, until):
            old = rows.get(COUNT, b"n")
            total = 1 + (unpack(old) if old else 0)
            yield Batch([(COUNT, b"n", pack(total))], number + 1 if number + 1 < until else None, 10)

    return Migration(to, 1, f"step {to}", lambda _rows: 10 * until, run)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    Database.open(tmp_path / "db").close()
    with Database.open_unchecked(tmp_path / "db") as db:
        RawRows(db).commit([(CURSORS.name, b"format", pack([FORMAT - 1, FORMAT - 1]))])
    return tmp_path / "db"


def stored(path: Path) -> tuple[int, Any, Any]:
    """The version, the count and the position."""
    with Database.open_unchecked(path) as db:
        version = format_version(db)
        assert version is not None
        return version.written, db.get(COUNTS, "n"), db.get(CURSORS, UNDER_WAY)


def test_there_is_a_step_to_every_format() -> None:
    assert [step.to for step in known_steps()] == list(range(1, FORMAT + 1))


def test_steps_run_in_order_and_each_leaves_its_version(old: Path) -> None:
    told: list[tuple[str, int, int]] = []
    steps = [counting(FORMAT), counting(FORMAT + 1, until=2)]
    done = migrate(old, steps=steps, progress=lambda *told_now: told.append(told_now))
    assert done == Migrated(FORMAT - 1, FORMAT + 1, 50)
    assert stored(old) == (FORMAT + 1, 5, None)
    assert [what for what, _, _ in told] == [f"step {FORMAT}"] * 4 + [f"step {FORMAT + 1}"] * 3
    assert told[3][1:] == (30, 30)


def test_steps_that_are_done_do_not_run(old: Path) -> None:
    migrate(old, steps=[counting(FORMAT)])
    assert migrate(old, steps=[counting(FORMAT)]) == Migrated(FORMAT, FORMAT, 0)
    assert stored(old)[1] == 3


@pytest.mark.parametrize(
    ("point", "passes", "left"),
    [
        ("before", 1, (FORMAT - 1, None, None)),
        ("after", 1, (FORMAT - 1, 1, [FORMAT, 1, 10])),
        ("before", 3, (FORMAT - 1, 2, [FORMAT, 2, 20])),
        ("after", 3, (FORMAT, 3, None)),
    ],
)
def test_a_batch_its_position_and_the_version_are_one(
    old: Path, point: str, passes: int, left: tuple[int, Any, Any]
) -> None:
    reached: list[str] = []

    def crash(name: str) -> None:
        reached.append(name)
        if reached.count(f"{point} migrate {FORMAT}") == passes:
            raise Stop

    with pytest.raises(Stop):
        migrate(old, steps=[counting(FORMAT)], crash_point=crash)
    assert stored(old) == left
    migrate(old, steps=[counting(FORMAT)])
    assert stored(old) == (FORMAT, 3, None)


def test_half_migrated_it_is_opened_by_no_program(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(name: str) -> None:
        if name.startswith("after"):
            raise Stop

    with pytest.raises(Stop):
        migrate(old, steps=[counting(FORMAT)], crash_point=crash)
    with Database.open_unchecked(old) as db:
        assert format_version(db) == (FORMAT - 1, FORMAT)
    with pytest.raises(StoreVersion, match="under way; run `indexer db migrate`"):
        Database.open(old)
    with monkeypatch.context() as older:
        older.setattr(database, "FORMAT", FORMAT - 1)
        with pytest.raises(StoreVersion, match="use a newer program"):
            Database.open(old)
    migrate(old, steps=[counting(FORMAT)])
    with Database.open(old) as db:
        assert format_version(db) == (FORMAT, 1)


def test_a_step_without_a_last_batch_is_a_fault(old: Path) -> None:
    endless = Migration(FORMAT, 1, "", lambda _rows: 0, lambda _rows, _position: iter([Batch([], 1, 0)]))
    with pytest.raises(AssertionError, match="ended without its last batch"):
        migrate(old, steps=[endless])
    assert stored(old)[0] == FORMAT - 1
