"""What a verified frame does to its repository: rows 5, 6, 13, first sight, resync states, ephemeral mode."""

from __future__ import annotations

import pytest

from indexer.atproto.mst import EMPTY_ROOT
from indexer.atproto.types import Cid
from indexer.ingest.machine import Act, Decision, Situation, decide, desynchronized, drained, scheduled
from indexer.ingest.verify import COMMIT, SYNC, Outcome, Verdict
from indexer.store.codecs import NEW_REPO, AccountStatus, RepoRow, SyncState, Work

NOW = 1_000_000
LIVE = Situation(NOW)
DRAIN = Situation(NOW, draining=True, fresh=True)
EPHEMERAL = Situation(NOW, ephemeral=True)
ROOT_1, ROOT_2, ROOT_3 = (b"\x01\x71\x12\x20" + bytes([n]) * 32 for n in (1, 2, 3))
REV_1, REV_2, REV_3 = "3aaaaaaaaaa22", "3aaaaaaaaab22", "3aaaaaaaaac22"

NEW = NEW_REPO._replace(tracked=True, signing_key="did:key:z", pds="https://pds.test")
SYNCED = NEW._replace(state=SyncState.SYNCED, rev=REV_1, min_rev=REV_1, data=ROOT_1, complete=True)
PENDING = NEW._replace(min_rev=REV_1, due=5)
BROKEN = SYNCED._replace(state=SyncState.DESYNCHRONIZED, due=5)
FETCHING = SYNCED._replace(state=SyncState.BACKFILLING, due=1)


def commit(
    rev: str = REV_2, prev: Cid | None = ROOT_1, data: Cid = ROOT_2, *, since: str | None = REV_1,
    outcome: Outcome = Outcome.OK, row: int = 0, reason: str = "",
) -> Verdict:  # fmt: skip
    return Verdict(outcome, row, reason, "", COMMIT, "did:plc:a", rev, since, prev, data)


def sync(rev: str = REV_2, data: Cid = ROOT_2) -> Verdict:
    return Verdict(Outcome.OK, 0, "", "", SYNC, "did:plc:a", rev, data=data)


def refused(row: int, reason: str, *, prev: Cid | None = ROOT_1, rev: str = REV_2) -> Verdict:
    return commit(rev, prev, outcome=Outcome.REJECT, row=row, reason=reason)


INSUFFICIENT = commit(outcome=Outcome.DESYNC, row=17, reason="insufficient")
TOO_BIG = commit(outcome=Outcome.DESYNC, row=3, reason="too_big")


def outcome(decision: Decision) -> tuple[Act, str]:
    return decision.act, decision.reason


def test_a_commit_on_the_stored_root_is_applied() -> None:
    decision = decide(SYNCED, commit(), LIVE)
    assert outcome(decision) == (Act.APPLY, "")
    assert decision.row == SYNCED._replace(rev=REV_2, min_rev=REV_2, data=ROOT_2)
    assert not decision.since_mismatch


def test_a_differing_since_alone_is_noted_and_applied() -> None:
    decision = decide(SYNCED, commit(since=REV_3), LIVE)
    assert decision.act is Act.APPLY
    assert decision.since_mismatch


@pytest.mark.parametrize("rev", [REV_1, "2aaaaaaaaaa22"])
@pytest.mark.parametrize("verdict", [commit(), sync(), refused(12, "signature"), TOO_BIG])
def test_row_6_what_is_not_newer_is_dropped_whatever_else_is_wrong(rev: str, verdict: Verdict) -> None:
    decision = decide(SYNCED, verdict._replace(rev=rev), LIVE)
    assert outcome(decision) == (Act.DROP, "stale_rev")
    assert decision.row == SYNCED


def test_row_5_an_inactive_account_s_frames_are_dropped_and_remembered_as_missed() -> None:
    hidden = SYNCED._replace(status=AccountStatus.DEACTIVATED)
    decision = decide(hidden, commit(), LIVE)
    assert outcome(decision) == (Act.DROP, "inactive")
    assert decision.row == hidden._replace(min_rev=REV_2)
    assert decide(hidden, refused(12, "signature"), LIVE).row == hidden


def test_a_frame_that_waited_since_the_account_was_active_is_applied() -> None:
    hidden = SYNCED._replace(status=AccountStatus.TAKENDOWN)
    assert decide(hidden, commit(), DRAIN).act is Act.APPLY
    assert decide(hidden._replace(status=AccountStatus.DELETED), commit(), DRAIN).act is Act.DROP


