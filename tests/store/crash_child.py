"""The process that the crash tests kill: writes, folds, collects, prunes and wipes until it dies.

``python -m tests.store.crash_child FOLDER POINT COUNT``: SIGKILLs itself at the COUNT-th pass of the
crash point (``before put``, ``after retention prune``, …); with POINT ``-`` it prints one line for every
acknowledged unit and runs until it is killed from outside.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import count as count_from
from pathlib import Path

from indexer.store import gc, refcounts, retention, sweep
from indexer.store.codecs import AccountStatus
from indexer.store.database import Database
from indexer.store.gc import BlocksGcWorker
from indexer.store.refcounts import CheckpointWorker
from indexer.store.retention import RetentionWorker
from indexer.store.transaction import Transaction
from indexer.store.writer import Writer
from tests.store.support import Clock, block_of, cid_of, founded, settings_of

DIDS = [f"did:web:user{number}.test" for number in range(5)]
#: Unit at the writer, and the function that it runs.
STEPS = [
    ("checkpoint", refcounts, "fold"),
    ("blocks_gc", gc, "collect"),
    ("retention", RetentionWorker, "_mark"),
    ("retention", retention, "prune"),
    ("retention", sweep, "sweep"),
    ("retention", sweep, "finish"),
]


def crasher(point: str, count: int) -> Callable[[str], None]:
    left = count

    def reached(name: str) -> None:
        nonlocal left
        if name == point:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return reached


def told_apart(reached: Callable[[str], None]) -> Callable[[str], None]:
    """Crash points of the workers that bear the name of the step as well."""
    running: dict[str, str] = {}

    def noted(owner: object, step: str, unit: str) -> None:
        original = getattr(owner, step)

        def wrapped(*arguments: object) -> object:
            running[unit] = step
            return original(*arguments)

        setattr(owner, step, wrapped)

    for unit, owner, step in STEPS:
        noted(owner, step, unit)

    def at(point: str) -> None:
        step = running.get(point.partition(" ")[2])
        reached(point if step is None else f"{point} {step}")

    return at


def commit(number: int, choice: random.Random, tx: Transaction) -> None:
    """A commit of a few records with its cursor in the same batch; now and then a wipe."""
    did = choice.choice(DIDS)
    if number % 40 == 39:  # the same one every time: the others live long enough to leave dead blocks
        tx.wipe_repo(DIDS[0], AccountStatus.DELETED)
    founded(tx, did)
    for _ in range(3):
        path = f"a.b.c/{choice.randrange(12)}"
        block = block_of(f"{number}" if choice.random() < 0.5 else f"again {choice.randrange(30)}")
        if choice.random() < 0.3:
            tx.delete_record(did, path, "3ka", live=True)
        else:
            tx.put_record(did, path, cid_of(block), block, "3ka", live=True)
    tx.append_event("sync", did, fields={"number": number})
    tx.set_cursor("upstream", number)


async def main(folder: Path, point: str, count: int) -> None:
    settings = settings_of(
        events={"retention": "50ms"}, gc={"step_rows": 60, "wipe_point_rows": 5, "compact_after": 20},
        writer={"group_ops": 40},
    )  # fmt: skip
    db = Database.open(folder / "db", memory_mib=32)
    clock = Clock()
    at = told_apart(crasher(point, count))
    writer = Writer(db, settings, clock=clock, boot="one boot", crash_point=at)
    clock.now = max(clock.now, writer.state.last_time)
    await writer.start()
    workers = (
        CheckpointWorker(db, writer, settings.gc),
        BlocksGcWorker(db, writer, settings.gc),
        RetentionWorker(db, writer, settings, uptime=clock),
    )
    start = (db.cursor("upstream") or 0) + 1
    choice = random.Random(start)

    async def write(number: int) -> None:
        await writer.run("put", partial(commit, number, choice))
        clock.forward(0.002)
        if point == "-":
            print(number, writer.head, flush=True)

    for number in count_from(start, 2):
        await write(number)
        passes = [worker.run_once() for worker in workers] if choice.random() < 0.1 else []
        await asyncio.gather(*passes, write(number + 1))  # commits run into the passes


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
