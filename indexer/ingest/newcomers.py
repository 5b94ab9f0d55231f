"""Accounts that a message names for the first time: which of them get a row, and which have to wait for one.

Anybody can make up DIDs. A relay's word opens a row, up to so many of which no directory knows anything; a
PDS's opens one once a directory says that the account lives there (sync.md §2, row 4), and until then the
DID stands in `strangers`, bounded for each PDS, and its frames wait among those that nobody vouches for.
Leaves out asking the directory (`identities`) and what its answer does (`strangers`). Steps on the writer.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from indexer.atproto.frames import CommitFrame, SyncFrame
from indexer.atproto.types import Did
from indexer.identity.resolver import Identity
from indexer.ingest.account import has_authority, is_stale
from indexer.ingest.filters import Filters
from indexer.ingest.machine import Act
from indexer.ingest.tools import IngestTools
from indexer.ingest.words import with_identity, with_words
from indexer.store.codecs import NEW_REPO, AccountStatus, AccountWord, RepoRow, Work
from indexer.store.counts import HEARSAY
from indexer.store.stranger_rows import StrangerRow
from indexer.store.transaction import Transaction


class Result(NamedTuple):
    """What became of a message, for the counters."""

    act: Act
    reason: str


class Wake(Protocol):
    """``fresh`` are the flags of ``work`` that were not in the row before."""

    def __call__(self, did: Did, work: int, fresh: int) -> None: ...


UNWANTED = Result(Act.DROP, "unwanted")


class Newcomers:
    """``wake`` is told of DIDs that have due work, and which."""

    def __init__(self, filters: Filters, tools: IngestTools, wake: Wake, *, ephemeral: bool) -> None:
        self.filters = filters
        self.ephemeral = ephemeral
        self._tools = tools
        self.wake = wake

    def wants_unknown(self, did: Did, frame: CommitFrame | SyncFrame | None) -> bool:
        """Whether an account without a row is to be followed because of this frame."""
        filters = self.filters
        if filters.is_excluded(did):
            return False
        if filters.mode == "full":
            return True
        if not filters.signals or not isinstance(frame, CommitFrame):
            return False
        return any(filters.signals_match(op.path.partition("/")[0]) for op in frame.ops)

    def followed(
        self,
        tx: Transaction,
        did: Did,
        source: str,
        frame: CommitFrame | SyncFrame | None = None,
        identity: Identity | None = None,
    ) -> RepoRow | Result | None:
        """The repository's row, which it gets here where it may have one at first sight; what becomes of the
        message where it is not followed; None for a stranger, of whom only a PDS speaks so far."""
        row = tx.repo(did)
        if row is not None:
            return row if row.tracked and not self.filters.is_excluded(did) else UNWANTED
        if not self.wants_unknown(did, frame):
            return UNWANTED
        if not has_authority(source, "" if identity is None else identity.pds):
            return None
        if identity is None and not self.room(tx):
            return Result(Act.DROP, "unresolved_full")
        return self.first_row(tx, did, identity)

    def room(self, tx: Transaction) -> int:
        """How many more rows may be opened for accounts of which no directory knows so far."""
        return max(0, self._tools.settings.ingest.max_unresolved - tx.count(HEARSAY))

    def first_row(self, tx: Transaction, did: Did, identity: Identity | None) -> RepoRow:
        """Opens the row; what was kept for a stranger is its repository's from now on."""
        row = NEW_REPO._replace(tracked=True, work=Work.RESOLVE, hearsay=True)
        if identity is not None:
            row = with_identity(tx, did, row, identity)
        for source, stranger in tx.strangers(did):
            if stranger.word is not None:
                status, active, seq, time = stranger.word
                tx.set_account_word(did, source, AccountStatus(status), active, seq, time)
            tx.set_stranger(did, source, None)
        if tx.buffer_size(did)[0]:
            row = row._replace(work=row.work | Work.RESOLVE)
        row = with_words(tx, did, row, tx.account_words(did), ephemeral=self.ephemeral)
        self.store(tx, did, None, row)
        return row

    def note_stranger(self, tx: Transaction, did: Did, source: str, word: AccountWord | None = None) -> bool:
        """Has the directory asked where the account lives; false where this PDS named too many already."""
        before = tx.stranger(did, source)
        if before is None and tx.count(f"strangers/{source}") >= self._tools.settings.ingest.max_strangers:
            return False
        row = before or StrangerRow(tx.now_us)
        said = None if row.word is None else AccountWord(source, AccountStatus(row.word[0]), *row.word[1:])
        if word is not None and not is_stale(word, said):
            row = row._replace(word=(int(word.status), *word[2:]))
        if row != before:
            tx.set_stranger(did, source, row)
        self.wake(did, Work.RESOLVE, 0 if before else Work.RESOLVE)
        return True

    def store(self, tx: Transaction, did: Did, old: RepoRow | None, new: RepoRow) -> None:
        """The row, where it changed; whoever does the work that it has is told."""
        if new != old:
            tx.set_repo(did, new)
        if new.work:  # told each time, so that no failure elsewhere leaves it forgotten in the row
            self.wake(did, new.work, new.work & ~(0 if old is None else old.work))
