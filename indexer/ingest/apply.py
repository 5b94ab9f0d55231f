"""Steps on the writer: what an upstream's message changes in the store.

Owns the bridge between pure decisions (`machine`, `account`) and the transaction's verbs. Every function
runs inside the writer's turn, sees the rows as they are then, and must not wait. Whatever needs the
network becomes a `Work` flag in the row and a wake-up for `identities`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from indexer.atproto.frames import AccountFrame, CommitFrame, IdentityFrame, SyncFrame
from indexer.atproto.types import Did, DidKey, Seq
from indexer.identity.resolver import Identity
from indexer.ingest.account import has_authority, is_doubtful, is_stale, micros_of, status_of
from indexer.ingest.bans import BANNED
from indexer.ingest.filters import Filters
from indexer.ingest.holders import Holders, Weight
from indexer.ingest.machine import LABELS, Act, Decision, Situation, decide, desynchronized
from indexer.ingest.newcomers import Newcomers, Result, Wake
from indexer.ingest.tools import IngestTools
from indexer.ingest.verify import COMMIT, SYNC, Verdict
from indexer.ingest.words import with_words
from indexer.store.codecs import (
    NEW_REPO,
    OVERSIZE,
    AccountWord,
    FrameKind,
    RepoRow,
    SyncState,
    Work,
)
from indexer.store.transaction import Transaction


class Arrival(NamedTuple):
    """A `#commit` or `#sync` on its way in, from the socket or from the buffer."""

    source: str
    seq: Seq
    did: Did
    frame: CommitFrame | SyncFrame
    data: bytes  # the frame as it came
    key: DidKey = ""  # what it was verified under, "" when it was not
    identity: Identity | None = None  # where the key came from, when not from the row
    whole: bool = True  # verified as on top of a tree that was verified as a whole

    @property
    def kind(self) -> FrameKind:
        return COMMIT if isinstance(self.frame, CommitFrame) else SYNC


#: The lexicon's bound for `blocks` of a `#sync`; relays enforce the one of commits, so more is only counted.
SYNC_BLOCKS_BYTES: Final = 10_000


class Applier(Newcomers):
    """The steps, with what they share."""

    def __init__(self, filters: Filters, tools: IngestTools, wake: Wake, *, ephemeral: bool) -> None:
        super().__init__(filters, tools, wake, ephemeral=ephemeral)
        self._holders = Holders(tools.db)

    # ---- #commit and #sync

    def frame(self, tx: Transaction, arrival: Arrival, verdict: Verdict | None) -> Result:
        """One frame from an upstream; ``verdict`` is None where no key was known."""
        did = arrival.did
        row = self.followed(tx, did, arrival.source, arrival.frame, arrival.identity)
        if not isinstance(row, RepoRow):
            self._tools.routes.forget(did)
            return self._strange(tx, arrival, verdict) if row is None else row
        if self._tools.bans.covers(row.pds, arrival.source):
            return self._banned(tx, arrival, row, verdict)
        if verdict is None or arrival.key != row.signing_key or (arrival.whole and row.sparse):
            self._tools.routes.forget(did)
            return self._unverified(tx, arrival, row)
        if verdict.signed or verdict.ahead:
            self._tools.clock_watch.note(did, ahead=verdict.ahead)
        if arrival.kind == SYNC and len(arrival.frame.blocks) > SYNC_BLOCKS_BYTES:
            tx.add_count(f"ingest/{arrival.source}/note/sync_blocks", 1)
        waiting = bool(row.work & (Work.RESOLVE | Work.DRAIN)) and tx.waits_from(did, arrival.source)
        trusted = has_authority(arrival.source, row.pds)
        situation = Situation(tx.now_us, self.ephemeral, waiting, False, trusted)
        decision = decide(row, verdict, situation)
        if decision.act is Act.APPLY and row.state is not SyncState.SYNCED and tx.buffer_size(did)[0]:
            # It needs no fetch any more, which would have been followed by a replay of what waits.
            decision = decision._replace(row=decision.row._replace(work=decision.row.work | Work.DRAIN))
        return self._carry_out(tx, arrival, row, verdict, decision)

    def _strange(self, tx: Transaction, arrival: Arrival, verdict: Verdict | None) -> Result:
        """A frame of an account that does not live at its source, as far as is known."""
        if self._tools.bans.covers("", arrival.source):
            return Result(Act.DROP, BANNED)
        if verdict is not None:
            decision = decide(NEW_REPO, verdict, Situation(tx.now_us, self.ephemeral, authority=False))
            if decision.act is Act.REJECT:
                return self.refuse(tx, arrival, decision.reason, verdict.message)
        if not self.note_stranger(tx, arrival.did, arrival.source):
            return Result(Act.DROP, "strangers_full")
        self._buffer(tx, arrival, NEW_REPO, vouched=False)
        return Result(Act.BUFFER, "identity")

    def refuse(self, tx: Transaction, arrival: Arrival, reason: str, why: str) -> Result:
        """Sets a frame aside."""
        tx.quarantine(arrival.source, arrival.seq, arrival.did, reason, why, arrival.data)
        return Result(Act.REJECT, reason)

    def _banned(self, tx: Transaction, arrival: Arrival, row: RepoRow, verdict: Verdict | None) -> Result:
        """Nothing is taken. What a signature shows to be missed is fetched once the host is let go."""
        signed = verdict is not None and verdict.signed and arrival.key == row.signing_key
        missed = signed and row.state is SyncState.SYNCED and arrival.frame.rev > row.rev
        if missed and self._tools.bans.covers(row.pds) and has_authority(arrival.source, row.pds):
            situation = Situation(tx.now_us, ephemeral=self.ephemeral)
            self.store(tx, arrival.did, row, desynchronized(row, BANNED, situation))
        return Result(Act.DROP, BANNED)

    def replay(
        self, tx: Transaction, arrival: Arrival, row: RepoRow, verdict: Verdict, *, fresh: bool
    ) -> Result:
        """One frame from the buffer, whose row the caller has read. A `BUFFER` result left all as it was."""
        trusted = has_authority(arrival.source, row.pds)
        situation = Situation(tx.now_us, self.ephemeral, False, True, trusted, fresh)
        decision = decide(row, verdict, situation)
        if decision.act is Act.BUFFER:
            return Result(decision.act, decision.reason)
        return self._carry_out(tx, arrival, row, verdict, decision)

    def _carry_out(
        self, tx: Transaction, arrival: Arrival, row: RepoRow, verdict: Verdict, decision: Decision
    ) -> Result:
        new = decision.row
        reason = decision.reason
        if decision.act is Act.APPLY:
            new = self._write(tx, arrival, verdict, decision)
            reason = reason or arrival.kind
            self._tools.routes.put(arrival.did, new)
        elif decision.act is Act.BUFFER:
            vouched = verdict.signed and has_authority(arrival.source, row.pds)
            new = self._buffer(tx, arrival, new, vouched=vouched)
        elif decision.act is Act.REJECT:
            why = verdict.message
            if decision.reason != verdict.reason:
                why = f"{row.pds or 'another host'} is the account's PDS"
            self.refuse(tx, arrival, decision.reason, why)
        self.store(tx, arrival.did, row, new)
        if decision.since_mismatch:
            tx.add_count(f"ingest/{arrival.source}/note/since_mismatch", 1)
        return Result(decision.act, reason)

    def _write(self, tx: Transaction, arrival: Arrival, verdict: Verdict, decision: Decision) -> RepoRow:
        """The frame's changes; gives the row with the commit block and `complete` filled in."""
        did, frame, rev = arrival.did, arrival.frame, verdict.rev
        if decision.gap:
            tx.append_event("sync", did, rev=rev, fields={"seq": arrival.seq, "time": frame.time})
        complete = decision.row.complete
        filtered = bool(self.filters.collections)
        blocks = frame.blocks
        for action, path, cid, start, end, flags in verdict.ops:
            if filtered and not self.filters.wants_collection(path.partition("/")[0]):
                complete = False
                if not self.ephemeral:  # kept from a time when the collection was wanted
                    tx.delete_record(did, path, rev, live=True)
            elif cid is None:
                tx.delete_record(did, path, rev, live=True)
            else:
                complete = complete and not flags & OVERSIZE
                tx.put_record(did, path, cid, blocks[start:end], rev, live=True, flags=flags, action=action)
        begin, stop = verdict.commit
        return decision.row._replace(commit=blocks[begin:stop], complete=complete)

    def _unverified(self, tx: Transaction, arrival: Arrival, row: RepoRow) -> Result:
        """No key, or one that is not the row's any more, or a tree before it that is not what it was taken
        for: the frame waits with its repository."""
        if not row.status.active:
            return Result(Act.DROP, "inactive")
        if arrival.frame.rev <= row.rev:
            return Result(Act.DROP, "stale_rev")
        work = row.work
        if not row.signing_key:
            work |= Work.RESOLVE
            if row.hearsay and row.error:  # the directory did not know it: it may by now
                self.wake(arrival.did, Work.RESOLVE, Work.RESOLVE)
        elif row.state is not SyncState.BACKFILLING:
            work |= Work.DRAIN  # else it is replayed once the fetched repository is applied
        new = self._buffer(tx, arrival, row._replace(work=work), vouched=False)
        self.store(tx, arrival.did, row, new)
        return Result(Act.BUFFER, "identity")

    def _buffer(self, tx: Transaction, arrival: Arrival, row: RepoRow, *, vouched: bool) -> RepoRow:
        """Keeps the frame. At the limit of those that are vouched for they go, and only a fetch newer than
        they are will do; of others the new one goes, and the account's host is asked what was missed."""
        did, rev = arrival.did, arrival.frame.rev
        while not tx.buffer_frame(did, rev, arrival.kind, arrival.source, arrival.data, vouched=vouched):
            if vouched or not self._make_room(tx, did, row, len(arrival.data)):
                break
        else:
            if not vouched:
                self._holders.note(did, _weight(tx, did, row))
            return row
        if not vouched:
            tx.add_count(f"ingest/{arrival.source}/drop/unproven_full", 1)
            return row._replace(work=row.work | Work.RESOLVE | Work.COMPARE_REV)
        # Another source may be ahead of this one: what it sent would be missed by a fetch up to this rev.
        rev = max([rev, *(waiting.rev for waiting in tx.buffered(did) if waiting.vouched)])
        tx.drop_buffered(did, vouched=True)
        tx.add_count(f"ingest/{arrival.source}/drop/buffer_full", 1)
        if row.state is SyncState.BACKFILLING:
            return row._replace(min_rev=max(row.min_rev, rev))
        situation = Situation(tx.now_us, ephemeral=self.ephemeral)
        return desynchronized(row, "buffer_full", situation, rev)

    def _make_room(self, tx: Transaction, did: Did, row: RepoRow, size: int) -> bool:
        """The largest holder of unproven frames loses them, where all together are too many and it holds
        more than this account would; its host is asked what it missed by that. False: nobody has to go."""
        if tx.count("buffer/unproven_bytes") + size <= self._tools.settings.ingest.unproven_mib << 20:
            return False
        mine = _weight(tx, did, row)
        while (found := self._holders.heaviest()) is not None:
            holder, told = found
            other = tx.repo(holder)
            weight = _weight(tx, holder, other)
            if weight != told:
                self._holders.note(holder, weight)
                continue
            if holder == did or weight <= mine._replace(size=mine.size + size):
                return False
            for frame in tx.buffered(holder):
                if not frame.vouched:
                    tx.add_count(f"ingest/{frame.source}/drop/unproven_full", 1)
            tx.drop_buffered(holder, vouched=False)
            self._holders.note(holder, _weight(tx, holder, other))
            if other is not None:
                work = other.work | Work.RESOLVE | Work.COMPARE_REV
                self.store(tx, holder, other, other._replace(work=work))
            return True
        return False

    def failed(self, tx: Transaction, arrival: Arrival, error: Exception) -> None:
        """Stands in for a step that raised: the frame is set aside, its repository fetched anew."""
        reason = getattr(error, "reason", "") or type(error).__name__
        self._tools.routes.forget(arrival.did)
        tx.quarantine(arrival.source, arrival.seq, arrival.did, reason, str(error), arrival.data)
        row = tx.repo(arrival.did)
        if row is not None and row.tracked and arrival.frame.rev > row.rev:
            situation = Situation(tx.now_us, ephemeral=self.ephemeral)
            self.store(tx, arrival.did, row, desynchronized(row, reason, situation))

    # ---- #identity and #account

    def identity(self, tx: Transaction, source: str, frame: IdentityFrame) -> Result:
        """A hint only: the row is marked, the directory is asked outside."""
        if self._tools.bans.covers("", source):
            return Result(Act.DROP, BANNED)
        row = self.followed(tx, frame.did, source)
        if row is None:
            known = self.note_stranger(tx, frame.did, source)
            return Result(Act.APPLY, "identity") if known else Result(Act.DROP, "strangers_full")
        if isinstance(row, Result):
            return row
        trusted = has_authority(source, row.pds)
        if trusted:
            self._tools.resolver.purge(frame.did)
        self._tools.hint(frame.did, urgent=trusted)
        self.store(tx, frame.did, row, row._replace(work=row.work | Work.RESOLVE))
        if trusted:  # also where the question was due already, in its time
            self.wake(frame.did, Work.RESOLVE, Work.RESOLVE)
        return Result(Act.APPLY, "identity")

    def account(self, tx: Transaction, source: str, frame: AccountFrame) -> Result:
        """A host's word; the effective status follows from all of them."""
        did = frame.did
        if self._tools.bans.covers("", source):
            return Result(Act.DROP, BANNED)
        row = self.followed(tx, did, source)
        if isinstance(row, Result):
            return row
        status = status_of(frame.active, frame.status)
        # A host's clock that is ahead must not outweigh what is learned until then.
        time_us = min(micros_of(frame.time), tx.now_us)
        word = AccountWord(source, status, frame.active, frame.seq, time_us)
        if row is None:
            known = self.note_stranger(tx, did, source, word)
            return Result(Act.REJECT, "authority") if known else Result(Act.DROP, "strangers_full")
        words = {word.source: word for word in tx.account_words(did)}
        said = words.get(source)
        if is_stale(word, said):
            return Result(Act.DROP, "stale_word")
        tx.set_account_word(did, *word)
        words[source] = word
        trusted = has_authority(source, row.pds)
        fields = {"seq": frame.seq, "time": frame.time}
        new = with_words(tx, did, row, list(words.values()), fields, ephemeral=self.ephemeral)
        if not trusted:  # its PDS may have moved since we looked
            new = new._replace(work=new.work | Work.RESOLVE)
        elif not frame.active or not new.status.active or is_doubtful(word, said):
            new = new._replace(work=new.work | Work.CHECK_STATUS)
        self.store(tx, did, row, new)
        return Result(Act.APPLY, "account") if trusted else Result(Act.REJECT, "authority")


def _weight(tx: Transaction, did: Did, row: RepoRow | None) -> Weight:
    return Weight(row is None or not row.signing_key, tx.unproven_size(did)[1])


def label(result: Result) -> str:
    """``outcome/reason`` as in the counters' names."""
    return f"{LABELS[result.act]}/{result.reason}"
