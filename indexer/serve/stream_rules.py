"""What a stream reader may ask for and when it is too slow: pure decisions on values.

Owns the filter of a reader, the place where it starts, and the slow-reader rule. No sockets, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from indexer.atproto.syntax import check_did, check_nsid_pattern, nsid_matches
from indexer.errors import RequestError
from indexer.serve.xrpc.params import Params

MAX_COLLECTIONS = 100
MAX_DIDS = 10_000
_REMEMBERED_COLLECTIONS = 4096
_PARAMETERS = ("cursor", "wantedCollections", "wantedDids", "compress")

#: what a filter looks at: the DID, and the collection of record events ("" for the others)
Key = tuple[str, str]


@dataclass(slots=True)
class EventFilter:
    """``collections`` concern record events only; ``dids`` all. Empty means everything."""

    collections: frozenset[str] = frozenset()
    dids: frozenset[str] = frozenset()
    _known: dict[str, bool] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether everything passes."""
        return not self.collections and not self.dids

    def wants(self, key: Key) -> bool:
        """Whether the reader gets the event."""
        did, collection = key
        if self.dids and did not in self.dids:
            return False
        if not self.collections or not collection:
            return True
        known = self._known.get(collection)
        if known is None:
            known = any(nsid_matches(pattern, collection) for pattern in self.collections)
            if len(self._known) < _REMEMBERED_COLLECTIONS:
                self._known[collection] = known
        return known


class StreamOptions(NamedTuple):
    """What a reader asks for."""

    cursor: int | None
    filter: EventFilter
    zstd: bool


def parse_options(params: Params) -> StreamOptions:
    """Options of a `/stream` request; raises `RequestError` naming the parameter."""
    params.expect_only(_PARAMETERS)
    params.expect_values("cursor")
    compress = params.optional("compress")
    if compress not in (None, "true", "false", "zstd"):
        raise RequestError("parameter compress must be zstd, true or false")
    return StreamOptions(
        cursor=params.optional_integer("cursor"),
        filter=EventFilter(
            frozenset(params.many("wantedCollections", check_nsid_pattern, MAX_COLLECTIONS)),
            frozenset(params.many("wantedDids", check_did, MAX_DIDS)),
        ),
        zstd=compress in ("true", "zstd"),
    )


class Start(NamedTuple):
    """Where a reader begins; ``outdated`` when that is not where it asked to."""

    position: int
    outdated: bool


def start_position(cursor: int | None, floor: int, head: int) -> Start | None:
    """``head`` is the id that the next event will get. None: the cursor lies in the future.

    0 asks for everything from the first event on: it is outdated once something was pruned.
    """
    if cursor is None:
        return Start(head, False)
    if cursor > head:
        return None
    return Start(max(cursor, floor), max(cursor, 1) < floor)


class SlowRule:
    """A reader is dropped when for a whole window it was far behind and slower than the floor rate."""

    __slots__ = ("_from_position", "_lag", "_rate", "_since", "_window")

    def __init__(self, *, window: float, lag: int, rate: float) -> None:
        self._window, self._lag, self._rate = window, lag, rate
        self._since: float | None = None
        self._from_position = 0

    def is_too_slow(self, now: float, position: int, head: int) -> bool:
        """Judges the reader at ``position``; to be asked several times in a window."""
        if head - position <= self._lag:
            self._since = None
            return False
        if self._since is None:
            self._since, self._from_position = now, position
            return False
        elapsed = now - self._since
        if elapsed < self._window:
            return False
        if (position - self._from_position) / elapsed < self._rate:
            return True
        self._since, self._from_position = now, position
        return False
