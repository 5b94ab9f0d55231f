"""`bench car_walk [BYTES …]`: CAR bytes → ordered records, with and without block hashing, one core and all.

Times `indexer.repo.walker.index_repo` and the slicing of every record out of the buffer, as backfill does it.
The archives are the simulator's; `--file` or HUGE_CAR adds any other.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path

from bench.options import Options, machine, profiled, timed
from bench.report import Report, Target
from indexer.repo.walker import index_repo
from indexer.simulator.corpus import cached_car

_KIB, _MIB = 1 << 10, 1 << 20
REDUCED = (3 * _KIB, 280 * _KIB, 5 * _MIB, 64 * _MIB)
FULL = (3 * _KIB, 280 * _KIB, 5 * _MIB, 128 * _MIB, 450 * _MIB)
#: The targets hold from this size up, a core.
_FROM = _MIB
_HASHED, _PLAIN = Target(130), Target(200)


def run(options: Options) -> Report:
    """Every size, hashed and not; then the largest on all cores."""
    report = Report("car_walk", notes=[machine()])
    files = {_named(size): cached_car(options.cache, size=size)[0] for size in options.chosen(REDUCED, FULL)}
    if options.file is not None:
        files[options.file.stem] = options.file
    for name, file in files.items():
        _measure(report, options, name, file)
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


def walk(data: bytes, hashes: bool) -> int:
    """Every record's path and block in key order; returns the records' bytes."""
    total = 0
    for _path, _cid, start, end in index_repo(data, verify_hashes=hashes).records:
        total += len(data[start:end])
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
