"""A fetched repository against the stored one: which records to write and which to delete.

Pure: merges two runs in key order, page by page, so memory is bounded by the pages whatever the
repositories' sizes. A record whose stored row already has the fetched CID needs nothing, which is what
makes an interrupted apply resume without telling anything twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias, TypeVar

from indexer.atproto.types import Cid, Nsid, Path
from indexer.backfill.verify import IndexEntry
from indexer.store.codecs import RecordRow

StoredRecord: TypeAlias = tuple[Path, RecordRow]
_Item = TypeVar("_Item", IndexEntry, StoredRecord)
WantsCollection: TypeAlias = Callable[[Nsid], bool]


class Changes(NamedTuple):
    """What to write and what to delete, each in key order."""

    puts: list[IndexEntry]
    deletes: list[Path]

    @property
    def size(self) -> int:
        return len(self.puts) + len(self.deletes)


def diff(
    fetched: Iterator[list[IndexEntry]],
    stored: Iterator[list[StoredRecord]],
    wants: WantsCollection | None = None,
) -> Iterator[Changes]:
    """The changes that turn the ``stored`` pages into the ``fetched`` ones, one step a page or less.

    Records of collections that ``wants`` refuses are not written. One that is stored from a time when its
    collection was wanted stays as long as it is the network's; what changed or went there is deleted.
    """
    new: list[IndexEntry] = []
    old: list[StoredRecord] = []
    while True:
        new = new or next(fetched, [])
        old = old or next(stored, [])
        if not new and not old:
            return
        bound = min(page[-1][0] for page in (new, old) if page)
        taken_new, new = _cut(new, bound)
        taken_old, old = _cut(old, bound)
        yield _compare(taken_new, taken_old, wants)


def _cut(page: list[_Item], bound: Path) -> tuple[list[_Item], list[_Item]]:
    if not page or page[-1][0] <= bound:
        return page, []
    at = bisect_right(page, bound, key=_path)
    return page[:at], page[at:]


def _path(item: _Item) -> Path:
    return item[0]


def _compare(new: list[IndexEntry], old: list[StoredRecord], wants: WantsCollection | None) -> Changes:
    rows = dict(old)
    if rows:
        kept = {entry[0] for entry in new if (row := rows.get(entry[0])) and _same(entry, row)}
        new = [entry for entry in new if entry[0] not in kept]
    puts = new if wants is None else [entry for entry in new if wants(entry[0].partition("/")[0])]
    if rows:
        replaced = {entry[0] for entry in puts}
        return Changes(puts, [path for path in rows if path not in kept and path not in replaced])
    return Changes(puts, [])


def _same(entry: IndexEntry, row: RecordRow) -> bool:
    return row.cid == entry[1] and row.flags == entry[4]


def joined(steps: Iterator[Changes], size: int, most_bytes: int) -> Iterator[tuple[Changes, bool]]:
    """``steps`` joined and cut into units, each with whether it is the last: at most ``size`` changes, and
    ``most_bytes`` of different blocks unless a single one is larger.

    There is always a last one, be it empty.
    """
    held = Changes([], [])
    for step in steps:
        held = Changes(held.puts + step.puts, held.deletes + step.deletes) if held.size else step
        while True:
            puts = _leading(held.puts, size, most_bytes)
            deletes = size - puts if puts == len(held.puts) else 0
            if puts == len(held.puts) and deletes >= len(held.deletes):
                break
            yield Changes(held.puts[:puts], held.deletes[:deletes]), False
            held = Changes(held.puts[puts:], held.deletes[deletes:])
    yield held, True


def _leading(puts: list[IndexEntry], size: int, most_bytes: int) -> int:
    """How many of the first puts fit into a unit; one always does. A block may stand under any number of
    keys, and is written once."""
    count = min(len(puts), size)
    if sum(put[3] - put[2] for put in puts[:count]) <= most_bytes:
        return count
    seen: set[Cid] = set()
    left = most_bytes
    for number, (_path, cid, start, end, _flags) in enumerate(puts[:count]):
        if cid not in seen:
            seen.add(cid)
            left -= end - start
            if left < 0:
                return max(1, number)
    return count
