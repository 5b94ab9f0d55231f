"""Stored databases of earlier formats: dumps of their rows, and a database made of a dump.

A dump is NDJSON, one row a line: keyspace, key and value in hexadecimal. It does not depend on RocksDB's
files, so it stays readable, small and diffable.
"""

from __future__ import annotations

import json
from pathlib import Path

from indexer.store.database import Database
from indexer.store.keyspaces import KEYSPACES
from indexer.store.raw import RawRows
from tests.paths import DATA

FORMATS = DATA / "formats"


def load(version: int, folder: Path, extra: list[tuple[str, bytes, bytes]] | None = None) -> None:
    """Makes a database of format ``version`` in ``folder`` from its stored rows."""
    Database.open(folder).close()  # the families; the stored rows replace its marks
    lines = (FORMATS / f"v{version}" / "rows.ndjson").read_text().splitlines()
    rows = [(name, bytes.fromhex(key), bytes.fromhex(value)) for name, key, value in map(json.loads, lines)]
    with Database.open_unchecked(folder) as db:
        RawRows(db).commit([*rows, *(extra or [])])


def dump(db: Database) -> list[tuple[str, bytes, bytes]]:
    """Every row of a database."""
    return [(name, key, value) for name in KEYSPACES for key, value in db.raw_scan(name, None, None)]


def save(version: int, rows: list[tuple[str, bytes, bytes]]) -> None:
    """Stores rows as the database of format ``version``."""
    folder = FORMATS / f"v{version}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps([name, key.hex(), value.hex()]) for name, key, value in rows]
    (folder / "rows.ndjson").write_text("\n".join(lines) + "\n")
