"""A pool of worker processes for pure CPU work: verification, tree building.

Owns the processes' lives: they start on first use, die with their parent (also when it is killed),
are replaced when one dies, and ignore the terminal's Ctrl-C so that the daemon can drain. Leaves out
ordering: callers await their results in the order they want. Called from the event loop only.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import ParamSpec, TypeVar

from indexer.errors import WorkerDied

P = ParamSpec("P")
T = TypeVar("T")


class Pool:
    """``workers`` processes; with 0 the same functions run on a thread of this process."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        #: Times the processes had to be replaced because one of them died.
        self.restarts = 0
        self._executor: ProcessPoolExecutor | None = None
        self._stopped = False

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """``function(*args, **kwargs)`` in a worker; its exceptions are raised here.

        ``function`` must be importable by name and its arguments picklable. When a worker dies the
        call is made once more in a fresh one; a second death raises `WorkerDied`.
        """
        if self.workers == 0:
            return await asyncio.to_thread(function, *args, **kwargs)
        for attempt in (1, 2):
            executor = self._live()
            try:
                return await asyncio.wrap_future(executor.submit(function, *args, **kwargs))
            except BrokenProcessPool as error:
                self._replace(executor)
                if attempt == 2:
                    name = getattr(function, "__qualname__", repr(function))
                    raise WorkerDied(f"a worker process died twice while it ran {name}") from error
        raise AssertionError("unreachable")

    async def warm(self) -> None:
        """Starts every process now, so that the first work does not wait for imports."""
        if self.workers:
            await asyncio.gather(*(self.run(_nothing) for _ in range(self.workers)))

    def pids(self) -> list[int]:
        """Process ids of the workers that run at this moment."""
        processes = getattr(self._executor, "_processes", None) or {}
        return list(processes)

    async def stop(self) -> None:
        """Waits for what runs, drops what has not begun, ends the processes."""
        self._stopped = True
        executor, self._executor = self._executor, None
        if executor is not None:
            await asyncio.to_thread(executor.shutdown, wait=True, cancel_futures=True)

    def _live(self) -> ProcessPoolExecutor:
        if self._stopped:
            raise WorkerDied("the pool of worker processes is stopped")
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self.workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_worker
            )
        return self._executor

    def _replace(self, broken: ProcessPoolExecutor) -> None:
        if self._executor is broken:
            self._executor = None
            self.restarts += 1
            broken.shutdown(wait=False, cancel_futures=True)


def _nothing() -> None:
    """Work that only makes a process start."""


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)
