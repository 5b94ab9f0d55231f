"""Made tests/data/formats/v0 once, by ``python -m tests.migrations.make_v0``: a database without references.

Three repositories: one with created, updated, deleted, shared, oversize and invalid records; one wiped and
come back with a record that it had before; one that holds nothing any more. The first events are pruned. The
dump leaves out what format 0 did not have.
"""

from __future__ import annotations

import asyncio
import tempfile
from functools import partial
from pathlib import Path

from indexer.store.codecs import INVALID, OVERSIZE, AccountStatus, pack
from indexer.store.transaction import Transaction
from tests.migrations.rows import dump, save
from tests.store.support import ALICE, BOB, LIKE, POST, SYNCED, Clock, Store, opened

CAROL = "did:web:carol.example"
_NEW = {"block_refs", "reflog", "gc_queue"}


async def fill(store: Store, clock: Clock) -> None:
    for did in (ALICE, BOB, CAROL):
        await store.do(partial(Transaction.set_repo, did=did, row=SYNCED))
    await store.put(ALICE, POST, "pruned")
    await store.retention.run_once()  # the watermark
    clock.forward(120)
    await store.delete(ALICE, POST)
    await store.put(ALICE, POST, "first")
    await store.put(ALICE, POST, "second")
    await store.put(ALICE, LIKE, "second")
    await store.put(ALICE, "app.bsky.feed.post/3kaaaaaaaaa2b", "huge", flags=OVERSIZE)
    await store.put(ALICE, "app.bsky.feed.post/3kaaaaaaaaa2c", "wrong", flags=INVALID)
    await store.put(BOB, POST, "before")
    await store.put(BOB, LIKE, "gone with the wipe")
    await store.do(lambda tx: tx.wipe_repo(BOB, AccountStatus.ACTIVE))
    await store.put(BOB, POST, "before")
    for number in range(20):
        await store.put(CAROL, f"app.bsky.feed.post/3kaaaaaaaa{number:02d}a", f"post {number}")
        await store.delete(CAROL, f"app.bsky.feed.post/3kaaaaaaaa{number:02d}a")
    await store.retention.run_once()


async def main() -> None:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        async with opened(Path(folder), clock=clock, events={"retention": "60s"}) as store:
            await fill(store, clock)
            assert store.writer.floor > 1
            rows = [row for row in dump(store.db) if row[0] not in _NEW and row[1] != b"checkpoint"]
    marks = {b"format": pack([0, 0])}
    save(0, [(name, key, marks.get(key, value) if name == "cursors" else value) for name, key, value in rows])


if __name__ == "__main__":
    asyncio.run(main())
