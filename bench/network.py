"""`bench network [ACCOUNTS]`: a network of 30 hosts, found by listHosts and listRepos and fetched whole.

Two thirds of the hosts have the same number of accounts, the rest few; each answers with a latency of its
own, and two of them refuse one request in so many with 429. Only one address is told to the daemon. Measured
are the rate, the memory, and the time that `/stats` says is left against what was: the error is that of the
whole time foretold, from the first tenth of the run to its end.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import NamedTuple

import aiohttp

from bench.backfill import document_of
from bench.daemon import BenchDaemon, running_daemon
from bench.options import Options, machine
from bench.report import Report, Target
from indexer.simulator.corpus import cached_car
from indexer.simulator.replay import ReplayNetwork, ReplaySource
from indexer.simulator.stamped import StampedCar, stamp_car

REDUCED = (2_000,)
FULL = (2_000, 10_000, 50_000)
_HOSTS, _LARGE_HOSTS = 30, 20
#: One account in so many lives on a host that has few.
_ELSEWHERE = 25
#: Records of an account, in turn, and of one account in so many.
_SIZES = (2, 5, 10, 20, 50, 100)
_LARGE_EVERY, _LARGE = 500, 3_000
_LATENCIES_S = (0.005, 0.02, 0.05, 0.1, 0.15)
#: Which hosts are busy at times, and one in how many requests meets that.
_BUSY_HOSTS, _BUSY_EVERY = (3, 17), 50
_SAMPLE_S = 0.5
_LONGEST_S = 3600.0
_FIRST = 0.1
_ETA = Target(25, at_most=True)


class Sample(NamedTuple):
    """What `/stats` said at a time since the start; ``eta_s`` is None where it said nothing."""

    at: float
    synced: int
    eta_s: float | None


class Figures(NamedTuple):
    """One run."""

    repos_per_s: float
    records_per_s: float
    peak_mib: float
    eta_error_percent: float


def run(options: Options) -> Report:
    """Rates, memory and the error of the time left for each number of accounts."""
    report = Report("network", notes=[machine(), f"{_HOSTS} hosts"])
    for accounts in options.chosen(REDUCED, FULL):
        cars = [_car(options.cache, number) for number in range(accounts)]
        records = sum(car.info.records for car in cars)
        report.notes.append(f"{accounts:,} accounts, {records:,} records")
        runs = [asyncio.run(measure(cars, options.cache)) for _ in range(options.runs)]
        if options.profile is not None:
            asyncio.run(measure(cars, options.cache, profile=options.profile))
        for name, unit, target in (
            ("repos_per_s", "repos/s", None),
            ("records_per_s", "records/s", None),
            ("peak_mib", "MiB", None),
            ("eta_error_percent", "%", _ETA),
        ):
            values = [getattr(each, name) for each in runs]
            report.add(f"{name}_{accounts}", unit, values, target, series=name, size=accounts)
    return report


def _car(cache: Path, number: int) -> StampedCar:
    records = _LARGE if number % _LARGE_EVERY == _LARGE_EVERY - 1 else _SIZES[number % len(_SIZES)]
    return stamp_car(*cached_car(cache, seed=records, records=records), number)


def _host_of(number: int) -> int:
    """Where an account lives."""
    if number % _ELSEWHERE:
        return number % _LARGE_HOSTS
    return _LARGE_HOSTS + (number // _ELSEWHERE) % (_HOSTS - _LARGE_HOSTS)


async def measure(cars: list[StampedCar], folder: Path, *, profile: Path | None = None) -> Figures:
    """One fresh daemon that is told one address."""
    sources = [
        ReplaySource(
            (),
            f"http://pds{host}.simnet.test",
            latency_s=_LATENCIES_S[host % len(_LATENCIES_S)],
            busy_every=_BUSY_EVERY if host in _BUSY_HOSTS else 0,
        )
        for host in range(_HOSTS)
    ]
    documents = {
        car.info.did: document_of(car.info, number, sources[_host_of(number)].endpoint)
        for number, car in enumerate(cars)
    }
    async with ReplayNetwork(sources, documents, {car.info.did: car for car in cars}) as network:
        settings = {
            "filter.mode": "full",
            "upstreams": "",
            "plc_urls": network.plc_url,
            "plc.max_requests_per_s": 10_000,
            "crawler.sources": f"hosts::{network.urls[0]}",
            "crawler.max_queued": 1_000_000,
            "backfill.concurrency": 32,
        }
        async with running_daemon(settings, folder, profile=profile) as daemon:
            start = time.perf_counter()
            samples = await _watched(daemon, len(cars), start)
            total = samples[-1].at
            records = sum(car.info.records for car in cars)
            return Figures(len(cars) / total, records / total, daemon.peak_mib, eta_error(samples) * 100)


async def _watched(daemon: BenchDaemon, accounts: int, start: float) -> list[Sample]:
    """What was said until all accounts are synced."""
    samples = []
    async with aiohttp.ClientSession() as http:
        while (at := time.perf_counter() - start) < _LONGEST_S:
            stats = await daemon.get(http, "/stats")
            samples.append(Sample(at, stats["repos"]["by_state"]["synced"], stats["backfill"]["eta_s"]))
            if samples[-1].synced >= accounts:
                return samples
            await asyncio.sleep(_SAMPLE_S)
    raise TimeoutError(f"{samples[-1].synced:,} of {accounts:,} accounts were synced: {stats['repos']}")


def eta_error(samples: list[Sample]) -> float:
    """The largest error of the whole time foretold, as a share of the whole time that it took.

    Of the samples from the first tenth on; one that foretells nothing counts as an error of 1.
    """
    total = samples[-1].at
    later = [sample for sample in samples[:-1] if sample.at >= total * _FIRST and sample.synced]
    return max(
        (1.0 if eta is None else abs(at + eta - total) / total for at, _synced, eta in later), default=0.0
    )
