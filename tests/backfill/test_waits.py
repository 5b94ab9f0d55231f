"""The arithmetic of waiting."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.backfill.waits import Allowance, Bucket, allowance_of, backoff_s, exhausted_s, limited_s
from indexer.identity.http import reset_s

NOW = 1_800_000_000.0


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


def test_a_rate_limit_waits_ten_seconds_growing_unless_it_says_how_long() -> None:
    assert [limited_s(n, 10, 60, jitter=0.0, asked=None) for n in (1, 2, 3, 4)] == [10, 20, 40, 60]
    assert limited_s(4, 10, 60, jitter=0.0, asked=3) == 3
    assert limited_s(1, 10, 60, jitter=1.0, asked=None) == 11


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


@pytest.mark.parametrize(
    ("headers", "allowance"),
    [
        ({}, None),
        ({"ratelimit-remaining": "5"}, None),
        ({"ratelimit-remaining": "many", "ratelimit-reset": "30"}, None),
        ({"ratelimit-remaining": "5", "ratelimit-reset": "30"}, Allowance(5, 30.0, 0)),
        (
            {"ratelimit-remaining": "5", "ratelimit-reset": "30", "ratelimit-limit": "3000"},
            Allowance(5, 30.0, 3000),
        ),
        (
            {"ratelimit-remaining": "5", "ratelimit-reset": "30", "ratelimit-limit": "a lot"},
            Allowance(5, 30.0, 0),
        ),
    ],
)
def test_what_headers_say_of_an_allowance(headers: dict[str, str], allowance: Allowance | None) -> None:
    assert allowance_of(headers, NOW) == allowance


def test_a_host_is_spared_when_a_quarter_of_its_allowance_is_left() -> None:
    assert Allowance(750, 100.0, 3000).requests_per_s is None
    assert Allowance(700, 100.0, 3000).requests_per_s == 7.0
    assert Allowance(0, 100.0, 3000).requests_per_s is None
    assert Allowance(0, 100.0, 3000).pause == 100.0


def test_a_bucket_lets_through_what_its_rate_allows() -> None:
    bucket = Bucket(2.0, 0.0)
    now, passed = 0.0, []
    while now < 10.0:
        if (wait := bucket.wait_s(2.0, now)) > 0:
            now += wait
            continue
        bucket.tokens -= 1.0
        passed.append(now)
    assert len(passed) in (21, 22)
    assert max(b - a for a, b in pairwise(passed[2:])) == pytest.approx(0.5)


def test_a_pause_fills_the_bucket_for_one_second_and_no_more() -> None:
    bucket = Bucket(0.0, 0.0)
    assert bucket.refill(5.0, 1000.0) == 5.0
    assert bucket.refill(0.1, 2000.0) == 1.0
