"""Raw rows of a database that nobody else writes: for migrations, repairs and restores.

Keys and values are bytes, keyspaces are named by string, so that a migration does not change its
meaning with the codecs of the day. Commits go around the writer; every call blocks. Any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeAlias

import rocksdict

from indexer.store import rocks
from indexer.store.database import Database

Change: TypeAlias = tuple[str, bytes, bytes | None]  # keyspace, key, value; None deletes


class RawRows:
    """The rows of an open database, as bytes."""

    __slots__ = ("_db", "_options")

    def __init__(self, db: Database) -> None:
        self._db = db
        self._options = rocksdict.WriteOptions()

    def get(self, name: str, key: bytes) -> bytes | None:
        return self._db.raw_get(name, key)

    def multi_get(self, name: str, keys: Sequence[bytes]) -> list[bytes | None]:
        if not keys:
            return []
        with rocks.translated(f"reading {name}"):
            found: list[bytes | None] = self._db.family(name).get(list(keys))
        return found

    def after(self, name: str, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """Up to ``limit`` rows with key ≥ ``start``, in order."""
        return list(islice(self._db.raw_scan(name, start or None, None), limit))

    def scan(self, name: str, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        return self._db.raw_scan(name, start, stop)

    def estimate(self, name: str) -> int:
        """About how many rows there are."""
        return int(self._db.family(name).property_int_value("rocksdb.estimate-num-keys") or 0)

    def commit(self, changes: Iterable[Change], *, sync: bool = False) -> None:
        """Write ``changes`` in one batch, all or nothing."""
        batch = rocksdict.WriteBatch(raw_mode=True)
        for name, key, value in changes:
            if value is None:
                batch.delete(key, self._db.handles[name])
            else:
                batch.put(key, value, self._db.handles[name])
        self._db.write(batch, self._options)
        if sync:
            self._db.sync_wal()