def test_rows_1_and_2_come_before_everything() -> None:
    verdict = refused(1, "fields", rev="")
    assert outcome(decide(SYNCED._replace(status=AccountStatus.DELETED), verdict, LIVE)) == (
        Act.REJECT,
        "fields",
    )


@pytest.mark.parametrize("row", [SYNCED, PENDING, BROKEN, FETCHING, NEW])
def test_a_refused_frame_changes_nothing(row: RepoRow) -> None:
    decision = decide(row, refused(15, "ops"), LIVE)
    assert outcome(decision) == (Act.REJECT, "ops")
    assert decision.row == row


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (commit(prev=ROOT_3), "prev_data"),
        (commit(prev=None), "prev_data"),
        (refused(15, "ops", prev=None), "prev_data"),
        (INSUFFICIENT, "insufficient"),
        (TOO_BIG, "too_big"),
        (sync(), "sync"),
    ],
)
def test_row_13_a_break_desynchronizes_and_asks_for_a_newer_fetch(verdict: Verdict, reason: str) -> None:
    decision = decide(SYNCED, verdict, LIVE)
    assert outcome(decision) == (Act.DESYNC, reason)
    assert decision.row == SYNCED._replace(
        state=SyncState.DESYNCHRONIZED, min_rev=REV_2, due=NOW, error=reason
    )


def test_a_sync_frame_with_our_root_moves_the_rev() -> None:
    decision = decide(SYNCED, sync(data=ROOT_1), LIVE)
    assert decision.act is Act.APPLY
    assert (decision.row.rev, decision.row.data) == (REV_2, ROOT_1)


@pytest.mark.parametrize("verdict", [commit(prev=None), commit(prev=EMPTY_ROOT), sync(data=EMPTY_ROOT)])
def test_a_first_commit_from_the_empty_tree_is_a_base_without_a_fetch(verdict: Verdict) -> None:
    decision = decide(NEW._replace(due=NOW + 5), verdict, LIVE)
    assert decision.act is Act.APPLY
    assert decision.row.state is SyncState.SYNCED
    assert decision.row.complete
    assert (decision.row.rev, decision.row.due) == (REV_2, 0)


@pytest.mark.parametrize("verdict", [commit(), sync(), INSUFFICIENT, TOO_BIG])
def test_any_other_first_sight_is_fetched(verdict: Verdict) -> None:
    decision = decide(NEW, verdict, LIVE)
    assert outcome(decision) == (Act.DROP, "pending")
    assert decision.row == NEW._replace(min_rev=REV_2, due=NOW)


def test_a_repository_once_seen_never_starts_from_the_empty_tree_again() -> None:
    assert decide(PENDING, commit(prev=EMPTY_ROOT), LIVE).act is Act.DROP
    assert decide(BROKEN, commit(prev=EMPTY_ROOT), LIVE).act is Act.DROP


@pytest.mark.parametrize("row", [PENDING, BROKEN])
def test_while_a_fetch_is_awaited_commits_only_raise_min_rev(row: RepoRow) -> None:
    decision = decide(row, commit(), LIVE)
    assert decision.act is Act.DROP
    assert decision.row == row._replace(min_rev=REV_2)


@pytest.mark.parametrize("verdict", [commit(), sync(), INSUFFICIENT])
def test_while_it_is_fetched_frames_are_buffered_and_then_checked(verdict: Verdict) -> None:
    assert outcome(decide(FETCHING, verdict, LIVE)) == (Act.BUFFER, "backfilling")
    assert decide(FETCHING, verdict, DRAIN).act is not Act.BUFFER
    assert decide(FETCHING, commit(), DRAIN).row.state is SyncState.BACKFILLING


def test_frames_queue_up_behind_those_that_wait() -> None:
    behind = Situation(NOW, waiting=True)
    assert outcome(decide(SYNCED, commit(), behind)) == (Act.BUFFER, "waiting")
    assert decide(SYNCED, refused(15, "ops"), behind).act is Act.REJECT
    assert decide(SYNCED, commit(rev=REV_1), behind).act is Act.DROP


