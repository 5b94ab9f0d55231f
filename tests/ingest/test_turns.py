"""Turns with hosts: slots by place, who is next, rests after failures."""

from __future__ import annotations

from indexer.errors import FetchTransient
from indexer.ingest.turns import HostTurns, Place, Turns, host_place

KIND, HOST = Place("kind", 3), host_place("a.test", 2)


async def test_slots_are_bounded_and_the_next_one_is_called() -> None:
    called: list[str] = []
    turns = Turns(called.append, (1.0, 300.0), 100)
    with turns.taken([KIND, HOST]):
        with turns.taken([KIND, HOST]):
            assert turns.wait_s("c", [KIND, HOST]) >= 30
            assert turns.wait_s("d", [KIND, HOST]) >= 30
            assert turns.wait_s("e", [KIND, host_place("b.test", 2)]) == 0
            assert called == []
        assert called == ["c"]
        assert turns.wait_s("c", [KIND, HOST]) == 0
    assert called == ["c", "d"]


async def test_a_host_that_fails_rests_and_what_else_was_under_way_tells_nothing_new() -> None:
    turns = Turns(lambda _: None, (1.0, 300.0), 100)
    for _ in range(5):
        turns.failed(HOST.name)
    assert 0.9 < turns.wait_s("a", [HOST]) <= 1.1
    turns.failed(HOST.name, retry_after=100.0)
    assert 99 < turns.wait_s("a", [HOST]) <= 101
    assert turns.wait_s("a", [host_place("b.test", 1)]) == 0
    turns.answered(HOST.name)
    assert turns.wait_s("a", [HOST]) == 0


async def test_many_who_wait_come_back_one_after_another() -> None:
    turns = Turns(lambda _: None, (1.0, 300.0), 100)
    with turns.taken([host_place("a.test", 1)]):
        waits = [turns.wait_s(f"d{n}", [host_place("a.test", 1)]) for n in range(1000)]
    assert waits == sorted(waits)
    assert waits[-1] >= 60


async def test_idle_places_are_forgotten() -> None:
    turns = Turns(lambda _: None, (1.0, 300.0), 10)
    with turns.taken([HOST]):
        for number in range(1000):
            assert turns.wait_s("a", [host_place(f"h{number}", 1)]) == 0
        assert len(turns) <= 12
        assert turns.wait_s("a", [host_place("a.test", 1)]) > 0


class Manners:
    """Hosts as the fetches know them."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float | None, bool]] = []
        self.rest = 0.0

    def penalty_s(self, host: str) -> float:
        return self.rest

    def success(self, host: str) -> None:
        self.told.append((host, None, False))

    def fault(
        self, host: str, *, jitter: float, retry_after: float | None, limited: bool, error: str
    ) -> None:
        assert 0 <= jitter < 1
        self.told.append((host, retry_after, limited))


async def test_what_fetches_and_questions_learn_of_hosts_counts_for_both() -> None:
    turns, manners = HostTurns(lambda _: None, (1.0, 300.0), 100), Manners()
    turns.manners = manners
    assert turns.wait_s("a", [KIND, HOST]) == 0
    manners.rest = 7.0
    assert turns.wait_s("a", [KIND, HOST]) == 7.0
    manners.rest = float("inf")  # banned: it is not asked anyway
    assert turns.wait_s("a", [KIND, HOST]) == 0
    turns.told("a.test", None)
    turns.told("a.test", FetchTransient("slow down", retry_after=9.0, reason="rate_limited"))
    assert manners.told == [("a.test", None, False), ("a.test", 9.0, True)]
