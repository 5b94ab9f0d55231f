"""Steps on the writer for what the network answered: identities, statuses, revs.

Owns what an answer does to the row, the log and the buffer. Leaves out asking (`identities`, `drain`). Every
function runs inside the writer's turn and meets the row as it is by then, not as it was when asked.
"""

from __future__ import annotations

from typing import NamedTuple

from indexer.atproto.frames import CommitFrame, SyncFrame, decode_frame
from indexer.atproto.syntax import tid_micros
from indexer.atproto.types import Did, Handle, Micros, Rev, Seq
from indexer.errors import FrameError, IdentityGone
from indexer.identity.resolver import Identity
from indexer.ingest.account import CHECKED, PDS_PREFIX, has_authority
from indexer.ingest.apply import Applier
from indexer.ingest.hearsay import FORGOTTEN, GONE, grace_left, unheard_of
from indexer.ingest.machine import Situation, desynchronized, drained
from indexer.ingest.tools import IngestTools
from indexer.ingest.words import bury, tell_identity, with_check, with_identity, with_words
from indexer.store.codecs import AccountStatus, AccountWord, RepoRow, SyncState, Work
from indexer.store.transaction import Transaction


class Answers:
    """The steps, with what they share."""

    def __init__(self, tools: IngestTools, applier: Applier) -> None:
        self._tools = tools
        self._applier = applier
        self._first_sight_us = int(tools.settings.ingest.first_sight_wait * 1_000_000)

    def learned(self, tx: Transaction, did: Did, identity: Identity) -> None:
        """The directory answered. With frames waiting, `Work.RESOLVE` stays until they are replayed."""
        row = tx.repo(did)
        if row is None:
            return
        new = self._with_identity(tx, did, row, identity)
        if identity.handle:  # asked anew, also where the claim is the same: its domain may say something else
            new = new._replace(work=new.work | Work.VERIFY_HANDLE)
        if new.state is not SyncState.BACKFILLING:
            if tx.buffer_size(did)[0]:
                new = new._replace(work=new.work | Work.RESOLVE)
            else:
                new = self.at_rest(tx, did, new, resolved=True)
        self._applier.store(tx, did, row, new)

    def gone(self, tx: Transaction, did: Did, error: IdentityGone) -> float | None:
        """An authoritative no: what waits is refused; a deleted identity takes its repository along, and a
        row of which nothing was but hearsay goes. Seconds until the directory is to be asked once more."""
        row = tx.repo(did)
        if row is None:
            return None
        refused = self.refuse_waiting(tx, did, error)
        self._tools.routes.forget(did)
        if row.hearsay:
            return self._unheard_of(tx, did, row, error)
        if error.tombstone:
            self.purge(tx, did)
            return None
        work = row.work & ~(Work.RESOLVE | Work.CHECK_STATUS | Work.COMPARE_REV)
        new = row._replace(signing_key="", pds="", work=work, error=f"{GONE}: {error}"[:500])
        if refused:
            new = self._perhaps_behind(tx, new)
        self._applier.store(tx, did, row, new)
        return None

    def _unheard_of(self, tx: Transaction, did: Did, row: RepoRow, error: IdentityGone) -> float | None:
        """Nobody but strangers knows the account: after a while, in which it may turn up, its row goes."""
        new = unheard_of(row, str(error), tx.now_us)
        wait = grace_left(new, tx.now_us, self._tools.settings.ingest.unknown_grace)
        if not wait and tx.forget_repo(did):
            tx.add_count(FORGOTTEN, 1)
            return None
        self._applier.store(tx, did, row, new)
        return max(wait, self._tools.settings.ingest.refresh_interval)

    def refuse_waiting(self, tx: Transaction, did: Did, error: IdentityGone) -> bool:
        """What waits for the identity is refused; whether anything was."""
        refused: set[str] = set()
        for waiting in tx.buffered(did):
            tx.add_count(f"ingest/{waiting.source}/reject/identity", 1)
            if waiting.source not in refused:  # one of each source: the others say nothing more
                refused.add(waiting.source)
                seq = seq_of(waiting.data)
                tx.quarantine(waiting.source, seq, did, "identity", str(error), waiting.data)
        tx.drop_buffered(did)
        return bool(refused)

    def expired(self, tx: Transaction, did: Did, before: Micros) -> None:
        """Frames from before then, which waited in vain for an identity that proves them, go. Once it is
        known the account's host is asked what was missed."""
        old = [frame for frame in tx.buffered(did) if not frame.vouched and frame.arrived < before]
        for frame in old:
            tx.add_count(f"ingest/{frame.source}/drop/unproven_old", 1)
            tx.drop_buffered_frame(did, frame)
        row = tx.repo(did)
        if row is not None and old:
            self._applier.store(tx, did, row, row._replace(work=row.work | Work.RESOLVE | Work.COMPARE_REV))

    def _perhaps_behind(self, tx: Transaction, row: RepoRow) -> RepoRow:
        """A repository that we hold, some frames of which were refused unseen: directories have been wrong.

        It is fetched when its identity is known again; the directory is asked for that once in a long while.
        """
        held = row.state is SyncState.SYNCED and row.rev != "" and row.status.active
        if not held or self._applier.ephemeral:
            return row
        due = tx.now_us + int(self._tools.settings.backfill.retry_max * 1_000_000)
        return row._replace(state=SyncState.DESYNCHRONIZED, min_rev=max(row.min_rev, row.rev), due=due)

    def checked(self, tx: Transaction, did: Did, identity: Identity, status: AccountStatus | None) -> None:
        """The account's PDS told its status; None where its answer says nothing."""
        row = tx.repo(did)
        if row is None:
            return
        new = self._with_identity(tx, did, row, identity)
        new = new._replace(work=(new.work | row.work & Work.RESOLVE) & ~Work.CHECK_STATUS)
        words = [word for word in tx.account_words(did) if word.source != CHECKED]
        if status is AccountStatus.DELETED and all(word.status is not status for word in words):
            status = None  # a host that does not know an account has not said that it was deleted
        if status is not None:
            new = with_check(tx, did, new, status, tx.now_us, ephemeral=self._applier.ephemeral)
        self._applier.store(tx, did, row, new)
        confirmed = status is AccountStatus.DELETED or _told_by_its_pds(words, identity.pds)
        if confirmed and new.status is AccountStatus.DELETED and row.rev:
            self.purge(tx, did)

    def purge(self, tx: Transaction, did: Did) -> None:
        """The account is deleted for certain: its content goes, its row stays to be asked."""
        self._tools.routes.forget(did)
        bury(tx, did)

    def handle(self, tx: Transaction, did: Did, claimed: Handle, handle: Handle) -> bool:
        """What became of a claimed handle; false when another one is claimed by now."""
        row = tx.repo(did)
        known = self._tools.resolver.cached(did)
        if row is None or (known is not None and known.handle != claimed):
            return row is None
        new = row._replace(handle=handle, work=row.work & ~Work.VERIFY_HANDLE)
        if new.handle != row.handle:
            tell_identity(tx, did, new)
        self._applier.store(tx, did, row, new)
        return True

    def compared(self, tx: Transaction, did: Did, rev: Rev | None) -> None:
        """The host told its rev (None: it did not); newer than ours means that we missed something."""
        row = tx.repo(did)
        if row is None or row.state is SyncState.BACKFILLING:  # asked again once it is fetched
            return
        new = row._replace(work=row.work & ~Work.COMPARE_REV)
        if rev is not None and rev > row.rev and row.status.active:
            situation = Situation(tx.now_us, self._applier.ephemeral)
            if row.state is SyncState.SYNCED:
                new = self._awaited(desynchronized(new, "compare_rev", situation), rev, situation)
            elif not row.due and not situation.ephemeral:
                new = new._replace(due=situation.now_us)
        self._applier.store(tx, did, row, new)

    def _awaited(self, row: RepoRow, rev: Rev, situation: Situation) -> RepoRow:
        """A rev in our future would be refused, and its repository fetched in vain: it is due when our clock,
        or who sets it right, has come there."""
        settings = self._tools.settings
        at = tid_micros(rev) - int(settings.ingest.max_future * 1_000_000)
        if situation.ephemeral or at <= situation.now_us:
            return row
        longest = situation.now_us + int(settings.backfill.retry_max * 1_000_000)
        return row._replace(due=min(at, longest))

    def at_rest(self, tx: Transaction, did: Did, row: RepoRow, *, resolved: bool) -> RepoRow:
        """The row when nothing waits for the repository; ``resolved``: its identity is as of now."""
        row = drained(row, Situation(tx.now_us, self._applier.ephemeral), self._first_sight_us)
        if resolved and did not in self._tools.hints:
            return row._replace(work=row.work & ~Work.RESOLVE)
        return row

    def _with_identity(self, tx: Transaction, did: Did, row: RepoRow, identity: Identity) -> RepoRow:
        """The row with its identity; another PDS may change whose word on the status counts."""
        if row.signing_key != identity.signing_key:
            self._tools.routes.forget(did)
        new = with_identity(tx, did, row, identity)
        moved = row.pds != new.pds
        if did in self._tools.hints:
            new = new._replace(work=new.work | Work.RESOLVE)
        if moved:
            words = tx.account_words(did)
            # A check was the word of the host that it lived on before, which the new one is to be asked for.
            present = [word for word in words if word.source != CHECKED]
            new = with_words(tx, did, new, present, ephemeral=self._applier.ephemeral)
            if present != words or (new.status is not row.status and not new.status.active):
                new = new._replace(work=new.work | Work.CHECK_STATUS)
        if new.error.startswith(GONE):
            new = new._replace(error="", due=min(new.due, tx.now_us))
        return new


def _told_by_its_pds(words: list[AccountWord], pds: str) -> bool:
    """Whether the account's present PDS, which we follow, said that it was deleted."""
    return any(
        word.status is AccountStatus.DELETED
        and word.source.startswith(PDS_PREFIX)
        and has_authority(word.source, pds)
        for word in words
    )


def seq_of(data: bytes) -> Seq:
    """The number under which a waiting frame came; 0 where its bytes do not say."""
    frame = read_waiting(data)
    return 0 if frame is None else frame.seq


def read_waiting(data: bytes) -> CommitFrame | SyncFrame | None:
    """A frame that waited; None where its bytes are none."""
    try:
        frame = decode_frame(data)
    except FrameError:
        return None
    return frame if isinstance(frame, (CommitFrame, SyncFrame)) else None


class Latest(NamedTuple):
    """What a host says about a repository. ``status`` None: it did not say; ``rev`` likewise."""

    status: AccountStatus | None
    rev: Rev | None
