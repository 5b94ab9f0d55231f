"""Steps on the writer for what the network answered: identities, statuses, revs.

Owns what an answer does to the row, the log and the buffer. Leaves out asking (`identities`, `drain`). Every
function runs inside the writer's turn and meets the row as it is by then, not as it was when asked.
"""

from __future__ import annotations

from typing import NamedTuple

from indexer.atproto.frames import CommitFrame, SyncFrame, decode_frame
from indexer.atproto.syntax import tid_micros
from indexer.atproto.types import Did, Handle, Rev, Seq
from indexer.errors import FrameError, IdentityGone
from indexer.identity.resolver import Identity
from indexer.ingest.account import CHECKED, PDS_PREFIX, has_authority
from indexer.ingest.apply import Applier, tell_identity, with_identity
from indexer.ingest.machine import Situation, desynchronized, drained
from indexer.ingest.tools import IngestTools
from indexer.ingest.words import bury, with_check, with_words
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

    def gone(self, tx: Transaction, did: Did, error: IdentityGone) -> None:
        """An authoritative no: what waits is refused; a deleted identity takes its repository along."""
        row = tx.repo(did)
        if row is None:
            return
        refused: set[str] = set()
        for waiting in tx.buffered(did):
            tx.add_count(f"ingest/{waiting.source}/reject/identity", 1)
            if waiting.source not in refused:  # one of each source: the others say nothing more
                refused.add(waiting.source)
                seq = seq_of(waiting.data)
                tx.quarantine(waiting.source, seq, did, "identity", str(error), waiting.data)
        tx.drop_buffered(did)
        self._tools.routes.forget(did)
        if error.tombstone:
            self.purge(tx, did)
            return
        work = row.work & ~(Work.RESOLVE | Work.CHECK_STATUS | Work.COMPARE_REV)
        new = row._replace(signing_key="", pds="", work=work, error=f"identity_gone: {error}"[:500])
        if refused:
            new = self._perhaps_behind(tx, new)
        self._applier.store(tx, did, row, new)

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
        if new.error.startswith("identity_gone"):
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
    try:
        frame = decode_frame(data)
    except FrameError:
        return 0
    return frame.seq if isinstance(frame, (CommitFrame, SyncFrame)) else 0


class Latest(NamedTuple):
    """What a host says about a repository. ``status`` None: it did not say; ``rev`` likewise."""

    status: AccountStatus | None
    rev: Rev | None
