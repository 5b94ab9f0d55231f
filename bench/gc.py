"""`bench gc [RECORDS …] [--rounds R] [--records N]`: update churn and its traces; start-up after a kill.

Churn: a fiftieth of RECORDS (or N) are written and updated R times in a process of its own, with the workers
running and a retention of three seconds, then pruned, folded, collected and compacted; a fresh index of the
same final state is the measure of what should be left. Start-up: RECORDS are loaded, as many more but at most
100,000 lie in the log unfolded, the writing process is killed; timed from the daemon's start to its first
getRecord. Then getRecord's latency at random records, idle and while that log is folded. With ``--data``
the store is loaded there once, and start-up alone is measured.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles
from typing import Any, Final, NamedTuple

import aiohttp
import orjson

from bench.daemon import BenchDaemon, running_daemon
from bench.options import Options, machine
from bench.records import PER_REPO, made, owner
from bench.report import Report, Target
from bench.requests import Client

REDUCED = (20_000, 60_000, 200_000)
FULL = (100_000, 1_000_000, 5_000_000)
_CHURNED: Final = 50  # a fiftieth of the records
_TAIL = 100_000
_CLIENTS: Final = 4
_NEXT: Final = "next_record"  # beside the store: the number of the record to write next
_IDLE_S = 2.0
_RATIO, _DIRECTORY = Target(1.3, at_most=True), Target(200, at_most=True)
_MEMORY, _START, _LATENCY = Target(400, at_most=True), Target(2, at_most=True), Target(20, at_most=True)
_SETTINGS: Final = {
    "upstreams": "",
    "audit.repos_per_minute": 0,
    "gc.checkpoint_rows": 1_000_000_000,  # folds when it is told to
    "gc.checkpoint_interval": "1h",
}


class Restart(NamedTuple):
    """A start after a kill, and queries."""

    start_s: float
    idle_p99_ms: float
    checkpoint_p99_ms: float
    checkpoint_max_ms: float
    checkpoint_s: float
    checkpoint_requests: int


def run(options: Options) -> Report:
    """Both parts at each size."""
    report = Report("gc", notes=[machine()])
    for records in options.chosen(REDUCED, FULL):
        if options.data is None:
            _churn(report, options, options.records or max(PER_REPO, records // _CHURNED))
            with tempfile.TemporaryDirectory(dir=options.cache, prefix="gc-") as folder:
                restarts = _restarts(report, options, records, Path(folder))
        else:
            restarts = _restarts(report, options, records, options.data / str(records))
        for name, unit, target in (
            ("start_s", "s", _START),
            ("idle_p99_ms", "ms", None),
            ("checkpoint_p99_ms", "ms", _LATENCY),
            ("checkpoint_max_ms", "ms", None),
            ("checkpoint_s", "s", None),
            ("checkpoint_requests", "requests", None),
        ):
            values = [getattr(each, name) for each in restarts]
            report.add(f"{name}_{records}", unit, values, target, series=name, size=records)
    return report


# -- churn


def _churn(report: Report, options: Options, records: int) -> None:
    """Bytes hardly differ from run to run: one is enough."""
    with tempfile.TemporaryDirectory(dir=options.cache, prefix="gc-") as folder:
        fresh = child("churn", Path(folder) / "fresh", records, options.rounds, options.rounds)
        full = child("churn", Path(folder) / "churned", records, 0, options.rounds)
    mib = 2**20
    report.notes.append(
        f"{records:,} records, {options.rounds} rounds: SST {full['sst_bytes'] / mib:,.1f} MiB, fresh "
        f"{fresh['sst_bytes'] / mib:,.1f} MiB; {full['blocks_reclaimed']:,} blocks reclaimed"
    )
    beyond = (full["directory_bytes"] - fresh["sst_bytes"] * _RATIO.bound) / mib
    for name, unit, value, target in (
        ("sst_ratio", "ratio", full["sst_bytes"] / fresh["sst_bytes"], _RATIO),
        ("directory_beyond_mib", "MiB", max(beyond, 0.001), _DIRECTORY),
        ("churn_peak_mib", "MiB", full["peak_mib"], _MEMORY),
        ("versions_per_s", "versions/s", full["versions_per_s"], None),
        ("settle_s", "s", full["settle_s"], None),
    ):
        report.add(f"{name}_{records}", unit, [value], target, series=name, size=records)


def child(*arguments: object) -> dict[str, Any]:
    """What `bench.store` printed."""
    command = [sys.executable, "-m", "bench.store", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = orjson.loads(done.stdout.splitlines()[-1])
    return result


# -- start-up and queries


def _restarts(report: Report, options: Options, records: int, folder: Path) -> list[Restart]:
    done = []
    first, tail = _loaded(report, records, folder), min(_TAIL, records)
    for profile in (*[None] * options.runs, *([options.profile] if options.profile else [])):
        _kill_in_the_tail(folder, first, first + tail)
        first += tail
        (folder / _NEXT).write_text(str(first))
        found = asyncio.run(restart(folder, records, tail, profile=profile))
        if profile is None:
            done.append(found)
    return done


def _loaded(report: Report, records: int, folder: Path) -> int:
    """Loads the records where that is not done yet; the number of the next one."""
    held = folder / _NEXT
    if held.exists():
        return int(held.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    loaded = child("fill", folder, 0, records)
    rate, peak = loaded["records_per_s"], loaded["peak_mib"]
    report.add(f"load_records_per_s_{records}", "records/s", [rate], series="load", size=records)
    report.add(f"load_peak_mib_{records}", "MiB", [peak], _MEMORY, series="peak", size=records)
    held.write_text(str(records))
    return records


def _kill_in_the_tail(folder: Path, first: int, last: int) -> None:
    command = [sys.executable, "-m", "bench.store", "tail", str(folder), str(first), str(last)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
    if line.strip() != b"ready":
        raise SystemExit("the writing process ended early")


async def restart(folder: Path, records: int, tail: int, *, profile: Path | None = None) -> Restart:
    """The daemon on what the killed process left."""
    settings = {**_SETTINGS, "data_dir": str(folder)}
    start = time.perf_counter()
    async with running_daemon(settings, folder, profile=profile) as daemon, Client(daemon.public) as first:
        await first.get(_path(0))
        took = time.perf_counter() - start
        idle = await _latencies(daemon, records, asyncio.create_task(asyncio.sleep(_IDLE_S)))
        begun = time.perf_counter()
        folded = asyncio.create_task(_checkpoint(daemon, tail))
        busy = await _latencies(daemon, records, folded)
        checkpoint_s = time.perf_counter() - begun
    p99 = quantiles(idle, n=100)[98] * 1000, quantiles(busy, n=100)[98] * 1000
    return Restart(took, *p99, max(busy) * 1000, checkpoint_s, len(busy))


async def _checkpoint(daemon: BenchDaemon, tail: int) -> None:
    async with aiohttp.ClientSession() as http, http.post(f"{daemon.management}/db/checkpoint") as answer:
        answer.raise_for_status()
        report = (await answer.json())["report"]
    if report["changes"] < tail:
        raise SystemExit(f"the checkpoint found less than the killed process left: {report}")


async def _latencies(daemon: BenchDaemon, records: int, until: asyncio.Task[None]) -> list[float]:
    """Seconds of each getRecord of a few clients that ask without rest until the task is done."""
    choice = random.Random(records)
    latencies: list[float] = []

    async def ask() -> None:
        async with Client(daemon.public) as client:
            while not until.done():
                path = _path(choice.randrange(records))
                start = time.perf_counter()
                await client.get(path)
                latencies.append(time.perf_counter() - start)

    await asyncio.gather(*(ask() for _ in range(_CLIENTS)))
    await until
    return latencies


def _path(number: int) -> str:
    collection, _, rkey = made(number).path.partition("/")
    repo = owner(number // PER_REPO)
    return f"/xrpc/com.atproto.repo.getRecord?repo={repo}&collection={collection}&rkey={rkey}"