def test_row_12_a_bad_signature_gets_one_fresh_key() -> None:
    stale = decide(SYNCED, refused(12, "signature"), LIVE)
    assert outcome(stale) == (Act.BUFFER, "signature")
    assert stale.row.work == Work.RESOLVE
    fresh = decide(SYNCED, refused(12, "signature"), DRAIN)
    assert outcome(fresh) == (Act.REJECT, "signature")
    assert fresh.row == SYNCED._replace(work=int(Work.COMPARE_REV))


def test_row_4_a_foreign_host_is_asked_about_once_and_then_refused() -> None:
    stale = decide(SYNCED, commit(), Situation(NOW, authority=False))
    assert outcome(stale) == (Act.BUFFER, "authority")
    assert stale.row.work == Work.RESOLVE
    fresh = decide(SYNCED, commit(), Situation(NOW, authority=False, fresh=True, draining=True))
    assert outcome(fresh) == (Act.REJECT, "authority")
    assert fresh.row == SYNCED._replace(work=int(Work.COMPARE_REV))


@pytest.mark.parametrize("row", [8, 9, 10, 11])
def test_what_no_identity_can_make_right_waits_for_none(row: int) -> None:
    foreign = Situation(NOW, authority=False)
    assert outcome(decide(SYNCED, refused(row, "car"), foreign)) == (Act.REJECT, "car")
    assert decide(SYNCED, refused(row, "car"), foreign).row == SYNCED


def test_ephemeral_any_proven_commit_is_a_base() -> None:
    decision = decide(NEW, commit(), EPHEMERAL)
    assert decision.act is Act.APPLY
    assert not decision.gap
    assert (decision.row.state, decision.row.due) == (SyncState.SYNCED, 0)


@pytest.mark.parametrize("row", [SYNCED._replace(data=ROOT_3), BROKEN._replace(due=0)])
@pytest.mark.parametrize("verdict", [commit(), sync()])
def test_ephemeral_a_break_begins_a_new_chain_and_tells_of_the_gap(row: RepoRow, verdict: Verdict) -> None:
    decision = decide(row, verdict, EPHEMERAL)
    assert outcome(decision) == (Act.APPLY, "gap")
    assert decision.gap
    assert decision.row.data == ROOT_2


@pytest.mark.parametrize("verdict", [INSUFFICIENT, TOO_BIG, commit(prev=None)])
def test_ephemeral_what_proves_nothing_is_no_base(verdict: Verdict) -> None:
    decision = decide(SYNCED, verdict, EPHEMERAL)
    assert decision.act is Act.DESYNC
    assert (decision.row.state, decision.row.due) == (SyncState.DESYNCHRONIZED, 0)


def test_ephemeral_the_chain_goes_on_without_a_gap() -> None:
    assert not decide(SYNCED, commit(), EPHEMERAL).gap
    assert not decide(SYNCED, sync(data=ROOT_1), EPHEMERAL).gap


def test_a_planned_fetch_keeps_its_time_unless_only_a_first_commit_was_awaited() -> None:
    assert scheduled(NEW._replace(due=NOW + 9), NOW).due == NOW
    assert scheduled(NEW._replace(due=NOW + 9, attempt=2), NOW).due == NOW + 9
    assert scheduled(NEW, NOW).due == NOW
    assert scheduled(PENDING, NOW).due == 5


def test_min_rev_is_never_below_the_stored_rev() -> None:
    assert desynchronized(SYNCED._replace(min_rev=""), "x", LIVE).min_rev == REV_1


def test_a_drained_fetch_is_synced_unless_its_buffer_overflowed() -> None:
    ready = FETCHING._replace(work=int(Work.DRAIN))
    assert drained(ready, LIVE, 7) == ready._replace(state=SyncState.SYNCED, due=0, work=0)
    short = drained(ready._replace(min_rev=REV_3), LIVE, 7)
    assert (short.state, short.due, short.error) == (SyncState.DESYNCHRONIZED, NOW, "buffer_overflow")
    assert drained(FETCHING, LIVE, 7) == FETCHING


def test_a_repository_only_heard_of_is_fetched_after_a_pause() -> None:
    assert drained(NEW, LIVE, 7).due == NOW + 7
    assert drained(PENDING._replace(due=0), LIVE, 7).due == NOW
    assert drained(NEW._replace(status=AccountStatus.SUSPENDED), LIVE, 7).due == 0
    assert drained(NEW, EPHEMERAL, 7).due == 0
    assert drained(SYNCED, LIVE, 7) == SYNCED
