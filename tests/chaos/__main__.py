"""The command line of the chaos run; see the package."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.chaos.run import ChaosRun, Options, Report

SEED = 20261121


def run_seed(options: Options, folder: Path, *, loud: bool = False) -> Report:
    """One run in a folder of its own."""
    told = partial(print, f"seed {options.seed}:", flush=True) if loud else lambda line: None

    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # clients that are killed hang up

    async def go() -> Report:
        return await ChaosRun(options, folder, told).run()

    return asyncio.run(go())


def _options(arguments: argparse.Namespace, seed: int) -> Options:
    options = Options(seed, accounts=arguments.accounts)
    if arguments.minutes:
        return options._replace(
            seconds=arguments.minutes * 60, lies=4.0, rate=40.0, life=(2.0, 60.0), patience=120.0
        )
    return options._replace(commits=arguments.commits)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs, with seeds one after the other")
    parser.add_argument("--accounts", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=0.0, help="a long storm, with longer lives")
    parser.add_argument("--commits", type=int, default=0, help="at least so many commits before the calm")
    parser.add_argument("--keep", type=Path, default=None, help="a folder in which everything is left")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the daemon is to end with us
    failed = 0
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
            folder = arguments.keep / str(seed) if arguments.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            report = run_seed(_options(arguments, seed), folder, loud=True)
        print(json.dumps({"seed": seed, "faults": len(report.faults), **report.figures}), flush=True)
        for fault in report.faults[:40]:
            print(f"  FAULT {fault}", flush=True)
        failed += bool(report.faults)
    print(f"{arguments.seeds} runs, {failed} with faults", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
