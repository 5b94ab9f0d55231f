"""Leaving hosts alone: slots, tokens, penalties, tiers, what is remembered."""

from __future__ import annotations

from typing import Any

import pytest

from indexer.backfill.hosts import BANNED, OVER_LIMIT, Hosts, Views, host_of
from indexer.backfill.tiers import Tiers
from indexer.backfill.waits import Allowance
from indexer.config import Settings
from indexer.store.host_rows import NO_HOST, HostRow, decode_host, encode_host

WALL = 1_800_000_000.0


class Clock:
    now = 100.0
    asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return self.now

    def wall(self) -> float:
        return WALL + self.now


def settings(hosts: dict[str, Any] | None = None, **backfill: Any) -> Settings:
    limits = {"per_host": 2, "retry_min": 5, "retry_max": 100, **backfill}
    return Settings(backfill=limits, hosts={"requests_per_s": 0, **(hosts or {})})


def made(clock: Clock | None = None, views: Views | None = None, **tables: Any) -> Hosts:
    clock = clock or Clock()
    return Hosts(settings(**tables), clock, views or Views(), clock.wall)


def us(clock: Clock, seconds: float = 0.0) -> int:
    return int((clock.wall() + seconds) * 1e6)


def test_the_host_of_an_origin() -> None:
    assert host_of("https://PDS.example.com") == "pds.example.com"
    assert host_of("https://PDS.example.com:443/") == "pds.example.com"
    assert host_of("http://localhost:2583/") == "localhost:2583"
    assert host_of("http://[::1") == ""
    assert host_of("") == ""


def test_a_row_comes_back_as_it_was() -> None:
    row = HostRow("trusted", True, "spam", 3, 1.5, 10, 1, 2, 3, 4, 5, 6, "slow")
    assert decode_host(encode_host(row)) == row
    assert decode_host(encode_host(NO_HOST)) == NO_HOST


# ---- slots and tokens


def test_one_host_has_so_many_slots() -> None:
    hosts = made()
    hosts.take("a")
    hosts.take("a")
    assert not hosts.free("a")
    assert hosts.free("b")
    hosts.release("a")
    assert hosts.free("a")


def test_a_host_gets_more_slots_with_each_good_answer_and_fewer_with_a_fault() -> None:
    hosts = made(per_host=8)
    taken = []
    for _ in range(10):
        before = 0
        while hosts.free("a"):
            hosts.take("a")
            before += 1
        for _ in range(before):
            hosts.release("a")
        taken.append(before)
        hosts.success("a")
    assert taken == [2, 3, 4, 5, 6, 7, 8, 8, 8, 8]
    hosts.fault("a", jitter=0.0)
    for _ in range(4):
        assert hosts.free("a")
        hosts.take("a")
    assert not hosts.free("a")


def test_a_host_is_asked_no_faster_than_its_tier_says() -> None:
    clock = Clock()
    hosts = made(clock, hosts={"requests_per_s": 4.0})
    for _ in range(4):
        assert hosts.free("a")
        hosts.take("a")
        hosts.release("a")
    assert not hosts.free("a")
    assert hosts.soonest_s(["a"]) == pytest.approx(0.25)
    assert hosts.free("b")
    clock.now += 0.25
    assert hosts.free("a")


def test_what_is_left_of_an_allowance_is_spread_until_it_returns() -> None:
    clock = Clock()
    hosts = made(clock)
    hosts.success("a", allowance=Allowance(remaining=10, reset_s=20.0, limit=3000))
    hosts.take("a")
    hosts.release("a")
    assert not hosts.free("a")
    clock.now += 2.0
    assert hosts.free("a")
    hosts.take("a")
    hosts.release("a")
    clock.now += 18.0  # its window ended
    for _ in range(50):
        assert hosts.free("a")
        hosts.take("a")
        hosts.release("a")


def test_a_used_up_allowance_rests_the_host() -> None:
    hosts = made()
    hosts.success("a", allowance=Allowance(0, 7.0, 100))
    assert hosts.penalty_s("a") == 7
    hosts.success("b", pause=8)
    assert hosts.penalty_s("b") == 8
    assert hosts.status() == {"active": 0, "penalized": 2, "known": 2}


