"""The running group: everything that its steps changed and that is not committed yet.

Reads see the group's own writes. A step that fails is undone to its savepoint, event ids included.
`finish` turns what is pending into rows, `absorb` moves what memory mirrors once they are committed.
The verbs are in the classes on top. On the writer's loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from indexer.atproto.types import Cid, Did, EventId, Micros, Nsid, Path
from indexer.errors import StoreCorrupt
from indexer.store import codecs, keyspaces
from indexer.store.codecs import RecordRow, RepoRow, decode_record, encode_u64, pack, unpack
from indexer.store.database import Database
from indexer.store.keyspaces import BLOCKS, COUNTS, CURSORS, RECORDS, REPOS
from indexer.store.overlay import MISSING, Overlay
from indexer.store.reads import record_range
from indexer.store.references import Life
from indexer.store.state import State
from indexer.store.wipes import Wipe

_CACHED_REPOS: Final = 4096  # decoded rows kept from group to group
_CACHED_COUNTS: Final = 65_536


class Limits(NamedTuple):
    """Bounds of what the verbs keep; from the settings."""

    buffer_frames_per_repo: int
    buffer_bytes_per_repo: int
    buffer_bytes: int  # of vouched frames, of all repositories
    unproven_frames_per_repo: int
    unproven_bytes: int  # of all repositories
    quarantine_entries: int  # of all sources
    quarantine_bytes: int  # of one entry's data
    wipe_point_rows: int


class Savepoint(NamedTuple):
    events: int
    last_time: Micros
    ops: int
    size: int
    ranges: int


class Group(Overlay):
    """Pending changes of every kind, and reads that see them."""

    __slots__ = (
        "_block_rows", "_clock", "_count_cache", "_cursors", "_deltas", "_did_counts", "_ephemeral",
        "_events", "_folded", "_keep_blocks", "_last_time", "_limits", "_record_rows", "_refs",
        "_repo_cache", "_repos", "_settled", "_state", "_wipes",
    )  # fmt: skip

    def __init__(self, db: Database, state: State, limits: Limits, clock: Callable[[], Micros]) -> None:
        super().__init__(db)
        self._state = state
        self._limits = limits
        self._clock = clock
        self._ephemeral = db.mode.ephemeral
        self._keep_blocks = db.mode.blocks
        self._record_rows = self._rows[RECORDS.name]
        self._block_rows = self._rows[BLOCKS.name]
        self._repos: dict[Did, RepoRow | None] = {}  # None: deleted
        self._repo_cache: dict[Did, RepoRow | None] = {}
        self._count_cache: dict[str, int] = {}
        self._cursors: dict[str, Any] = {}
        self._deltas: dict[str, int] = {}
        self._did_counts: dict[tuple[Did, Nsid], int] = {}
        self._refs: dict[Life, dict[Cid, int]] = {}
        self._settled: dict[Life, dict[Cid, int]] = {}
        self._folded: dict[str, int] = {}
        self._wipes: dict[Did, Wipe | None] = {}
        self._events: list[bytes] = []
        self._last_time = state.last_time

    # ---- reads

    @property
    def now_us(self) -> Micros:
        return self._clock()

    @property
    def next_event(self) -> EventId:
        """The id that the next event gets if this group commits."""
        return self._state.next_id + len(self._events)

    def repo(self, did: Did) -> RepoRow | None:
        cached = self._repos.get(did, MISSING)
        if cached is MISSING:
            cached = self._repo_cache.get(did, MISSING)
        if cached is MISSING:
            cached = self._repo_cache[did] = self._db.repo(did)
        found: RepoRow | None = cached
        return found

    def record(self, did: Did, path: Path) -> RecordRow | None:
        raw = self._stored(did, f"{did}\0{path}".encode())
        return None if raw is None else decode_record(raw)

    def records(
        self, did: Did, *, start: Path | None = None, stop: Path | None = None, limit: int | None = None
    ) -> list[tuple[Path, RecordRow]]:
        """Rows of a repository in tree order, start ≤ path < stop, flagged ones included."""
        low, high = record_range(did, None, start, stop)
        prefix = len(did.encode()) + 1
        found: list[tuple[Path, RecordRow]] = []
        for key, raw in self.raw_scan(RECORDS.name, low, high):
            if limit is not None and len(found) >= limit:
                break
            found.append((key[prefix:].decode(), decode_record(raw)))
        return found

    def block(self, did: Did, cid: Cid) -> bytes | None:
        return self.raw(BLOCKS.name, did.encode() + b"\0" + cid)

    def position(self, name: str) -> Any:
        """A row of `cursors`, whatever it holds."""
        value = self._cursors.get(name, MISSING)
        return self._db.get(CURSORS, name) if value is MISSING else value

    def cursor(self, name: str) -> int | None:
        value = self.position(name)
        if value is not None and not isinstance(value, int):
            raise StoreCorrupt(f"cursors: row {name!r} holds {value!r} where a number belongs")
        return value

    def count(self, name: str) -> int:
        return self._db.count(name) + self._deltas.get(name, 0)

    def block_count(self, did: Did, cid: Cid) -> int:
        """How many references hold a block of the current life."""
        epoch = self._epoch(did)
        life = (did, epoch)
        count = (self.get(keyspaces.BLOCK_REFS, (did, cid)) or 0) + self._state.refs.pending(did, epoch, cid)
        if life in self._refs:
            count += self._refs[life].get(cid, 0)
        if life in self._settled:  # folded by this very group: in the row and still in memory
            count -= self._settled[life].get(cid, 0)
        return count

    @property
    def counts_ready(self) -> bool:
        """Whether `block_count` knows every reference."""
        return self._state.refs.ready

    @property
    def keeps_blocks(self) -> bool:
        return self._keep_blocks

    def wipe_of(self, did: Did) -> Wipe | None:
        """The wipe of the repository that is not swept yet, here or before."""
        wipe = self._wipes.get(did, MISSING)
        found: Wipe | None = self._state.wipes.by_did.get(did) if wipe is MISSING else wipe
        return found

    def stale(self, did: Did, epoch: int) -> bool:
        """Whether ``epoch`` of the repository is a life that ended, here or before."""
        wipe = self._wipes.get(did)
        return epoch < wipe.epoch if wipe is not None else self._state.wipes.stale(did, epoch)

    def _stored(self, did: Did, key: bytes) -> bytes | None:
        value = self._record_rows.get(key, MISSING)
        if value is MISSING:
            value = None if did in self._cleared else self._db.raw_get("records", key)
        found: bytes | None = value
        return found

    def _epoch(self, did: Did) -> int:
        row = self.repo(did)
        return 0 if row is None else row.epoch

    def settle(self, life: Life, changes: dict[Cid, int]) -> None:
        """A fold moves these changes from the log into the rows with this group."""
        known = self._settled.setdefault(life, {})
        if not self.add_all(known, changes):
            for cid, delta in changes.items():
                self.add(known, cid, delta)

    def settle_changes(self, changes: int) -> None:
        """So many logged changes are folded with this group."""
        self.write(self._folded, "changes", self._folded.get("changes", 0) + changes)

    # ---- cursors and counts

    def set_cursor(self, name: str, value: Any) -> None:
        """Set a cursor; None removes it."""
        self.write(self._cursors, name, value)
        self.ops += 1

    def add_count(self, name: str, delta: int) -> None:
        self.add(self._deltas, name, delta)

    # ---- the writer's side

    @property
    def pending(self) -> bool:
        """Whether the group changes anything."""
        return bool(self.ops or self._deltas or self._refs)

    def savepoint(self) -> Savepoint:
        self._undo.clear()
        return Savepoint(len(self._events), self._last_time, self.ops, self.size, len(self._ranges))

    def undo(self, point: Savepoint) -> None:
        """Take back everything since the savepoint, event ids included."""
        self.undo_rows()
        del self._events[point.events :]
        del self._ranges[point.ranges :]
        self._last_time, self.ops, self.size = point.last_time, point.ops, point.size

    def finish(self) -> bool:
        """Turn what is pending into rows; true when the commit must be synced (the id reserve moves)."""
        state = self._state
        for did, row in self._repos.items():
            self._rows[REPOS.name][did.encode()] = None if row is None else codecs.encode_repo(row)
        must_sync = False
        if self._events:
            rows = self._rows[keyspaces.EVENTS.name]
            for event_id, raw in enumerate(self._events, state.next_id):
                rows[encode_u64(event_id)] = raw
            head = state.next_id + len(self._events)
            self._cursors[keyspaces.HEAD] = [head, self._last_time]
            self._deltas["events"] = self._deltas.get("events", 0) + len(self._events)
            if head > state.reserved - state.margin:
                must_sync = True
                self._cursors[keyspaces.RESERVE] = head + 2 * state.margin
        refs = {life: cids for life, cids in self._refs.items() if cids}
        if refs:
            self._rows[keyspaces.REFLOG.name][encode_u64(state.refs.next_row)] = codecs.encode_reflog(refs)
        self._finish_counts()
        for name, value in self._cursors.items():
            self._rows[CURSORS.name][name.encode()] = None if value is None else pack(value)
        return must_sync

    def _finish_counts(self) -> None:
        deltas = self._deltas
        for (did, collection), delta in self._did_counts.items():
            if delta:
                for name in (f"did/{did}/{collection}", f"records/{collection}", "records"):
                    deltas[name] = deltas.get(name, 0) + delta
        rows, cache = self._rows[COUNTS.name], self._count_cache
        if len(cache) > _CACHED_COUNTS:
            cache.clear()
        for name, delta in deltas.items():
            if delta:
                key = name.encode()
                total = cache.get(name)
                if total is None:
                    stored = self._db.raw_get("counts", key)
                    total = 0 if stored is None else unpack(stored)
                total += delta
                cache[name] = total  # a commit that fails poisons the writer: nobody reads it then
                rows[key] = pack(total) if total else None

    def absorb(self) -> None:
        """The group is committed: move what memory mirrors, and start the next group."""
        state = self._state
        state.next_id += len(self._events)
        state.last_time = self._last_time
        for name, value in self._cursors.items():
            state.cursor_moved(name, value)
        refs = {life: cids for life, cids in self._refs.items() if cids}
        if refs:
            state.refs.merge(refs)
        for life, settled in self._settled.items():
            state.refs.settle(life, settled)
        state.refs.unfolded -= self._folded.get("changes", 0)
        for did, wipe in self._wipes.items():
            if wipe is None:
                state.wipes.by_did.pop(did, None)
            else:
                before = self._repo_cache.get(did)  # as it was before this group, which read it
                state.refs.drop((did, 0 if before is None else before.epoch))
                state.wipes.ended(did, wipe)
        self._repo_cache.update(self._repos)
        self.clear()

    def clear(self) -> None:
        super().clear()
        for pending in (self._repos, self._cursors, self._deltas, self._did_counts, self._wipes):
            pending.clear()
        for changes in (self._refs, self._settled, self._folded):
            changes.clear()
        if len(self._repo_cache) > _CACHED_REPOS:
            self._repo_cache.clear()
        self._events.clear()
        self._last_time = self._state.last_time
