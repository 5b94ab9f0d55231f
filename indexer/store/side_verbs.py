"""Verbs beside the records: resync buffer, quarantine, account words, archives, filter, sources, hosts.

The part of the transaction that does not touch records; see `Transaction`. On the writer's loop.
"""

from __future__ import annotations

from typing import Any

from indexer.atproto.types import Did, Micros, Rev, Seq
from indexer.store import keyspaces
from indexer.store.codecs import (
    AccountStatus,
    AccountWord,
    ArchiveRow,
    BufferedFrame,
    FrameKind,
    QuarantineRow,
    RepoRow,
    SourceRow,
    did_range,
)
from indexer.store.group import Group
from indexer.store.host_rows import ACCOUNTS, ALL_COUNTED, COUNTED, NO_HOST, HostRow, home_of
from indexer.store.keyspaces import (
    ACCOUNT_STATUS,
    ARCHIVE_QUEUE,
    ARCHIVES,
    CRAWL,
    FILTER,
    HOSTS,
    QUARANTINE,
    RESYNC_BUFFER,
    SOURCES,
)


class SideVerbs(Group):
    """Account words, waiting frames, refused frames, filter rows."""

    __slots__ = ()

    # ---- account words

    def set_account_word(
        self, did: Did, source: str, status: AccountStatus, active: bool, seq: Seq, time: Micros
    ) -> None:
        self.put(ACCOUNT_STATUS, (did, source), (status, active, seq, time))

    def drop_account_word(self, did: Did, source: str) -> None:
        self.delete(ACCOUNT_STATUS, (did, source))

    def account_words(self, did: Did) -> list[AccountWord]:
        rows = self.raw_scan(ACCOUNT_STATUS.name, *did_range(did))
        return [
            AccountWord(ACCOUNT_STATUS.key.decode(key)[1], *ACCOUNT_STATUS.value.decode(raw))
            for key, raw in rows
        ]

    # ---- frames that wait, frames that failed

    def buffer_frame(self, did: Did, rev: Rev, kind: FrameKind, source: str, data: bytes) -> bool:
        """Keep a frame until its repository is ready; false, with nothing kept, at a limit."""
        key = (did, rev, kind, source)
        old = self.get(RESYNC_BUFFER, key)
        frames, size = self.buffer_size(did)
        more = len(data) - (0 if old is None else len(old[1]))
        limits = self._limits
        if (
            frames + (old is None) > limits.buffer_frames_per_repo
            or size + more > limits.buffer_bytes_per_repo
            or self.count("buffer/bytes") + more > limits.buffer_bytes
        ):
            return False
        self.put(RESYNC_BUFFER, key, (self._epoch(did), data))
        self._count_buffer(did, int(old is None), more)
        return True

    def buffered(self, did: Did, limit: int | None = None) -> list[BufferedFrame]:
        """Waiting frames of the current life by rev, commits before syncs."""
        epoch = self._epoch(did)
        found: list[BufferedFrame] = []
        for raw_key, raw in self.raw_scan(RESYNC_BUFFER.name, *did_range(did)):
            if limit is not None and len(found) >= limit:
                break
            _, rev, kind, source = RESYNC_BUFFER.key.decode(raw_key)
            frame_epoch, data = RESYNC_BUFFER.value.decode(raw)
            if frame_epoch == epoch:
                found.append(BufferedFrame(rev, kind, source, data))
        return found

    def drop_buffered(self, did: Did, up_to_rev: Rev | None = None) -> int:
        """Drop waiting frames, with a rev those up to and with it; returns how many."""
        start, stop = did_range(did)
        if up_to_rev is not None:
            stop = f"{did}\0{up_to_rev}\1".encode()
        frames = size = 0
        rows = self._rows[RESYNC_BUFFER.name]
        for raw_key, raw in list(self.raw_scan(RESYNC_BUFFER.name, start, stop)):
            self.write(rows, raw_key, None)
            frames += 1
            size += len(RESYNC_BUFFER.value.decode(raw)[1])
        self.ops += frames
        if frames:
            self._count_buffer(did, -frames, -size)
        return frames

    def drop_buffered_frame(self, did: Did, frame: BufferedFrame) -> None:
        """Drop one waiting frame, if it still waits as it is."""
        key = (did, frame.rev, frame.kind, frame.source)
        waiting = self.get(RESYNC_BUFFER, key)
        if waiting is not None and waiting[1] == frame.data:
            self.delete(RESYNC_BUFFER, key)
            self._count_buffer(did, -1, -len(frame.data))

    def buffer_size(self, did: Did) -> tuple[int, int]:
        """Waiting (frames, bytes) of a repository."""
        return self.count(f"buffer/{did}/frames"), self.count(f"buffer/{did}/bytes")

    def _count_buffer(self, did: Did, frames: int, size: int) -> None:
        self.add(self._deltas, f"buffer/{did}/frames", frames)
        self.add(self._deltas, f"buffer/{did}/bytes", size)
        self.add(self._deltas, "buffer/frames", frames)
        self.add(self._deltas, "buffer/bytes", size)

    def quarantine(self, source: str, seq: Seq, did: Did, reason: str, message: str, data: bytes) -> None:
        """Keep a refused frame for inspection; the oldest one goes when the ring is full."""
        number = self.cursor(keyspaces.QUARANTINE_NEXT) or 0
        kept = data[: self._limits.quarantine_bytes]
        row = QuarantineRow(self._clock(), source, seq, did, reason, message[:1000], len(data), kept)
        self.put(QUARANTINE, number, row)
        if number >= self._limits.quarantine_entries:
            self.delete(QUARANTINE, number - self._limits.quarantine_entries)
        self.set_cursor(keyspaces.QUARANTINE_NEXT, number + 1)

    # ---- archives

    def queue_archive(self, did: Did, digest: bytes) -> None:
        """A file that no row holds may appear: should nothing come of it, it is removed."""
        self.put(ARCHIVE_QUEUE, (did, digest), None)

    def hold_archive(self, did: Did, digest: bytes, row: ArchiveRow, keep: int) -> None:
        """Keep a CAR; the newest ``keep`` of the repository stay, one of each rev."""
        others = [(key, old) for key, old in self._archives(did) if key[1] != digest]
        others.sort(key=lambda item: item[1].time_us, reverse=True)
        kept = 1
        for key, old in others:
            if old.rev == row.rev or kept >= keep:
                self._release_archive(key, old)
            else:
                kept += 1
        before = self.get(ARCHIVES, (did, digest))
        self.put(ARCHIVES, (did, digest), row)
        self._count_archives(int(before is None), row.size - (0 if before is None else before.size))
        self.delete(ARCHIVE_QUEUE, (did, digest))

    def release_archives(self, did: Did) -> None:
        """Let go of every CAR of a repository; the files follow."""
        for key, row in self._archives(did):
            self._release_archive(key, row)

    def _archives(self, did: Did) -> list[tuple[tuple[Did, bytes], ArchiveRow]]:
        rows = self.raw_scan(ARCHIVES.name, *did_range(did))
        return [(ARCHIVES.key.decode(key), ARCHIVES.value.decode(raw)) for key, raw in rows]

    def _release_archive(self, key: tuple[Did, bytes], row: ArchiveRow) -> None:
        self.delete(ARCHIVES, key)
        self.put(ARCHIVE_QUEUE, key, None)
        self._count_archives(-1, -row.size)

    def _count_archives(self, files: int, size: int) -> None:
        self.add(self._deltas, "archives", files)
        self.add(self._deltas, "archives/bytes", size)

    # ---- filter

    def set_filter(self, kind: str, item: str) -> None:
        self.put(FILTER, (kind, item), None)

    def drop_filter(self, kind: str, item: str) -> None:
        self.delete(FILTER, (kind, item))

    # ---- sources

    def set_source(self, kind: str, name: str, row: SourceRow) -> None:
        self.put(SOURCES, (kind, name), row)

    def drop_source(self, kind: str, name: str) -> None:
        self.delete(SOURCES, (kind, name))

    # ---- crawl

    def crawl_row(self, kind: str, name: str) -> Any:
        return self.get(CRAWL, (kind, name))

    def set_crawl_row(self, kind: str, name: str, row: Any) -> None:
        """Keep a row of the crawler's; None is none. Rows are counted by kind."""
        before = self.get(CRAWL, (kind, name))
        if row is None:
            self.delete(CRAWL, (kind, name))
        else:
            self.put(CRAWL, (kind, name), row)
        self.add(self._deltas, f"crawl/{kind}", (row is not None) - (before is not None))

    # ---- hosts

    def host(self, name: str) -> HostRow:
        """What is known of a host; an empty row where that is nothing."""
        return self.get(HOSTS, name) or NO_HOST

    def set_host(self, name: str, row: HostRow) -> None:
        """Keep what is known of a host; an empty row is none."""
        if row == NO_HOST:
            self.delete(HOSTS, name)
        else:
            self.put(HOSTS, name, row)

    def count_home(self, did: Did, old: RepoRow | None, new: RepoRow) -> None:
        """The totals of accounts by host follow a repository's row, as far as they are made already."""
        before, after = home_of(old), home_of(new)
        if before != after and did <= (self.position(COUNTED) or ""):
            for host, delta in ((before, -1), (after, 1)):
                if host:
                    self.add(self._deltas, ACCOUNTS + host, delta)

    def count_homes(self, limit: int) -> bool:
        """Count the accounts of ``limit`` more repositories by host; true when all are counted."""
        start = self.position(COUNTED) or ""
        stored = [did for did, _ in self._db.repos(after=start, limit=limit)]
        stop = stored[-1] if len(stored) == limit else ALL_COUNTED
        fresh = {did for did in self._repos if start < did <= stop}  # written by this group
        for did in fresh.union(stored):
            host = home_of(self.repo(did))
            if host:
                self.add(self._deltas, ACCOUNTS + host, 1)
        self.set_cursor(COUNTED, stop)
        return stop == ALL_COUNTED
