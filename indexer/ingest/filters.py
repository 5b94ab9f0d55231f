"""Which repositories are followed and which collections are kept.

Owns the `Filters` value, its matching rules and its form in the `filter` keyspace, where what the
management API changed stands above the settings. Leaves out who changes it. Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from indexer.atproto.syntax import check_did, check_nsid_pattern
from indexer.atproto.types import Did, Nsid
from indexer.config import FilterSettings
from indexer.errors import SyntaxInvalid

FilterMode: TypeAlias = Literal["full", "filter"]
#: Row of the `filter` keyspace that says: this list was set here, also when it is empty.
OVERRIDDEN = ""
LISTS = ("signals", "collections", "excludes")


@dataclass(frozen=True, slots=True)
class _Patterns:
    """Collections and ``ns.*`` patterns, sorted for matching: one set look-up and one ``startswith``."""

    exact: frozenset[str]
    prefixes: tuple[str, ...]

    @classmethod
    def of(cls, patterns: Iterable[str]) -> _Patterns:
        items = list(patterns)
        return cls(
            frozenset(item for item in items if not item.endswith(".*")),
            tuple(item[:-1] for item in items if item.endswith(".*")),
        )

    def match(self, nsid: Nsid) -> bool:
        return nsid in self.exact or nsid.startswith(self.prefixes)


@dataclass(frozen=True, slots=True)
class Filters:
    """What to follow and what to keep. Collections empty: all of them."""

    mode: FilterMode = "filter"
    signals: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()
    excludes: frozenset[Did] = frozenset()
    _signals: _Patterns = field(init=False, repr=False, compare=False)
    _collections: _Patterns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_signals", _Patterns.of(self.signals))
        object.__setattr__(self, "_collections", _Patterns.of(self.collections))

    @classmethod
    def checked(
        cls, mode: FilterMode, signals: Iterable[str], collections: Iterable[str], excludes: Iterable[str]
    ) -> Filters:
        """Filters from outside: every pattern and DID is validated (`SyntaxInvalid`)."""
        if mode not in ("full", "filter"):
            raise SyntaxInvalid(f"filter mode must be 'full' or 'filter', not {mode!r}")
        return cls(
            mode,
            tuple(dict.fromkeys(check_nsid_pattern(item) for item in signals)),
            tuple(dict.fromkeys(check_nsid_pattern(item) for item in collections)),
            frozenset(check_did(item) for item in excludes),
        )

    @classmethod
    def of(cls, settings: FilterSettings) -> Filters:
        return cls.checked(settings.mode, settings.signals, settings.collections, settings.excludes)

    def wants_collection(self, nsid: Nsid) -> bool:
        """Whether records of this collection are kept."""
        return not self.collections or self._collections.match(nsid)

    def signals_match(self, nsid: Nsid) -> bool:
        """Whether a record of this collection makes an unknown account wanted."""
        return self._signals.match(nsid)

    def is_excluded(self, did: Did) -> bool:
        return did in self.excludes

    def widens(self, old: Filters) -> bool:
        """Whether this keeps collections that ``old`` may have left out."""
        if not old.collections:
            return False
        return not self.collections or not all(_covered(item, old) for item in self.collections)

    def with_rows(self, rows: Iterable[tuple[str, str]]) -> Filters:
        """These filters under what the `filter` keyspace holds as ``(kind, item)``."""
        stored: dict[str, list[str]] = {}
        for kind, item in rows:
            stored.setdefault(kind, []).append(item)
        changes: dict[str, Any] = {
            kind: [item for item in stored[kind] if item != OVERRIDDEN] for kind in LISTS if kind in stored
        }
        if stored.get("mode"):
            changes["mode"] = stored["mode"][0]
        for name in ("signals", "collections"):
            if name in changes:
                changes[name] = tuple(changes[name])
        if "excludes" in changes:
            changes["excludes"] = frozenset(changes["excludes"])
        return replace(self, **changes)

    def rows(self) -> Iterator[tuple[str, str]]:
        """This value as ``(kind, item)`` rows that `with_rows` reads back."""
        yield "mode", self.mode
        for kind, items in (
            ("signals", self.signals),
            ("collections", self.collections),
            ("excludes", sorted(self.excludes)),
        ):
            yield kind, OVERRIDDEN
            for item in items:
                yield kind, item


def _covered(pattern: str, old: Filters) -> bool:
    """Whether every collection that ``pattern`` names was kept under ``old``."""
    if not pattern.endswith(".*"):
        return old.wants_collection(pattern)
    prefix = pattern[:-1]
    return any(item.endswith(".*") and prefix.startswith(item[:-1]) for item in old.collections)
