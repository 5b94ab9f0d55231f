"""The per-repository state machine: what a verified frame does to its repository.

Owns rows 5, 6 and 13 of the commit table, first sight, the resync states, `min_rev`, and the rules of
ephemeral mode (sync.md §2). Pure decisions on a `RepoRow` and a `Verdict`; who stores them, buffers
frames or asks the network is decided elsewhere. Any thread.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from indexer.atproto.mst import EMPTY_ROOT
from indexer.atproto.types import Micros, Rev
from indexer.ingest.verify import COMMIT, FIELDS_ROW, SIGNATURE_ROW, Outcome, Verdict
from indexer.store.codecs import AccountStatus, RepoRow, SyncState, Work


class Act(IntEnum):
    APPLY = 0  # write the frame's changes; the row is the new state
    DROP = 1  # stale or out of scope
    BUFFER = 2  # cannot be decided now; keep the frame with its repository
    DESYNC = 3  # our copy is unproven from here on
    REJECT = 4  # conclusively bad


LABELS = ("ok", "drop", "buffer", "desync", "reject")


class Decision(NamedTuple):
    """``row`` is what the repository's row becomes (equal to the old one: nothing to store)."""

    act: Act
    reason: str
    row: RepoRow
    gap: bool = False  # ephemeral mode: the chain broke and begins anew with this frame
    since_mismatch: bool = False


class Situation(NamedTuple):
    """What the decision needs to know besides the row and the verdict."""

    now_us: Micros
    ephemeral: bool = False
    waiting: bool = False  # earlier frames of the same source wait in the repository's buffer
    draining: bool = False  # the frame comes from the buffer; nothing stands before it
    authority: bool = True  # the source is a relay, or the account's own PDS
    fresh: bool = False  # the identity was asked for after the frame came in, and no hint since


def decide(row: RepoRow, verdict: Verdict, situation: Situation) -> Decision:
    """What one verified frame does, in the precedence of sync.md §2: rows 0–2, DROP, REJECT, DESYNC."""
    if verdict.outcome is Outcome.REJECT and verdict.row <= FIELDS_ROW:
        return Decision(Act.REJECT, verdict.reason, row)
    if not _takes_frames(row, situation):
        return Decision(Act.DROP, "inactive", _raised(row, verdict))
    if verdict.rev <= row.rev:
        return Decision(Act.DROP, "stale_rev", row)
    if verdict.outcome is Outcome.REJECT and verdict.row < SIGNATURE_ROW and not verdict.ahead:
        return Decision(Act.REJECT, verdict.reason, row)  # no identity could make it right
    if not situation.authority:
        return _unproven(row, "authority", situation)
    if verdict.outcome is Outcome.REJECT:
        if verdict.reason == "signature":
            return _unproven(row, "signature", situation)
        if verdict.ahead:
            return Decision(Act.REJECT, verdict.reason, _made_up_for(row, verdict))
        if not (verdict.signed and _unlinked(row, verdict)):
            return Decision(Act.REJECT, verdict.reason, row)
    if situation.waiting and not situation.draining:
        return Decision(Act.BUFFER, "waiting", row)
    if situation.ephemeral:
        return _decide_ephemeral(row, verdict)
    return _decide_by_state(row, verdict, situation)


def _takes_frames(row: RepoRow, situation: Situation) -> bool:
    """Row 5. A frame that waited came in while the account was active, before the word that hid it."""
    if situation.draining:
        return row.status is not AccountStatus.DELETED
    return row.status.active


def _decide_by_state(row: RepoRow, verdict: Verdict, situation: Situation) -> Decision:
    if is_first_sight(row) and _starts_from_empty(verdict):
        base = row._replace(complete=True, sparse=False)
        return Decision(Act.APPLY, "", advanced(base, verdict, SyncState.SYNCED))
    if row.state is SyncState.BACKFILLING and not situation.draining:
        return Decision(Act.BUFFER, "backfilling", row)
    if row.state in (SyncState.PENDING, SyncState.DESYNCHRONIZED):
        return Decision(Act.DROP, row.state.label, scheduled(_raised(row, verdict), situation.now_us))
    return _decide_on_chain(row, verdict, situation)


def _decide_on_chain(row: RepoRow, verdict: Verdict, situation: Situation) -> Decision:
    """The repository is synced, or becomes so with the frames that are replayed now."""
    if verdict.kind != COMMIT:
        reason = "" if verdict.data == row.data else "sync"
    elif verdict.outcome is Outcome.DESYNC:
        reason = verdict.reason
    else:
        reason = "" if verdict.prev_data is not None and verdict.prev_data == row.data else "prev_data"
    if reason:
        return Decision(Act.DESYNC, reason, desynchronized(row, reason, situation, verdict.rev))
    mismatch = verdict.kind == COMMIT and verdict.since is not None and verdict.since != row.rev
    return Decision(Act.APPLY, "", advanced(row, verdict, row.state), since_mismatch=mismatch)


