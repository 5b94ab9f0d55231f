"""The process that writes while RocksDB is forced to stall; prints one JSON object of what happened.

``python -m tests.store.pressure_child FOLDER SCENARIO``. A process of its own: a write that waits inside
RocksDB holds the interpreter lock, and a test that is stuck there could not be ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from indexer.store.check import check
from indexer.store.keyspaces import KEYSPACES
from indexer.store.transaction import Transaction
from tests.store.support import ALICE, REV, Store, block_of, cid_of, founded, opened

QUEUE = 40
_TICK_S = 0.002
_STOPPED_S = 1.0
_LOAD_S = 2.0
#: No write is taken while a keyspace has one file in level 0, and none is compacted away.
_STOP = {"level0_file_num_compaction_trigger": "1000", "level0_stop_writes_trigger": "1"}
_GO_ON = {"level0_stop_writes_trigger": "1000"}
#: Flushes and compactions without end, each of which makes writes wait.
_TINY = {
    "write_buffer_size": "65536",
    "max_write_buffer_number": "2",
    "level0_file_num_compaction_trigger": "2",
    "level0_slowdown_writes_trigger": "2",
    "level0_stop_writes_trigger": "3",
}


class Loop:
    """How the event loop fares."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.ticks = 0

    async def watch(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.perf_counter()
            self.longest_s = max(self.longest_s, now - last)
            self.ticks += 1
            last = now


@asynccontextmanager
async def watched() -> AsyncIterator[Loop]:
    loop = Loop()
    task = asyncio.create_task(loop.watch())
    await asyncio.sleep(0.01)
    loop.longest_s = 0.0
    try:
        yield loop
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def put(number: int, size: int, tx: Transaction) -> None:
    block = block_of(f"{number:08}" * (size // 8))
    founded(tx, ALICE)
    tx.put_record(ALICE, f"a.b.c/{number:06}", cid_of(block), block, REV, live=True)


async def stopped(store: Store) -> dict[str, float]:
    """Writes are stopped for a second, while callers bring more than the queue holds."""
    await store.put(ALICE, "a.b.c/first", "one")
    family = store.db.family("records")
    family.set_options(_STOP)
    family.flush(True)
    handed_in = 0

    async def caller(number: int) -> None:
        nonlocal handed_in
        future = await store.writer.submit_ordered("put", [partial(put, number, 100)], _refuse)
        handed_in += 1
        await future

    async with watched() as loop:
        callers = [asyncio.create_task(caller(number)) for number in range(QUEUE * 3)]
        await asyncio.sleep(_STOPPED_S)
        during = {
            "handed_in": handed_in,
            "done": sum(task.done() for task in callers),
            "head": store.writer.head,
            "stalls": store.writer.stats.stalls,
        }
        family.set_options(_GO_ON)
        await asyncio.gather(*callers)
    order = [event.rkey for event in store.events()][1:]
    return {**during, "longest_s": loop.longest_s, "ticks": loop.ticks, "in_order": order == sorted(order),
            "events": len(order)}  # fmt: skip


async def loaded(store: Store) -> dict[str, float]:
    """Load without rest on buffers and levels far too small for it."""
    for name in KEYSPACES:
        store.db.family(name).set_options(_TINY)
    written = 0
    async with watched() as loop:
        until = time.monotonic() + _LOAD_S
        while time.monotonic() < until:
            steps = [partial(put, number, 4096) for number in range(written, written + 50)]
            await store.writer.run_ordered("put", steps, _refuse)
            written += 50
    return {"longest_s": loop.longest_s, "ticks": loop.ticks, "stalls": store.writer.stats.stalls,
            "events": len(store.events()) - written}  # fmt: skip


def _refuse(_index: int, error: Exception) -> partial[None]:
    raise AssertionError(f"no rescue was expected: {error!r}")


async def main(folder: Path, scenario: str) -> None:
    async with opened(folder, writer={"queue_units": QUEUE}) as store:
        result = await {"stopped": stopped, "loaded": loaded}[scenario](store)
        problems = check(store.db).problems
    print(json.dumps({**result, "problems": problems}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
