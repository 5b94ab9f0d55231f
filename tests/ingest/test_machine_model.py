"""Any sequence of frames, fetches, failures and statuses: the machine does what a plain twin does.

The twin knows numbers instead of rows: the rev that it has, the root of it, the rev that a fetch must
reach, what waits. What must hold whatever happens: a synced repository is the account's own as of its rev,
the rev never falls, and no commit that was seen is missed by a repository that claims to be synced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from indexer.atproto.mst import EMPTY_ROOT
from indexer.atproto.types import Cid, Rev
from indexer.backfill.apply import Plan, finished
from indexer.backfill.outcome import BELOW_MIN_REV, Failure, accepts_old, failed
from indexer.backfill.verify import Verified
from indexer.config import BackfillSettings
from indexer.identity.resolver import Identity
from indexer.ingest.account import with_status
from indexer.ingest.machine import Act, Situation, decide, drained
from indexer.ingest.verify import COMMIT, SYNC, Outcome, Verdict
from indexer.store.codecs import NEW_REPO, AccountStatus, RepoRow, SyncState, Work

DID, NOW, ROOM, TRIES = "did:plc:a", 1_000_000, 3, 2
BACKFILL = BackfillSettings(min_rev_tries=TRIES)
IDENTITY = Identity(DID, "", "did:key:z", "https://pds.test", 0)
CLEAN, FORGED, BAD_OPS, INSUFFICIENT = "", "signature", "ops", "insufficient"

_KINDS = st.sampled_from([COMMIT, COMMIT, SYNC])
_FAULTS = st.sampled_from([CLEAN] * 5 + [FORGED, BAD_OPS, INSUFFICIENT])


class Sent(NamedTuple):
    """A frame about commit ``number``: the root it claims, the root before it (None: no prevData)."""

    number: int
    root: int
    prev: int | None
    kind: str
    fault: str

    @property
    def order(self) -> tuple[int, bool]:
        return self.number, self.kind == SYNC


def rev_of(number: int) -> Rev:
    return f"3{number:012d}" if number else ""


def root_of(root: int) -> Cid:
    return EMPTY_ROOT if root == 0 else b"\x01\x71\x12\x20" + root.to_bytes(32, "big")


def verdict_of(sent: Sent) -> Verdict:
    outcome, row = {
        CLEAN: (Outcome.OK, 0), FORGED: (Outcome.REJECT, 12), BAD_OPS: (Outcome.REJECT, 15),
        INSUFFICIENT: (Outcome.DESYNC, 17),
    }[sent.fault]  # fmt: skip
    prev = None if sent.prev is None else root_of(sent.prev)
    kind = COMMIT if sent.kind == COMMIT else SYNC
    rev, data = rev_of(sent.number), root_of(sent.root)
    return Verdict(outcome, row, sent.fault, "", kind, DID, rev, None, prev, data)


@dataclass
class Twin:
    """The rules in the plainest words."""

    state: str = "pending"
    rev: int = 0
    root: int = -1
    need: int = 0
    active: bool = True
    applied: bool = False  # fetched, and what waited is to be replayed
    waiting: list[Sent] = field(default_factory=list)

    def frame(self, sent: Sent, *, replayed: bool = False) -> str:
        if not self.active and not replayed:
            if sent.fault != FORGED:
                self.need = max(self.need, sent.number)
            return "drop"
        if sent.number <= self.rev:
            return "drop"
        first = self.state == "pending" and not self.rev and not self.need
        unlinked = sent.kind == COMMIT and sent.prev is None and not first
        if sent.fault == FORGED or (sent.fault == BAD_OPS and not unlinked):
            return "reject"
        empty = sent.root == 0 if sent.kind == SYNC else sent.prev in (None, 0)
        if first and sent.fault == CLEAN and empty:
            self.state, self.applied = "synced", bool(self.waiting)
            return self._take(sent)
        if self.state == "backfilling" and not replayed:
            return self._wait(sent)
        if self.state in ("pending", "desynchronized"):
            self.need = max(self.need, sent.number)
            return "drop"
        linked = sent.root if sent.kind == SYNC else sent.prev
        if sent.fault == CLEAN and linked == self.root:
            return self._take(sent)
        self.state, self.need = "desynchronized", max(self.need, sent.number)
        return "desync"

    def _take(self, sent: Sent) -> str:
        self.rev, self.root, self.need = sent.number, sent.root, max(self.need, sent.number)
        return "ok"

    def _wait(self, sent: Sent) -> str:
        if len(self.waiting) == ROOM and sent not in self.waiting:
            self.need = max(self.need, sent.number, *(item.number for item in self.waiting))
            self.waiting.clear()
        elif sent not in self.waiting:
            self.waiting.append(sent)
        return "buffer"

    def fetched(self, number: int, root: int, accepted: bool) -> None:
        if accepted:
            self.need = number
        self.rev, self.root, self.need = number, root, max(self.need, number)
        self.applied = bool(self.waiting)
        if self.need > number:
            self.state, self.applied = "desynchronized", False
        elif not self.applied:
            self.state = "synced"

    def replay(self) -> None:
        for sent in sorted(self.waiting, key=lambda item: item.order):
            self.frame(sent, replayed=True)
        self.waiting.clear()
        self.applied = False
        if self.state == "backfilling":
            self.state = "synced" if self.need <= self.rev else "desynchronized"

    def fail(self) -> None:
        self.state = "desynchronized" if self.rev else "pending"


class Machine(RuleBasedStateMachine):
    """One repository, its account's true history, and a host that may lag behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.row: RepoRow = NEW_REPO._replace(tracked=True, signing_key="did:key:z", due=5)
        self.waiting: list[Sent] = []
        self.twin = Twin()
        self.roots = [0, 1, 2]  # of each commit of the true history; before the first it is the empty tree
        self.seen = self.highest = 0

    # ---- the account and its frames

    @rule(changes=st.booleans())
    def commits(self, changes: bool) -> None:
        self.roots.append(len(self.roots) if changes else self.roots[-1])

    @rule(data=st.data(), kind=_KINDS, fault=_FAULTS, unlinked=st.booleans(), newest=st.booleans())
    def frame(self, data: st.DataObject, kind: str, fault: str, unlinked: bool, newest: bool) -> None:
        last = len(self.roots) - 1
        number = last if newest else data.draw(st.integers(1, last), "number")
        prev = None if unlinked and (number == 1 or newest) else self.roots[number - 1]
        if kind == SYNC:
            prev, fault = None, FORGED if fault == FORGED else CLEAN
        sent = Sent(number, self.roots[number], prev, kind, fault)
        wanted = self.twin.frame(sent)
        decision = decide(self.row, verdict_of(sent), Situation(NOW, fresh=True))
        started = decision.act is Act.APPLY and self.row.state is not SyncState.SYNCED
        self.row = decision.row
        if started and self.waiting:  # as `apply` does it
            self.row = self.row._replace(work=self.row.work | Work.DRAIN)
        if decision.act is Act.BUFFER:
            self._buffer(sent)
        assert ("ok", "drop", "buffer", "desync", "reject")[decision.act] == wanted
        if fault != FORGED and not (fault == BAD_OPS and wanted == "reject"):
            self.seen = max(self.seen, number)

    def _buffer(self, sent: Sent) -> None:
        """As `apply` does it: at the limit the newest that is vouched for becomes the bound."""
        if sent in self.waiting:
            return
        if len(self.waiting) < ROOM:
            self.waiting.append(sent)
            return
        newest = max(rev_of(item.number) for item in [*self.waiting, sent])
        self.row = self.row._replace(min_rev=max(self.row.min_rev, newest))
        self.waiting.clear()

    # ---- fetches

    def _fetching(self) -> bool:
        return self.row.state is SyncState.BACKFILLING and not self.row.work & Work.DRAIN

    @precondition(lambda self: self.row.due and self.row.state is not SyncState.BACKFILLING)
    @rule()
    def claim(self) -> None:
        assert self.row.state is not SyncState.SYNCED
        work = self.row.work & ~Work.DRAIN
        self.row = self.row._replace(state=SyncState.BACKFILLING, due=1, work=work)
        self.twin.state, self.twin.applied = "backfilling", False

    @precondition(lambda self: self._fetching() and self.row.status.active)
    @rule(data=st.data(), lag=st.booleans())
    def fetched(self, data: st.DataObject, lag: bool) -> None:
        last = len(self.roots) - 1
        number = data.draw(st.integers(1, last), "number") if lag else last
        rev, row = rev_of(number), self.row
        mark = ""
        if rev < max(row.min_rev, row.rev):
            if not accepts_old(row, rev, TRIES):
                self._fail(BELOW_MIN_REV)
                return
            mark, self.seen = "accepted", number
        self.row = row._replace(complete=False, min_rev=rev if mark else max(row.min_rev, rev))
        verified = Verified(rev, root_of(self.roots[number]), b"commit", 1, 0, 0, 1)
        plan = Plan(DID, 0, verified, Path(), Path(), None, IDENTITY, None, mark)
        self.row = finished(self.row, plan, waiting=bool(self.waiting), now_us=NOW)
        self.twin.fetched(number, self.roots[number], bool(mark))

    @precondition(lambda self: self._fetching())
    @rule()
    def fails(self) -> None:
        self._fail("timeout")

    def _fail(self, reason: str) -> None:
        self.row = failed(self.row, Failure("retry", reason, ""), NOW, BACKFILL, 0.0)
        assert self.row.due > NOW
        self.twin.fail()

    @precondition(lambda self: self.row.work & Work.DRAIN)
    @rule()
    def replay(self) -> None:
        situation = Situation(NOW, draining=True, fresh=True)
        for sent in sorted(self.waiting, key=lambda item: item.order):
            self.row = decide(self.row, verdict_of(sent), situation).row
        self.waiting.clear()
        self.row = drained(self.row, situation, 5)
        self.twin.replay()

    # ---- the account's status

    @rule()
    def hides(self) -> None:
        self.row = with_status(self.row, AccountStatus.DEACTIVATED, NOW, ephemeral=False)
        self.twin.active = False

    @rule()
    def comes_back(self) -> None:
        if self.row.status.active:
            return
        self.row = with_status(self.row, AccountStatus.ACTIVE, NOW, ephemeral=False)
        self.twin.active = True
        if self.twin.state == "synced" and self.twin.need > self.twin.rev:
            self.twin.state = "desynchronized"

    # ---- what must hold

    @invariant()
    def they_agree(self) -> None:
        twin, row = self.twin, self.row
        assert (row.state.label, row.rev, row.min_rev) == (twin.state, rev_of(twin.rev), rev_of(twin.need))
        assert self.waiting == twin.waiting
        assert bool(row.work & Work.DRAIN) == twin.applied

    @invariant()
    def what_is_held_is_the_account_s_own(self) -> None:
        if self.row.rev:
            assert self.row.data == root_of(self.roots[self.twin.rev])

    @invariant()
    def the_rev_never_falls(self) -> None:
        assert self.row.min_rev >= self.row.rev
        assert self.twin.rev >= self.highest
        self.highest = self.twin.rev

    @invariant()
    def nothing_that_was_seen_is_missed(self) -> None:
        if self.row.state is SyncState.SYNCED and self.row.status.active and not self.row.work & Work.DRAIN:
            assert self.row.rev >= rev_of(self.seen)
            assert not self.waiting

    @invariant()
    def a_repository_that_is_not_synced_has_something_due(self) -> None:
        if self.row.status.active and self.row.state is not SyncState.SYNCED:
            assert self.row.due


def explore(examples: int, steps: int) -> None:
    limits = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    run_state_machine_as_test(Machine, settings=limits)


def test_whatever_comes_the_machine_does_what_the_twin_does() -> None:
    explore(50, 25)


@pytest.mark.slow
@pytest.mark.limit(180)
def test_whatever_comes_at_length() -> None:
    explore(500, 50)
