"""Archived CARs: which files of the byte store belong to which repository, and the end of the others.

The bytes lie in `cas`, a row in `archives` holds each file. Before a file is written its name goes into
`archive_queue`, synced; the unit that makes the row takes it out again, and whoever drops a row (a newer
CAR, a wipe) puts it back. So a kill at any moment leaves no file that neither a row nor the queue knows.
The passes remove what is queued and not held. On the writer's loop; files are touched in threads.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, TypeAlias

import structlog

from indexer.atproto.types import Did, Micros, Rev
from indexer.cas import BlobStore, Digest, digest_of_file
from indexer.cas.blob_store import translated
from indexer.config import Settings
from indexer.errors import StoreError
from indexer.store.codecs import ArchiveRow, decode_cid_key, did_range
from indexer.store.database import Database
from indexer.store.keyspaces import ARCHIVE_QUEUE, ARCHIVES
from indexer.store.reads import Reads
from indexer.store.threads import in_thread
from indexer.store.transaction import Transaction
from indexer.store.worker import Worker
from indexer.store.writer import Writer

log = structlog.get_logger(__name__)

Key: TypeAlias = tuple[Did, Digest]

#: CARs hashed and compressed at one time.
_AT_ONCE: Final = 2


class Archived(NamedTuple):
    """A CAR whose file is in place and whose row is not yet."""

    digest: Digest
    size: int
    keep: int

    def hold(self, tx: Transaction, did: Did, rev: Rev) -> None:
        """Makes the row, in the batch that makes the repository whole."""
        tx.hold_archive(did, self.digest, ArchiveRow(rev, tx.now_us, self.size), self.keep)


class Archive(NamedTuple):
    """One archived CAR of a repository."""

    digest: Digest
    rev: Rev
    time_us: Micros
    size: int


class ArchiveReport(NamedTuple):
    looked: int
    removed: int
    refused: int = 0  # files that the system did not let us remove; tried again by the next pass


class Archives(Worker):
    """Keeps CARs, lists and reads them, removes the files that nothing holds."""

    name = "archives"

    def __init__(self, db: Database, writer: Writer, blobs: BlobStore, settings: Settings) -> None:
        super().__init__(db, writer, settings.gc)
        self.blobs = blobs
        self._archive = settings.archive
        self._busy: Counter[Digest] = Counter()  # files that are being kept, by how many
        self._files = asyncio.Lock()  # a file that a step looks at does not become busy meanwhile
        self._copies = 0  # under way: files stay until they are done
        self._copied = asyncio.Event()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self.removed = 0
        self.refused = 0  # by the last pass

    @property
    def interval(self) -> float:
        return self._settings.blocks_interval

    @property
    def keeps(self) -> bool:
        """Whether CARs are archived from now on."""
        return self._archive.cars

    @property
    def stats(self) -> dict[str, int]:
        return {
            "passes": self.passes,
            "failures": self.failures,
            "files": self._db.count("archives"),
            "bytes": self._db.count("archives/bytes"),
            "removed": self.removed,
            "refused": self.refused,
        }

    # ---- in

    @asynccontextmanager
    async def keeping(self, did: Did, car: Path) -> AsyncIterator[Archived | None]:
        """Puts a verified CAR into the byte store; its file is safe until the block ends, and stays when
        a unit inside called `Archived.hold`. None when nothing is to be archived."""
        if not self.keeps:
            yield None
            return
        async with self._slots:
            digest = await in_thread(partial(digest_of_file, car))
            async with self._files:
                self._busy[digest] += 1
        try:
            await self._writer.run("archive", lambda tx: tx.queue_archive(did, digest))
            await in_thread(self._sync)  # a power cut must not keep the file and forget its name
            async with self._slots:
                await in_thread(partial(self.blobs.put_file, car, digest=digest))
            with translated(f"reading {car}"):
                size = car.stat().st_size
            yield Archived(digest, size, self._archive.keep_per_repo)
        finally:
            self._busy[digest] -= 1
            if not self._busy[digest]:
                del self._busy[digest]

    # ---- out

    def of(self, did: Did) -> list[Archive]:
        """The archived CARs of a repository, newest first."""
        return archives_of(self._db, did)

    async def open(self, archive: Archive) -> BinaryIO:
        """The CAR as a stream; see `BlobStore.open_read`."""
        return await asyncio.to_thread(self.blobs.open_read, archive.digest)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """No file is removed inside, so that a copy of the database and then of the files fits together.
        New ones are kept as ever: they are not of that moment."""
        self._copies += 1
        self._copied.clear()
        try:
            async with self._files:
                pass  # a step that removes ends first
            yield
        finally:
            self._copies -= 1
            if not self._copies:
                self._copied.set()

    # ---- the end of files

    async def run_once(self) -> ArchiveReport:
        """One walk through the queue."""
        async with self._turn:
            total = ArchiveReport(0, 0)
            position: bytes | None = b""
            while position is not None:
                async with self._removing():
                    started = time.perf_counter()
                    keys, position = self._queued(position)
                    if keys:
                        step = await self._step(keys)
                        total = ArchiveReport(*(a + b for a, b in zip(total, step, strict=True)))
                await self._pace.rest(time.perf_counter() - started, len(keys))
            self.removed += total.removed
            self.refused = total.refused
            self.passes += 1
            return total

    @asynccontextmanager
    async def _removing(self) -> AsyncIterator[None]:
        """A turn with the files, while nobody copies them."""
        while True:
            if self._copies:
                await self._copied.wait()
            async with self._files:
                if not self._copies:
                    yield
                    return

    def _queued(self, position: bytes) -> tuple[list[Key], bytes | None]:
        """The next entries that nobody works on, and where to go on (None at the end)."""
        keys: list[Key] = []
        for raw, _ in self._db.raw_scan(ARCHIVE_QUEUE.name, position, None):
            key = decode_cid_key(raw)
            if key[1] not in self._busy:
                keys.append(key)
            if len(keys) >= self._pace.rows:
                return keys, raw + b"\0"
        return keys, None

    async def _step(self, keys: list[Key]) -> ArchiveReport:
        """Removes those files that no row holds. Busy ones are not among them, so that none can come to be
        held before the entries go. What cannot be removed keeps its entry."""
        rows = self._db.multi_get(ARCHIVES, keys)
        loose = [key for key, row in zip(keys, rows, strict=True) if row is None]
        gone = await in_thread(partial(self._remove, loose)) if loose else {}
        await self._writer.run(self.name, partial(settle, keys, frozenset(gone)))
        return ArchiveReport(len(keys), sum(gone.values()), len(loose) - len(gone))

    def _sync(self, *, between: Callable[[], None]) -> None:
        self._db.sync_wal()

    def _remove(self, keys: list[Key], *, between: Callable[[], None]) -> dict[Key, bool]:
        """The keys whose file is not there any more, and whether it was before."""
        self._db.sync_wal()  # a power cut must not bring back a row whose file is gone
        gone: dict[Key, bool] = {}
        refused: StoreError | None = None
        for key in keys:
            try:
                gone[key] = self.blobs.remove(key[1])
            except StoreError as error:
                refused = refused or error
        if refused is not None:
            log.error("archives_not_removed", files=len(keys) - len(gone), first=str(refused))
        return gone


def settle(keys: list[Key], removed: frozenset[Key], tx: Transaction) -> None:
    """Entries go whose file is removed or held. One that lost its row since is left for the next pass."""
    for key in keys:
        if key in removed or tx.get(ARCHIVES, key) is not None:
            tx.delete(ARCHIVE_QUEUE, key)


def archives_of(reads: Reads, did: Did) -> list[Archive]:
    """The archived CARs of a repository, newest first."""
    rows = [Archive(key[1], *row) for key, row in reads.scan(ARCHIVES, *did_range(did))]
    return sorted(rows, key=lambda row: row.time_us, reverse=True)
