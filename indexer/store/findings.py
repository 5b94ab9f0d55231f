"""What a recount finds, and what becomes of it: `check` puts it in words, `repair` sets it right.

Words are bounded, so that a database that is wrong throughout does not fill memory. Pure.
"""

from __future__ import annotations

from typing import Final

from indexer.atproto.types import Cid, Did

_MAX_PROBLEMS: Final = 1000


class Findings:
    """Problems, in words. ``repairable`` of them are counts and references that `repair` can set."""

    wants_blocks = True  # whether blocks are to be looked at

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.repairable = 0

    def problem(self, text: str) -> None:
        """Something that only a fetch, a backup or a person puts right."""
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)

    def _to_repair(self, text: str) -> None:
        self.repairable += 1
        self.problem(text)

    def wrong_count(self, did: Did, cid: Cid, counted: int, referred: int) -> None:
        """The references of a block are not as many as is counted, log included."""
        self._to_repair(
            f"references: block {cid.hex()} of {did} is counted {counted} times, referred to {referred} times"
        )

    def zero_row(self, did: Did, cid: Cid) -> None:
        """A row of `block_refs` counts nothing; a fold would have deleted it."""
        self._to_repair(f"references: block {cid.hex()} of {did} has a row that counts nothing")

    def folded_rows(self, first: int, last: int, position: int) -> None:
        """Rows of the log below the checkpoint, which deletes what it folds."""
        self._to_repair(f"reflog: rows {first} to {last} are left below the checkpoint at {position}")

    def wrong_total(self, name: str, stored: int, recounted: int) -> None:
        self._to_repair(f"counts: {name} says {stored}, a recount {recounted}")
