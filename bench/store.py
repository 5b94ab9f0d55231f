"""A child process that drives the real store, so that its memory is its own and it can be killed.

``python -m bench.store churn FOLDER RECORDS FIRST LAST``: writes versions FIRST … LAST of all records, with
the workers running and a retention of seconds; settles (prune, checkpoint, collection, compaction); prints
one JSON object. ``… fill FOLDER FROM TO`` adds records with the daemon's defaults; ``… tail FOLDER FROM TO``
adds them unfolded, prints a line, and goes on writing until it is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from bench.records import PER_REPO, made, owner
from indexer.config import LogSettings, Settings
from indexer.logs import configure_logging
from indexer.memory import IN_DAEMON, collect_rarely, limit_arenas
from indexer.store.codecs import NEW_REPO, SyncState
from indexer.store.database import Database
from indexer.store.gc import BlocksGcWorker
from indexer.store.refcounts import CheckpointWorker
from indexer.store.retention import RetentionWorker
from indexer.store.transaction import Transaction
from indexer.store.upkeep import compact_all
from indexer.store.writer import Writer

_REV: Final = "3l6oveex3ii2l"
SYNCED: Final = NEW_REPO._replace(tracked=True, state=SyncState.SYNCED, complete=True, rev=_REV)
_PER_UNIT: Final = 50
_UNITS: Final = 40  # in flight
_RETENTION_S: Final = 3.0
_SWIFT: Final = {
    "events": {"retention": f"{_RETENTION_S:g}s"},
    "gc": {"checkpoint_interval": 3, "ttl_interval": 1, "blocks_interval": 2},
}


class Store(NamedTuple):
    """The open store and its workers."""

    db: Database
    writer: Writer
    retention: RetentionWorker
    checkpoint: CheckpointWorker
    gc: BlocksGcWorker


@asynccontextmanager
async def opened(folder: Path, tables: dict[str, Any]) -> AsyncIterator[Store]:
    """The store in ``folder``, where a daemon with that data_dir looks for it."""
    settings = Settings.model_validate(tables)
    limit_arenas(settings.malloc_arenas)
    collect_rarely(IN_DAEMON)
    with Database.open(folder / "db", memory_mib=settings.memory_mib) as db:
        writer = Writer(db, settings)
        await writer.start()
        try:
            yield Store(
                db,
                writer,
                RetentionWorker(db, writer, settings),
                CheckpointWorker(db, writer, settings.gc),
                BlocksGcWorker(db, writer, settings.gc),
            )
        finally:
            await writer.stop()


@asynccontextmanager
async def at_work(store: Store) -> AsyncIterator[None]:
    """The workers run at their intervals."""
    workers = (store.retention, store.checkpoint, store.gc)
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def put(number: int, count: int, version: int, live: bool, tx: Transaction) -> None:
    """Records of one repository, as a commit or a chunk of a fetched repository writes them."""
    did = owner(number // PER_REPO)
    if tx.repo(did) is None:
        tx.set_repo(did, SYNCED)
    for each in range(number, number + count):
        path, cid, block = made(each, version)
        tx.put_record(did, path, cid, block, _REV, live=live)


async def write(store: Store, numbers: Iterable[int], version: int = 0, *, live: bool = True) -> None:
    """Each number stands for `_PER_UNIT` records from it on."""
    for some in _batches(numbers):
        units = (partial(put, number, _PER_UNIT, version, live) for number in some)
        await asyncio.gather(*(store.writer.run("bench", unit) for unit in units))


def _batches(numbers: Iterable[int]) -> Iterable[list[int]]:
    rest = iter(numbers)
    while some := list(itertools.islice(rest, _UNITS)):
        yield some


async def churn(folder: Path, records: int, first: int, last: int) -> dict[str, float]:
    """Everything is written, then updated until it has its last version."""
    start = time.perf_counter()
    async with opened(folder, _SWIFT) as store:
        async with at_work(store):
            for version in range(first, last + 1):
                await write(store, range(0, records, _PER_UNIT), version)
            written = time.perf_counter() - start
        await settle(store)
        return {
            "versions_per_s": records * (last - first + 1) / written,
            "settle_s": time.perf_counter() - start - written,
            "sst_bytes": sst_bytes(store.db),
            "directory_bytes": directory_bytes(folder),
            "peak_mib": peak_mib(),
            "blocks_reclaimed": store.gc.reclaimed,
            "events_pruned": store.retention.pruned,
        }


async def settle(store: Store) -> None:
    """The log pruned whole, references folded, dead blocks gone, files compacted."""
    await store.retention.run_once()  # leaves a watermark behind everything
    await asyncio.sleep(_RETENTION_S + 0.1)
    await store.retention.run_once()
    await store.checkpoint.run_once()
    await store.gc.run_once()
    await asyncio.to_thread(compact_all, store.db)


async def fill(folder: Path, first: int, last: int) -> dict[str, float]:
    """Adds the records ``first`` … ``last`` - 1 as a backfill does."""
    start = time.perf_counter()
    async with opened(folder, {}) as store, at_work(store):
        await write(store, range(first, last, _PER_UNIT), live=False)
    return {"records_per_s": (last - first) / (time.perf_counter() - start), "peak_mib": peak_mib()}


async def tail(folder: Path, first: int, last: int) -> dict[str, float]:
    """Adds records that no checkpoint folds, then writes until it is killed."""
    async with opened(folder, {}) as store:
        await write(store, range(first, last, _PER_UNIT))
        print("ready", flush=True)
        for version in itertools.count(1):
            await write(store, range(first, min(last, first + _PER_UNIT * _UNITS), _PER_UNIT), version)
    raise AssertionError("it is killed before")


def sst_bytes(db: Database) -> int:
    return sum(row["sst_bytes"] for row in db.stats().values())


def directory_bytes(folder: Path) -> int:
    """What the files take up, as far as they are written (a preallocated log counts what is allocated)."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main() -> None:
    """Runs what the arguments name."""
    configure_logging(LogSettings(level="warning"))
    jobs: dict[str, Callable[..., Any]] = {"churn": churn, "fill": fill, "tail": tail}
    result = asyncio.run(jobs[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:])))
    print(orjson.dumps(result).decode(), flush=True)


if __name__ == "__main__":
    main()
