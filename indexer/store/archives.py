"""Archived CARs: which files of the byte store belong to which repository, and the end of the others.

The bytes lie in `cas`, a row in `archives` holds each file. Before a file is written its name goes into
`archive_queue`, synced; the unit that makes the row takes it out again, and whoever drops a row (a newer
CAR, a wipe) puts it back. So a kill at any moment leaves no file that neither a row nor the queue knows.
The passes remove what is queued and not held. On the writer's loop; files are touched in threads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, TypeAlias, TypeVar

from indexer.atproto.types import Did, Micros, Rev
from indexer.cas import BlobStore, Digest, digest_of_file
from indexer.config import Settings
from indexer.errors import BlobMissing, StoreError
from indexer.store.codecs import ArchiveRow, decode_cid_key, did_range
from indexer.store.database import Database
from indexer.store.keyspaces import ARCHIVE_QUEUE, ARCHIVES
from indexer.store.reads import Reads
from indexer.store.transaction import Transaction
from indexer.store.worker import Worker
from indexer.store.writer import Writer

T = TypeVar("T")

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


class Archives(Worker):
    """Keeps CARs, lists and reads them, removes the files that nothing holds."""

    name = "archives"

    def __init__(self, db: Database, writer: Writer, blobs: BlobStore, settings: Settings) -> None:
        super().__init__(db, writer, settings.gc)
        self.blobs = blobs
        self._archive = settings.archive
        self._busy: set[Digest] = set()
        self._files = asyncio.Lock()  # a file that a step looks at does not become busy meanwhile
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self.removed = 0

    @property
    def interval(self) -> float:
        return self._settings.blocks_interval

    @property
    def stats(self) -> dict[str, int]:
        return {
            "passes": self.passes,
            "failures": self.failures,
            "files": self._db.count("archives"),
            "bytes": self._db.count("archives/bytes"),
            "removed": self.removed,
        }

    # ---- in

    @asynccontextmanager
    async def keeping(self, did: Did, car: Path) -> AsyncIterator[Archived | None]:
        """Puts a verified CAR into the byte store; its file is safe until the block ends, and stays when
        a unit inside called `Archived.hold`. None when nothing is to be archived."""
        if not self._archive.cars:
            yield None
            return
        async with self._slots:
            digest = await _in_thread(partial(digest_of_file, car))
            async with self._files:
                self._busy.add(digest)
        try:
            await self._writer.run("archive", lambda tx: tx.queue_archive(did, digest))
            await _in_thread(self._sync)  # a power cut must not keep the file and forget its name
            async with self._slots:
                await _in_thread(partial(self.blobs.put_file, car, digest=digest))
            yield Archived(digest, car.stat().st_size, self._archive.keep_per_repo)
        finally:
            self._busy.discard(digest)

    # ---- out

    def of(self, did: Did) -> list[Archive]:
        """The archived CARs of a repository, newest first."""
        return archives_of(self._db, did)

    async def open(self, archive: Archive) -> BinaryIO:
        """The CAR as a stream; see `BlobStore.open_read`."""
        return await asyncio.to_thread(self.blobs.open_read, archive.digest)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """No file is removed inside: a copy of the database and then of the files fits together."""
        async with self._files:
            yield

    # ---- the end of files

    async def run_once(self) -> ArchiveReport:
        """One walk through the queue."""
        async with self._turn:
            looked = removed = 0
            position: bytes | None = b""
            while position is not None:
                started = time.perf_counter()
                async with self._files:
                    keys, position = self._queued(position)
                    removed += await self._step(keys) if keys else 0
                looked += len(keys)
                await self._pace.rest(time.perf_counter() - started, len(keys))
            self.removed += removed
            self.passes += 1
            return ArchiveReport(looked, removed)

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

    async def _step(self, keys: list[Key]) -> int:
        """Removes those files that no row holds; how many there were. Busy ones are not among them, so
        that none can come to be held before the entries go."""
        rows = self._db.multi_get(ARCHIVES, keys)
        loose = [key for key, row in zip(keys, rows, strict=True) if row is None]
        removed = await _in_thread(partial(self._remove, loose)) if loose else 0
        await self._writer.run(self.name, partial(settle, keys, frozenset(loose)))
        return removed

    def _sync(self, *, between: Callable[[], None]) -> None:
        self._db.sync_wal()

    def _remove(self, keys: list[Key], *, between: Callable[[], None]) -> int:
        self._db.sync_wal()  # a power cut must not bring back a row whose file is gone
        return sum(self.blobs.remove(digest) for _, digest in keys)


def settle(keys: list[Key], removed: frozenset[Key], tx: Transaction) -> None:
    """Entries go whose file is removed or held. One that lost its row since is left for the next pass."""
    for key in keys:
        if key in removed or tx.get(ARCHIVES, key) is not None:
            tx.delete(ARCHIVE_QUEUE, key)


def archives_of(reads: Reads, did: Did) -> list[Archive]:
    """The archived CARs of a repository, newest first."""
    rows = [Archive(key[1], *row) for key, row in reads.scan(ARCHIVES, *did_range(did))]
    return sorted(rows, key=lambda row: row.time_us, reverse=True)


def check_archives(reads: Reads, blobs: BlobStore, did: Did | None = None) -> Iterator[str]:
    """What is wrong with the archived files, in words: every row's file is there, whole and as long as it
    says. Reads every file. Blocking."""
    bounds = (None, None) if did is None else did_range(did)
    for (owner, digest), row in reads.scan(ARCHIVES, *bounds):
        what = f"archives: the CAR of {owner} at {row.rev}"
        try:
            with blobs.open_read(digest) as file:
                size = sum(len(piece) for piece in iter(partial(file.read, 1 << 20), b""))
        except BlobMissing:
            yield f"{what} has no file (sha256 {digest.hex()})"
        except StoreError as error:
            yield f"{what}: {error}"
        else:
            if size != row.size:
                yield f"{what} has {size} bytes, its row says {row.size}"


class _Between:
    """Called between the chunks of a CAR; raises once nobody waits for the end any more."""

    def __init__(self) -> None:
        self.abandoned = False

    def __call__(self) -> None:
        if self.abandoned:
            raise StoreError("the archive was given up: the daemon stops")


async def _in_thread(work: Callable[..., T]) -> T:
    """Runs ``work`` with a ``between``. Cancelled, it ends with the thread, which is within a chunk."""
    between = _Between()
    task = asyncio.create_task(asyncio.to_thread(work, between=between))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        between.abandoned = True
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        raise
