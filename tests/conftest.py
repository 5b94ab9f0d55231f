"""Runs `async def` tests on a fresh loop, gives every test a time limit, takes back what it set up for logs.

The limit is 30 s, `@pytest.mark.limit(seconds)` changes it. A test that overruns it fails with the
stack of where it was (SIGALRM, so also inside native calls that return to Python).
"""

from __future__ import annotations

import asyncio
import inspect
import signal
from collections.abc import Iterator
from types import FrameType

import pytest
import structlog

DEFAULT_LIMIT_S = 30


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    marker = item.get_closest_marker("limit")
    seconds = float(marker.args[0]) if marker else DEFAULT_LIMIT_S

    def overrun(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"{item.nodeid} took longer than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, overrun)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        structlog.reset_defaults()  # a command run in a test logs to a stream that ends with the test