# ---- penalties


def test_a_rate_limit_rests_the_host_for_as_long_as_it_asks() -> None:
    clock = Clock()
    hosts = made(clock)
    hosts.fault("a", jitter=0.0, retry_after=30, limited=True)
    assert not hosts.free("a")
    assert hosts.penalty_s("a") == 30
    clock.now += 30
    assert hosts.free("a")


def test_a_rate_limit_without_headers_rests_the_host_ten_seconds_growing() -> None:
    clock = Clock()
    hosts = made(clock)
    waits = []
    for _ in range(5):
        hosts.fault("a", jitter=0.0, limited=True)
        hosts.fault("a", jitter=0.0, limited=True)  # under way when the host was left alone
        waits.append(hosts.penalty_s("a"))
        clock.now += waits[-1]
    assert waits == [10, 20, 40, 80, 100]
    hosts.success("a")
    hosts.fault("a", jitter=0.0, limited=True)
    assert hosts.penalty_s("a") == 10


def test_single_faults_leave_the_host_in_use_and_a_row_of_them_does_not() -> None:
    hosts = made()
    for _ in range(3):
        hosts.fault("a", jitter=0.0)
    assert hosts.free("a")
    hosts.success("a")
    for _ in range(3):
        hosts.fault("a", jitter=0.0)
    assert hosts.free("a")
    hosts.fault("a", jitter=0.0)
    assert not hosts.free("a")


def test_a_row_of_wrong_repositories_rests_a_host_though_it_answers() -> None:
    hosts = made()
    for _ in range(3):
        hosts.success("a")
        hosts.lied("a", jitter=1.0)
    assert hosts.free("a")
    hosts.lied("a", jitter=1.0, error="signature")
    assert hosts.penalty_s("a") == 5
    assert hosts.row("a").error == "signature"
    hosts.proved("a")
    hosts.lied("a", jitter=1.0)
    assert hosts.penalty_s("a") == 5


# ---- tiers and an operator's word


def test_a_word_comes_before_rules_and_rules_before_the_default() -> None:
    tiers = Tiers(
        settings(
            {
                "tiers": ["big=8/0/0", "small=1/2.5/10"],
                "rules": ["*.big.example=big", "*.example=small"],
                "account_limit": 7,
            }
        )
    )
    assert tiers.of("other.test", NO_HOST) == ("default", 2, 0.0, 7)
    assert tiers.of("a.big.example", NO_HOST) == ("big", 8, 0.0, 0)
    assert tiers.of("a.big.example:8443", NO_HOST).name == "big"
    assert tiers.of("a.example", NO_HOST) == ("small", 1, 2.5, 10)
    assert tiers.of("a.example", HostRow(tier="big")).name == "big"
    assert tiers.of("a.example", HostRow(tier="left the settings")).name == "small"
    assert tiers.of("a.example", HostRow(tier="big", fetches=3, requests_per_s=0.5, accounts=1)) == (
        "big", 3, 0.5, 1,
    )  # fmt: skip


def test_a_banned_host_is_never_free_until_it_is_let_go() -> None:
    hosts = made()
    assert hosts.free("a")
    hosts.decided("a", HostRow(banned=True))
    assert (hosts.free("a"), hosts.held("a"), hosts.wait_s("a")) == (False, BANNED, float("inf"))
    hosts.decided("a", NO_HOST)
    assert (hosts.free("a"), hosts.held("a")) == (True, "")


def test_a_host_above_its_account_limit_is_held_back_until_a_word_lifts_it() -> None:
    accounts = {"a": 10, "b": 11}
    hosts = made(views=Views(accounts=accounts.__getitem__), hosts={"account_limit": 10})
    assert (hosts.held("a"), hosts.held("b")) == ("", OVER_LIMIT)
    assert hosts.state_of("b", hosts.row("b")) == "throttled"
    hosts.decided("b", HostRow(accounts=0))
    assert hosts.held("b") == ""


