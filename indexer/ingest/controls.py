"""What an operator switched off: parts of the intake, kept over restarts as one row of `cursors`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from indexer.store.database import Database
from indexer.store.keyspaces import CURSORS
from indexer.store.transaction import Transaction

FIREHOSE: Final = "firehose"
BACKFILL: Final = "backfill"
CRAWLER: Final = "crawler"
PARTS: Final = (CRAWLER, FIREHOSE, BACKFILL)
_ROW: Final = "paused"


def paused_parts(db: Database) -> frozenset[str]:
    """Those that are to stand still."""
    return _parts(db.get(CURSORS, _ROW))


def change_paused(tx: Transaction, runs: Mapping[str, bool]) -> frozenset[str]:
    """Has parts go on or stand still, the others as they are by now; those that stand still then."""
    kept = _parts(tx.position(_ROW)) - runs.keys()
    off = kept | {part for part, goes_on in runs.items() if not goes_on}
    tx.set_cursor(_ROW, sorted(off) or None)
    return off


def _parts(stored: Any) -> frozenset[str]:
    return frozenset(part for part in stored if part in PARTS) if isinstance(stored, list) else frozenset()