def _decide_ephemeral(row: RepoRow, verdict: Verdict) -> Decision:
    """No record is kept: any frame that proves itself can be the base of a chain."""
    first = is_first_sight(row)
    linked = verdict.prev_data if verdict.kind == COMMIT else verdict.data
    if verdict.outcome is Outcome.DESYNC or _unlinked(row, verdict):
        reason = verdict.reason if verdict.outcome is Outcome.DESYNC else "prev_data"
        broken = row._replace(state=SyncState.DESYNCHRONIZED, min_rev=max(row.min_rev, verdict.rev))
        return Decision(Act.DESYNC, reason, broken)
    gap = not first and (row.state is not SyncState.SYNCED or linked != row.data)
    return Decision(Act.APPLY, "gap" if gap else "", advanced(row, verdict, SyncState.SYNCED), gap=gap)


def _unproven(row: RepoRow, reason: str, situation: Situation) -> Decision:
    """Rows 4 and 12: a stale identity gets one refresh; after it the frame is refused."""
    if not situation.fresh:
        return Decision(Act.BUFFER, reason, row._replace(work=row.work | Work.RESOLVE))
    # Newer than ours by its own word: its host is asked once.
    return Decision(Act.REJECT, reason, row._replace(work=row.work | Work.COMPARE_REV))


def _made_up_for(row: RepoRow, verdict: Verdict) -> RepoRow:
    """Row 7 refused what the account signed: when our clock is right again, nobody sends it anew.

    So its host is asked for its rev; a repository that is being fetched has to be at least as new.
    """
    if row.state is SyncState.SYNCED:
        return row._replace(work=row.work | Work.COMPARE_REV)
    if row.state is SyncState.BACKFILLING:
        return row._replace(min_rev=max(row.min_rev, verdict.rev))
    return row  # a fetch is due


def is_first_sight(row: RepoRow) -> bool:
    """No commit of this repository was ever taken notice of."""
    return row.state is SyncState.PENDING and not row.rev and not row.min_rev


def _starts_from_empty(verdict: Verdict) -> bool:
    if verdict.outcome is not Outcome.OK:
        return False
    if verdict.kind == COMMIT:
        return verdict.prev_data is None or verdict.prev_data == EMPTY_ROOT
    return verdict.data == EMPTY_ROOT


def _unlinked(row: RepoRow, verdict: Verdict) -> bool:
    """A commit without ``prevData`` on a known repository: rows 14–17 prove nothing about it."""
    return verdict.kind == COMMIT and verdict.prev_data is None and not is_first_sight(row)


def _raised(row: RepoRow, verdict: Verdict) -> RepoRow:
    """`min_rev` at least at this frame, which its signature vouches for."""
    if not verdict.signed or verdict.rev <= row.min_rev:
        return row
    return row._replace(min_rev=verdict.rev)


def advanced(row: RepoRow, verdict: Verdict, state: SyncState) -> RepoRow:
    """The row with the frame's commit as the newest one; its block is filled in by who applies it."""
    idle = state is SyncState.SYNCED
    return row._replace(
        state=state,
        rev=verdict.rev,
        data=verdict.data,
        min_rev=max(row.min_rev, verdict.rev),
        due=0 if idle else row.due,
        error="" if idle else row.error,
        attempt=0 if idle else row.attempt,
    )


def scheduled(row: RepoRow, now_us: Micros) -> RepoRow:
    """The row with a fetch due: at once when none is planned or only a first commit was awaited."""
    awaiting = row.state is SyncState.PENDING and not row.rev and row.attempt == 0 and not row.error
    if row.due == 0 or (awaiting and row.due > now_us):
        return row._replace(due=now_us)
    return row


def desynchronized(row: RepoRow, reason: str, situation: Situation, seen: Rev = "") -> RepoRow:
    """The row after a break: a fetch is due, and only one at least as new as ``seen`` will do."""
    broken = row._replace(
        state=SyncState.DESYNCHRONIZED, min_rev=max(row.min_rev, row.rev, seen), error=reason, attempt=0
    )
    return broken if situation.ephemeral else broken._replace(due=situation.now_us)


def drained(row: RepoRow, situation: Situation, first_sight_us: Micros) -> RepoRow:
    """The row once nothing waits in its buffer and its identity is known.

    A fetched repository is synced now. One that was only heard of gets its fetch, after a pause in which
    a new account's first commit may make it needless.
    """
    fetched = row.state is SyncState.BACKFILLING and row.work & Work.DRAIN
    row = row._replace(work=row.work & ~Work.DRAIN)
    if fetched:
        if row.min_rev > row.rev:  # the buffer overflowed while the repository was fetched
            return desynchronized(row, "buffer_overflow", situation)
        return row._replace(state=SyncState.SYNCED, due=0)
    unplanned = row.due == 0 and row.status.active and not situation.ephemeral
    if unplanned and row.state in (SyncState.PENDING, SyncState.DESYNCHRONIZED):
        pause = first_sight_us if is_first_sight(row) else 0
        return row._replace(due=situation.now_us + pause)
    return row
