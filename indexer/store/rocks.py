"""RocksDB's options and its errors: the border to rocksdict.

Derives every option from the keyspace table and one memory budget, and turns rocksdict's bare
`Exception` into our tree. No state.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import rocksdict

from indexer.errors import StoreBusy, StoreCorrupt, StoreError, StoreFull, StoreLocked
from indexer.store.keyspaces import KEYSPACES, Tuning
from indexer.store.view import by_own_name

MIB: Final = 1 << 20
_WAL_LIMIT: Final = 128 * MIB
_DICTIONARY: Final = 32 * 1024
_ZSTD_LEVEL: Final = 1
_COLLECTOR: Final = (10_000, 3_000, 0.3)  # window, tombstones that trigger, share of them
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
#: How the message of a damaged database ends.
RESTORE_ADVICE: Final = "; restore a backup"
_CORRUPTION: Final = "Corruption: "
_FILES_AT_ONCE: Final = 256  # open files left to sockets, spools and the rest


class Budget(NamedTuple):
    """What all column families share."""

    cache: Any
    write_buffers: Any
    memory_bytes: int


def budget(memory_mib: int) -> Budget:
    memory = memory_mib * MIB
    cache = rocksdict.Cache(memory * 5 // 6)  # the allocator loses a fifth more between the pieces
    # Memtables are charged to the cache, so the two together stay within the one setting.
    buffers = rocksdict.WriteBufferManager.new_write_buffer_manager_with_cache(memory // 3, False, cache)
    return Budget(cache, buffers, memory)


def database_options(shared: Budget, *, create: bool) -> Any:
    """Options of the database as a whole (and of its unused default family)."""
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(create)
    options.create_missing_column_families(True)
    options.set_max_total_wal_size(_WAL_LIMIT)
    options.set_write_buffer_manager(shared.write_buffers)
    options.set_max_background_jobs(max(2, min(4, os.cpu_count() or 2)))
    options.set_max_open_files(_open_files())
    options.set_max_log_file_size(4 * MIB)
    options.set_keep_log_file_num(4)
    options.set_stats_dump_period_sec(0)
    options.set_stats_persist_period_sec(0)
    options.set_manifest_preallocation_size(64 * 1024)
    options.set_bytes_per_sync(MIB)
    options.set_write_buffer_size(MIB)
    env = rocksdict.Env()  # the process's one
    env.lower_thread_pool_cpu_priority()  # compactions yield to answers and ingest; flushes do not
    options.set_env(env)
    return options


def family_options(shared: Budget, tuning: Tuning, *, create: bool) -> Any:
    options = database_options(shared, create=create)
    share = max(MIB, shared.memory_bytes // 48) * tuning.weight
    options.set_write_buffer_size(min(share, 64 * MIB))
    options.set_max_write_buffer_number(4)
    options.set_level_compaction_dynamic_level_bytes(True)
    options.set_target_file_size_base(32 * MIB)
    options.set_compression_type(rocksdict.DBCompressionType.lz4())
    if tuning.zstd_dictionary:
        options.set_bottommost_compression_type(rocksdict.DBCompressionType.zstd())
        options.set_bottommost_compression_options(-14, _ZSTD_LEVEL, 0, _DICTIONARY, True)
        options.set_bottommost_zstd_max_train_bytes(_DICTIONARY * 50, True)
    if tuning.collected:
        options.add_compact_on_deletion_collector_factory(*_COLLECTOR)
    options.set_block_based_table_factory(_table(shared, tuning))
    return options


def _table(shared: Budget, tuning: Tuning) -> Any:
    table = rocksdict.BlockBasedOptions()
    table.set_block_cache(shared.cache)
    table.set_block_size(tuning.block_kib * 1024)
    table.set_format_version(5)
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    if tuning.bloom:
        table.set_bloom_filter(10, False)
    return table


def whole_compaction() -> Any:
    """Options of a compaction that rewrites the last level too. Otherwise RocksDB moves a lone file there as
    it is, with its tombstones and without the bottom's compression."""
    options = rocksdict.CompactOptions()
    options.set_bottommost_level_compaction(rocksdict.BottommostLevelCompaction.force_optimized())
    return options


def all_families(shared: Budget, existing: list[str], *, create: bool) -> dict[str, Any]:
    """Options by column family; those of a newer program are opened too, to read its version."""
    families = {name: database_options(shared, create=create) for name in ["default", *existing]}
    for name, keyspace in KEYSPACES.items():
        families[name] = family_options(shared, keyspace.tuning, create=create)
    return families


def _open_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = 65_536
    return max(64, min(soft - _FILES_AT_ONCE, soft * 3 // 4, 32_768))


def translate(error: Exception, what: str) -> StoreError:
    """Our error for one of RocksDB's. Its text begins with the status, at times twice, and may have several
    lines; paths in it may hold any word."""
    text = by_own_name(" ".join(str(error).split()))
    full = isinstance(error, OSError) and error.errno in _FULL
    if full or text.startswith("IO error: No space left") or text.endswith(": No space left on device"):
        return StoreFull(f"{what}: the disk is full; free some space and start again ({text})")
    if text.startswith("Result incomplete"):  # "Write stall"
        return StoreBusy(f"{what}: the store asks for patience: {text}")
    if text.startswith(("IO error: lock hold by", "IO error: While lock file")):
        return StoreLocked(f"{what}: another process holds the database; stop it first ({text})")
    if text.startswith(_CORRUPTION):
        while text.startswith(_CORRUPTION):
            text = text.removeprefix(_CORRUPTION)
        return StoreCorrupt(f"{what}: the database is damaged: {text}{RESTORE_ADVICE}")
    return StoreError(f"{what}: {text}")


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Every failure of rocksdict inside becomes a `StoreError`."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        raise translate(error, what) from error
