"""The open database: typed reads, snapshots, statistics.

Owns the RocksDB handles. Every change goes through the writer; reads are safe from any thread and
see whole commits only. Iterators and snapshots hold the database's lock, so they are released here.
Long calls run in threads that nobody can stop; closing makes RocksDB give them up and waits for them.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path as FilePath
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import rocksdict

from indexer.errors import StoreBusy, StoreCorrupt, StoreError, StoreModeMismatch, StoreVersion
from indexer.store import rocks
from indexer.store.codecs import (
    Mode,
    pack,
)
from indexer.store.keyspaces import (
    CURSORS,
    KEYSPACES,
    REPOS,
    UNDER_WAY,
    Keyspace,
)
from indexer.store.reads import Reads, Snapshot, decode, scan_keys, scan_rows
from indexer.store.view import View, forget_writer, note_writer

K = TypeVar("K")
V = TypeVar("V")

__all__ = ["FORMAT", "Database", "Reads", "Snapshot"]

FORMAT: Final = 1  # of the bytes on disk; raised by a migration
OLDEST_READER: Final = 1  # the oldest program format that may read what we write


class FormatVersion(NamedTuple):
    written: int
    oldest_reader: int  # the oldest program format that may read it


class _Opened(NamedTuple):
    rocks: Any
    give_back: Callable[[], None]  # to be called when it is closed
    missing: frozenset[str]  # keyspaces that are not there and cannot be made


class Database(Reads):
    """An open database; `open` it, `close` it."""

    __slots__ = (
        "_busy", "_calls", "_closed", "_families", "_give_back", "_rocks", "_shared", "_write_failed",
        "handles", "mode", "path",
    )  # fmt: skip

    def __init__(self, path: FilePath, mode: Mode, opened: _Opened, shared: rocks.Budget) -> None:
        self.path = path
        self.mode = mode
        rocks_db = self._rocks = opened.rocks
        self._give_back = opened.give_back
        self._shared = shared
        # Looked at only, an older program's database lacks keyspaces: they are as empty as the default one.
        places = {name: "default" if name in opened.missing else name for name in KEYSPACES}
        self._families = {name: rocks_db.get_column_family(at) for name, at in places.items()}
        #: Column family handles for write batches; the writer's business.
        self.handles: dict[str, Any] = {
            name: rocks_db.get_column_family_handle(at) for name, at in places.items()
        }
        self._closed = False
        self._busy = 0  # blocking calls under way, in threads
        self._calls = threading.Condition()
        self._write_failed = False

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
        ``read_only`` changes nothing in the folder, which need not be writable.

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

    @classmethod
    def open_unchecked(cls, path: FilePath, *, memory_mib: int = 64, read_only: bool = False) -> Database:
        """Open the database in folder ``path`` whatever its mode, and its format unless that is newer;
        for migrations, backups and restores, which work on raw rows or on files."""
        shared = rocks.budget(memory_mib)
        database = cls(path, Mode(), _open_rocks(path, shared, create=False, read_only=read_only), shared)
        try:
            format_version(database)
        except BaseException:
            database.close()
            raise
        return database

    def _check_format(self, mode: Mode | None, read_only: bool) -> None:
        version = format_version(self)
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
        if self.raw_get(CURSORS.name, UNDER_WAY.encode()) is not None:
            raise StoreVersion(
                f"{self.path}: a migration of the database is under way; run `indexer db migrate`, "
                "which goes on where it was"
            )
        if version.written < FORMAT:
            raise StoreVersion(
                f"{self.path}: the database has format {version.written}, this program needs {FORMAT}; "
                "make a backup, then run `indexer db migrate`"
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
        rows = self.raw_multi_get(keyspace.name, [encode(key) for key in keys])
        return [
            None if raw is None else decode(keyspace, key, raw) for key, raw in zip(keys, rows, strict=True)
        ]

    def raw_multi_get(self, name: str, keys: Sequence[bytes]) -> list[bytes | None]:
        with rocks.translated(f"reading {name}"):
            rows: list[bytes | None] = self._families[name].get(keys)
        return rows

    def multi_get_apart(self, keyspace: Keyspace[K, V], keys: Sequence[K]) -> list[V | None]:
        """As `multi_get`, for a thread: blocking, releases the GIL while it reads."""
        with self._blocking(f"reading {keyspace.name}"):
            return self.multi_get(keyspace, keys)

    def raw_scan(
        self, name: str, start: bytes | None, stop: bytes | None, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        return scan_rows(self._families[name], start, stop, reverse)

    def raw_keys(self, name: str, start: bytes, stop: bytes) -> Iterator[bytes]:
        """As `raw_scan`, without the values."""
        return scan_keys(self._families[name], start, stop)

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

    def compression(self) -> dict[str, dict[str, int]]:
        """Per keyspace: bytes of keys and values in the files before compression, and after. Reads the
        properties of every file: for people who ask, not for gauges."""
        return {name: self._family_compression(name) for name in KEYSPACES}

    def _family_compression(self, name: str) -> dict[str, int]:
        text = self._families[name].property_value("rocksdb.aggregated-table-properties") or ""
        found = dict(part.strip().split("=", 1) for part in text.split(";") if "=" in part)
        keys, values = int(found.get("raw key size", 0)), int(found.get("raw value size", 0))
        return {"raw_bytes": keys + values, "data_bytes": int(found.get("data block size", 0))}

    def memory(self) -> dict[str, int]:
        return {
            "cache_bytes": self._shared.cache.get_usage(),
            "write_buffer_bytes": self._shared.write_buffers.get_usage(),
            "limit_bytes": self._shared.memory_bytes,
        }

    def checkpoint(self, target: FilePath) -> None:
        """A consistent copy in the new folder ``target``, on the same file system: its files are hard
        links. Blocking. What was flushed before need not be flushed in here, where the GIL is held."""
        with self._blocking(f"making a checkpoint in {target}"):
            for family in self._families.values():
                family.flush(True)
            rocksdict.Checkpoint(self._rocks).create_checkpoint(str(target))

    def compact(
        self, keyspace: Keyspace[Any, Any], start: bytes | None = None, stop: bytes | None = None
    ) -> None:
        """Flush and compact a range down to the last level; blocking, releases the GIL."""
        with self._blocking(f"compacting {keyspace.name}"):
            self._families[keyspace.name].flush(True)
            self._families[keyspace.name].compact_range(start, stop, rocks.whole_compaction())

    def sync_wal(self) -> None:
        """Make everything committed survive a power cut; blocking, releases the GIL."""
        with self._blocking("syncing the write-ahead log"):
            self._rocks.flush_wal(True)

    def write(self, batch: Any, options: Any) -> None:
        """Commit a batch; the writer's business. Raises `StoreBusy` on a stall (the batch is consumed)."""
        try:
            with rocks.translated("committing"):
                self._rocks.write(batch, options)
        except StoreBusy:
            raise
        except StoreError:
            self._write_failed = True
            raise

    @contextmanager
    def _blocking(self, what: str) -> Iterator[None]:
        """Around a call that `close` must wait for."""
        with self._calls:
            if self._closed:
                raise StoreError(f"{what}: the database is closed")
            self._busy += 1
        try:
            with rocks.translated(what):
                yield
        finally:
            with self._calls:
                self._busy -= 1
                self._calls.notify_all()

    def close(self) -> None:
        """Give the lock back; idempotent. Compactions under way are given up, nothing is lost by it."""
        with self._calls:
            if self._closed:
                return
            self._closed = True
            given_up = self._busy > 0
            if given_up:
                self._rocks.cancel_all_background(False)
            self._calls.wait_for(lambda: not self._busy)
        failed: StoreError | None = None
        for part in (*self._families.values(), self._rocks):
            try:
                with rocks.translated(f"closing {self.path}"):
                    part.close()
            except StoreError as error:
                failed = failed or error
        self._rocks = part = None
        self._families.clear()
        self.handles.clear()
        gc.collect(0)  # a forgotten iterator in a young cycle would keep the LOCK
        self._give_back()
        # After giving up nothing is flushed: the log has it all. After a failed write its error is the one
        # to tell, and closing repeats it in other words.
        if failed is not None and not given_up and not self._write_failed:
            raise failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def format_version(db: Database) -> FormatVersion | None:
    """The version that the database carries, None when it carries none. Raises `StoreVersion` when it is
    newer than this program can read, `StoreCorrupt` when it makes no sense."""
    version = db.get(CURSORS, "format")
    if version is None:
        return None
    if not (isinstance(version, list) and len(version) == 2 and all(isinstance(n, int) for n in version)):
        raise StoreCorrupt(f"{db.path}: malformed format version {version!r} (cursors: format)")
    if version[1] > FORMAT:
        raise StoreVersion(
            f"{db.path}: the database has format {version[0]}, for programs that read format {version[1]}, "
            f"and this one reads up to {FORMAT}; use a newer program"
        )
    return FormatVersion(*version)


