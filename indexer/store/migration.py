"""The framework of format migrations: which steps are due, and running them so that a kill costs nothing.

The steps themselves are in `migrations/` (`indexer.migrations`), numbered by the format that each one makes,
with codecs of their own. A step yields batches; each is committed with the position to go on from, the last
one with the new version. Until then no program opens the database: not this one, because of the position,
nor an older one, because from the first batch on it may only be read by programs of the new version.
Runs offline, blocking; the database's lock is held.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, NamedTuple, TypeAlias

from indexer.errors import StoreCorrupt
from indexer.store.codecs import pack, unpack
from indexer.store.database import FORMAT, Database, format_version
from indexer.store.keyspaces import CURSORS, FORMAT_VERSION, UNDER_WAY
from indexer.store.raw import Change, RawRows

#: Called with a step's title, the rows handled so far and about how many there are.
Progress: TypeAlias = Callable[[str, int, int], None]


class Batch(NamedTuple):
    """Changes that belong together. ``position`` (MessagePack) is where to go on; None: the step is done."""

    changes: Sequence[Change]
    position: Any
    handled: int  # rows looked at


@dataclass(frozen=True, slots=True)
class Migration:
    """A step from format ``to`` − 1 to format ``to``.

    ``run(rows, position)`` goes on from the position of its last committed batch, None at the start, and
    reads what its earlier batches wrote. ``total`` estimates the rows that it looks at.
    """

    to: int
    oldest_reader: int  # the oldest program format that may read the result
    title: str
    total: Callable[[RawRows], int]
    run: Callable[[RawRows, Any], Iterator[Batch]]


class Migrated(NamedTuple):
    before: int
    after: int
    handled: int  # rows looked at, by this run


def known_steps() -> tuple[Migration, ...]:
    """The steps of `indexer.migrations`, in order."""
    steps: tuple[Migration, ...] = importlib.import_module("indexer.migrations").STEPS
    assert [step.to for step in steps] == list(range(1, FORMAT + 1)), "a step for every format"
    return steps


def _silent(_title: str, _done: int, _total: int) -> None:
    """Nobody watches."""


def migrate(
    path: FilePath,
    *,
    memory_mib: int = 64,
    steps: Sequence[Migration] | None = None,
    progress: Progress = _silent,
    crash_point: Callable[[str], None] | None = None,
) -> Migrated:
    """Bring the database in ``path`` to this program's format; going on where a kill left it.

    Raises `StoreVersion` for a newer one, `StoreLocked`, `StoreCorrupt`, `StoreFull`.
    """
    with Database.open_unchecked(path, memory_mib=memory_mib) as db:
        version = format_version(db)
        if version is None:
            raise StoreCorrupt(f"{path}: the database has no format version (cursors: {FORMAT_VERSION})")
        rows = RawRows(db)
        handled = 0
        for step in steps if steps is not None else known_steps():
            if step.to > version.written:
                handled += _run(rows, step, progress, crash_point or (lambda _point: None))
        after = format_version(db)
        db.sync_wal()
        return Migrated(version.written, after.written if after else 0, handled)


def _run(rows: RawRows, step: Migration, progress: Progress, crash_point: Callable[[str], None]) -> int:
    position, done = _resumed(rows, step)
    before, total = done, max(step.total(rows), done)
    progress(step.title, done, total)
    for batch in step.run(rows, position):
        done += batch.handled
        crash_point(f"before migrate {step.to}")
        rows.commit([*batch.changes, *_marks(step, batch, done)], sync=batch.position is None)
        crash_point(f"after migrate {step.to}")
        progress(step.title, done, max(total, done))
        if batch.position is None:
            return done - before
    raise AssertionError(f"migration {step.to} ended without its last batch")


def _resumed(rows: RawRows, step: Migration) -> tuple[Any, int]:
    """Where the step goes on, and how many rows are behind it."""
    raw = rows.get(CURSORS.name, UNDER_WAY.encode())
    if raw is None:
        return None, 0
    try:
        to, position, done = unpack(raw)
    except Exception as error:
        raise StoreCorrupt(f"cursors: row {UNDER_WAY!r} holds no migration: {error}") from error
    if to != step.to:
        raise StoreCorrupt(f"cursors: row {UNDER_WAY!r} is of migration {to}, due is {step.to}")
    return position, done


def _marks(step: Migration, batch: Batch, done: int) -> list[Change]:
    name = CURSORS.name
    if batch.position is not None:
        return [
            (name, UNDER_WAY.encode(), pack([step.to, batch.position, done])),
            (name, FORMAT_VERSION.encode(), pack([step.to - 1, step.to])),
        ]
    return [
        (name, UNDER_WAY.encode(), None),
        (name, FORMAT_VERSION.encode(), pack([step.to, step.oldest_reader])),
    ]
