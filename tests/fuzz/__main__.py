"""The command line of fuzzing, and its clock: see the package."""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType
from typing import NamedTuple

from indexer.errors import IndexerError
from tests.fuzz.targets import TARGETS

SEED = 20261121
#: Processor seconds of one input: what is allowed, and when it is given up.
MOST_S = 1.0
_GIVE_UP_S = 5.0
#: Growth of the process over its size once warm, and by one input beyond twenty times its length.
_MOST_MIB = 256
_LEAP_MIB = 64
_WARM = 200
_TOLD_S = 60.0


class Overrun(BaseException):
    """An input took much too long."""


class Fault(NamedTuple):
    """What went wrong with input ``number``."""

    number: int
    what: str


class Result(NamedTuple):
    """``slowest`` in seconds, ``grown`` in MiB; ``outcomes``: what the inputs came to."""

    inputs: int
    outcomes: Counter[str]
    slowest: float
    grown: int
    faults: list[Fault]


def fuzz(
    target: str,
    seed: int,
    seconds: float,
    *,
    first: int = 0,
    most: int | None = None,
    keep: Path | None = None,
) -> Result:
    """Inputs number ``first`` and on until the time is over."""
    make = TARGETS[target]
    outcomes: Counter[str] = Counter()
    faults: list[Fault] = []
    slowest, base, number = 0.0, 0, first
    make(seed, Random(0))  # the corpus takes a while
    began = told = time.monotonic()
    previous = signal.signal(signal.SIGVTALRM, _overrun)
    try:
        while time.monotonic() - began < seconds and (most is None or number < first + most):
            data, attempt = make(seed, Random(f"{seed}/{target}/{number}"))
            before, started = _peak_mib(), time.thread_time()
            signal.setitimer(signal.ITIMER_VIRTUAL, _GIVE_UP_S)
            try:
                outcomes[attempt()] += 1
            except IndexerError as error:
                faults.append(Fault(number, f"{type(error).__name__} came out: {traceback.format_exc()}"))
            except (Exception, Overrun):
                faults.append(Fault(number, traceback.format_exc()))
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            took, peak = time.thread_time() - started, _peak_mib()
            slowest = max(slowest, took)
            base = base if number - first > _WARM else peak
            faults += _judged(number, len(data), took, peak - before, peak - base)
            if keep is not None and faults and faults[-1].number == number:
                (keep / f"{target}-{seed}-{number}").write_bytes(data)
            number += 1
            if time.monotonic() - told > _TOLD_S:
                told = time.monotonic()
                print(f"{target}: {number} inputs, {len(faults)} faults, peak {peak} MiB", flush=True)
    finally:
        signal.signal(signal.SIGVTALRM, previous)
    return Result(number - first, outcomes, slowest, _peak_mib() - base, faults)


def _judged(number: int, size: int, took: float, leap: int, grown: int) -> list[Fault]:
    found = []
    if took > MOST_S:
        found.append(Fault(number, f"took {took:.2f} s of processor time for {size} bytes"))
    if leap > _LEAP_MIB + 20 * size / 2**20:
        found.append(Fault(number, f"took {leap} MiB for {size} bytes"))
    if grown > _MOST_MIB:
        found.append(Fault(number, f"the process has grown by {grown} MiB"))
    return found


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _overrun(_signal: int, _frame: FrameType | None) -> None:
    raise Overrun(f"more than {_GIVE_UP_S} s of processor time")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", type=int, default=None, help="one input, by its number")
    parser.add_argument("--keep", type=Path, default=None, help="a folder for inputs that are faults")
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    first, most = (0, None) if options.only is None else (options.only, 1)
    result = fuzz(
        options.target, options.seed, options.minutes * 60, first=first, most=most, keep=options.keep
    )
    for fault in result.faults[:20]:
        print(f"FAULT input {fault.number}: {fault.what}", flush=True)
    for name, count in sorted(result.outcomes.items()):
        print(f"  {name}: {count}")
    print(
        f"{options.target}: {result.inputs} inputs, slowest {result.slowest * 1000:.0f} ms, "
        f"grown by {result.grown} MiB, {len(result.faults)} faults"
    )
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
