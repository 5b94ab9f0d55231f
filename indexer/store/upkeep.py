"""What an operator asks of an open database: figures by keyspace, which one it is, compaction and reading
of everything.

All of it blocks; the daemon calls it in a thread. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any, Final

import rocksdict

from indexer.errors import StoreError
from indexer.store import rocks
from indexer.store.database import Database
from indexer.store.keyspaces import KEYSPACES

_ROWS: Final = "rows_estimated"
#: Totals that are kept, not estimated.
_COUNTED: Final = ("repos", "records", "events")
_READAHEAD: Final = 2 << 20
_ROWS_A_STEP: Final = 50_000


def describe(db: Database) -> dict[str, Any]:
    """Which database it is; exact counts; rows, bytes and compression by keyspace; totals, and memory.

    ``rows_estimated`` is RocksDB's guess. ``raw_bytes`` is what the keys and values in the files come to
    before compression, ``data_bytes`` after; obsolete versions and tombstones count in both.
    """
    packed = db.compression()
    keyspaces = {name: {_ROWS: row.pop("rows"), **row, **packed[name]} for name, row in db.stats().items()}
    names = next(iter(keyspaces.values())).keys()
    totals = {name: sum(row[name] for row in keyspaces.values()) for name in names}
    return {
        "data_dir": str(db.path.parent.resolve()),
        "identity": identity(db.path),
        "counts": {name: db.count(name) for name in _COUNTED},
        "keyspaces": keyspaces,
        "totals": totals,
        "memory": db.memory(),
    }


def identity(path: FilePath) -> str:
    """Tells the database in folder ``path`` from every other one, its own copies included, also where the
    folder has another name, as in a container: RocksDB's id of it, and the number of the locked file. A
    backup was never opened, so it has neither: it is told by its CURRENT."""
    try:
        if not (path / "LOCK").exists():
            return f"-/{(path / 'CURRENT').stat().st_ino}"
        return f"{(path / 'IDENTITY').read_text().strip()}/{(path / 'LOCK').stat().st_ino}"
    except OSError as error:
        raise StoreError(f"{path}: cannot tell which database this is: {error.strerror}") from error


def read_through(db: Database, step: Callable[[str, int, int], None]) -> None:
    """Read every row once: RocksDB checks each block that it reads. Raises `StoreCorrupt`
    with the file at fault. ``step("reading <keyspace>", rows, of about)`` is called now and then."""
    for error in damage(db, step):
        raise error


def damage(db: Database, step: Callable[[str, int, int], None]) -> Iterator[StoreError]:
    """As `read_through`, of all keyspaces: what ended the reading of those that cannot be read to the end."""
    done, total = 0, sum(row["rows"] for row in db.stats().values())
    for name in KEYSPACES:
        try:
            for rows in _read(db, name):
                done += rows
                step(f"reading {name}", done, max(done, total))
        except StoreError as error:
            yield error


def _read(db: Database, name: str) -> Iterator[int]:
    """Reads a keyspace; the rows, so many at a time."""
    options = rocksdict.ReadOptions()
    options.set_readahead_size(_READAHEAD)
    with rocks.translated(f"reading {name}"):
        cursor = db.family(name).iter(options)
        try:
            cursor.seek_to_first()
            rows = 0
            while cursor.valid():
                cursor.next()
                rows += 1
                if not rows % _ROWS_A_STEP:
                    yield _ROWS_A_STEP
            cursor.status()
        finally:
            del cursor  # the error's traceback would keep the database open


def compact_all(db: Database, step: Callable[[str, int, int], None] | None = None) -> None:
    """Compact every keyspace, one after another; ``step(name, done, of)`` is called before each."""
    for done, keyspace in enumerate(KEYSPACES.values()):
        if step is not None:
            step(keyspace.name, done, len(KEYSPACES))
        db.compact(keyspace)
