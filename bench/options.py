"""What every benchmark is told, and how it measures: a quiet clock, a profile, a cache of input."""

from __future__ import annotations

import cProfile
import io
import os
import platform
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from indexer.atproto.crypto import verify
from indexer.simulator.keys import K256, SigningKey


class Options(NamedTuple):
    """The command line, parsed."""

    sizes: tuple[int, ...]
    runs: int
    full: bool
    cache: Path
    file: Path | None = None
    profile: Path | None = None
    #: gc: updates of every churned record, and how many are churned (a fiftieth of the size when None).
    rounds: int = 20
    records: int | None = None
    #: gc: where the loaded store is kept for the next time; no churn is run then.
    data: Path | None = None

    def chosen(self, reduced: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes from the command line, else those of the reduced or the full set."""
        return self.sizes or (full if self.full else reduced)


def timed(function: Callable[[], object], runs: int, *, least_s: float = 0.3) -> list[float]:
    """Seconds of one core a call, one number a run; quick calls are repeated until a run lasts ``least_s``.

    For single-threaded work without I/O: the process's own time, so that a busy neighbour does not count.
    """
    start = time.process_time()
    function()
    once = time.process_time() - start
    repeat = max(1, round(least_s / max(once, 1e-7)))
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        for _ in range(repeat):
            function()
        seconds.append((time.process_time() - start) / repeat)
    return seconds


def profiled(function: Callable[[], object], file: Path, title: str) -> None:
    """Runs ``function`` under a profile and appends what it cost to ``file``."""
    profile = cProfile.Profile()
    profile.runcall(function)
    append_profile(profile, file, title)


def append_profile(profile: cProfile.Profile | str, file: Path, title: str) -> None:
    """Appends the functions that cost most, by themselves and with what they call, to ``file``."""
    text = io.StringIO()
    stats = pstats.Stats(profile, stream=text).strip_dirs()
    for order in ("tottime", "cumulative"):
        stats.sort_stats(order).print_stats(20)
    with file.open("a") as out:
        out.write(f"# {title}\n{text.getvalue()}\n")


def cached(file: Path, make: Callable[[], bytes]) -> bytes:
    """The file's bytes; made first, atomically, when it is not there."""
    if not file.exists():
        print(f"making {file.name} (once, kept in {file.parent}) …", file=sys.stderr, flush=True)
        part = file.with_suffix(f".part{os.getpid()}")
        part.write_bytes(make())
        part.replace(file)
    return file.read_bytes()


def machine() -> str:
    """One line about where the numbers come from."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    place = f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}"
    return f"{place}; one secp256k1 verification takes {_signature_us():.0f} µs"


def _signature_us() -> float:
    """Native work of a fixed size, by which numbers of different or busy machines can be compared."""
    key, message = SigningKey.derive(K256, "bench"), b"bench"
    signature = key.sign(message)
    return min(timed(lambda: verify(key.did_key, message, signature), 5, least_s=0.02)) * 1e6
