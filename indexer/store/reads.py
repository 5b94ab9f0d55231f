"""Typed reads over raw rows, and snapshots.

`Reads` is what a database and a snapshot of it have in common; `Snapshot` is one point in time.
Reads are safe from any thread, a snapshot from one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import rocksdict

from indexer.atproto.types import Cid, Did, Nsid, Path
from indexer.errors import StoreCorrupt
from indexer.store import rocks
from indexer.store.codecs import (
    AccountWord,
    BufferedFrame,
    RecordRow,
    RepoRow,
    after_prefix,
    decode_record,
    did_range,
)
from indexer.store.keyspaces import (
    ACCOUNT_STATUS,
    BLOCKS,
    COUNTS,
    CURSORS,
    FILTER,
    RECORDS,
    REPOS,
    RESYNC_BUFFER,
    Keyspace,
)

K = TypeVar("K")
V = TypeVar("V")

_SNAPSHOT_ROWS: Final = 256  # read from a snapshot's iterator at once


class Reads:
    """Typed reads over some source of raw rows; shared by `Database` and `Snapshot`."""

    __slots__ = ()

    def raw_get(self, name: str, key: bytes) -> bytes | None:
        raise TypeError("abstract")

    def raw_scan(
        self, name: str, start: bytes | None, stop: bytes | None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Rows with start ≤ key < stop, in order; in reverse from the end."""
        raise TypeError("abstract")

    def get(self, keyspace: Keyspace[K, V], key: K) -> V | None:
        raw = self.raw_get(keyspace.name, keyspace.key.encode(key))
        return None if raw is None else decode(keyspace, key, raw)

    def multi_get(self, keyspace: Keyspace[K, V], keys: Sequence[K]) -> list[V | None]:
        return [self.get(keyspace, key) for key in keys]

    def scan(
        self,
        keyspace: Keyspace[K, V],
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[K, V]]:
        """Decoded rows with start ≤ encoded key < stop; exhaust or close the iterator."""
        left = -1 if limit is None else limit
        if not left:
            return
        for raw_key, raw in self.raw_scan(keyspace.name, start, stop, reverse):
            key = keyspace.key.decode(raw_key)
            yield key, decode(keyspace, key, raw)
            left -= 1
            if not left:
                return

    def repo(self, did: Did) -> RepoRow | None:
        return self.get(REPOS, did)

    def record(self, did: Did, path: Path) -> RecordRow | None:
        return self.get(RECORDS, (did, path))

    def block(self, did: Did, cid: Cid) -> bytes | None:
        return self.get(BLOCKS, (did, cid))

    def records(
        self,
        did: Did,
        collection: Nsid | None = None,
        *,
        start: str | None = None,
        stop: str | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> list[tuple[Path, RecordRow]]:
        """Rows of a repository in tree order (``reverse``: backwards), flagged ones included.

        ``start`` ≤ path < ``stop``; with a collection the bounds are record keys of it.
        """
        low, high = record_range(did, collection, start, stop)
        prefix = len(did.encode()) + 1
        found: list[tuple[Path, RecordRow]] = []
        if limit is not None and limit <= 0:
            return found
        for key, raw in self.raw_scan(RECORDS.name, low, high, reverse):
            found.append((key[prefix:].decode(), decode_record(raw)))
            if len(found) == limit:
                break
        return found

    def repos(self, after: Did = "", limit: int = 1000) -> list[tuple[Did, RepoRow]]:
        return list(self.scan(REPOS, after.encode() + b"\0" if after else None, limit=limit))

    def count(self, name: str) -> int:
        return self.get(COUNTS, name) or 0

    def counts(self, prefix: str = "") -> dict[str, int]:
        raw = prefix.encode()
        return dict(self.scan(COUNTS, raw, after_prefix(raw)))

    def cursor(self, name: str) -> int | None:
        value = self.get(CURSORS, name)
        if value is not None and not isinstance(value, int):
            raise StoreCorrupt(f"cursors: row {name!r} holds {value!r} where a number belongs")
        return value

    def account_words(self, did: Did) -> list[AccountWord]:
        return [AccountWord(key[1], *value) for key, value in self.scan(ACCOUNT_STATUS, *did_range(did))]

    def buffered(
        self, did: Did, epoch: int, *, limit: int, after: BufferedFrame | None = None
    ) -> list[BufferedFrame]:
        """Frames of a life that wait, by rev, commits before syncs; those behind ``after``."""
        start, stop = did_range(did)
        if after is not None:
            start = RESYNC_BUFFER.key.encode((did, *after[:3])) + b"\0"
        rows = self.scan(RESYNC_BUFFER, start, stop, limit=limit)
        return [BufferedFrame(*key[1:], *row[1:]) for key, row in rows if row.epoch == epoch]

    def filters(self, kind: str | None = None) -> list[tuple[str, str]]:
        """The (kind, item) rows of the filter."""
        bounds = (None, None) if kind is None else did_range(kind)
        return [key for key, _ in self.scan(FILTER, *bounds)]


def record_range(
    did: Did, collection: Nsid | None, start: str | None, stop: str | None
) -> tuple[bytes, bytes]:
    raw = did.encode() + b"\0"
    if collection is None:
        low, high = raw, did.encode() + b"\x01"
    else:
        low = f"{did}\0{collection}/".encode()
        high = f"{did}\0{collection}0".encode()  # "0" follows "/"
        raw = low
    if start is not None:
        low = raw + start.encode()
    if stop is not None:
        high = raw + stop.encode()
    return low, high


def decode(keyspace: Keyspace[K, V], key: K, raw: bytes) -> V:
    try:
        return keyspace.value.decode(raw)
    except Exception as error:
        raise StoreCorrupt(f"{keyspace.name}: row {key!r} does not decode: {error}") from error


class Snapshot(Reads):
    """One point in time over some keyspaces, for one thread; close it, because it holds the lock.

    rocksdict 0.3.29 ignores the snapshot in iterators that are made after a write (only gets honour
    it), so each keyspace's iterator is made with the snapshot, and scans take turns on it.
    """

    __slots__ = ("_iterators", "_snapshots")

    def __init__(self, families: dict[str, Any]) -> None:
        self._snapshots = {name: family.snapshot() for name, family in families.items()}
        self._iterators = {name: family.iter() for name, family in families.items()}

    def raw_get(self, name: str, key: bytes) -> bytes | None:
        try:
            value: bytes = self._snapshots[name][key]
        except KeyError:
            raise
        except Exception as error:
            if "key not found" in str(error):
                return None
            raise rocks.translate(error, f"reading {name}") from error
        return value

    def raw_scan(
        self, name: str, start: bytes | None, stop: bytes | None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        read = self._read_backwards if reverse else self._read
        while rows := read(self._iterators[name], start, stop):
            yield from rows
            if len(rows) < _SNAPSHOT_ROWS:
                return
            if reverse:
                stop = rows[-1][0]
            else:
                start = rows[-1][0] + b"\0"

    @staticmethod
    def _read(cursor: Any, start: bytes | None, stop: bytes | None) -> list[tuple[bytes, bytes]]:
        rows: list[tuple[bytes, bytes]] = []
        cursor.seek(start or b"")
        while len(rows) < _SNAPSHOT_ROWS and cursor.valid():
            key = cursor.key()
            if stop is not None and key >= stop:
                break
            rows.append((key, cursor.value()))
            cursor.next()
        _expect_intact(cursor)
        return rows

    @staticmethod
    def _read_backwards(cursor: Any, start: bytes | None, stop: bytes | None) -> list[tuple[bytes, bytes]]:
        rows: list[tuple[bytes, bytes]] = []
        if stop is None:
            cursor.seek_to_last()
        else:
            cursor.seek_for_prev(stop)
            if cursor.valid() and cursor.key() == stop:
                cursor.prev()
        while len(rows) < _SNAPSHOT_ROWS and cursor.valid():
            key = cursor.key()
            if start is not None and key < start:
                break
            rows.append((key, cursor.value()))
            cursor.prev()
        _expect_intact(cursor)
        return rows

    def close(self) -> None:
        self._iterators.clear()
        self._snapshots.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _expect_intact(cursor: Any) -> None:
    """Raises what ended a walk before its end, if anything did."""
    with rocks.translated("reading"):
        cursor.status()


def scan_keys(source: Any, start: bytes, stop: bytes) -> Iterator[bytes]:
    with rocks.translated("reading"):
        cursor = _cursor(source, stop)
        cursor.seek(start)
        while cursor.valid():
            yield cursor.key()
            cursor.next()
        cursor.status()


def scan_rows(
    source: Any, start: bytes | None, stop: bytes | None, reverse: bool
) -> Iterator[tuple[bytes, bytes]]:
    """Rows in order, by the cursor itself: rocksdict's own `items` ends at a damaged block as if at the
    last row, and keeps the error to itself."""
    with rocks.translated("reading"):
        cursor = _cursor(source, stop)
        if reverse:
            cursor.seek_to_last()  # just before the upper bound
        elif start is None:
            cursor.seek_to_first()
        else:
            cursor.seek(start)
        move = cursor.prev if reverse else cursor.next
        while cursor.valid():
            key = cursor.key()
            # rocksdict 0.3.29 sets the upper bound when asked for a lower one, hence the comparison.
            if reverse and start is not None and key < start:
                return
            yield key, cursor.value()
            move()
        cursor.status()


def _cursor(source: Any, stop: bytes | None) -> Any:
    """An iterator that ends before ``stop``, or at an error, which its `status` then raises."""
    options = rocksdict.ReadOptions()
    if stop is not None:
        options.set_iterate_upper_bound(stop)
    return source.iter(options)
