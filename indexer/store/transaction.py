"""The verbs that change the store. Each keeps all of its keyspaces in step.

A `Transaction` is the running group's view: it reads its own pending writes, gives out event ids,
and can undo the step that runs. The writer owns it and makes the batch; callers get it for the
length of one function. On the writer's loop. Hot: `put_record` and what it calls write into the
overlay's dicts directly; by `bench live` every microsecond here is half a percent of ingest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from indexer.atproto.types import Cid, Did, Micros, Nsid, Path, Rev
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
    Kind,
    RepoRow,
    SyncState,
    pack,
)
from indexer.store.counts import count_repo
from indexer.store.keyspaces import PENDING
from indexer.store.new_records import CountedBlocks as CountedBlocks
from indexer.store.new_records import NewRecord as NewRecord
from indexer.store.new_records import NewRecords
from indexer.store.overlay import MISSING
from indexer.store.wipes import Wipe

_ACTIONS: Final = {"create": CREATE, "update": UPDATE, "delete": DELETE}
_KINDS: Final = {kind: number for number, kind in enumerate(codecs.KINDS)}


class Transaction(NewRecords):
    """What one function on the writer may do. Do not keep it."""

    __slots__ = ()

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
        row = self._repos.get(did) or self.repo(did)
        epoch = 0 if row is None else row.epoch
        rows = self._record_rows
        self._undo.append((rows, key, rows.get(key, MISSING)))
        rows[key] = b"%c%b%b" % (flags, cid, rev.encode())
        self.ops += 1
        if flags:
            self._put_flagged(did, epoch, path, cid, block, rev, live, flags, served)
        else:
            if self._keep_blocks:
                self._keep(did, epoch, cid, block, 2)
            collection = self._record_event(did, epoch, rev, path, UPDATE if served else CREATE, cid, live)
            if not served:
                self.add(self._did_counts, (did, collection), 1)
        if stored is not None and self._keep_blocks and not stored[0] & OVERSIZE:
            self.ref(did, epoch, stored[1:37], -1)

    def put_records(
        self,
        did: Did,
        rev: Rev,
        records: Sequence[NewRecord],
        *,
        live: bool,
        counted: CountedBlocks | None = None,
    ) -> None:
        """As `put_record` for each of ``records`` (in key order), at a fraction of its cost where none of
        them, and nothing between them, is stored: a repository that is fetched for the first time. An empty
        block is one that is kept already, for a record that stays. ``counted`` is of all calls by which one
        apply puts a repository there, while nobody else writes to it."""
        if not self._put_new(did, rev, records, live, counted):
            for path, cid, block, flags in records:
                self.put_record(did, path, cid, block, rev, live=live, flags=flags)

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

    def _keep(self, did: Did, epoch: int, cid: Cid, block: bytes, references: int) -> None:
        if block:
            rows = self._block_rows
            key = did.encode() + b"\0" + cid
            self._undo.append((rows, key, rows.get(key, MISSING)))
            rows[key] = block
        self.ops += 1
        self.size += len(block) + 200
        self.ref(did, epoch, cid, references)

    # ---- events

    def _record_event(
        self, did: Did, epoch: int, rev: Rev, path: Path, action: int, cid: Cid | None, live: bool
    ) -> Nsid:
        """Append a record's event; returns its collection."""
        now = self._clock()
        last = self._last_time
        if now <= last:
            now = last + 1
        self._last_time = now
        collection, _, rkey = path.partition("/")
        self._events.append(
            pack((LIVE if live else RECORD, now, did, epoch, rev, collection, rkey, action, cid))
        )
        self.ops += 1
        self.size += 150
        return collection

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
        if old is None or old.pds != row.pds or old[:3] != row[:3]:
            self.tally(did, old, row)
        if old is None or old[:3] != row[:3] or old.hearsay != row.hearsay:
            for name, delta in count_repo(old, row):
                self.add(self._deltas, name, delta)

    def schedule(self, did: Did, due: Micros) -> None:
        self.set_repo(did, (self.repo(did) or NEW_REPO)._replace(due=due))

    def unschedule(self, did: Did) -> None:
        row = self.repo(did)
        if row is not None and row.due:
            self.set_repo(did, row._replace(due=0))

    def forget_repo(self, did: Did) -> bool:
        """Delete the row of a repository of which nothing ever was, with all that waits for it or was said of
        it; where the log called the account not active it takes that back, for one that turns up later begins
        as active. False, with nothing changed, where there is or was something: a key, a rev, records,
        archived CARs, an earlier life (events of which may still be replayed), a fetch under way."""
        old = self.repo(did)
        if old is None or old.signing_key or old.rev or old.epoch or old.state is SyncState.BACKFILLING:
            return False
        if self.wipe_of(did) is not None or self.records(did, limit=1) or self._archives(did):
            return False
        self.drop_buffered(did)
        for word in self.account_words(did):
            self.drop_account_word(did, word.source)
        if not old.status.active:
            self.append_event("account", did, fields={"active": True})
        if old.due:
            self.delete(PENDING, (old.due, did))
        self.tally(did, old, None)
        for name, delta in count_repo(old, None):
            self.add(self._deltas, name, delta)
        self.write(self._repos, did, None)
        self.ops += 1
        return True

    def wipe_repo(self, did: Did, status: AccountStatus) -> None:
        """End this life of a repository: its content is gone at once, the row stays as a tombstone."""
        old = self.repo(did)
        row = old or NEW_REPO
        counts = self.did_counts(did)
        ranged = self.clear_content(did, sum(counts.values()), self._limits.wipe_point_rows)
        for collection, records in counts.items():
            self.add(self._did_counts, (did, collection), -records)
        self.drop_buffered(did)
        self.release_archives(did)
        cids = self._refs.get((did, row.epoch))
        if cids is not None:
            self._undo.append((self._refs, (did, row.epoch), cids))
            del self._refs[(did, row.epoch)]
        fresh = row._replace(
            tracked=False, state=SyncState.PENDING, status=status, epoch=row.epoch + 1, complete=False,
            rev="", min_rev="", commit=b"", data=b"", due=0, work=0, error="", attempt=0, hearsay=False,
        )  # fmt: skip
        before = self.wipe_of(did)
        ranged = ranged or (before is not None and before.ranged)  # not compacted yet
        refused = self.cursor(keyspaces.QUARANTINE_NEXT) or 0
        wipe = Wipe(fresh.epoch, self.next_event, self._state.refs.next_row, ranged, refused)
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
