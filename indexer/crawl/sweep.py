"""A sweep: one walk through all pages of a list, and where it is.

Owns the durable position of a source or host and its rules: what a page moves, how an endless list is known,
when the next sweep begins. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from indexer.atproto.types import Micros, Nsid
from indexer.ingest.filters import Filters

#: How a sweep may end, for the counters ``crawler/<outcome>``.
DONE, ENDLESS, MALFORMED, UNSUPPORTED, REFUSED = "done", "endless", "malformed", "unsupported", "refused"


class EndlessList(ValueError):
    """A list that goes in circles, or on beyond the bound of its pages."""


class Sweep(NamedTuple):
    """``started_us`` is 0 between two sweeps. ``mark`` is an earlier cursor: a list that comes back to it
    goes in circles. It is set anew after 1, 2, 4, … pages, so that it comes to lie within any circle
    (Brent)."""

    cursor: str = ""
    collection: Nsid = ""
    started_us: Micros = 0
    next_us: Micros = 0
    asked: str = ""  # what was looked for, `looked_for`
    pages: int = 0
    listed: int = 0
    found: int = 0
    mark: str = ""
    since_mark: int = 0
    span: int = 1
    outcome: str = ""  # of the last sweep that ended
    ended_us: Micros = 0

    @classmethod
    def of(cls, row: Any) -> Sweep:
        """From its row, as `list` makes it; one that is none is a sweep that never began."""
        return cls(*row) if isinstance(row, list) and len(row) == len(cls._fields) else cls()

    @property
    def place(self) -> tuple[Micros, Nsid, str]:
        """What a page belongs to: another one means that the sweep went on, or began anew, meanwhile."""
        return self.started_us, self.collection, self.cursor


def looked_for(filters: Filters) -> str:
    """What a sweep looks for, in short: other filters look for something else."""
    text = "\n".join((filters.mode, *sorted(filters.signals), "", *sorted(filters.collections)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def begun(sweep: Sweep, now_us: Micros, asked: str, collections: Sequence[Nsid]) -> Sweep:
    """A new sweep from the first page on."""
    first = collections[0] if collections else ""
    return Sweep(
        started_us=now_us, asked=asked, collection=first, outcome=sweep.outcome, ended_us=sweep.ended_us
    )


def moved(sweep: Sweep, cursor: str, listed: int, max_pages: int) -> Sweep:
    """The sweep behind a page. Raises `EndlessList`."""
    pages = sweep.pages + 1
    if cursor and cursor in (sweep.cursor, sweep.mark):
        raise EndlessList(f"page {pages} leads back to an earlier one")
    if cursor and pages >= max_pages:
        raise EndlessList(f"more than {max_pages} pages")
    mark, since, span = sweep.mark, sweep.since_mark + 1, sweep.span
    if since >= span:
        mark, since, span = cursor, 0, span * 2
    return sweep._replace(
        cursor=cursor, pages=pages, listed=sweep.listed + listed, mark=mark, since_mark=since, span=span
    )


def next_collection(sweep: Sweep, collections: Sequence[Nsid]) -> Sweep | None:
    """The sweep at the first page of the collection behind the one that was read to its end."""
    left = [collection for collection in collections if collection > sweep.collection]
    if not left:
        return None
    return sweep._replace(collection=min(left), cursor="", mark="", since_mark=0, span=1)


def ended(sweep: Sweep, outcome: str, now_us: Micros, interval_us: Micros) -> Sweep:
    """Between two sweeps; the next one is due an interval after this one began."""
    due = max((sweep.started_us or now_us) + interval_us, now_us + min(interval_us, _PAUSE_US))
    return sweep._replace(
        cursor="", collection="", started_us=0, next_us=due, mark="", since_mark=0, span=1,
        outcome=outcome, ended_us=now_us,
    )  # fmt: skip


#: Shortest pause between two sweeps of a list that takes longer than the interval.
_PAUSE_US: Final = 60_000_000
