"""What a fetched repository changes in the stored one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from indexer.backfill.diff import Changes, diff, joined
from indexer.backfill.verify import IndexEntry
from indexer.store.codecs import RecordRow

T = TypeVar("T")

paths = st.builds(lambda name, number: f"col.{name}/{number:02}", st.sampled_from("abc"), st.integers(0, 30))
repos = st.dictionaries(paths, st.integers(0, 3), max_size=40)


def cid(number: int) -> bytes:
    return bytes([number]) * 36


def pages(items: Sequence[T], size: int) -> Iterator[list[T]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))


def fetched(repo: dict[str, int], size: int) -> Iterator[list[IndexEntry]]:
    return pages([(path, cid(value), 0, 1, 0) for path, value in sorted(repo.items())], size)


def stored(repo: dict[str, int], size: int) -> Iterator[list[tuple[str, RecordRow]]]:
    return pages([(path, RecordRow(cid(value), "rev")) for path, value in sorted(repo.items())], size)


@given(repos, repos, st.integers(1, 9), st.integers(1, 9))
def test_applied_it_gives_the_fetched_repository(
    new: dict[str, int], old: dict[str, int], new_page: int, old_page: int
) -> None:
    result = {path: cid(value) for path, value in old.items()}
    touched: list[str] = []
    for changes in diff(fetched(new, new_page), stored(old, old_page)):
        assert changes.size <= new_page + old_page
        for path, value, *_ in changes.puts:
            assert result.get(path) != value, "an unchanged record is written"
            result[path] = value
        for path in changes.deletes:
            del result[path]
        touched += [entry[0] for entry in changes.puts] + changes.deletes
    assert result == {path: cid(value) for path, value in new.items()}
    assert len(touched) == len(set(touched))


@given(repos, repos, st.integers(1, 9))
def test_unwanted_collections_are_never_written_and_deleted_only_when_stale(
    new: dict[str, int], old: dict[str, int], size: int
) -> None:
    for changes in diff(fetched(new, size), stored(old, size), lambda nsid: nsid != "col.b"):
        assert not any(entry[0].startswith("col.b/") for entry in changes.puts)
        for path in changes.deletes:
            assert new.get(path) != old[path]


def test_another_flag_of_the_same_record_is_a_change() -> None:
    entry: IndexEntry = ("col.a/1", cid(1), 0, 1, 2)
    changes = list(diff(iter([[entry]]), iter([[("col.a/1", RecordRow(cid(1), "rev", 0))]])))
    assert changes == [Changes([entry], [])]


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=12), st.integers(1, 6))
def test_units_keep_every_change_and_their_bound(steps: list[tuple[int, int]], size: int) -> None:
    puts = [[(f"p{at}/{n}", b"", 0, 0, 0) for n in range(count)] for at, (count, _) in enumerate(steps)]
    deletes = [[f"d{at}/{n}" for n in range(count)] for at, (_, count) in enumerate(steps)]
    made = [Changes(*part) for part in zip(puts, deletes, strict=True)]
    units = list(joined(iter(made), size, 1 << 40))
    assert [last for _, last in units] == [False] * (len(units) - 1) + [True]
    assert all(0 < unit.size <= size for unit, last in units if not last)
    assert units[-1][0].size <= size
    assert [entry for unit, _ in units for entry in unit.puts] == list(chain(*puts))
    assert [path for unit, _ in units for path in unit.deletes] == list(chain(*deletes))
