from __future__ import annotations

import asyncio
from time import monotonic

from hypothesis import given
from hypothesis import strategies as st

from indexer.identity.cache import Pace, TtlCache


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_entry_lives_as_long_as_it_was_told() -> None:
    clock = Clock()
    cache: TtlCache[str, int] = TtlCache(10, clock=clock)
    cache.put("a", 1, 5)
    cache.put("b", 2, 10)
    clock.now += 4.9
    assert cache.get("a") == 1
    clock.now += 0.1
    assert cache.get("a") is None
    assert cache.get("b") == 2
    assert len(cache) == 1


def test_the_least_recently_used_goes_first() -> None:
    cache: TtlCache[str, int] = TtlCache(2, clock=Clock())
    cache.put("a", 1, 5)
    cache.put("b", 2, 5)
    assert cache.get("a") == 1
    cache.put("c", 3, 5)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
    cache.put("a", 4, 5)
    assert (cache.get("a"), len(cache)) == (4, 2)


def test_expired_entries_do_not_wait_for_the_cache_to_be_full() -> None:
    clock = Clock()
    cache: TtlCache[int, int] = TtlCache(1_000, clock=clock)
    for number in range(500):
        cache.put(number, number, 5)
        clock.now += 1
        cache.get(number // 2)  # one in use, which may hold back others, though not for long
    assert len(cache) <= 2 * 5
    cache.put(1_000, 0, 0)
    assert cache.get(1_000) is None


def test_a_dropped_entry_is_gone() -> None:
    cache: TtlCache[str, int] = TtlCache(2, clock=Clock())
    cache.put("a", 1, 5)
    cache.drop("a")
    cache.drop("never there")
    assert cache.get("a") is None


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=60), st.integers(1, 4))
def test_the_cache_is_never_larger_than_told(steps: list[tuple[str, bool]], capacity: int) -> None:
    cache: TtlCache[str, str] = TtlCache(capacity, clock=Clock())
    recent: list[str] = []
    for key, write in steps:
        if write:
            cache.put(key, key, 1)
        elif cache.get(key) is None:
            continue
        recent = ([item for item in recent if item != key] + [key])[-capacity:]
    assert len(cache) == len(recent)
    assert all(cache.get(key) == key for key in recent)


async def test_requests_are_spaced() -> None:
    pace, start = Pace(200.0), monotonic()
    await asyncio.gather(*[pace.wait() for _ in range(11)])
    assert monotonic() - start >= 0.049


async def test_a_pause_holds_everyone_back() -> None:
    pace, start = Pace(1e6), monotonic()
    pace.pause(0.03)
    await pace.wait()
    assert monotonic() - start >= 0.029
