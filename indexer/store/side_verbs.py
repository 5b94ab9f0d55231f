"""Verbs beside the records: resync buffer, strangers, account words, archives, filter, sources, hosts.

The part of the transaction that does not touch records; see `Transaction`. On the writer's loop.
"""

from __future__ import annotations

from typing import Any

from indexer.atproto.types import Did, Micros, Rev, Seq
from indexer.store.codecs import (
    AccountStatus,
    AccountWord,
    ArchiveRow,
    BufferedFrame,
    FrameKind,
    SourceRow,
    WaitingRow,
    did_range,
)
from indexer.store.host_rows import NO_HOST, HostRow
from indexer.store.keyspaces import (
    ACCOUNT_STATUS,
    ARCHIVE_QUEUE,
    ARCHIVES,
    CRAWL,
    FILTER,
    HOSTS,
    RESYNC_BUFFER,
    SOURCES,
    STRANGERS,
)
from indexer.store.ring import RefusedRing
from indexer.store.stranger_rows import StrangerRow
from indexer.store.tallies import Tallies


class SideVerbs(RefusedRing, Tallies):
    """Account words, waiting frames, strangers, filter rows."""

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

    def buffer_frame(
        self, did: Did, rev: Rev, kind: FrameKind, source: str, data: bytes, *, vouched: bool = True
    ) -> bool:
        """Keep a frame until its repository is ready; false, with nothing kept, at a limit.

        Frames that nothing vouches for have limits of their own, and never stand in the way of the others.
        """
        key = (did, rev, kind, source)
        old = self.get(RESYNC_BUFFER, key)
        if old is not None and old.vouched and not vouched:
            return True  # what is known to be the account's own stays
        new = WaitingRow(self._epoch(did), data, self._clock(), vouched)
        if not self._has_room(did, old, new):
            return False
        self.put(RESYNC_BUFFER, key, new)
        if old is not None:
            self._count_buffer(did, -1, old)
        self._count_buffer(did, 1, new)
        return True

    def _has_room(self, did: Did, old: WaitingRow | None, new: WaitingRow) -> bool:
        limits = self._limits
        frames, size = self.unproven_size(did)
        total = self.count("buffer/unproven_bytes")
        most = (limits.unproven_frames_per_repo, limits.buffer_bytes_per_repo, limits.unproven_bytes)
        if new.vouched:
            all_frames, all_bytes = self.buffer_size(did)
            frames, size, total = all_frames - frames, all_bytes - size, self.count("buffer/bytes") - total
            most = (limits.buffer_frames_per_repo, limits.buffer_bytes_per_repo, limits.buffer_bytes)
        replaced = old is not None and old.vouched is new.vouched
        more = len(new.data) - (len(old.data) if old is not None and replaced else 0)
        return frames + (not replaced) <= most[0] and size + more <= most[1] and total + more <= most[2]

    def buffered(
        self, did: Did, limit: int | None = None, after: BufferedFrame | None = None
    ) -> list[BufferedFrame]:
        """Waiting frames of the current life by rev, commits before syncs; those behind ``after``."""
        epoch = self._epoch(did)
        found: list[BufferedFrame] = []
        start, stop = did_range(did)
        if after is not None:
            start = RESYNC_BUFFER.key.encode((did, *after[:3])) + b"\0"
        for raw_key, raw in self.raw_scan(RESYNC_BUFFER.name, start, stop):
            if limit is not None and len(found) >= limit:
                break
            _, rev, kind, source = RESYNC_BUFFER.key.decode(raw_key)
            row = RESYNC_BUFFER.value.decode(raw)
            if row.epoch == epoch:
                found.append(BufferedFrame(rev, kind, source, *row[1:]))
        return found

    def waits_from(self, did: Did, source: str) -> bool:
        """Whether a frame of this source waits."""
        if not self.buffer_size(did)[0]:
            return False
        rows = self.raw_scan(RESYNC_BUFFER.name, *did_range(did))
        return any(RESYNC_BUFFER.key.decode(key)[3] == source for key, _ in rows)

    def drop_buffered(self, did: Did, up_to_rev: Rev | None = None, *, vouched: bool | None = None) -> int:
        """Drop waiting frames: with a rev those up to and with it, with ``vouched`` those; how many."""
        start, stop = did_range(did)
        if up_to_rev is not None:
            stop = f"{did}\0{up_to_rev}\1".encode()
        frames = 0
        rows = self._rows[RESYNC_BUFFER.name]
        for raw_key, raw in list(self.raw_scan(RESYNC_BUFFER.name, start, stop)):
            row = RESYNC_BUFFER.value.decode(raw)
            if vouched in (None, row.vouched):
                self.write(rows, raw_key, None)
                frames += 1
                self._count_buffer(did, -1, row)
        self.ops += frames
        return frames

    def drop_buffered_frame(self, did: Did, frame: BufferedFrame) -> None:
        """Drop one waiting frame, if it still waits as it is."""
        key = (did, frame.rev, frame.kind, frame.source)
        waiting = self.get(RESYNC_BUFFER, key)
        if waiting is not None and waiting.data == frame.data:
            self.delete(RESYNC_BUFFER, key)
            self._count_buffer(did, -1, waiting)

    def buffer_size(self, did: Did) -> tuple[int, int]:
        """Waiting (frames, bytes) of a repository."""
        return self.count(f"buffer/{did}/frames"), self.count(f"buffer/{did}/bytes")

    def unproven_size(self, did: Did) -> tuple[int, int]:
        """Those (frames, bytes) of them for which nothing vouches."""
        return self.count(f"buffer/{did}/unproven_frames"), self.count(f"buffer/{did}/unproven_bytes")

    def _count_buffer(self, did: Did, frames: int, row: WaitingRow) -> None:
        size = frames * len(row.data)
        for prefix in ("buffer/", f"buffer/{did}/"):
            self.add(self._deltas, prefix + "frames", frames)
            self.add(self._deltas, prefix + "bytes", size)
            if not row.vouched:
                self.add(self._deltas, prefix + "unproven_frames", frames)
                self.add(self._deltas, prefix + "unproven_bytes", size)

    # ---- accounts without a row, of which a PDS sent something

    def set_stranger(self, did: Did, source: str, row: StrangerRow | None) -> None:
        """Keep that ``source`` named an account which no directory has said to live there so far; None: no
        more. Counted by source."""
        before = self.get(STRANGERS, (did, source))
        if row is None:
            self.delete(STRANGERS, (did, source))
        else:
            self.put(STRANGERS, (did, source), row)
        self.add(self._deltas, f"strangers/{source}", (row is not None) - (before is not None))

    def stranger(self, did: Did, source: str) -> StrangerRow | None:
        return self.get(STRANGERS, (did, source))

    def strangers(self, did: Did) -> list[tuple[str, StrangerRow]]:
        """Which sources named it, and what they said."""
        rows = self.raw_scan(STRANGERS.name, *did_range(did))
        return [(STRANGERS.key.decode(key)[1], STRANGERS.value.decode(raw)) for key, raw in rows]

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
