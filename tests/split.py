"""Runs the collected tests in several processes, which take whole modules from one queue.

Most tests wait for sockets, disks and child processes, so `python -m pytest` takes about half as long
with two. The session collects once, forks, and reports what its processes tell it as if it had run the
tests itself: one output, one summary, one exit code. A module's tests stay together and in order, so its
fixtures are made once. One process does it all where there is one module, `--processes 1`, a debugger,
or no safe fork (macOS).
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import pytest

_MOST = 4  # processes without being asked: the tests also start processes and threads of their own
_ENDING_S = 10  # for a process to take down what its tests set up
_INDEX_BYTES = 2  # of a module in the queue

_Place = tuple[str, int | None, str]


def pytest_addoption(parser: pytest.Parser) -> None:
    usual = min(os.cpu_count() or 1, _MOST)
    parser.addoption("--processes", type=int, default=usual, metavar="N", help="that run the tests")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    modules = [list(tests) for _, tests in groupby(session.items, key=lambda item: item.path)]
    option = session.config.option
    count = min(option.processes, len(modules))
    if count < 2 or session.testsfailed or option.collectonly or option.usepdb or sys.platform != "linux":
        return None  # pytest's own loop
    _run(_Shared(session, modules, _queue(len(modules)), mmap.mmap(-1, 1)), count)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)
    return True


def _queue(length: int) -> int:
    """The reading end of a pipe that holds the indexes below `length`: each is read by one process."""
    queue, filling = os.pipe()
    os.write(filling, b"".join(index.to_bytes(_INDEX_BYTES, "big") for index in range(length)))
    os.close(filling)
    return queue


class _Shared(NamedTuple):
    """What the session and its processes have in common."""

    session: pytest.Session
    modules: list[list[pytest.Item]]
    queue: int
    ending: mmap.mmap  # one byte, set when no further test shall begin

    def taken(self) -> Iterator[pytest.Item]:
        """The tests of the modules that this process takes."""
        while index := os.read(self.queue, _INDEX_BYTES):
            yield from self.modules[int.from_bytes(index, "big")]

    def ends(self) -> bool:
        return bool(self.ending[0] or self.session.shouldfail or self.session.shouldstop)


def _run(shared: _Shared, count: int) -> None:
    """Every module in one of `count` processes; raises when one of them dies."""
    shared.session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # one for all
    context = multiprocessing.get_context("fork")
    running: dict[Connection, str] = {}
    processes = []
    for _ in range(count):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(shared, theirs))
        process.start()
        theirs.close()
        processes.append(process)
        running[ours] = "no test"
    os.close(shared.queue)
    try:
        _listen(shared, running)
    finally:
        shared.ending[0] = 1
        for process in processes:
            process.join(_ENDING_S)
            process.kill()


# --- the session's side ---


def _listen(shared: _Shared, running: dict[Connection, str]) -> None:
    """Reports what the processes tell, until all of them have ended."""
    while running:
        for connection in wait(list(running)):
            assert isinstance(connection, Connection)
            try:
                told = connection.recv()
            except EOFError:
                pytest.exit(f"the process that ran {running[connection]} died", pytest.ExitCode.TESTS_FAILED)
            if told is None:
                del running[connection]
            elif isinstance(told, str):
                running[connection] = told
            else:
                _report(shared.session.config, *told)
        shared.ending[0] = shared.ends()


def _report(config: pytest.Config, nodeid: str, place: _Place, reports: list[dict[str, object]]) -> None:
    """As if the test had run here."""
    config.hook.pytest_runtest_logstart(nodeid=nodeid, location=place)
    for data in reports:
        report = config.hook.pytest_report_from_serializable(config=config, data=data)
        config.hook.pytest_runtest_logreport(report=report)
    config.hook.pytest_runtest_logfinish(nodeid=nodeid, location=place)


# --- a process's side ---


class _Teller:
    """Tells the session, instead of the terminal: a test's name when it begins, its reports when it ends."""

    def __init__(self, config: pytest.Config, connection: Connection) -> None:
        self._config = config
        self._tell = connection.send
        self._reports: list[dict[str, object]] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports = []
        self._tell(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook.pytest_report_to_serializable
        self._reports.append(hook(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str, location: _Place) -> None:
        self._tell((nodeid, location, self._reports))


def _work(shared: _Shared, connection: Connection) -> None:
    """A process: runs the tests that it takes from the queue."""
    plugins = shared.session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(_Teller(shared.session.config, connection))
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()  # into a file that the processes would share
    capture.start_global_capturing()
    try:
        with suppress(KeyboardInterrupt):  # the session is interrupted, too, and says so
            _run_tests(shared)
            connection.send(None)
    finally:
        capture.stop_global_capturing()


def _run_tests(shared: _Shared) -> None:
    tests = shared.taken()
    test = next(tests, None)
    try:
        while test is not None and not shared.ends():
            following = next(tests, None)  # its fixtures stay where it shares them
            test.ihook.pytest_runtest_protocol(item=test, nextitem=following)
            test = following
    finally:
        shared.session._setupstate.teardown_exact(None)
