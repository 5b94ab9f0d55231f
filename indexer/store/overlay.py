"""The pending writes of a running group, and reads that see them.

One plain dict a keyspace from encoded key to value (None: deleted), an undo list for the step that
runs, range deletes. Everything of a group can be turned into a batch any number of times, because a
stalled write consumes the batch. On the writer's loop. Hot: verbs inline what is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeVar

import rocksdict

from indexer.atproto.types import Did
from indexer.store.codecs import did_range
from indexer.store.database import Database
from indexer.store.keyspaces import BLOCK_REFS, BLOCKS, GC_QUEUE, KEYSPACES, RECORDS, Keyspace
from indexer.store.reads import decode

K = TypeVar("K")
V = TypeVar("V")

MISSING: Final[Any] = object()
ADDED: Final[Any] = object()  # in the undo list: the key stands for many, none of which was there
CONTENT: Final = (RECORDS, BLOCKS, BLOCK_REFS, GC_QUEUE)  # what a wipe may clear by range
_CONTENT_NAMES: Final = frozenset(keyspace.name for keyspace in CONTENT)


class Overlay:
    """Pending rows by keyspace with savepoint and undo."""

    __slots__ = ("_cleared", "_db", "_ranges", "_rows", "_undo", "ops", "size")

    def __init__(self, db: Database) -> None:
        self._db = db
        self._rows: dict[str, dict[bytes, bytes | None]] = {name: {} for name in KEYSPACES}
        self._undo: list[tuple[dict[Any, Any], Any, Any]] = []
        self._ranges: list[tuple[str, bytes, bytes]] = []
        self._cleared: dict[Did, bool] = {}  # repositories whose content a range delete takes
        self.ops = 0
        self.size = 0  # bytes, roughly

    def write(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        """Set an entry of any of the group's dicts so that `undo` can take it back."""
        self._undo.append((target, key, target.get(key, MISSING)))
        target[key] = value

    def add(self, target: dict[Any, int], key: Any, delta: int) -> None:
        old = target.get(key)
        self._undo.append((target, key, MISSING if old is None else old))
        target[key] = delta if old is None else old + delta

    def add_all(self, target: dict[Any, Any], entries: dict[Any, Any]) -> bool:
        """Set many entries at once; false, with nothing set, when one of them is there already."""
        if not target.keys().isdisjoint(entries):
            return False
        self._undo.append((target, entries, ADDED))
        target.update(entries)
        return True

    def write_all(self, target: dict[Any, Any], entries: dict[Any, Any]) -> None:
        """As `write` for each of many entries, at once where none of them is there."""
        if not self.add_all(target, entries):
            for key, value in entries.items():
                self.write(target, key, value)

    def undo_rows(self) -> None:
        """Take back what was written since the undo list was last cleared."""
        for target, key, old in reversed(self._undo):
            if old is MISSING:
                target.pop(key, None)
            elif old is ADDED:
                for each in key:
                    target.pop(each, None)
            else:
                target[key] = old
        self._undo.clear()

    # ---- generic verbs, for keyspaces that nothing else must be kept in step with

    def get(self, keyspace: Keyspace[K, V], key: K) -> V | None:
        raw_key = keyspace.key.encode(key)
        raw = self.raw(keyspace.name, raw_key)
        return None if raw is None else decode(keyspace, key, raw)

    def put(self, keyspace: Keyspace[K, V], key: K, value: V) -> None:
        raw = keyspace.value.encode(value)
        self.write(self._rows[keyspace.name], keyspace.key.encode(key), raw)
        self.ops += 1
        self.size += len(raw) + 40

    def delete(self, keyspace: Keyspace[K, Any], key: K) -> None:
        self.write(self._rows[keyspace.name], keyspace.key.encode(key), None)
        self.ops += 1

    def raw(self, name: str, key: bytes) -> bytes | None:
        value = self._rows[name].get(key, MISSING)
        if value is not MISSING:
            pending: bytes | None = value
            return pending
        if self._cleared and name in _CONTENT_NAMES and key.partition(b"\0")[0].decode() in self._cleared:
            return None
        return self._db.raw_get(name, key)

    def raw_scan(self, name: str, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Rows with start ≤ key < stop as the group sees them, in order."""
        pending = sorted((item for item in self._rows[name].items() if start <= item[0] < stop), reverse=True)
        cleared = bool(self._cleared) and name in _CONTENT_NAMES
        for key, value in self._db.raw_scan(name, start, stop):
            while pending and pending[-1][0] < key:
                new_key, new = pending.pop()
                if new is not None:
                    yield new_key, new
            if pending and pending[-1][0] == key:
                _, new = pending.pop()
                if new is not None:
                    yield key, new
            elif not (cleared and key.partition(b"\0")[0].decode() in self._cleared):
                yield key, value
        for new_key, new in reversed(pending):
            if new is not None:
                yield new_key, new

    def clear_content(self, did: Did, records: int, point_rows: int) -> bool:
        """Delete a repository's content: row by row when it is small, else by range (then true).

        ``records`` is about how many it holds; each has a block and a count as well.
        """
        start, stop = did_range(did)
        if records * 3 > point_rows:
            self._clear_range(did, start, stop)
            return True
        keys: list[tuple[str, bytes]] = []
        for keyspace in CONTENT:
            name = keyspace.name
            keys += [(name, key) for key in self._rows[name] if start <= key < stop]
            for key in () if did in self._cleared else self._db.raw_keys(name, start, stop):
                keys.append((name, key))
                if len(keys) > point_rows:
                    self._clear_range(did, start, stop)
                    return True
        for name, key in keys:
            self.write(self._rows[name], key, None)
        self.ops += len(keys)
        return False

    def _clear_range(self, did: Did, start: bytes, stop: bytes) -> None:
        for keyspace in CONTENT:
            rows = self._rows[keyspace.name]
            for key in [key for key in rows if start <= key < stop]:
                self._undo.append((rows, key, rows.pop(key)))
            self._ranges.append((keyspace.name, start, stop))
        self.write(self._cleared, did, True)
        self.ops += len(CONTENT)

    # ---- the batch

    def batch(self) -> Any:
        """A fresh batch of everything pending. Range deletes first: rows written later stand."""
        handles = self._db.handles
        batch = rocksdict.WriteBatch(raw_mode=True)
        for name, start, stop in self._ranges:
            batch.delete_range(start, stop, handles[name])
        put, delete = batch.put, batch.delete
        for name, rows in self._rows.items():
            if rows:
                handle = handles[name]
                for key, value in rows.items():
                    if value is None:
                        delete(key, handle)
                    else:
                        put(key, value, handle)
        return batch

    def clear(self) -> None:
        for rows in self._rows.values():
            rows.clear()
        self._undo.clear()
        self._ranges.clear()
        self._cleared.clear()
        self.ops = self.size = 0
