"""Applies the mutants one by one to a copy of the tree and runs the test that must notice.

``python -m tests.mutants.run [NAME…]``: exits 1 when a mutant survives or no longer applies, or when a
killer fails without any mutant. The working tree is only read; each process has a copy of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from tests.paths import ROOT

TABLE = Path(__file__).with_name("mutants.toml")
_MOST = 4  # processes without being asked
_LIMIT_S = 240.0  # of one killer; a mutant that makes it hang is noticed, too
_LEFT_OUT = shutil.ignore_patterns(
    ".git", "__pycache__", ".*_cache", ".hypothesis", ".venv", "*.egg-info", "/data"
)
_FAILED = 1  # pytest's exit code when tests failed; others mean that it could not run them


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    killer: str
    why: str


class NotApplied(Exception):
    """The text that a mutant replaces is not found exactly once."""


def mutants() -> list[Mutant]:
    return [Mutant(**row) for row in tomllib.loads(TABLE.read_text())["mutant"]]


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the bug. The first newline of a text in the table is not part of it."""
    if text.count(mutant.old) != 1:
        raise NotApplied(f"{mutant.name}: its text occurs {text.count(mutant.old)} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


class Run(NamedTuple):
    """How a killer ended: exit code (None: it took too long), the first test that failed, seconds."""

    code: int | None
    failed: str
    seconds: float


def run_tests(tree: Path, file: str) -> Run:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--no-header", "--tb=no",
               "-p", "no:cacheprovider", file]  # fmt: skip
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "COLUMNS": "200"}
    started = time.monotonic()
    tests = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = tests.communicate(timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        return Run(None, "it hangs", time.monotonic() - started)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(tests.pid, signal.SIGKILL)  # with the processes that a bug left behind
        tests.communicate()
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - |$)", out, re.MULTILINE)
    if tests.returncode not in (0, _FAILED):
        print(out[-2000:], errors[-2000:], sep="\n")
    return Run(tests.returncode, failed[1] if failed else "", time.monotonic() - started)


def verdict(tree: Path, mutant: Mutant) -> bool:
    """Whether the killer notices; says so."""
    place = tree / mutant.file
    sound = place.read_text()
    _write(place, mutated(mutant, sound))
    try:
        run = run_tests(tree, mutant.killer)
    finally:
        _write(place, sound)
    killed = run.code in (_FAILED, None)
    word = "killed  " if killed else "SURVIVED"
    print(f"{word} {mutant.name:40} {run.seconds:5.1f} s  {mutant.killer} {run.failed}", flush=True)
    return killed


def _write(place: Path, text: str) -> None:
    """Another text of the file, at another time: by its seconds and its size bytecode is known to be old."""
    newer = place.stat().st_mtime + 2
    place.write_text(text)
    os.utime(place, (newer, newer))


def sound(tree: Path, killer: str) -> bool:
    """Whether a killer passes without any mutant; says so when it does not."""
    passes = run_tests(tree, killer).code == 0
    if not passes:
        print(f"FAILS    {killer} without any mutant", flush=True)
    return passes


def noticed(tree: Path, mutant: Mutant) -> bool:
    """As `verdict`; a mutant that does not apply is told, too."""
    try:
        return verdict(tree, mutant)
    except NotApplied as error:
        print(f"STALE    {error}", flush=True)
        return False


def judged(chosen: list[Mutant], processes: int) -> int:
    """How many killers or mutants are at fault, looked at in several copies of the tree at a time."""
    checks: list[Callable[[Path], bool]] = [
        partial(sound, killer=killer) for killer in dict.fromkeys(mutant.killer for mutant in chosen)
    ]
    checks += [partial(noticed, mutant=mutant) for mutant in chosen]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(processes) as pool:
        trees = SimpleQueue[Path]()
        for number in range(processes):
            tree = Path(folder) / f"tree-{number}"
            shutil.copytree(ROOT, tree, ignore=_LEFT_OUT)
            trees.put(tree)

        def in_a_tree(check: Callable[[Path], bool]) -> bool:
            tree = trees.get()
            try:
                return check(tree)
            finally:
                trees.put(tree)

        return sum(not good for good in pool.map(in_a_tree, checks))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, _MOST), metavar="N")
    arguments = parser.parse_args()
    names = set(arguments.names)
    chosen = [mutant for mutant in mutants() if not names or mutant.name in names]
    if unknown := names - {mutant.name for mutant in chosen}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    started = time.monotonic()
    faults = judged(chosen, arguments.processes)
    print(f"{len(chosen)} mutants in {time.monotonic() - started:.0f} s, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
