"""What an operator asks of an open database: figures by keyspace, and compaction of everything.

Both block; the daemon calls them in a thread. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from indexer.store.database import Database
from indexer.store.keyspaces import KEYSPACES


def describe(db: Database) -> dict[str, Any]:
    """Rows, bytes and compression by keyspace, totals, and memory.

    ``raw_bytes`` is what the keys and values in the files come to before compression, ``data_bytes``
    after; obsolete versions and tombstones count in both.
    """
    packed = db.compression()
    keyspaces = {name: {**row, **packed[name]} for name, row in db.stats().items()}
    names = next(iter(keyspaces.values())).keys()
    totals = {name: sum(row[name] for row in keyspaces.values()) for name in names}
    return {"keyspaces": keyspaces, "totals": totals, "memory": db.memory()}


def compact_all(db: Database, step: Callable[[str, int, int], None] | None = None) -> None:
    """Compact every keyspace, one after another; ``step(name, done, of)`` is called before each."""
    for done, keyspace in enumerate(KEYSPACES.values()):
        if step is not None:
            step(keyspace.name, done, len(KEYSPACES))
        db.compact(keyspace)