def test_a_word_takes_effect_at_once_and_leaves_what_was_seen() -> None:
    hosts = made()
    hosts.fault("a", jitter=0.0, error="slow")
    hosts.decided("a", HostRow(fetches=1, faults=99))
    assert (hosts.row("a").faults, hosts.row("a").fetches) == (1, 1)
    hosts.take("a")
    assert not hosts.free("a")


# ---- states


def test_the_states_of_a_host() -> None:
    clock = Clock()
    hosts = made(clock, hosts={"idle_after": 60})
    assert hosts.state_of("never asked", hosts.row("never asked")) == "idle"
    hosts.success("a")
    assert hosts.state_of("a", hosts.row("a")) == "active"
    hosts.fault("a", jitter=0.0, limited=True)
    assert hosts.state_of("a", hosts.row("a")) == "throttled"
    clock.now += 30
    assert hosts.state_of("a", hosts.row("a")) == "active"
    for _ in range(3):
        hosts.fault("a", jitter=0.0)
    assert hosts.state_of("a", hosts.row("a")) == "offline"
    hosts.success("a")
    clock.now += 61
    assert hosts.state_of("a", hosts.row("a")) == "idle"
    hosts.decided("a", HostRow(banned=True))
    assert hosts.state_of("a", hosts.row("a")) == "banned"


def test_what_changed_is_to_be_stored_once_and_good_answers_rarely() -> None:
    clock = Clock()
    hosts = made(clock)
    hosts.success("a")
    assert hosts.changed() == {"a": HostRow(first_us=us(clock), ok_us=us(clock))}
    for _ in range(1000):
        clock.now += 1
        hosts.success("a")
    assert hosts.changed() == {}
    clock.now += 3600
    hosts.success("a")
    assert hosts.changed()["a"].ok_us == us(clock)
    hosts.fault("a", jitter=0.0, retry_after=30, limited=True, error="rate_limited: x")
    row = hosts.changed()["a"]
    assert (row.faults, row.limits, row.until_us, row.error) == (1, 1, us(clock, 30), "rate_limited: x")


def test_a_penalty_comes_back_with_its_row() -> None:
    clock = Clock()
    rows = {"a": HostRow(until_us=us(clock, 40), limits=2, faults=2), "b": HostRow(banned=True)}
    hosts = made(clock, Views(read=rows.get))
    assert hosts.penalty_s("a") == pytest.approx(40)
    assert hosts.held("b") == BANNED
    clock.now += 41
    assert hosts.free("a")
    hosts.fault("a", jitter=0.0, limited=True)
    assert hosts.penalty_s("a") == pytest.approx(40)  # the third in a row


# ---- the table


def test_the_table_of_hosts_is_bounded() -> None:
    clock = Clock()
    hosts = made(clock, hosts={"in_memory": 64})
    hosts.take("kept")
    hosts.fault("penalized", jitter=0.0, retry_after=50)
    for number in range(1000):
        hosts.success(f"host{number}")
        assert len(hosts._hosts) <= 64
    assert hosts.penalty_s("penalized") == 50
    hosts.release("kept")


def test_rested_hosts_are_forgotten_too_and_come_back_from_their_rows() -> None:
    clock = Clock()
    rows: dict[str, HostRow] = {}
    hosts = made(clock, Views(read=rows.get), hosts={"in_memory": 100}, retry_max=10_000)
    hosts.take("fetching")
    hosts.fault("longest", jitter=0.0, retry_after=9_000)
    for number in range(1_000):
        hosts.fault(f"host{number}", jitter=0.0, retry_after=1_000 + number)
        assert len(hosts._hosts) <= 100
        rows.update(hosts.changed())
    assert hosts.penalty_s("longest") == 9_000
    assert hosts.penalty_s("host999") == 1_999
    assert hosts.penalty_s("host0") == pytest.approx(1_000)
    hosts.release("fetching")
    # A few questions for the time a fault; a table scanned for every new host would ask much more often.
    assert clock.asked < 10_000
