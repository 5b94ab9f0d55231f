"""`bench car_walk [BYTES …]`: CAR bytes → ordered records, with and without block hashing, one core and all.

Times `indexer.repo.walker.index_repo` and the slicing of every record out of the buffer, as backfill does it;
then the library: `DriverBuilder` within a memory limit, in streaming order without a disk; told to ignore
that order, with one; and with one for the same blocks in a random order. Memory is the growth of a fresh
process. The archives are the simulator's; `--file` or HUGE_CAR adds any other.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.options import Options, machine, profiled, timed
from bench.report import Report, Target
from indexer import DiskBuilder, Driver, DriverBuilder, RecordWalk, WalkLimits
from indexer.atproto.car import read_header, sections
from indexer.repo.walker import index_repo
from indexer.simulator.corpus import cached_car

_KIB, _MIB = 1 << 10, 1 << 20
REDUCED = (3 * _KIB, 280 * _KIB, 5 * _MIB, 64 * _MIB)
FULL = (3 * _KIB, 280 * _KIB, 5 * _MIB, 128 * _MIB, 450 * _MIB)
#: The targets hold from this size up, a core.
_FROM = _MIB
_HASHED, _PLAIN = Target(130), Target(200)
#: MiB: the library's limit, and what a process may grow by with it.
_LIMIT = 16
_GROWTH = Target(_LIMIT + 64, at_most=True)
#: Archives from this size up are also walked in a process of their own, whose memory is measured.
_LARGE = 32 * _MIB
_PIECE = 256 * _KIB
#: The walk of 450 MiB on a busy machine may take longer than the library allows by itself.
_PATIENCE_S = 3600


def run(options: Options) -> Report:
    """Every size, hashed and not; then the largest on all cores."""
    report = Report("car_walk", notes=[machine()])
    files = {_named(size): cached_car(options.cache, size=size)[0] for size in options.chosen(REDUCED, FULL)}
    if options.file is not None:
        files[options.file.stem] = options.file
    for name, file in files.items():
        _measure(report, options, name, file)
        _measure_library(report, options, name, file)
    largest = max(files.values(), key=lambda file: file.stat().st_size)
    cores = os.cpu_count() or 1
    rates = [_on_all_cores(largest, cores) for _ in range(options.runs)]
    report.add(f"all_{cores}_cores_mib_per_s", "MiB/s", rates)
    report.add("peak_memory_mib", "MiB", [_peak_mib()])
    return report


def _measure(report: Report, options: Options, name: str, file: Path) -> None:
    data = file.read_bytes()
    size = len(data) / _MIB
    for series, hashes, target in (("hashed", True, _HASHED), ("unhashed", False, _PLAIN)):
        job = partial(walk, data, hashes)
        rates = [size / seconds for seconds in timed(job, options.runs)]
        bound = target if len(data) >= _FROM * 0.9 else None
        report.add(f"{series}_{name}_mib_per_s", "MiB/s", rates, bound, series=series, size=len(data))
        if options.profile is not None:
            profiled(job, options.profile, f"car_walk {name} {series}")


class Walked(NamedTuple):
    """One walk by the library: seconds of processor time, and MiB by which its process grew."""

    seconds: float
    growth_mib: float


def _measure_library(report: Report, options: Options, name: str, file: Path) -> None:
    size = file.stat().st_size
    large = size >= _LARGE
    mixed = _shuffled(options.cache, file)
    for series, source, streaming in (
        ("library", file, True),
        ("library_disk", file, False),
        ("library_shuffled", mixed, False),
    ):
        limit = _LIMIT if large or streaming else 0  # what memory could hold goes to the disk, too
        if large:
            runs = [_in_a_process(source, streaming, limit) for _ in range(options.runs)]
        else:
            job = partial(_walk_by_library, source, streaming, limit)
            runs = [Walked(each, 0) for each in timed(job, options.runs)]
        rates = [size / _MIB / each.seconds for each in runs]
        report.add(f"{series}_{name}_mib_per_s", "MiB/s", rates, series=series, size=size)
        if large:
            report.add(f"{series}_{name}_growth_mib", "MiB", [each.growth_mib for each in runs], _GROWTH)


def _shuffled(cache: Path, file: Path) -> Path:
    """The same archive with its blocks in a random order, made once."""
    path = cache / f"{file.stem}-{file.stat().st_size}-shuffled.car"
    if not path.exists():
        data = file.read_bytes()
        _roots, at = read_header(data)
        head, pieces = data[:at], []
        for _cid, _start, end in sections(data, at, verify=False):
            pieces.append((at, end))
            at = end
        random.Random(1).shuffle(pieces)
        cache.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        with draft.open("wb", buffering=1 << 20) as out:
            out.write(head)
            out.writelines(data[start:end] for start, end in pieces)
        draft.rename(path)
    return path


def _in_a_process(file: Path, streaming: bool, limit: float) -> Walked:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_walk_by_library, (file, streaming, limit))


def _walk_by_library(file: Path, streaming: bool, limit: float) -> Walked:
    asyncio.run(_nothing())  # what every loop costs is not the walk's
    before, start = _own_peak_mib(), time.process_time()
    asyncio.run(drive(file, streaming, limit))
    return Walked(time.process_time() - start, _own_peak_mib() - before)


async def _nothing() -> None:
    """Work that only makes a loop start."""


async def drive(file: Path, streaming: bool, limit: float) -> int:
    """Every record of a file by `DriverBuilder`, on disk unless ``streaming`` spares it; their bytes."""
    limits = WalkLimits(max_seconds=_PATIENCE_S)
    match await DriverBuilder(limit, streaming=streaming, limits=limits).load_car(_pieces(file)):
        case Driver.Memory(_, driver):
            return await _total(driver)
        case Driver.Disk(need_disk):
            with (
                tempfile.TemporaryDirectory() as folder,
                DiskBuilder().open(Path(folder) / "spill") as store,
            ):
                _, driver = await need_disk.finish_loading(store)
                return await _total(driver)


async def _total(driver: RecordWalk) -> int:
    total = 0
    async for chunk in driver.chunks(1000):
        total += sum(len(each.data or b"") for each in chunk)
    return total


async def _pieces(file: Path) -> AsyncIterator[bytes]:
    with file.open("rb") as source:
        while piece := source.read(_PIECE):
            yield piece


def walk(data: bytes, hashes: bool) -> int:
    """Every record's path, CID and block in key order; returns the records' bytes."""
    total = 0
    for _path, _cid, block in index_repo(data, verify_hashes=hashes).records.blocks():
        total += len(block)
    return total


def _on_all_cores(file: Path, cores: int) -> float:
    """MiB/s in total when every core walks the same archive at once."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(cores) as pool:
        pool.map(_warm, range(cores), 1)
        start = time.perf_counter()
        sizes = pool.map(_walk_file, [file] * cores, 1)
        return sum(sizes) / _MIB / (time.perf_counter() - start)


def _warm(_number: int) -> None:
    time.sleep(0.2)  # long enough for every process to take one


def _walk_file(file: Path) -> int:
    data = file.read_bytes()
    walk(data, True)
    return len(data)


def _named(size: int) -> str:
    return f"{size // _MIB}mib" if size >= _MIB else f"{size // _KIB}kib"


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / _KIB


def _own_peak_mib() -> float:
    """As `_peak_mib`; but a process that was just started does not count its parent's memory."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return _peak_mib()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / _KIB
