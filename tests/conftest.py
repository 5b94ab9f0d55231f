"""Runs `async def` tests on a fresh loop, gives every test a time limit, takes back what it set up for logs.

The limit is 30 s, `@pytest.mark.limit(seconds)` changes it. A test that overruns it fails with the
stack of where it was (SIGALRM, so also inside native calls that return to Python).

`tests.split` spreads the modules over several processes, `tests.places` says where their files are.
"""

from __future__ import annotations

import asyncio
import inspect
import signal
from collections.abc import Iterator
from types import FrameType

import pytest
import structlog
from hypothesis import settings

from tests.places import pytest_configure
from tests.split import pytest_addoption, pytest_runtestloop

__all__ = [
    "pytest_addoption", "pytest_configure", "pytest_pyfunc_call", "pytest_runtest_call", "pytest_runtestloop",
]  # fmt: skip

DEFAULT_LIMIT_S = 30


def _log_plainly() -> None:
    """As structlog does by itself, but for coloured tracebacks, which cost a second each."""
    structlog.reset_defaults()
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], plain])


_log_plainly()
# A busy machine makes an example slow: the test's own limit is the one that counts.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


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
        _log_plainly()  # a command run in a test logs to a stream that ends with the test
