"""Words of many hosts, one effective status."""

from __future__ import annotations

import pytest

from indexer.identity.http import Response
from indexer.ingest.account import (
    CHECKED,
    effective,
    has_authority,
    host_and_port,
    is_stale,
    micros_of,
    status_of,
    with_status,
)
from indexer.ingest.identities import read_latest
from indexer.store.codecs import NEW_REPO, AccountStatus, AccountWord, RepoRow, SyncState, Work

A, D, T, X = (
    AccountStatus.ACTIVE, AccountStatus.DEACTIVATED, AccountStatus.TAKENDOWN, AccountStatus.DELETED,
)  # fmt: skip
PDS = "https://pds.test"
OWN, OLD = "pds::wss://pds.test", "pds::wss://old.test"
RELAY, OTHER = "wss://relay.test", "wss://other.test"
LISTED = "crawler::https://relay.test"


def word(source: str, status: AccountStatus, time: int = 1, seq: int = 1) -> AccountWord:
    return AccountWord(source, status, status is A, seq, time)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ([], A),
        ([word(RELAY, D)], D),
        ([word(RELAY, A), word(OTHER, D)], D),
        ([word(RELAY, T), word(OTHER, D)], T),
        ([word(OWN, A), word(RELAY, D)], A),
        ([word(OWN, D), word(RELAY, A)], D),
        ([word(OLD, D)], A),
        ([word(OLD, D), word(RELAY, A)], A),
        ([word(RELAY, D, 1), word(CHECKED, A, 2)], A),
        ([word(RELAY, D, 3), word(CHECKED, A, 2)], D),
        ([word(RELAY, T, 1), word(CHECKED, A, 2)], T),
        ([word(RELAY, D, 1), word(CHECKED, X, 2)], X),
        ([word(RELAY, A, 3), word(CHECKED, X, 2)], A),
        ([word(OWN, A, 3), word(CHECKED, D, 2)], A),
        ([word(LISTED, T, 1), word(RELAY, A, 2)], A),  # the same relay's list and stream
        ([word(LISTED, T, 2), word(RELAY, A, 1)], T),
        ([word(LISTED, T, 1), word(RELAY, A, 1)], T),
        ([word(LISTED, T, 1), word(OTHER, A, 2)], T),
        ([word(OWN, D, 1), word(CHECKED, A, 2)], A),
    ],
)
def test_the_current_pds_s_word_else_the_most_restrictive_as_checked(
    words: list[AccountWord], status: AccountStatus
) -> None:
    assert effective(words, PDS) is status
    assert effective(list(reversed(words)), PDS) is status


@pytest.mark.parametrize(
    ("source", "pds", "authority"),
    [
        (RELAY, "", True),
        (OWN, PDS, True),
        (OWN, "https://pds.test:443", True),
        (OWN, "https://pds.test:8443", False),
        (OLD, PDS, False),
        (OWN, "", False),
        ("pds::ws://127.0.0.1:2583", "http://127.0.0.1:2583", True),
    ],
)
def test_a_pds_speaks_for_its_own_accounts_only(source: str, pds: str, authority: bool) -> None:
    assert has_authority(source, pds) is authority


def test_hosts_compare_by_name_and_port() -> None:
    assert host_and_port("wss://PDS.test/") == host_and_port("https://pds.test") == "pds.test:443"
    assert host_and_port("https://pds.test:99999") == host_and_port("nonsense") == ""


@pytest.mark.parametrize(
    ("active", "text", "status"),
    [
        (True, None, A),
        (True, "throttled", A),
        (False, "deleted", X),
        (False, "throttled", AccountStatus.THROTTLED),
        (False, None, AccountStatus.UNKNOWN),
        (False, "something new", AccountStatus.UNKNOWN),
        (False, "active", AccountStatus.UNKNOWN),
    ],
)
def test_status_words(active: bool, text: str | None, status: AccountStatus) -> None:
    assert status_of(active, text) is status


def test_a_replayed_word_is_stale_unless_its_seq_or_time_is_newer() -> None:
    stored = word(RELAY, A, time=10, seq=10)
    assert is_stale(word(RELAY, D, time=9, seq=9), stored)
    assert is_stale(stored, stored)
    assert not is_stale(word(RELAY, D, time=11, seq=3), stored)
    assert not is_stale(word(RELAY, D, time=10, seq=11), stored)
    assert not is_stale(word(RELAY, D), None)


def test_frame_times() -> None:
    assert micros_of("1970-01-01T00:00:01.5Z") == 1_500_000
    assert micros_of("1970-01-01T01:00:00+01:00") == 0
    assert micros_of("0000-01-01T00:00:00Z") == 0


SYNCED = NEW_REPO._replace(tracked=True, state=SyncState.SYNCED, rev="b", min_rev="b")


@pytest.mark.parametrize(
    ("row", "state", "due"),
    [
        (SYNCED, SyncState.SYNCED, 0),
        (SYNCED._replace(min_rev="c"), SyncState.DESYNCHRONIZED, 7),
        (NEW_REPO, SyncState.PENDING, 7),
        (NEW_REPO._replace(due=9, attempt=3, error="slow: it was"), SyncState.PENDING, 9),
        (NEW_REPO._replace(due=9, attempt=3, error="repo_takendown: its host says so"), SyncState.PENDING, 7),
        (NEW_REPO._replace(state=SyncState.BACKFILLING, due=1), SyncState.BACKFILLING, 1),
    ],
)
def test_active_again_is_fetched_if_something_was_missed(row: RepoRow, state: SyncState, due: int) -> None:
    hidden = row._replace(status=D)
    again = with_status(hidden, A, 7, ephemeral=False)
    assert (again.status, again.state, again.due) == (A, state, due)
    assert bool(again.work & Work.COMPARE_REV) is (state is SyncState.SYNCED)
    assert with_status(hidden, A, 7, ephemeral=True) == hidden._replace(status=A)


def test_an_inactive_account_is_not_fetched() -> None:
    assert with_status(NEW_REPO._replace(due=5), T, 7, ephemeral=False) == NEW_REPO._replace(status=T)


@pytest.mark.parametrize(
    ("status", "body", "latest"),
    [
        (200, b'{"did":"did:plc:a","active":true,"rev":"3aaaaaaaaaa22"}', (A, "3aaaaaaaaaa22")),
        (200, b'{"did":"did:plc:a","active":false,"status":"takendown"}', (T, None)),
        (200, b'{"active":true,"rev":"not a tid"}', (A, None)),
        (200, b'{"active":"yes"}', (None, None)),
        (200, b"<html>", (None, None)),
        (400, b'{"error":"RepoNotFound"}', (X, None)),
        (400, b'{"error":"RepoDeactivated"}', (D, None)),
        (404, b"not here", (None, None)),
        (501, b'{"error":"MethodNotImplemented"}', (None, None)),
    ],
)
def test_answers_to_get_repo_status(
    status: int, body: bytes, latest: tuple[AccountStatus | None, str | None]
) -> None:
    assert read_latest(Response(status, {}, body, "")) == latest
