"""What the backfill does to repository rows: request, postpone, claim, fail.

Each is one step on the writer, a value that is called with the transaction. Decisions on rows and
errors are `outcome`'s; how words become an account's status is `indexer.ingest.words`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from indexer.atproto.types import Did, Micros
from indexer.backfill.hosts import HELD
from indexer.backfill.outcome import HOST_RESTS, Failure, failed
from indexer.backfill.queue import CLAIMED_DUE, explicit_due, found_due
from indexer.config import BackfillSettings
from indexer.identity.resolver import Identity
from indexer.ingest.account import reason_of
from indexer.ingest.hearsay import FORGOTTEN, GONE, grace_left, unheard_of
from indexer.ingest.words import bury, with_check, with_identity
from indexer.store.codecs import NEW_REPO, AccountStatus, AccountWord, RepoRow, SyncState, Work
from indexer.store.database import Database
from indexer.store.transaction import Transaction
from indexer.store.writer import clock_us

FETCHABLE = (SyncState.PENDING, SyncState.BACKFILLING, SyncState.DESYNCHRONIZED)


def is_waiting(row: RepoRow | None) -> bool:
    """Whether a repository is followed and waits for a fetch."""
    return row is not None and row.tracked and row.due > 0 and row.state in FETCHABLE


def claimed(tx: Transaction, did: Did, epoch: int) -> RepoRow | None:
    """The row, when the repository is still the one that a job claimed under ``epoch``."""
    row = tx.repo(did)
    if row is None or row.epoch != epoch or row.state is not SyncState.BACKFILLING or not row.tracked:
        return None
    return row


@dataclass(frozen=True, slots=True)
class RequestUnit:
    """Repositories that somebody asked for are followed and come first; gives those acted on.

    One that is complete already, or being worked on, stays as it is unless ``again``. Those that were not
    asked for by anybody (no time at which they were ``asked``) get no place in front.
    """

    dids: Sequence[Did]
    busy: frozenset[Did]
    ephemeral: bool
    again: bool
    asked: Micros | None  # of all units of a request the same

    def __call__(self, tx: Transaction) -> list[Did]:
        acted = []
        due = found_due(tx.now_us) if self.asked is None else explicit_due(self.asked)
        for did in dict.fromkeys(self.dids):
            row = tx.repo(did)
            known = row or NEW_REPO._replace(hearsay=True)
            asked = self._asked(known._replace(hearsay=known.hearsay and self.asked is None), did, due)
            if asked != row:
                tx.set_repo(did, asked)
                acted.append(did)
        return acted

    def _asked(self, row: RepoRow, did: Did, due: Micros) -> RepoRow:
        followed = row._replace(tracked=True)
        if self.ephemeral or (did in self.busy and row.state is SyncState.BACKFILLING and is_waiting(row)):
            return followed  # a job may also be under way for a row that it no longer owns: `claimed`
        if row.tracked and row.state is SyncState.SYNCED and not self.again:
            return followed
        state = SyncState.DESYNCHRONIZED if row.rev else SyncState.PENDING
        return followed._replace(state=state, due=due, attempt=0, error="")


@dataclass(frozen=True, slots=True)
class PostponeUnit:
    """Repositories of a host that is to be left alone until ``due``. No attempt is counted.

    A row that tells of no failure of its own tells ``why`` it waits, and gets the identity that is known:
    nobody could see otherwise which host it waits for.
    """

    dids: Sequence[Did]
    due: Micros
    why: str
    identities: Mapping[Did, Identity]

    def __call__(self, tx: Transaction) -> None:
        for did in self.dids:
            row = tx.repo(did)
            if row is None or not is_waiting(row) or row.due >= self.due:
                continue
            if did in self.identities:
                row = known_identity(tx, did, row, self.identities[did])
            if reason_of(row.error) in ("", HOST_RESTS, *HELD):
                row = row._replace(error=f"{HOST_RESTS}: {self.why}"[:500])
            tx.set_repo(did, row._replace(due=self.due))


@dataclass(frozen=True, slots=True)
class ClaimUnit:
    """The repository becomes backfilling, so that its frames are buffered; None when it does not wait.

    It is then `CLAIMED_DUE`: should the process die, it stands in front of the queue.
    """

    did: Did
    identity: Identity

    def __call__(self, tx: Transaction) -> RepoRow | None:
        row = tx.repo(self.did)
        if row is None or not is_waiting(row):
            return None
        row = known_identity(tx, self.did, row, self.identity)
        # `DRAIN` of a backfilling repository means that it is applied and its frames are to be replayed.
        row = row._replace(state=SyncState.BACKFILLING, due=CLAIMED_DUE, work=row.work & ~Work.DRAIN)
        tx.set_repo(self.did, row)
        return row


@dataclass(frozen=True, slots=True)
class FailUnit:
    """What a failure leaves: the reason, the time of the next try, the account's status where it is one.

    ``epoch`` is None for a job that failed before its claim.
    """

    did: Did
    epoch: int | None
    failure: Failure
    settings: BackfillSettings
    jitter: float
    grace_s: float  # of an account that was only heard of and that the directory does not know

    def __call__(self, tx: Transaction) -> None:
        row = tx.repo(self.did)
        if row is None or not is_waiting(row):
            return
        if self.epoch is not None and claimed(tx, self.did, self.epoch) is None:
            return  # wiped, or removed and followed again: that waits for a fetch of its own
        tx.add_count(f"backfill/{self.failure.outcome}/{self.failure.reason}", 1)
        if row.hearsay and self.failure.reason == GONE:
            row = unheard_of(row, self.failure.message, tx.now_us)
            if not grace_left(row, tx.now_us, self.grace_s) and tx.forget_repo(self.did):
                tx.add_count(FORGOTTEN, 1)
                return
        elif self.failure.tombstone:
            bury(tx, self.did)
            return
        if self.failure.status is not None:
            row = with_check(tx, self.did, row, self.failure.status, tx.now_us, ephemeral=False)
        tx.set_repo(self.did, failed(row, self.failure, tx.now_us, self.settings, self.jitter))


def known_identity(tx: Transaction, did: Did, row: RepoRow, identity: Identity) -> RepoRow:
    """The row with an identity that may come from the cache: a hint to ask again stays one."""
    new = with_identity(tx, did, row, identity)
    return new._replace(work=row.work | new.work & Work.VERIFY_HANDLE)


class Asked(NamedTuple):
    """When an account's own PDS was asked for its repository, and the words about it that were known then."""

    at: Micros
    words: list[AccountWord]


def asked_now(db: Database, did: Did) -> Asked:
    return Asked(clock_us(), db.account_words(did))


def back_again(tx: Transaction, did: Did, row: RepoRow, asked: Asked | None) -> RepoRow:
    """The row of an account that was not active, once its repository is applied.

    That its PDS serves the repository says that it is active, as of when it was asked. Another host's
    copy (``asked`` is None) says nothing, and any newer word outweighs it: then the PDS is to be asked.
    """
    words = tx.account_words(did)
    # Words that came in meanwhile are newer whatever the clocks of their hosts say.
    if asked is None or words != asked.words or any(word.time > asked.at for word in words):
        return row._replace(work=row.work | Work.CHECK_STATUS)
    return with_check(tx, did, row, AccountStatus.ACTIVE, asked.at, ephemeral=False)
