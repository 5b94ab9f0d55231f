"""`bench tuning [RECORDS …]`: other layouts of the keyspaces beside the one that is used, on the same work.

Each layout gets a process of its own: records are put, a quarter of them updated, with the workers running;
then read at random through a small cache, then compacted. Reports bytes a record (compacted), write
amplification (what RocksDB wrote to files, for flushes and compactions, over what it was given), and the time
of a getRecord's two reads. For whoever changes `store/keyspaces.py`; `bench all` leaves it out.
"""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import quantiles
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import orjson

from bench.options import Options, machine
from bench.records import PER_REPO, made, owner
from bench.report import Report
from bench.store import Store, at_work, opened, write
from indexer.store import rocks
from indexer.store.keyspaces import KEYSPACES
from indexer.store.upkeep import compact_all

REDUCED = (200_000,)
FULL = (200_000, 1_000_000)
_READS: Final = 20_000
_UNIT: Final = 50
_MEMORY_MIB: Final = 64  # small beside the data, so that reads reach the files
_TICKER: Final = re.compile(
    r"rocksdb\.(bytes\.written|flush\.write\.bytes|compact\.write\.bytes) COUNT : (\d+)"
)


_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class Layout(NamedTuple):
    """Changes to the table of keyspaces (name → fields of `Tuning`), and to constants of `rocks`."""

    keyspaces: Mapping[str, dict[str, Any]] = _NOTHING
    constants: Mapping[str, Any] = _NOTHING


_ROWS: Final = ("records", "block_refs")
_KIB: Final = 1024
LAYOUTS: Final[dict[str, Layout]] = {
    "as_is": Layout(),
    "no_dictionary": Layout(constants={"_DICTIONARY": 0}),
    "dictionary_16k": Layout(constants={"_DICTIONARY": 16 * _KIB}),
    "dictionary_64k": Layout(constants={"_DICTIONARY": 64 * _KIB}),
    "no_zstd": Layout({name: {"zstd_dictionary": False} for name in KEYSPACES}),
    "lz4_rows": Layout({name: {"zstd_dictionary": False} for name in _ROWS}),
    "zstd_level_3": Layout(constants={"_ZSTD_LEVEL": 3}),
    "zstd_level_6": Layout(constants={"_ZSTD_LEVEL": 6}),
    "zstd_level_9": Layout(constants={"_ZSTD_LEVEL": 9}),
    "buffers_double": Layout({name: {"weight": each.tuning.weight * 2} for name, each in KEYSPACES.items()}),
    "buffers_half": Layout(
        {name: {"weight": max(1, each.tuning.weight // 2)} for name, each in KEYSPACES.items()}
    ),
    "blocks_4k": Layout({"blocks": {"block_kib": 4}}),
    "blocks_8k": Layout({"blocks": {"block_kib": 8}}),
    "blocks_32k": Layout({"blocks": {"block_kib": 32}}),
    "rows_4k": Layout({name: {"block_kib": 4} for name in _ROWS}),
    "rows_16k": Layout({name: {"block_kib": 16} for name in _ROWS}),
    "no_bloom": Layout({name: {"bloom": False} for name in KEYSPACES}),
    "no_collectors": Layout({name: {"collected": False} for name in KEYSPACES}),
}


def run(options: Options) -> Report:
    """Every layout at each size."""
    report = Report("tuning", notes=[machine(), f"reads with memory_mib = {_MEMORY_MIB}"])
    for records in options.chosen(REDUCED, FULL):
        for name in LAYOUTS:
            found = [_child(options.cache, name, records) for _ in range(options.runs)]
            for figure, unit in (
                ("bytes_per_record", "bytes"),
                ("write_amplification", "ratio"),
                ("get_p50_us", "µs"),
                ("get_p99_us", "µs"),
                ("get_cpu_us", "µs"),
                ("load_cpu_us", "µs/record"),
            ):
                report.add(f"{name}_{figure}_{records}", unit, [each[figure] for each in found])
    return report


def _child(cache: Path, name: str, records: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=cache, prefix="tuning-") as folder:
        command = [sys.executable, "-m", "bench.tuning", name, folder, str(records)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result: dict[str, float] = orjson.loads(done.stdout.splitlines()[-1])
    return result


# -- in the child


def lay_out(layout: Layout) -> list[Any]:
    """Has the store opened with the layout; gives its options, of which one's statistics count everything."""
    for name, value in layout.constants.items():
        setattr(rocks, name, value)
    for name, fields in layout.keyspaces.items():
        object.__setattr__(KEYSPACES[name], "tuning", KEYSPACES[name].tuning._replace(**fields))
    plain = rocks.database_options
    counted: list[Any] = []

    def with_statistics(shared: rocks.Budget, *, create: bool) -> Any:
        options = plain(shared, create=create)
        options.enable_statistics()
        counted.append(options)
        return options

    rocks.database_options = with_statistics
    return counted


async def measure(folder: Path, records: int, counted: list[Any]) -> dict[str, float]:
    """The work, once."""
    choice = random.Random(1)
    numbers = list(range(0, records, _UNIT))
    async with opened(folder, {"memory_mib": _MEMORY_MIB}) as store:
        start = time.process_time()
        async with at_work(store):
            choice.shuffle(numbers)
            await write(store, numbers, live=False)
            await write(store, numbers[: len(numbers) // 4], 1)
        cpu = time.process_time() - start
        await store.checkpoint.run_once()
        for name in KEYSPACES:
            store.db.family(name).flush(True)
        amplification = _amplification(counted)
        await asyncio.to_thread(compact_all, store.db)
        size = sum(row["sst_bytes"] for row in store.db.stats().values())
        begun = time.process_time()
        reads = _read(store, records, choice)
        read_cpu = (time.process_time() - begun) / _READS
    cuts = quantiles(reads, n=100)
    return {
        "bytes_per_record": size / records,
        "write_amplification": amplification,
        "get_p50_us": cuts[49] * 1e6,
        "get_p99_us": cuts[98] * 1e6,
        "get_cpu_us": read_cpu * 1e6,
        "load_cpu_us": cpu / records * 1e6,
    }


def _amplification(counted: list[Any]) -> float:
    """Bytes to disk for each written; only the options that opened the database have counts."""
    tickers: Counter[str] = Counter()
    for options in counted:
        for name, count in _TICKER.findall(options.get_statistics()):
            tickers[name] += int(count)
    return (tickers["flush.write.bytes"] + tickers["compact.write.bytes"]) / tickers["bytes.written"]


def _read(store: Store, records: int, choice: random.Random) -> list[float]:
    """Seconds of a row's and its block's read, at random."""
    seconds = []
    for _ in range(_READS):
        number = choice.randrange(records)
        did, path = owner(number // PER_REPO), made(number).path
        start = time.perf_counter()
        row = store.db.record(did, path)
        found = row is not None and store.db.block(did, row.cid) is not None
        seconds.append(time.perf_counter() - start)
        assert found, path
    return seconds


def main() -> None:
    """``python -m bench.tuning LAYOUT FOLDER RECORDS`` prints the figures of one layout."""
    counted = lay_out(LAYOUTS[sys.argv[1]])
    result = asyncio.run(measure(Path(sys.argv[2]), int(sys.argv[3]), counted))
    print(orjson.dumps(result).decode(), flush=True)


if __name__ == "__main__":
    main()
