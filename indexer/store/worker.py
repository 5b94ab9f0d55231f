"""The frame of the background workers: intervals, pacing, counting of failures.

A worker does passes; a pass is a row of small steps, each one atomic unit on the writer, with as
much rest as work between them, so that ingest keeps at least half of the loop. Steps go ahead of what
waits at the writer: behind a full queue they would fall back without end, and memory would grow. A
failed read or plan is logged, counted and tried again at the next interval; a failed commit has
poisoned the writer and ends the worker. On the writer's loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, TypeVar

import structlog

from indexer.config import GcSettings
from indexer.errors import WriterPoisoned
from indexer.store.database import Database
from indexer.store.transaction import Transaction
from indexer.store.writer import Writer

T = TypeVar("T")

STEP_AIM_S: Final = 0.005
_REST_MAX_S: Final = 0.1
_MIN_ROWS: Final = 50

log = structlog.get_logger(__name__)


class Pace:
    """How many rows a step takes so that it lasts a few milliseconds, and the rest after it."""

    __slots__ = ("_max_rows", "rows", "took")

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self.rows = max(1, min(max_rows, 500))
        self.took = 0.0  # seconds that the last step worked

    async def step(self, writer: Writer, name: str, fn: Callable[[Transaction], T], started: float) -> T:
        """Run a step that was planned since ``started``; notes how long it worked, waiting left out."""
        self.took = time.perf_counter() - started

        def timed(tx: Transaction) -> T:
            began = time.perf_counter()
            try:
                return fn(tx)
            finally:
                self.took += time.perf_counter() - began

        return await writer.run(name, timed, ahead=True)

    async def rest(self, seconds: float, handled: int, hurry: float = 1.0) -> None:
        """Rest after a step that handled rows in ``seconds``, and choose the next step's size. In a ``hurry``
        (above 1) steps are so much longer and there is no rest."""
        if handled >= self.rows // 2:
            factor = min(2.0, max(0.5, STEP_AIM_S * max(1.0, hurry) / max(seconds, 1e-6)))
            self.rows = max(min(_MIN_ROWS, self._max_rows), min(self._max_rows, int(self.rows * factor)))
        await asyncio.sleep(0 if hurry > 1 else min(seconds, _REST_MAX_S))


class Worker:
    """Base of the workers: `run` calls `run_once` at intervals."""

    name = "worker"

    def __init__(self, db: Database, writer: Writer, settings: GcSettings) -> None:
        self._db = db
        self._writer = writer
        self._settings = settings
        self._pace = Pace(settings.step_rows)
        self._turn = asyncio.Lock()  # passes of one worker do not overlap
        self.passes = 0
        self.failures = 0

    @property
    def interval(self) -> float:
        raise TypeError("abstract")

    async def run_once(self) -> object:
        raise TypeError("abstract")

    def due_early(self) -> bool:
        """Whether a size limit asks for a pass before its time."""
        return False

    async def run(self) -> None:
        """Passes at intervals until cancelled or until the writer is closed."""
        while True:
            await self._wait()
            try:
                report = await self.run_once()
            except WriterPoisoned:
                return
            except Exception as error:
                self.failures += 1
                log.error("pass_failed", worker=self.name, error=str(error), failures=self.failures)
                continue
            log.debug("pass_done", worker=self.name, report=report)

    async def _wait(self) -> None:
        until = time.monotonic() + self.interval
        while (left := until - time.monotonic()) > 0 and not self.due_early():
            await asyncio.sleep(min(left, 1.0))
