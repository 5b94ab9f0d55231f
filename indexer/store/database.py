"""The open database: typed reads, snapshots, statistics.

Owns the RocksDB handles. Every change goes through the writer; reads are safe from any thread and
see whole commits only. Iterators and snapshots hold the database's lock, so they are released here.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import rocksdict

from indexer.atproto.types import Cid, Did, Nsid, Path
from indexer.errors import StoreCorrupt, StoreModeMismatch, StoreVersion
from indexer.store import rocks
from indexer.store.codecs import (
    AccountWord,
    Mode,
    RecordRow,
    RepoRow,
    after_prefix,
    decode_record,
    did_range,
    pack,
)
from indexer.store.keyspaces import (
    ACCOUNT_STATUS,
    BLOCKS,
    COUNTS,
    CURSORS,
    FILTER,
    KEYSPACES,
    RECORDS,
    REPOS,
    Keyspace,
)

K = TypeVar("K")
V = TypeVar("V")

FORMAT: Final = 1  # of the bytes on disk; raised by a migration
_SNAPSHOT_ROWS: Final = 256  # read from a snapshot's iterator at once
OLDEST_READER: Final = 1  # the oldest program format that may read what we write


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


def scan_rows(
    source: Any, start: bytes | None, stop: bytes | None, reverse: bool
) -> Iterator[tuple[bytes, bytes]]:
    options = rocksdict.ReadOptions()
    if stop is not None:
        options.set_iterate_upper_bound(stop)
    with rocks.translated("reading"):
        if not reverse:
            yield from source.items(from_key=start, read_opt=options)
            return
        # Without a position a reverse scan begins just before the upper bound. rocksdict 0.3.29
        # sets the upper bound when asked for a lower one, hence the comparison.
        for key, value in source.items(backwards=True, read_opt=options):
            if start is not None and key < start:
                return
            yield key, value


class Database(Reads):
    """An open database; `open` it, `close` it."""

    __slots__ = ("_closed", "_families", "_rocks", "_shared", "handles", "mode", "path")

    def __init__(self, path: FilePath, mode: Mode, rocks_db: Any, shared: rocks.Budget) -> None:
        self.path = path
        self.mode = mode
        self._rocks = rocks_db
        self._shared = shared
        self._families = {name: rocks_db.get_column_family(name) for name in KEYSPACES}
        #: Column family handles for write batches; the writer's business.
        self.handles: dict[str, Any] = {name: rocks_db.get_column_family_handle(name) for name in KEYSPACES}
        self._closed = False

    @classmethod
    def open(
        cls,
        path: FilePath,
        *,
        memory_mib: int = 64,
        mode: Mode | None = None,
        create: bool = True,
        read_only: bool = False,
    ) -> Database:
        """Open or create the database in folder ``path``; ``mode=None`` takes the remembered one.

        Raises `StoreLocked`, `StoreCorrupt`, `StoreVersion`, `StoreModeMismatch`, `StoreFull`.
        """
        shared = rocks.budget(memory_mib)
        database = cls(path, mode or Mode(), _open_rocks(path, shared, create, read_only), shared)
        try:
            database._check_format(mode, read_only)
        except BaseException:
            database.close()
            raise
        return database

    def _check_format(self, mode: Mode | None, read_only: bool) -> None:
        version = self.get(CURSORS, "format")
        if version is None:
            if next(self.raw_scan(REPOS.name, None, None), None) or next(
                self.raw_scan("events", None, None), None
            ):
                raise StoreCorrupt(
                    f"{self.path}: the database holds rows but no format version (cursors: format)"
                )
            if not read_only:
                self._found()
            return
        if not (isinstance(version, list) and len(version) == 2 and all(isinstance(n, int) for n in version)):
            raise StoreCorrupt(f"{self.path}: malformed format version {version!r} (cursors: format)")
        if version[1] > FORMAT:
            raise StoreVersion(
                f"{self.path}: the database has format {version[0]} and this program reads up to {FORMAT}; "
                "use a newer program"
            )
        self._check_mode(mode)

    def _found(self) -> None:
        family = self._families[CURSORS.name]
        with rocks.translated(f"creating {self.path}"):
            batch = rocksdict.WriteBatch(raw_mode=True)
            batch.put(b"format", pack([FORMAT, OLDEST_READER]), self.handles[CURSORS.name])
            batch.put(b"mode", pack(list(self.mode)), self.handles[CURSORS.name])
            family.write(batch)

    def _check_mode(self, mode: Mode | None) -> None:
        stored = self.get(CURSORS, "mode")
        if not (isinstance(stored, list) and len(stored) == 2):
            raise StoreCorrupt(f"{self.path}: malformed mode {stored!r} (cursors: mode)")
        remembered = Mode(bool(stored[0]), bool(stored[1]))
        if mode is not None and mode != remembered:
            raise StoreModeMismatch(
                f"{self.path}: the database was made in {remembered} mode and cannot be opened in "
                f"{mode} mode; use another data_dir, or ephemeral.enabled and store.blocks as it was made"
            )
        self.mode = remembered

    # ---- reads

    def raw_get(self, name: str, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._families[name].get(key)
        except Exception as error:
            raise rocks.translate(error, f"reading {name}") from error
        return value

    def family(self, name: str) -> Any:
        """The column family itself, for the hot reads of the transaction."""
        return self._families[name]

    def multi_get(self, keyspace: Keyspace[K, V], keys: Sequence[K]) -> list[V | None]:
        encode = keyspace.key.encode
        with rocks.translated(f"reading {keyspace.name}"):
            rows: list[bytes | None] = self._families[keyspace.name].get([encode(key) for key in keys])
        return [
            None if raw is None else decode(keyspace, key, raw) for key, raw in zip(keys, rows, strict=True)
        ]

    def raw_scan(
        self, name: str, start: bytes | None, stop: bytes | None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        return scan_rows(self._families[name], start, stop, reverse)

    def snapshot(self, *keyspaces: Keyspace[Any, Any]) -> Snapshot:
        """One point in time over ``keyspaces`` (all when none is named). Take it on the writer's loop."""
        names = [keyspace.name for keyspace in keyspaces] or list(KEYSPACES)
        with rocks.translated("taking a snapshot"):
            return Snapshot({name: self._families[name] for name in names})

    # ---- upkeep

    def stats(self) -> dict[str, dict[str, int]]:
        """Per keyspace: estimated rows, bytes of SST files and of live data in them, memtables."""
        return {name: self._family_stats(name) for name in KEYSPACES}

    def _family_stats(self, name: str) -> dict[str, int]:
        family = self._families[name]

        def value(prop: str) -> int:
            return int(family.property_int_value(f"rocksdb.{prop}") or 0)

        return {
            "rows": value("estimate-num-keys"),
            "sst_bytes": value("live-sst-files-size"),
            "live_bytes": value("estimate-live-data-size"),
            "memtable_bytes": value("cur-size-all-mem-tables"),
            "pending_compaction_bytes": value("estimate-pending-compaction-bytes"),
        }

    def memory(self) -> dict[str, int]:
        return {
            "cache_bytes": self._shared.cache.get_usage(),
            "write_buffer_bytes": self._shared.write_buffers.get_usage(),
            "limit_bytes": self._shared.memory_bytes,
        }

    def compact(
        self, keyspace: Keyspace[Any, Any], start: bytes | None = None, stop: bytes | None = None
    ) -> None:
        """Flush and compact a range; blocking, releases the GIL."""
        with rocks.translated(f"compacting {keyspace.name}"):
            self._families[keyspace.name].flush(True)
            self._families[keyspace.name].compact_range(start, stop)

    def sync_wal(self) -> None:
        """Make everything committed survive a power cut; blocking, releases the GIL."""
        with rocks.translated("syncing the write-ahead log"):
            self._rocks.flush_wal(True)

    def write(self, batch: Any, options: Any) -> None:
        """Commit a batch; the writer's business. Raises `StoreBusy` on a stall (the batch is consumed)."""
        with rocks.translated("committing"):
            self._rocks.write(batch, options)

    def close(self) -> None:
        """Give the lock back; idempotent."""
        if self._closed:
            return
        self._closed = True
        for family in self._families.values():
            family.close()
        self._families.clear()
        self.handles.clear()
        self._rocks.close()
        self._rocks = None
        gc.collect(0)  # a forgotten iterator in a young cycle would keep the LOCK

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_rocks(path: FilePath, shared: rocks.Budget, create: bool, read_only: bool) -> Any:
    exists = (path / "CURRENT").exists()
    if not exists and (read_only or not create):
        raise StoreCorrupt(f"{path}: no database there")
    with rocks.translated(f"opening {path}"):
        path.mkdir(parents=True, exist_ok=True)
        existing = rocksdict.Rdict.list_cf(str(path)) if exists else []
        access = rocksdict.AccessType.read_only(False) if read_only else rocksdict.AccessType.read_write()
        return rocksdict.Rdict(
            str(path),
            rocks.database_options(shared, create=create),
            column_families=rocks.all_families(shared, existing, create=create),
            access_type=access,
        )
