"""The suite in several processes: every test once, a module's together, one summary, a death is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the tests run in one process")

#: A module of tests; its process says that it is there, and waits for the other.
MODULE = """
import os, pathlib, time, pytest

def meet():
    pathlib.Path(f"{os.getpid()}.pid").touch()
    while len(list(pathlib.Path().glob("*.pid"))) < 2:
        time.sleep(0.01)

@pytest.fixture(scope="module")
def owner():
    meet()
    yield os.getpid()
    pathlib.Path(f"torn-down-{__name__}").touch()

def test_one(owner):
    print("a line of test_one")
    assert owner == os.getpid()

def test_two(owner):
    assert owner == os.getpid()
"""
FAILS = MODULE + "\n\ndef test_three(owner):\n    print('what', 'it', 'said')\n    assert 3 == 4, 'no'\n"
DIES = MODULE + "\n\ndef test_three(owner):\n    os.kill(os.getpid(), 9)\n"


def _pytest(folder: Path, first: str, second: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_first.py").write_text(first)
    (folder / "test_second.py").write_text(second)
    command = [sys.executable, "-m", "pytest", "-p", "tests.split", "-p", "no:hypothesispytest"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "--processes", "2", f"--rootdir={folder}", *options],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=25,
    )  # fmt: skip


def test_what_two_processes_run_is_reported_as_if_one_had(tmp_path: Path) -> None:
    done = _pytest(tmp_path, MODULE, FAILS, "--junitxml=report.xml")
    assert done.returncode == 1
    assert re.search(r"= 1 failed, 4 passed in ", done.stdout), done.stdout
    assert "test_second.py::test_three - AssertionError: no" in done.stdout
    assert done.stdout.count("what it said") == 1
    assert "a line of test_one" not in done.stdout
    assert (tmp_path / "report.xml").read_text().count("<testcase ") == 5
    assert len(list(tmp_path.glob("torn-down-*"))) == 2


def test_a_process_that_dies_is_told_with_its_test(tmp_path: Path) -> None:
    done = _pytest(tmp_path, MODULE, DIES)
    assert done.returncode == 1
    assert "the process that ran test_second.py::test_three died" in done.stdout


def test_the_first_failure_ends_them_all_where_that_is_asked_for(tmp_path: Path) -> None:
    waits = MODULE + "".join(
        f"\n\ndef test_{number}(owner):\n    time.sleep(0.05)\n" for number in range(200)
    )
    done = _pytest(tmp_path, waits, FAILS, "-x")
    assert done.returncode == 1
    assert "stopping after 1 failures" in done.stdout
    assert len(list(tmp_path.glob("torn-down-*"))) == 2
