"""The process that the storm kills: a real store under the whole mixed load, with its workers, and a reader.

``python -m tests.store.storm_child FOLDER SEED RUN CURSOR BOOT``: goes on with the load where the store
stands, as fast as the reader can follow, until it is killed. On stdout: ``r <unit> <head>`` when it is
ready, ``a <unit>`` for every acknowledged unit, ``e <json>`` for every event from CURSOR on, ``o <floor>``
when the reader was overtaken by the floor.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from indexer.cas import FsBlobStore
from indexer.config import Settings
from indexer.store.archives import Archives
from indexer.store.codecs import Event
from indexer.store.database import Database
from indexer.store.events import EventLog
from indexer.store.gc import BlocksGcWorker
from indexer.store.keyspaces import KEYSPACES
from indexer.store.refcounts import CheckpointWorker
from indexer.store.retention import RetentionWorker
from indexer.store.transaction import Transaction
from indexer.store.units import Step
from indexer.store.worker import Worker
from indexer.store.writer import Writer
from tests.store.storm_load import (
    ARCHIVED,
    BUFFERED,
    CURSOR,
    QUARANTINED,
    Op,
    Told,
    car_of,
    op_of,
    perform,
    rescue_of,
)
from tests.store.support import Clock, settings_of

RETENTION_S = 2
UNIT_S = 0.002  # of the storm's own time, a unit
_LAG = 600  # events that the load may be ahead of the reader
_IN_FLIGHT = 8  # groups of units that are not acknowledged


def settings() -> Settings:
    return settings_of(
        events={"retention": RETENTION_S},
        gc={"step_rows": 70, "checkpoint_rows": 1000, "wipe_point_rows": 200, "compact_after": 200},
        writer={"group_ops": 200},
        ingest={"buffer_frames_per_repo": BUFFERED},
        store={"quarantine_entries": QUARANTINED},
        archive={"cars": True, "keep_per_repo": ARCHIVED},
        durability={"flush_interval": 0.2},
    )


def told_of(event: Event) -> Told:
    return Told(
        event.kind, event.live, event.did, event.epoch, event.rev,
        f"{event.collection}/{event.rkey}".strip("/"), event.action, (event.cid or b"").hex(),
    )  # fmt: skip


def set_clock(clock: Clock, writer: Writer) -> None:
    """The storm's time stood still while nothing ran."""
    marks = RetentionWorker(writer.db, writer, settings()).watermarks(newest=True, limit=1)
    clock.now = max(clock.now, writer.state.last_time, *(mark.time for mark in marks))


class Child:
    """The load, the workers and the reader over one open store."""

    def __init__(self, folder: Path, seed: int, run: int, position: int, boot: str) -> None:
        self.folder = folder
        self.seed = seed
        self.chance = random.Random(f"{seed} {run}")
        self.position = position  # the reader's
        self.db = Database.open(folder / "db", memory_mib=32)
        self.clock = Clock()
        self.writer = Writer(self.db, settings(), clock=self.clock, boot=boot)
        self.log = EventLog(self.db, self.writer)
        gc = settings().gc
        self.archives = Archives(self.db, self.writer, FsBlobStore(folder / "cas", level=1), settings())
        self.workers: list[Worker] = [
            CheckpointWorker(self.db, self.writer, gc),
            BlocksGcWorker(self.db, self.writer, gc),
            RetentionWorker(self.db, self.writer, settings(), uptime=self.clock),
            self.archives,
        ]
        self.in_flight = 0
        self.moved = asyncio.Event()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.out: asyncio.StreamWriter

    async def run(self) -> None:
        set_clock(self.clock, self.writer)
        await self.writer.start()
        self.out = await _stdout()
        first = (self.db.cursor(CURSOR) or 0) + 1
        self.say(f"r {first - 1} {self.writer.head}")
        parts: list[Coroutine[Any, Any, None]] = [self.load(first), self.read(), self.compact()]
        parts += [self.passes(worker) for worker in self.workers]
        tasks = [asyncio.create_task(part) for part in parts]
        done, _ = await asyncio.wait([self.failed, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for part in done:
            part.result()

    def say(self, line: str) -> None:
        self.out.write(line.encode() + b"\n")

    # ---- the load

    async def load(self, number: int) -> None:
        while True:
            while self.in_flight >= _IN_FLIGHT or self.writer.head - self.position > _LAG:
                self.moved.clear()
                await self.moved.wait()
            op = op_of(self.seed, number)
            if op.kind == "archive":
                await self.archive(op)
                number += 1
                continue
            ops = [op]
            while len(ops) < self.chance.randrange(1, 12):
                op = op_of(self.seed, number + len(ops))
                if op.kind == "archive":
                    break
                ops.append(op)
            await self.hand_in(ops)
            number += len(ops)

    async def hand_in(self, ops: list[Op]) -> None:
        """Units in the order of their numbers, with one acknowledgement for all."""
        self.clock.forward(UNIT_S * len(ops))
        steps: list[Step] = [partial(perform, op) for op in ops]

        def rescue(index: int, _error: Exception) -> Step:
            return partial(rescue_of, ops[index])

        def done(future: asyncio.Future[None]) -> None:
            self.in_flight -= 1
            self.moved.set()
            error = future.exception()
            if error is None:
                self.say(f"a {ops[-1].number}")
            elif not self.failed.done():
                self.failed.set_exception(error)

        future = await self.writer.submit_ordered("storm", steps, rescue)
        self.in_flight += 1
        future.add_done_callback(done)

    async def archive(self, op: Op) -> None:
        car = self.folder / "fetched.car"
        car.write_bytes(car_of(op))
        async with self.archives.keeping(op.did, car) as archived:

            def hold(tx: Transaction) -> None:
                perform(op, tx, archived)

            await self.writer.run("storm", hold)
        self.say(f"a {op.number}")

    # ---- beside it

    async def passes(self, worker: Worker) -> None:
        """Passes at short, irregular intervals; a pass that fails ends the process."""
        while True:
            await worker.run_once()
            await asyncio.sleep(self.chance.uniform(0, 0.05))

    async def compact(self) -> None:
        """Rows reach files, at any moment."""
        while True:
            await asyncio.sleep(self.chance.uniform(0, 0.5))
            keyspace = self.chance.choice(list(KEYSPACES.values()))
            await asyncio.to_thread(self.db.compact, keyspace)

    async def read(self) -> None:
        while True:
            await self.writer.wait_head(self.position)
            if self.position < self.log.floor:
                if self.position:
                    self.say(f"o {self.log.floor}")
                self.position = self.log.floor
            page = self.log.page(self.position, self.chance.randrange(1, 300))
            self.log.blocks(page.events)
            for event in page.events:
                self.say(f"e {json.dumps([event.id, event.time_us, told_of(event)])}")
            self.position = page.next
            self.moved.set()
            await self.out.drain()


async def _stdout() -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.streams.FlowControlMixin(loop=loop), os.fdopen(1, "wb", closefd=False)
    )
    return asyncio.StreamWriter(transport, protocol, None, loop)


async def main(folder: Path, seed: int, run: int, position: int, boot: str) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    await Child(folder, seed, run, position, boot).run()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
