"""`python -m bench NAME [SIZE …]`: runs one benchmark, or `all`, and prints a table or JSON.

Owns the options. The input is made once by the simulator and kept in a cache folder outside the checkout.
Exit code 0 when the benchmark ran, whatever its numbers; `--strict` makes missed targets exit 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

import orjson

from bench.options import Options

NAMES = ("car_walk", "verify", "live", "backfill", "network", "gc", "disk")
#: Run by name only: they compare what might be, not what is.
ALONE = ("tuning", "parts")


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    names = [*NAMES, *ALONE, "all"]
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "sizes", nargs="*", type=int, metavar="SIZE", help="input sizes; each benchmark says of what"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object instead of a table")
    parser.add_argument("--runs", type=int, help="runs of each measurement (3)", default=3)
    parser.add_argument("--full", action="store_true", help="the full sizes, without a time limit")
    parser.add_argument("--cache", type=Path, help="folder for generated input", default=default_cache())
    parser.add_argument("--file", type=Path, help="car_walk: this CAR, also by HUGE_CAR in the environment")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="one more run under cProfile, as text")
    parser.add_argument("--rounds", type=int, help="gc: updates of every churned record (20)", default=20)
    parser.add_argument("--records", type=int, help="gc: records that are churned (a fiftieth of SIZE)")
    parser.add_argument("--data", type=Path, help="gc: keep the loaded store here and use it again; no churn")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a target is missed")
    return parser.parse_args(arguments)


def default_cache() -> Path:
    """The platform's cache folder for this project."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / (
        "Library/Caches" if sys.platform == "darwin" else ".cache"
    )
    return Path(base) / "atproto-indexer" / "bench"


def main(arguments: list[str] | None = None) -> int:
    """Runs what the arguments name."""
    given = _arguments(arguments)
    huge = given.file or (Path(os.environ["HUGE_CAR"]) if os.environ.get("HUGE_CAR") else None)
    options = Options(
        sizes=tuple(given.sizes),
        runs=given.runs,
        full=given.full,
        cache=given.cache,
        file=huge,
        profile=given.profile,
        rounds=given.rounds,
        records=given.records,
        data=given.data,
    )
    given.cache.mkdir(parents=True, exist_ok=True)
    met = True
    for name in NAMES if given.name == "all" else (given.name,):
        report = importlib.import_module(f"bench.{name}").run(options)
        met = met and report.met
        print(orjson.dumps(report.as_json()).decode() if given.json else report.as_table() + "\n", flush=True)
    return 0 if met or not given.strict else 1


if __name__ == "__main__":
    sys.exit(main())
