"""A pool of worker processes for pure CPU work: verification, tree building.

Owns the processes' lives: they start on first use, die with their parent (also when it is killed) and of
a job that takes too long, are replaced when one dies, and ignore the terminal's Ctrl-C so that the daemon
can drain. Leaves out ordering: callers await their results in the order they want. Called from the event
loop only.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnProcess
from typing import ParamSpec, TypeVar

from indexer.errors import WorkerDied
from indexer.memory import IN_WORKER, collect_rarely

#: Time for running work to end at a stop, in seconds.
STOP_S = 2.0

P = ParamSpec("P")
T = TypeVar("T")


class Pool:
    """``workers`` processes; with 0 the same functions run on a thread of this process.

    A job may take ``job_timeout`` seconds in its process, which dies of it otherwise; None is no limit, and
    a thread has none.
    """

    def __init__(self, workers: int, job_timeout: float | None = None) -> None:
        self.workers = workers
        self._job_timeout = job_timeout or 0.0
        #: Times the processes had to be replaced because one of them died.
        self.restarts = 0
        #: Whether the last call ended by the death of its process, twice.
        self.failing = False
        self._executor: ProcessPoolExecutor | None = None
        self._suspect: ProcessPoolExecutor | None = None
        self._alone = asyncio.Lock()
        self._stopped = False

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """``function(*args, **kwargs)`` in a worker; its exceptions are raised here.

        ``function`` must be importable by name and its arguments picklable. A worker's death breaks
        every call that is under way, so each is made once more in a process of its own: only the call
        that kills that one too raises `WorkerDied`.
        """
        if self.workers == 0:
            return await asyncio.to_thread(function, *args, **kwargs)
        executor = self._live()
        try:
            result = await self._submitted(executor, function, *args, **kwargs)
        except BrokenProcessPool:
            self._replace(executor)
        else:
            self.failing = False
            return result
        return await self._run_alone(function, *args, **kwargs)

    async def _run_alone(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The same in a process that nothing else runs in; one such process at a time."""
        async with self._alone:
            if self._stopped:
                raise WorkerDied("the pool of worker processes is stopped")
            self._suspect = executor = _executor(1)
            began = time.monotonic()
            try:
                return await self._submitted(executor, function, *args, **kwargs)
            except BrokenProcessPool as error:
                self.failing = True
                raise WorkerDied(self._obituary(function, time.monotonic() - began)) from error
            finally:
                self._suspect = None
                executor.shutdown(wait=False, cancel_futures=True)

    async def _submitted(
        self, executor: ProcessPoolExecutor, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        future = executor.submit(_timed, self._job_timeout, function, *args, **kwargs)
        return await asyncio.wrap_future(future)

    def _obituary(self, function: Callable[..., object], seconds: float) -> str:
        name = getattr(function, "__qualname__", repr(function))
        if self._job_timeout and seconds >= self._job_timeout:
            return f"a worker process took longer than {self._job_timeout:g} s for {name}, twice"
        return f"a worker process died twice while it ran {name}"

    async def warm(self) -> None:
        """Starts every process now, so that the first work does not wait for imports."""
        if self.workers:
            await asyncio.gather(*(self.run(_nothing) for _ in range(self.workers)))

    @property
    def problem(self) -> str:
        """Why no work can be done at the moment, "" when it can."""
        if self._stopped:
            return "stopped"
        return "its processes die under their work" if self.failing else ""

    def pids(self) -> list[int]:
        """Process ids of the workers that run at this moment."""
        return [*_processes(self._executor), *_processes(self._suspect)]

    async def stop(self) -> None:
        """Drops what has not begun; what runs gets `STOP_S` to end, then its process is ended.

        Nothing is lost by that: workers compute, they keep nothing.
        """
        self._stopped = True
        running = [executor for executor in (self._executor, self._suspect) if executor is not None]
        self._executor = None
        for executor in running:
            await asyncio.to_thread(_end, executor)

    def _live(self) -> ProcessPoolExecutor:
        if self._stopped:
            raise WorkerDied("the pool of worker processes is stopped")
        if self._executor is None:
            self._executor = _executor(self.workers)
        return self._executor

    def _replace(self, broken: ProcessPoolExecutor) -> None:
        if self._executor is broken:
            self._executor = None
            self.restarts += 1
            broken.shutdown(wait=False, cancel_futures=True)


def _executor(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_worker
    )


def _processes(executor: ProcessPoolExecutor | None) -> dict[int, SpawnProcess]:
    return dict(getattr(executor, "_processes", None) or {})


def _end(executor: ProcessPoolExecutor) -> None:
    processes = list(_processes(executor).values())
    executor.shutdown(wait=False, cancel_futures=True)
    deadline = time.monotonic() + STOP_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
    executor.shutdown(wait=True)


def _timed(limit_s: float, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs in a worker: the kernel ends the process at ``limit_s`` (0: never), whatever it is busy with."""
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return function(*args, **kwargs)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _nothing() -> None:
    """Work that only makes a process start."""


def _prepare_worker() -> None:
    collect_rarely(IN_WORKER)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)
