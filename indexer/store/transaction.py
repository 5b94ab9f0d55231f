"""The verbs that change the store. Each keeps all of its keyspaces in step.

A `Transaction` is the running group's view: it reads its own pending writes, gives out event ids,
and can undo the step that runs. The writer owns it and makes the batch; callers get it for the
length of one function. On the writer's loop. Hot: `put_record` and what it calls write into the
overlay's dicts directly; by `bench live` every microsecond here is half a percent of ingest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from indexer.atproto.types import Cid, Did, EventId, Micros, Nsid, Path, Rev, Seq
from indexer.errors import StoreCorrupt
from indexer.store import codecs, keyspaces
from indexer.store.codecs import (
    CREATE,
    DELETE,
    LIVE,
    NEW_REPO,
    OVERSIZE,
    RECORD,
    UPDATE,
    AccountStatus,
    AccountWord,
    BufferedFrame,
    FrameKind,
    Kind,
    QuarantineRow,
    RecordRow,
    RepoRow,
    SyncState,
    decode_record,
    did_range,
    encode_u64,
    pack,
    unpack,
)
from indexer.store.counts import count_repo
from indexer.store.database import Database, record_range
from indexer.store.keyspaces import (
    ACCOUNT_STATUS,
    BLOCKS,
    COUNTS,
    CURSORS,
    FILTER,
    PENDING,
    QUARANTINE,
    RECORDS,
    REPOS,
    RESYNC_BUFFER,
)
from indexer.store.overlay import MISSING, Overlay
from indexer.store.references import Life
from indexer.store.state import State
from indexer.store.wipes import Wipe

_ACTIONS: Final = {"create": CREATE, "update": UPDATE, "delete": DELETE}
_KINDS: Final = {kind: number for number, kind in enumerate(codecs.KINDS)}
_CACHED_REPOS: Final = 4096  # decoded rows kept from group to group


class Limits(NamedTuple):
    """Bounds of what the verbs keep; from the settings."""

    buffer_frames_per_repo: int
    buffer_bytes_per_repo: int
    buffer_bytes: int
    quarantine_entries: int
    quarantine_bytes: int  # of one entry's data
    wipe_point_rows: int


class Savepoint(NamedTuple):
    events: int
    last_time: Micros
    ops: int
    size: int
    ranges: int


class Transaction(Overlay):
    """What one function on the writer may do. Do not keep it."""

    __slots__ = (
        "_block_rows", "_clock", "_cursors", "_deltas", "_did_counts", "_ephemeral", "_events", "_folded",
        "_keep_blocks", "_last_time", "_limits", "_record_rows", "_refs", "_repo_cache", "_repos",
        "_settled", "_state", "_wipes",
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
        self._repos: dict[Did, RepoRow] = {}
        self._repo_cache: dict[Did, RepoRow | None] = {}
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
        row = self._repos.get(did)
        if row is not None:
            return row
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

    def cursor(self, name: str) -> int | None:
        value = self._cursors.get(name, MISSING)
        if value is MISSING:
            return self._db.cursor(name)
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

    def wiped_here(self, did: Did) -> bool:
        """Whether the running group wiped the repository."""
        return self._wipes.get(did) is not None

    def stale(self, did: Did, epoch: int) -> bool:
        """Whether ``epoch`` of the repository is a life that ended, here or before."""
        wipe = self._wipes.get(did)
        return epoch < wipe.epoch if wipe is not None else self._state.wipes.stale(did, epoch)

    # ---- records

    def put_record(
        self,
        did: Did,
        path: Path,
        cid: Cid,
        block: bytes,
        rev: Rev,
        *,
        live: bool,
        flags: int = 0,
        action: str | None = None,
    ) -> None:
        """Store a version of a record; the event is a create or an update by what is stored.

        The version already stored is no change and no event. A flagged version (`OVERSIZE`,
        `INVALID`) keeps its row but is not served: a served one before it gets a delete event; the
        caller of an oversize one clears `RepoRow.complete`. ``action`` counts in ephemeral mode.
        """
        if len(cid) != codecs.CID_BYTES:
            raise ValueError(f"not a binary CID: {cid!r}")
        if self._ephemeral:
            self._put_ephemeral(did, path, cid, block, rev, live, flags, action)
            return
        key = f"{did}\0{path}".encode()
        stored = self._stored(did, key)
        served = False
        if stored is not None:
            if stored[1:37] == cid and stored[0] == flags:
                return
            served = stored[0] == 0
        row = self.repo(did)
        epoch = 0 if row is None else row.epoch
        self.write(self._record_rows, key, b"%c%b%b" % (flags, cid, rev.encode()))
        self.ops += 1
        if flags:
            self._put_flagged(did, epoch, path, cid, block, rev, live, flags, served)
        else:
            if self._keep_blocks:
                self._keep(did, epoch, cid, block, 2)
            self._record_event(did, epoch, rev, path, UPDATE if served else CREATE, cid, live)
            if not served:
                self.add(self._did_counts, (did, path.partition("/")[0]), 1)
        if stored is not None and self._keep_blocks and not stored[0] & OVERSIZE:
            self.ref(did, epoch, stored[1:37], -1)

    def _put_flagged(
        self,
        did: Did,
        epoch: int,
        path: Path,
        cid: Cid,
        block: bytes,
        rev: Rev,
        live: bool,
        flags: int,
        served: bool,
    ) -> None:
        if self._keep_blocks and not flags & OVERSIZE:
            self._keep(did, epoch, cid, block, 1)
        if served:
            self._record_event(did, epoch, rev, path, DELETE, None, live)
            self.add(self._did_counts, (did, path.partition("/")[0]), -1)

    def _put_ephemeral(
        self,
        did: Did,
        path: Path,
        cid: Cid,
        block: bytes,
        rev: Rev,
        live: bool,
        flags: int,
        action: str | None,
    ) -> None:
        epoch = self._epoch(did)
        if flags:
            # What stood there is unknown: only an update may have replaced a served version.
            if action == "update":
                self._record_event(did, epoch, rev, path, DELETE, None, live)
            return
        if self._keep_blocks:
            self._keep(did, epoch, cid, block, 1)
        self._record_event(did, epoch, rev, path, _ACTIONS[action or "create"], cid, live)

    def delete_record(self, did: Did, path: Path, rev: Rev, *, live: bool) -> bool:
        """Delete a record; false when none is stored (then there is no event, but in ephemeral mode)."""
        epoch = self._epoch(did)
        if self._ephemeral:
            self._record_event(did, epoch, rev, path, DELETE, None, live)
            return True
        key = f"{did}\0{path}".encode()
        stored = self._stored(did, key)
        if stored is None:
            return False
        self.write(self._record_rows, key, None)
        self.ops += 1
        if stored[0] == 0:
            self._record_event(did, epoch, rev, path, DELETE, None, live)
            self.add(self._did_counts, (did, path.partition("/")[0]), -1)
        if self._keep_blocks and not stored[0] & OVERSIZE:
            self.ref(did, epoch, stored[1:37], -1)
        return True

    def _stored(self, did: Did, key: bytes) -> bytes | None:
        value = self._record_rows.get(key, MISSING)
        if value is MISSING:
            value = None if did in self._cleared else self._db.raw_get("records", key)
        found: bytes | None = value
        return found

    def _epoch(self, did: Did) -> int:
        row = self.repo(did)
        return 0 if row is None else row.epoch

    def _keep(self, did: Did, epoch: int, cid: Cid, block: bytes, references: int) -> None:
        self.write(self._block_rows, did.encode() + b"\0" + cid, block)
        self.ops += 1
        self.size += len(block) + 200
        self.ref(did, epoch, cid, references)

    def ref(self, did: Did, epoch: int, cid: Cid, delta: int) -> None:
        """Change a block's count. A sum of zero is logged too: the fold must look at the block."""
        cids = self._refs.get((did, epoch))
        if cids is None:
            cids = self._refs[(did, epoch)] = {}
        self.add(cids, cid, delta)

    # ---- events

    def _record_event(
        self, did: Did, epoch: int, rev: Rev, path: Path, action: int, cid: Cid | None, live: bool
    ) -> None:
        now = self._clock()
        if now <= self._last_time:
            now = self._last_time + 1
        self._last_time = now
        collection, _, rkey = path.partition("/")
        self._events.append(
            pack((LIVE if live else RECORD, now, did, epoch, rev, collection, rkey, action, cid))
        )
        self.ops += 1
        self.size += 150

    def append_event(
        self, kind: Kind, did: Did, *, live: bool = True, rev: Rev = "", fields: Mapping[str, Any]
    ) -> None:
        """Append an identity, account or sync event."""
        if kind == "record":
            raise ValueError("record events come from put_record and delete_record")
        self._last_time = max(self._clock(), self._last_time + 1)
        head = _KINDS[kind] + (LIVE if live else 0)
        raw = pack((head, self._last_time, did, self._epoch(did), rev, dict(fields)))
        self._events.append(raw)
        self.ops += 1
        self.size += len(raw) + 40

    # ---- repositories

    def set_repo(self, did: Did, row: RepoRow) -> None:
        """Store a repository's row and keep `pending` and the totals in step with it."""
        old = self.repo(did)
        if row.epoch != (0 if old is None else old.epoch):
            raise ValueError(f"{did}: the row of epoch {row.epoch} is out of date; read it again")
        self._write_repo(did, old, row)

    def _write_repo(self, did: Did, old: RepoRow | None, row: RepoRow) -> None:
        self.write(self._repos, did, row)
        self.ops += 1
        self.size += 200 + len(row.commit)
        old_due = 0 if old is None else old.due
        if old_due != row.due:
            if old_due:
                self.delete(PENDING, (old_due, did))
            if row.due:
                self.put(PENDING, (row.due, did), None)
        if old is None or old[:3] != row[:3]:
            for name, delta in count_repo(old, row):
                self.add(self._deltas, name, delta)

    def schedule(self, did: Did, due: Micros) -> None:
        self.set_repo(did, (self.repo(did) or NEW_REPO)._replace(due=due))

    def unschedule(self, did: Did) -> None:
        row = self.repo(did)
        if row is not None and row.due:
            self.set_repo(did, row._replace(due=0))

    def wipe_repo(self, did: Did, status: AccountStatus) -> None:
        """End this life of a repository: its content is gone at once, the row stays as a tombstone."""
        old = self.repo(did)
        row = old or NEW_REPO
        ranged = self.clear_content(did, self._limits.wipe_point_rows)
        for collection, records in self.did_counts(did).items():
            self.add(self._did_counts, (did, collection), -records)
        self.drop_buffered(did)
        cids = self._refs.get((did, row.epoch))
        if cids is not None:
            self._undo.append((self._refs, (did, row.epoch), cids))
            del self._refs[(did, row.epoch)]
        fresh = row._replace(
            tracked=False, state=SyncState.PENDING, status=status, epoch=row.epoch + 1, complete=False,
            rev="", min_rev="", commit=b"", data=b"", due=0, work=0, error="", attempt=0,
        )  # fmt: skip
        wipe = Wipe(fresh.epoch, self.next_event, self._state.refs.next_row, ranged, self._clock())
        self.write(self._wipes, did, wipe)
        self.set_cursor(keyspaces.WIPE + did, list(wipe))
        self._write_repo(did, old, fresh)
        fields = {"active": True} if status.active else {"active": False, "status": status.label}
        self.append_event("account", did, fields=fields)

    def did_counts(self, did: Did) -> dict[Nsid, int]:
        """Served records of a repository by collection, as the group sees them."""
        prefix = f"did/{did}/"
        counts = {name.removeprefix(prefix): n for name, n in self._db.counts(prefix).items()}
        for (owner, collection), delta in self._did_counts.items():
            if owner == did:
                counts[collection] = counts.get(collection, 0) + delta
        return {collection: n for collection, n in counts.items() if n}

    def forget_wipe(self, did: Did) -> None:
        """The last trace of the lives before is swept."""
        self.write(self._wipes, did, None)
        self.set_cursor(keyspaces.WIPE + did, None)

    def set_account_word(
        self, did: Did, source: str, status: AccountStatus, active: bool, seq: Seq, time: Micros
    ) -> None:
        self.put(ACCOUNT_STATUS, (did, source), (status, active, seq, time))

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

    # ---- cursors, counts, filter

    def set_cursor(self, name: str, value: Any) -> None:
        """Set a cursor; None removes it."""
        self.write(self._cursors, name, value)
        self.ops += 1

    def add_count(self, name: str, delta: int) -> None:
        self.add(self._deltas, name, delta)

    def set_filter(self, kind: str, item: str) -> None:
        self.put(FILTER, (kind, item), None)

    def drop_filter(self, kind: str, item: str) -> None:
        self.delete(FILTER, (kind, item))

    def settle(self, life: Life, cid: Cid, delta: int) -> None:
        """A fold moves ``delta`` from the log into the rows with this group."""
        cids = self._settled.get(life)
        if cids is None:
            cids = self._settled[life] = {}
        self.add(cids, cid, delta)

    def settle_changes(self, changes: int) -> None:
        """So many logged changes are folded with this group."""
        self.write(self._folded, "changes", self._folded.get("changes", 0) + changes)

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
            self._rows[REPOS.name][did.encode()] = codecs.encode_repo(row)
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
        rows, stored = self._rows[COUNTS.name], self._db.raw_get
        for name, delta in deltas.items():
            if delta:
                key = name.encode()
                old = stored("counts", key)
                total = delta if old is None else unpack(old) + delta
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
            for cid, delta in settled.items():
                state.refs.settle(life, cid, delta)
        state.refs.unfolded -= self._folded.get("changes", 0)
        for did, wipe in self._wipes.items():
            if wipe is None:
                state.wipes.by_did.pop(did, None)
            else:
                state.wipes.by_did[did] = wipe
                state.refs.drop(did, wipe.epoch)
        if len(self._repo_cache) > _CACHED_REPOS:
            self._repo_cache.clear()
        self._repo_cache.update(self._repos)
        self.clear()

    def clear(self) -> None:
        super().clear()
        for pending in (self._repos, self._cursors, self._deltas, self._did_counts, self._wipes):
            pending.clear()
        for changes in (self._refs, self._settled, self._folded):
            changes.clear()
        self._events.clear()
        self._last_time = self._state.last_time
