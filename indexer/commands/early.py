"""Signals that come before there is an event loop to take them: they are noted, and no daemon starts.

A handler that raised would be swallowed where Python ignores errors, as in the import system's callbacks.
Main thread.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_came = threading.Event()


def note_signals() -> None:
    """From now on SIGTERM and SIGINT end nothing by themselves; `signal_came` tells of them."""
    if threading.current_thread() is not threading.main_thread():
        return  # as in a program that runs the command in a thread; signals are its own
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)


def signal_came() -> bool:
    return _came.is_set()


def _note(_number: int, _frame: FrameType | None) -> None:
    _came.set()
