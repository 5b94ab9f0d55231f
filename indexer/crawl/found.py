"""What a page of repositories changes: new accounts are queued, others are looked at.

Owns the decision on each entry and the steps on the writer, the last of which moves the sweep on: a kill
between two steps has the page read again, which finds the rest. Decisions are pure; steps run
in the writer's turn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from indexer.atproto.frames import AccountFrame
from indexer.atproto.syntax import tid_from_micros
from indexer.atproto.types import Did, Micros, Rev
from indexer.backfill.hosts import host_of
from indexer.backfill.rows import RequestUnit
from indexer.crawl.pages import BY_COLLECTION, Listed
from indexer.crawl.sweep import Sweep
from indexer.crawl.tools import WAITING, WITHOUT, tally
from indexer.ingest.account import LIST_PREFIX, status_of
from indexer.ingest.apply import Applier
from indexer.ingest.filters import Filters
from indexer.ingest.revs import is_behind
from indexer.store.codecs import RepoRow, Work
from indexer.store.transaction import Transaction

_LAST_CLOCK = 1023


class Finding(NamedTuple):
    """What is to be done about the entries of a page, by DID."""

    queue: list[Did]
    ask: list[Did]  # describeRepo is to tell whether they hold a signal
    behind: list[Listed]
    words: list[Listed]  # their status differs from ours


@dataclass(frozen=True, slots=True)
class Lister:
    """Who lists, and what is looked for. ``of_pds``: it speaks of the accounts that live on it alone."""

    url: str
    mode: str
    filters: Filters
    of_pds: bool

    def decide(
        self, entries: Iterable[tuple[Listed, RepoRow | None]], without: Collection[Did], newest_us: Micros
    ) -> Finding:
        """``without``: accounts of which it is known that they hold no signal. Revs beyond ``newest_us`` are
        from the future and say nothing."""
        finding = Finding([], [], [], [])
        newest = tid_from_micros(newest_us, _LAST_CLOCK)
        for listed, row in entries:
            if self.filters.is_excluded(listed.did):
                continue
            if row is not None:
                self._known(listed, row, newest, finding)
            elif listed.active:
                wanted = self.filters.mode == "full" or self.mode == BY_COLLECTION
                if wanted or listed.did not in without:
                    (finding.queue if wanted else finding.ask).append(listed.did)
            elif self.filters.mode == "full":
                finding.words.append(listed)
        return finding

    def _known(self, listed: Listed, row: RepoRow, newest: Rev, finding: Finding) -> None:
        if not row.tracked:
            return
        if listed.active and listed.rev and listed.rev <= newest and is_behind(row, listed.rev):
            finding.behind.append(listed)
        told = self.mode != BY_COLLECTION and (not self.of_pds or host_of(row.pds) == host_of(self.url))
        if told and status_of(listed.active, listed.status).active != row.status.active:
            finding.words.append(listed)


def pieces(finding: Finding, size: int) -> list[Finding]:
    """The finding in parts of up to ``size`` accounts, at least one."""
    parts: list[Finding] = []
    kinds: tuple[Sequence[Any], ...] = finding
    for name, items in enumerate(kinds):
        for start in range(0, len(items), size):
            fields: list[list[Any]] = [[], [], [], []]
            fields[name] = list(items[start : start + size])
            parts.append(Finding(*fields))
    return parts or [finding]


@dataclass(frozen=True, slots=True)
class FoundUnit:
    """Part of a page. ``after`` is where the sweep is behind the page, None when more of it follows.

    Gives the number of accounts that are new, None when the sweep is elsewhere by now.
    """

    key: tuple[str, str]
    before: Sweep
    after: Sweep | None
    finding: Finding
    lister: Lister
    applier: Applier
    ephemeral: bool
    noted: Mapping[str, int]  # for the tallies

    def __call__(self, tx: Transaction) -> int | None:
        row = tx.crawl_row(*self.key)
        now = Sweep.of(row)
        if row is None or now.place != self.before.place:
            return None
        new = self._queue(tx) + self._ask(tx)
        for listed in self.finding.behind:
            self._compare(tx, listed)
        new += sum(self._word(tx, listed) for listed in self.finding.words)
        position = self.after if self.after is not None else now
        # What earlier parts of the page found is in the row alone.
        tx.set_crawl_row(*self.key, list(position._replace(found=now.found + new)))
        for outcome, number in self.noted.items():
            tally(tx, outcome, number)
        return new

    def _queue(self, tx: Transaction) -> int:
        dids = [did for did in self.finding.queue if tx.repo(did) is None]
        room = self.applier.room(tx)
        tally(tx, "unresolved_full", len(dids) - len(dids[:room]))
        dids = dids[:room]
        queued = len(RequestUnit(dids, frozenset(), self.ephemeral, again=False, asked=None)(tx))
        tally(tx, "found", queued)
        return queued

    def _ask(self, tx: Transaction) -> int:
        new = 0
        for did in self.finding.ask:
            if tx.repo(did) is None and tx.crawl_row(WAITING, did) is None:
                tx.set_crawl_row(WITHOUT, did, None)
                tx.set_crawl_row(WAITING, did, [tx.now_us, 0])
                new += 1
        return new

    def _compare(self, tx: Transaction, listed: Listed) -> None:
        """The host of a repository of which a newer rev is listed is asked for it."""
        row = tx.repo(listed.did)
        if row is not None and is_behind(row, listed.rev) and not self.ephemeral:
            self.applier.store(tx, listed.did, row, row._replace(work=row.work | Work.COMPARE_REV))
            tally(tx, "behind")

    def _word(self, tx: Transaction, listed: Listed) -> bool:
        """A list's word on a status: a relay's is one of its words, of a PDS's the PDS itself is asked.

        Whether the account is new, for which there has to be room, as for one that is active.
        """
        did, row = listed.did, tx.repo(listed.did)
        source = LIST_PREFIX + self.lister.url
        if row is not None and listed.active:
            if not any(word.source == source and not word.active for word in tx.account_words(did)):
                return False  # it was not this list that said otherwise
        elif row is not None and (not row.tracked or not row.status.active):
            return False
        elif row is None and not self.applier.room(tx):
            tally(tx, "unresolved_full")
            return False
        tally(tx, "words")
        if not self.lister.of_pds:
            time = datetime.fromtimestamp(tx.now_us / 1e6, UTC).isoformat()
            frame = AccountFrame(0, did, time, listed.active, listed.status)
            self.applier.account(tx, source, frame)
        elif row is None:  # once its identity is known it is fetched, which tells its status
            self.applier.first_row(tx, did, None)
        else:
            self.applier.store(tx, did, row, row._replace(work=row.work | Work.CHECK_STATUS))
        new = row is None and tx.repo(did) is not None
        tally(tx, "found", int(new))
        return new


@dataclass(frozen=True, slots=True)
class MoveUnit:
    """The sweep goes on, ends or begins, without accounts; false when it is elsewhere by now."""

    key: tuple[str, str]
    before: Sweep
    after: Sweep
    noted: Mapping[str, int]

    def __call__(self, tx: Transaction) -> bool:
        row = tx.crawl_row(*self.key)
        if row is None or Sweep.of(row).place != self.before.place:
            return False
        tx.set_crawl_row(*self.key, list(self.after))
        for outcome, number in self.noted.items():
            tally(tx, outcome, number)
        return True
