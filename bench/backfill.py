"""`bench backfill [RECORDS]`: repositories on loopback → fetched, verified, indexed, compacted.

The size 0, part of the full set, is the mix of 8 repositories of 500,000 records and 10,000 small ones.

Times from the request to follow all of them until the last record is indexed, and until RocksDB has nothing
left to compact; samples the memory of the daemon and its workers. The PDS runs in this process and shares the
cores with the daemon.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from bench.daemon import BenchDaemon, running_daemon
from bench.live import fill
from bench.options import Options, machine
from bench.report import Report, Target
from indexer.simulator.corpus import CarInfo, cached_car
from indexer.simulator.documents import document
from indexer.simulator.replay import ReplayNetwork, ReplaySource
from indexer.simulator.stamped import StampedCar, stamp_car

REDUCED = (200_000,)
FULL = (200_000, 1_000_000, 5_000_000, 0)
#: Repository sizes, in turn; the mean is close to the network's, where few are large.
_SIZES = (10, 100, 300, 1_000, 3_000, 10_000)
#: The mix: a few large repositories among many small ones.
_LARGE, _LARGE_RECORDS = 8, 500_000
_SMALL, _SMALL_RECORDS = 10_000, (5, 10, 20, 50, 100, 200)
_COMPACTED_S = 120.0
_ENDPOINT = "http://pds0.simnet.test"
_RATE, _MEMORY = Target(60_000), Target(512, at_most=True)


class Figures(NamedTuple):
    """One run."""

    records_per_s: float
    compacted_records_per_s: float
    peak_mib: float
    mib_per_s: float
    daemon_cpu_us: float


def run(options: Options) -> Report:
    """Rates and memory for each number of records."""
    report = Report("backfill", notes=[machine()])
    for records in options.chosen(REDUCED, FULL):
        repos = repositories(options.cache, records) if records else mix(options.cache)
        total = sum(car.info.records for car in repos)
        size = sum(car.info.bytes for car in repos)
        report.notes.append(f"{len(repos):,} repositories, {total:,} records, {size / 2**20:,.0f} MiB")
        runs = [asyncio.run(measure(repos, options.cache)) for _ in range(options.runs)]
        if options.profile is not None:
            asyncio.run(measure(repos, options.cache, profile=options.profile))
        for name, unit, target in (
            ("records_per_s", "records/s", None),
            ("compacted_records_per_s", "records/s", _RATE),
            ("peak_mib", "MiB", _MEMORY),
            ("mib_per_s", "MiB/s", None),
            ("daemon_cpu_us", "µs/record", None),
        ):
            values = [getattr(each, name) for each in runs]
            report.add(f"{name}_{records or 'mix'}", unit, values, target, series=name, size=records)
    return report


def repositories(cache: Path, records: int) -> list[StampedCar]:
    """Repositories of different sizes, ``records`` records in all or a little more."""
    found: list[StampedCar] = []
    total = 0
    for number, size in enumerate(itertools.cycle(_SIZES)):
        if total >= records:
            return found
        found.append(_stamped(cache, size, number))
        total += size
    return found


def mix(cache: Path) -> list[StampedCar]:
    """The large repositories, spread evenly among the small ones."""
    small = [
        _stamped(cache, size, number)
        for number, size in zip(range(_SMALL), itertools.cycle(_SMALL_RECORDS), strict=False)
    ]
    every = _SMALL // _LARGE
    for number in range(_LARGE):
        small.insert(number * (every + 1), _stamped(cache, _LARGE_RECORDS, _SMALL + number))
    return small


def _stamped(cache: Path, records: int, number: int) -> StampedCar:
    """A repository of so many records; those of one size have their records in common."""
    return stamp_car(*cached_car(cache, seed=records, records=records), number)


async def measure(repos: list[StampedCar], folder: Path, *, profile: Path | None = None) -> Figures:
    """One fresh daemon that fetches all of them."""
    documents = {car.info.did: document_of(car.info, index, _ENDPOINT) for index, car in enumerate(repos)}
    cars = {car.info.did: car for car in repos}
    total = sum(car.info.records for car in repos)
    size = sum(car.info.bytes for car in repos)
    async with ReplayNetwork([ReplaySource([], _ENDPOINT)], documents, cars) as network:
        settings = {
            "upstreams": network.stream_urls[0],
            "plc_urls": network.plc_url,
            "plc.max_requests_per_s": 10_000,
            "hosts.requests_per_s": 0,
        }
        async with running_daemon(settings, folder, profile=profile) as daemon:
            cpu = daemon.cpu_seconds()
            start = time.perf_counter()
            await fill(daemon, list(documents), total)
            indexed = time.perf_counter() - start
            cpu = daemon.cpu_seconds() - cpu
            await _compacted(daemon)
            settled = time.perf_counter() - start
            return Figures(
                total / indexed, total / settled, daemon.peak_mib, size / 2**20 / indexed, cpu / total * 1e6
            )


def document_of(info: CarInfo, index: int, endpoint: str) -> dict[str, Any]:
    """The DID document of the account ``index``, which lives at ``endpoint``."""
    multikey = info.signing_key.removeprefix("did:key:")
    return document(info.did, f"account{index}.simnet.test", multikey, endpoint)


async def _compacted(daemon: BenchDaemon) -> None:
    """Returns when no keyspace has bytes that wait for compaction."""
    deadline = time.monotonic() + _COMPACTED_S
    async with aiohttp.ClientSession() as http:
        while time.monotonic() < deadline:
            keyspaces = (await daemon.get(http, "/stats"))["store"]["keyspaces"]
            if not sum(row["pending_compaction_bytes"] for row in keyspaces.values()):
                return
            await asyncio.sleep(0.1)
    raise TimeoutError(f"compaction was not done within {_COMPACTED_S:g} s")
