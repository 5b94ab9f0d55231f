"""What the store's tests share: blocks that hash, an open store with its workers, steps."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from indexer.config import Settings
from indexer.store.check import check
from indexer.store.codecs import NEW_REPO, Event, Mode, RepoRow, SyncState
from indexer.store.database import Database
from indexer.store.events import EventLog
from indexer.store.gc import BlocksGcWorker
from indexer.store.refcounts import CheckpointWorker
from indexer.store.retention import RetentionWorker
from indexer.store.transaction import Transaction
from indexer.store.writer import Step, Writer, clock_us

ALICE = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
BOB = "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb"
POST = "app.bsky.feed.post/3kaaaaaaaaa2a"
LIKE = "app.bsky.feed.like/3kaaaaaaaaa2a"
REV = "3kbbbbbbbbb2b"
SYNCED: RepoRow = NEW_REPO._replace(tracked=True, state=SyncState.SYNCED)


def block_of(text: str) -> bytes:
    return b"\xa1\x64text" + text.encode()


def cid_of(block: bytes) -> bytes:
    return b"\x01\x71\x12\x20" + hashlib.sha256(block).digest()


def settings_of(**tables: Any) -> Settings:
    """Settings without the environment; tables as keyword arguments."""
    return Settings.model_validate(tables)


def founded(tx: Transaction, did: str) -> None:
    """Gives a repository the row without which it may hold nothing."""
    if tx.repo(did) is None:
        tx.set_repo(did, NEW_REPO)


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000_000

    def __call__(self) -> int:
        self.now += 1
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += int(seconds * 1_000_000)


@dataclass
class Store:
    """An open database with its writer, log and workers."""

    db: Database
    writer: Writer
    log: EventLog
    checkpoint: CheckpointWorker
    gc: BlocksGcWorker
    retention: RetentionWorker

    async def do(self, *steps: Callable[[Transaction], object]) -> None:
        def all_steps(tx: Transaction) -> None:
            for step in steps:
                step(tx)

        await self.writer.run("test", all_steps)

    async def put(self, did: str, path: str, text: str, *, rev: str = REV, flags: int = 0) -> bytes:
        block = block_of(text)
        cid = cid_of(block)

        def put(tx: Transaction) -> None:
            founded(tx, did)
            tx.put_record(did, path, cid, block, rev, live=True, flags=flags)

        await self.writer.run("put", put)
        return cid

    async def delete(self, did: str, path: str, *, rev: str = REV) -> bool:
        return await self.writer.run("delete", lambda tx: tx.delete_record(did, path, rev, live=True))

    def events(self) -> list[Event]:
        return self.log.read(0, 1_000_000)

    def actions(self) -> list[str]:
        return [event.action or event.kind for event in self.events()]

    def assert_clean(self) -> None:
        assert check(self.db).problems == []


@asynccontextmanager
async def opened(
    path: Path,
    *,
    mode: Mode | None = None,
    clock: Callable[[], int] = clock_us,
    uptime: Callable[[], int] | None = None,
    boot: str = "boot-1",
    clean: bool = True,
    **tables: Any,
) -> AsyncIterator[Store]:
    """An open store; ``clean=False`` leaves without the shutdown mark, as a kill does. Time passes with
    ``uptime``, with the ``clock`` when that is not given."""
    settings = settings_of(**tables)
    db = Database.open(path / "db", memory_mib=32, mode=mode)
    try:
        writer = Writer(db, settings, clock=clock, boot=boot)
        await writer.start()
        try:
            yield Store(
                db,
                writer,
                EventLog(db, writer),
                CheckpointWorker(db, writer, settings.gc),
                BlocksGcWorker(db, writer, settings.gc),
                RetentionWorker(db, writer, settings, uptime=uptime or clock),
            )
        finally:
            if clean:
                await writer.stop()
            else:
                await writer.abandon()
    finally:
        db.close()


def put_step(did: str, path: str, text: str, *, rev: str = REV, live: bool = True) -> Step:
    block = block_of(text)

    def step(tx: Transaction) -> None:
        founded(tx, did)
        tx.put_record(did, path, cid_of(block), block, rev, live=live)

    return step


def ids(events: Sequence[Event]) -> list[int]:
    return [event.id for event in events]