def _open_rocks(path: FilePath, shared: rocks.Budget, create: bool, read_only: bool) -> _Opened:
    exists = (path / "CURRENT").exists()
    if not exists and (read_only or not create):
        raise StoreCorrupt(f"{path}: no database there")
    with ExitStack() as undo, rocks.translated(f"opening {path}"):
        if read_only:
            view = View(path)
            undo.callback(view.close)
            missing = KEYSPACES.keys() - rocksdict.Rdict.list_cf(str(view.folder))
            opened = _rocks_in(view.folder, shared, create=False, read_only=True)
        else:
            path.mkdir(parents=True, exist_ok=True)
            missing = set()
            opened = _rocks_in(path, shared, create=create, read_only=False)
            undo.callback(forget_writer, note_writer(path))
        return _Opened(opened, undo.pop_all().close, frozenset(missing))


def _rocks_in(folder: FilePath, shared: rocks.Budget, *, create: bool, read_only: bool) -> Any:
    existing = rocksdict.Rdict.list_cf(str(folder)) if (folder / "CURRENT").exists() else []
    families = rocks.all_families(shared, existing, create=create)
    if read_only:
        families = {name: families[name] for name in existing}
    access = rocksdict.AccessType.read_only(False) if read_only else rocksdict.AccessType.read_write()
    return rocksdict.Rdict(
        str(folder),
        rocks.database_options(shared, create=create),
        column_families=families,
        access_type=access,
    )
