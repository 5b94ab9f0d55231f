"""The disk of a walk that memory does not hold: a throw-away RocksDB in a folder of its own.

Implements `indexer.repo.blocks.BlockStore`. Nothing in it outlives the walk, so it writes no log, and what a
killed process left behind is destroyed when the folder is opened again. A folder that holds anything else is
refused. Every call blocks; one thread at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, cast

import rocksdict

from indexer.atproto.types import Cid
from indexer.errors import DiskError, StoreError
from indexer.store import rocks

_MARK: Final = "SPILL"
_BLOOM_BITS: Final = 10
_BLOB_FILE: Final = 64 * rocks.MIB
#: Share of the memory that a write buffer takes; two of them exist at once.
_BUFFER_SHARE: Final = 8


class DiskBuilder:
    """How disk stores are to be opened. ``cache_mb``: memory (MiB) for blocks that are read and written;
    ``max_stored_mb``: what a store may hold at most (MiB of blocks and their CIDs)."""

    def __init__(self, cache_mb: int = 32, max_stored_mb: float = 10240) -> None:
        if cache_mb < 1 or max_stored_mb < 0:
            raise ValueError(f"cache_mb is {cache_mb} and max_stored_mb {max_stored_mb}: at least 1 and 0")
        self._cache_mb = cache_mb
        self._most = int(max_stored_mb * rocks.MIB)

    def open(self, path: Path | str) -> SpillStore:
        """The empty store in the folder ``path``, made when it is not there; or `DiskError`."""
        return SpillStore(Path(path), self._cache_mb, self._most)


class SpillStore:
    """Blocks by CID, on disk. A context manager: closing it deletes its folder's content."""

    blocking = True

    def __init__(self, path: Path, cache_mb: int, most: int) -> None:
        self.path = path
        #: Bytes that were put since the last reset.
        self.stored = 0
        self._most = most
        self._options = _options(cache_mb)
        self._write = cast(Any, rocksdict.WriteOptions())  # its type hints take the flag for a method
        self._write.disable_wal = True
        self._db: Any = None
        self._claim()
        self._open()

    def put_many(self, blocks: Sequence[tuple[Cid, bytes]]) -> None:
        db = self._live()
        self.stored += sum(len(cid) + len(kept) for cid, kept in blocks)
        if self.stored > self._most:
            raise DiskError(
                f"the disk store {self.path} is full: more than {self._most} bytes (max_stored_mb)",
                reason="spill_full",
            )
        batch = rocksdict.WriteBatch(raw_mode=True)
        for cid, kept in blocks:
            batch.put(cid, kept)
        with _translated(f"writing to the disk store {self.path}"):
            db.write(batch, self._write)

    def get_many(self, cids: Sequence[Cid]) -> list[bytes | None]:
        db = self._live()
        if not cids:
            return []
        with _translated(f"reading from the disk store {self.path}"):
            found: list[bytes | None] = db.get(list(cids))
        return found

    def reset(self) -> None:
        """Empties the store for the next archive."""
        self._live()
        self._destroy()
        self._open()

    def close(self) -> None:
        """Closes the store and deletes what it holds. May be called twice."""
        if self._db is not None:
            self._destroy()
            shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> SpillStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _live(self) -> Any:
        if self._db is None:
            raise DiskError(f"the disk store {self.path} is closed")
        return self._db

    def _claim(self) -> None:
        """Makes the folder ours; refuses one with other content."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            mark = self.path / _MARK
            if not mark.exists():
                if any(self.path.iterdir()):
                    raise DiskError(f"{self.path} holds other files: name a folder of its own")
                mark.touch()
        except OSError as error:
            raise DiskError(f"the folder {self.path} cannot be used: {error.strerror}") from error

    def _open(self) -> None:
        with _translated(f"opening the disk store {self.path}"):
            folder = self.path / "blocks"
            if folder.exists():
                rocksdict.Rdict.destroy(str(folder), self._options)
            self._db = rocksdict.Rdict(str(folder), self._options)
        self.stored = 0

    def _destroy(self) -> None:
        db, self._db = self._db, None
        with _translated(f"emptying the disk store {self.path}"):
            db.close()
            rocksdict.Rdict.destroy(str(self.path / "blocks"), self._options)
        self.stored = 0


def _options(cache_mb: int) -> Any:
    shared = rocks.budget(cache_mb)  # what is being written counts as cached
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_manager(shared.write_buffers)
    options.set_write_buffer_size(max(1, cache_mb // _BUFFER_SHARE) * rocks.MIB)
    options.set_max_write_buffer_number(2)
    options.set_compression_type(rocksdict.DBCompressionType.none())
    # Blocks lie beside the tree of CIDs, so that compaction does not move them: half the time of a read.
    options.set_enable_blob_files(True)
    options.set_min_blob_size(0)
    options.set_blob_file_size(_BLOB_FILE)
    options.set_max_open_files(256)
    options.set_keep_log_file_num(1)
    options.set_max_log_file_size(rocks.MIB)
    options.set_stats_dump_period_sec(0)
    options.set_stats_persist_period_sec(0)
    table = rocksdict.BlockBasedOptions()
    table.set_block_cache(shared.cache)
    table.set_bloom_filter(_BLOOM_BITS, False)
    table.set_cache_index_and_filter_blocks(True)
    table.set_format_version(5)
    options.set_block_based_table_factory(table)
    return options


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Every failure of RocksDB inside becomes a `DiskError`."""
    try:
        with rocks.translated(what):
            yield
    except StoreError as error:
        raise DiskError(str(error)) from error
