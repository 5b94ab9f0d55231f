"""The command line itself: exit codes, and a clear line where a package is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT


def _run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_help_version_and_wrong_usage_have_their_exit_codes() -> None:
    assert _run(sys.executable, "-m", "indexer", "--help").returncode == 0
    assert _run(sys.executable, "-m", "indexer", "--version").stdout.strip().count(".") == 2
    wrong = _run(sys.executable, "-m", "indexer", "nonsense")
    assert wrong.returncode == 2
    assert "No such command 'nonsense'" in wrong.stderr


def test_an_interpreter_without_the_packages_is_told_what_to_do() -> None:
    # -S leaves site-packages out, as in an interpreter where nothing is installed.
    done = _run(sys.executable, "-S", "-m", "indexer", "--version")
    assert done.returncode == 1
    assert "lacks the package click" in done.stderr
    assert ".venv" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_collector_never_looks_at_what_the_modules_hold() -> None:
    """A full collection would keep the daemon's loop for tens of milliseconds."""
    code = """
import gc
from indexer.cli import cli
passes = sum(generation["collections"] for generation in gc.get_stats())
cli.get_command(None, "run")
print(sum(generation["collections"] for generation in gc.get_stats()) - passes)
print(gc.isenabled(), gc.get_freeze_count() > 10 * len(gc.get_objects()))
"""
    done = _run(sys.executable, "-c", code)
    assert done.stdout.split() == ["0", "True", "True"], done.stderr
