"""Waiting, and leaving hosts alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.backfill import hosts as module
from indexer.backfill.hosts import Hosts, backoff_s, exhausted_s, host_of
from indexer.identity.http import reset_s

NOW = 1_800_000_000.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_wait_doubles_up_to_the_longest() -> None:
    waits = [backoff_s(attempt, 5, 100, jitter=1.0) for attempt in range(1, 8)]
    assert waits == [5, 10, 20, 40, 80, 100, 100]


@given(st.integers(1, 10_000), st.floats(0, 0.999), st.none() | st.floats(0, 1e12))
def test_a_wait_is_bounded_and_not_shorter_than_asked(
    attempt: int, jitter: float, asked: float | None
) -> None:
    wait = backoff_s(attempt, 5, 3600, jitter=jitter, retry_after=asked)
    assert 2.5 <= wait <= 3600 * 1.1
    assert asked is None or wait >= min(asked, 3600)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1800000030", 30.0), ("30", 30.0), ("1700000000", 0.0), ("", None), ("-1", None), ("x", None)],
)
def test_a_rate_limit_ends_at_a_moment_or_after_seconds(value: str, seconds: float | None) -> None:
    assert reset_s({"ratelimit-reset": value}, NOW) == seconds


def test_a_good_answer_asks_for_a_pause_only_when_nothing_is_left() -> None:
    headers = {"ratelimit-remaining": "1", "ratelimit-reset": "30"}
    assert exhausted_s(headers, NOW) is None
    assert exhausted_s(headers | {"ratelimit-remaining": "0"}, NOW) == 30.0


def test_the_host_of_an_origin() -> None:
    assert host_of("https://PDS.example.com") == "pds.example.com"
    assert host_of("http://localhost:2583/") == "localhost:2583"
    assert host_of("") == ""


def test_one_host_has_so_many_slots() -> None:
    hosts = Hosts(2, 5, 100, Clock())
    hosts.take("a")
    hosts.take("a")
    assert not hosts.free("a")
    assert hosts.free("b")
    hosts.release("a")
    assert hosts.free("a")


def test_a_rate_limit_rests_the_host_for_as_long_as_it_asks() -> None:
    clock = Clock()
    hosts = Hosts(2, 5, 100, clock)
    hosts.fault("a", jitter=0.0, retry_after=30, limited=True)
    assert not hosts.free("a")
    assert hosts.penalty_s("a") == 30
    clock.now += 30
    assert hosts.free("a")


def test_a_rate_limit_without_headers_rests_the_host_too() -> None:
    hosts = Hosts(2, 5, 100, Clock())
    hosts.fault("a", jitter=0.0, limited=True)
    assert not hosts.free("a")


def test_single_faults_leave_the_host_in_use_and_a_row_of_them_does_not() -> None:
    hosts = Hosts(2, 5, 100, Clock())
    for _ in range(3):
        hosts.fault("a", jitter=0.0)
    assert hosts.free("a")
    hosts.success("a")
    for _ in range(3):
        hosts.fault("a", jitter=0.0)
    assert hosts.free("a")
    hosts.fault("a", jitter=0.0)
    assert not hosts.free("a")


def test_a_used_up_allowance_rests_the_host() -> None:
    hosts = Hosts(2, 5, 100, Clock())
    hosts.success("a", pause=7)
    assert hosts.penalty_s("a") == 7
    assert hosts.status() == {"active": 0, "penalized": 1}


def test_the_table_of_hosts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HOSTS", 10)
    hosts = Hosts(2, 5, 100, Clock())
    hosts.take("kept")
    hosts.fault("penalized", jitter=0.0, retry_after=50)
    for number in range(100):
        hosts.success(f"host{number}")
    assert len(hosts._hosts) <= 10
    assert hosts.penalty_s("penalized") == 50
    hosts.release("kept")


def test_rested_hosts_are_forgotten_too_the_one_that_rests_longest_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_HOSTS", 100)
    clock = CountingClock()
    hosts = Hosts(2, 5, 10_000, clock)
    hosts.take("fetching")
    hosts.fault("longest", jitter=0.0, retry_after=9_000)
    for number in range(1_000):
        hosts.fault(f"host{number}", jitter=0.0, retry_after=1_000 + number)
        assert len(hosts._hosts) <= 100
    assert hosts.penalty_s("longest") == 9_000
    assert hosts.penalty_s("host999") == 1_999
    assert hosts.penalty_s("host0") == 0
    hosts.release("fetching")
    # Each fault asks once for the time; a table scanned for every new host would ask much more often.
    assert clock.asked < 1_100


class CountingClock(Clock):
    asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return self.now
