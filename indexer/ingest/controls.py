"""What an operator switched off: parts of the intake, kept over restarts as one row of `cursors`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

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
    stored = db.get(CURSORS, _ROW)
    return frozenset(part for part in stored if part in PARTS) if isinstance(stored, list) else frozenset()


def store_paused(tx: Transaction, parts: Iterable[str]) -> None:
    tx.set_cursor(_ROW, sorted(parts) or None)
