"""`bench disk [RECORDS …]`: bytes on disk for repositories, against the bytes of their CARs.

Puts every record of the simulator's repositories into a fresh store, with the log kept for ever, then folds,
collects and compacts. Counts all SST files: rows, blocks, references, log, counts. One run: nothing varies.
"""

from __future__ import annotations

import asyncio
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.backfill import repositories
from bench.options import Options, machine
from bench.report import Report, Target
from bench.store import SYNCED, Store, opened
from indexer.repo.walker import RepoIndex, index_repo
from indexer.simulator.stamped import StampedCar
from indexer.store.transaction import Transaction
from indexer.store.upkeep import compact_all

REDUCED = (2_000, 20_000, 200_000)
FULL = (20_000, 200_000, 2_000_000)
_CHUNK = 1_000
_MOST = Target(1.0, at_most=True)
#: Large enough for a dictionary; below, fixed costs of sixteen keyspaces show.
_FROM = 20_000


class Figures(NamedTuple):
    """What lies on disk."""

    keyspaces: dict[str, int]
    records: int
    car_bytes: int

    @property
    def sst_bytes(self) -> int:
        return sum(self.keyspaces.values())


def run(options: Options) -> Report:
    """Bytes for each number of records."""
    report = Report("disk", notes=[machine()])
    for records in options.chosen(REDUCED, FULL):
        cars = repositories(options.cache, records)
        with tempfile.TemporaryDirectory(dir=options.cache, prefix="disk-") as folder:
            found = asyncio.run(store(cars, Path(folder)))
        share = {name: size / found.records for name, size in found.keyspaces.items()}
        parts = ", ".join(f"{name} {size:.1f}" for name, size in share.items() if size >= 0.1)
        report.notes.append(f"{found.records:,} records, bytes a record: {parts}")
        ratio, stored = found.sst_bytes / found.car_bytes, found.sst_bytes / found.records
        target = _MOST if records >= _FROM else None
        report.add(f"car_ratio_{records}", "ratio", [ratio], target, series="car_ratio", size=records)
        report.add(f"bytes_per_record_{records}", "bytes", [stored], series="bytes", size=records)
        report.add(f"car_bytes_per_record_{records}", "bytes", [found.car_bytes / found.records])
        without = (found.sst_bytes - found.keyspaces["events"]) / found.car_bytes
        report.add(f"car_ratio_without_log_{records}", "ratio", [without], series="without log", size=records)
    return report


async def store(cars: list[StampedCar], folder: Path) -> Figures:
    """All repositories, settled."""
    records = size = 0
    async with opened(folder, {}) as opened_store:
        for car in cars:
            data = b"".join(car.pieces())
            index = index_repo(data)
            records += len(index.records)
            size += len(data)
            await _apply(opened_store, index, data)
        await opened_store.checkpoint.run_once()
        await opened_store.gc.run_once()
        await asyncio.to_thread(compact_all, opened_store.db)
        keyspaces = {name: row["sst_bytes"] for name, row in opened_store.db.stats().items()}
    return Figures(keyspaces, records, size)


async def _apply(opened_store: Store, index: RepoIndex, data: bytes) -> None:
    chunks = (partial(_put, index, data, at) for at in range(0, len(index.records), _CHUNK))
    await asyncio.gather(*(opened_store.writer.run("bench", chunk) for chunk in chunks))


def _put(index: RepoIndex, data: bytes, at: int, tx: Transaction) -> None:
    commit = index.commit
    if at == 0:
        tx.set_repo(commit.did, SYNCED._replace(rev=commit.rev, commit=index.commit_block, data=index.data))
    for path, cid, start, end in index.records[at : at + _CHUNK]:
        tx.put_record(commit.did, path, cid, data[start:end], commit.rev, live=False)
