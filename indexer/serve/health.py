"""What the daemon says about itself: liveness, readiness and the figures of `/stats` and `/metrics`.

Reads counts, rows and the parts' own figures; changes nothing. One event loop.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from indexer import __version__
from indexer.ingest import revs
from indexer.ingest.controls import FIREHOSE, PARTS, paused_parts
from indexer.ingest.hearsay import FORGOTTEN
from indexer.store.codecs import AccountStatus, SyncState, after_prefix
from indexer.store.counts import DELETED, HEARSAY
from indexer.store.keyspaces import COUNTS, PENDING, QUARANTINE_NEXT

if TYPE_CHECKING:
    from indexer.serve.services import Services
    from indexer.serve.stream import StreamHub
    from indexer.serve.xrpc.dispatch import Xrpc

VERSION = __version__
_STARTED = time.monotonic()
_STARTED_AT = time.time()
#: Collections shown by name, the largest of so many that are looked at: strangers make up collections.
_SHOWN_COLLECTIONS = 200
_SCANNED_COLLECTIONS = 5_000
_SHOWN_SOURCES = 5


def summary(services: Services) -> dict[str, Any]:
    """Liveness and the few figures that tell whether work goes on. ``status`` is "ok" or "failed"."""
    sources = sources_of(services)
    return {
        "status": "failed" if services.writer.poisoned else "ok",
        "version": VERSION,
        "uptime_s": round(time.monotonic() - _STARTED, 1),
        "head": services.writer.head,
        "repos": services.db.count("repos"),
        "records": services.db.count("records"),
        "sources": {"total": len(sources), "connected": sum(bool(s.get("connected")) for s in sources)},
    }


def not_ready(services: Services) -> list[str]:
    """Why the daemon does not do its work at the moment; nothing when it does."""
    reasons = []
    if services.writer.poisoned:
        reasons.append("writer: a commit failed, nothing more is written")
    free = shutil.disk_usage(services.settings.data_dir).free >> 20
    floor = services.settings.disk.hard_floor_mib
    if free < floor:
        reasons.append(f"disk: {free} MiB are free, ingest needs {floor} (disk.hard_floor_mib)")
    reasons += [f"{name}: {pool.problem}" for name, pool in services.pools.items() if pool.problem]
    if services.ingest is not None and (problem := services.ingest.clock_problem):
        reasons.append(f"clock: {problem}")
    return reasons + _unconnected(services)


def _unconnected(services: Services) -> list[str]:
    """What `ingest.ready_sources` misses; of several upstreams, those switched off are not missed."""
    wanted = services.settings.ingest.ready_sources
    if wanted == "none" or services.ingest is None:
        return []
    if FIREHOSE in paused_parts(services.db):
        return ["sources: the firehose is paused (PATCH /ingestion)"]
    sources = [source for source in sources_of(services) if source.get("enabled", True)]
    if not sources:
        return ['sources: no upstream is followed; ingest.ready_sources = "none" if that is meant']
    missing = [source for source in sources if not source["connected"]]
    if not missing or (wanted == "any" and len(missing) < len(sources)):
        return []
    names = [f"{source['name']} ({source.get('error') or 'not connected yet'})" for source in missing]
    more = f" and {len(names) - _SHOWN_SOURCES} more" if len(names) > _SHOWN_SOURCES else ""
    return [f"sources: not connected: {', '.join(names[:_SHOWN_SOURCES])}{more}"]


def statistics(services: Services, streams: StreamHub | None, xrpc: Xrpc | None) -> dict[str, Any]:
    """Totals, rates and the state of every part."""
    db, writer = services.db, services.writer
    return {
        "version": VERSION,
        "started_at": _STARTED_AT,
        "uptime_s": round(time.monotonic() - _STARTED, 1),
        "mode": {
            "filter": services.current_filters().mode,
            "ephemeral": db.mode.ephemeral,
            "blocks": db.mode.blocks,
        },
        "events": {
            "head": writer.head,
            "floor": services.log.floor,
            "total": db.count("events"),
        },
        "repos": {
            "total": db.count("repos"),
            "unresolved": db.count(HEARSAY),
            "forgotten": db.count(FORGOTTEN),
            "by_state": by_state(services),
            "by_status": _labelled(services, "repos/status/", [status.label for status in AccountStatus]),
        },
        "records": {"total": db.count("records"), "by_collection": _collections(services)},
        "ingest": {
            "sources": sources_of(services),
            "outcomes": outcomes(services),
            "paused": [part for part in PARTS if part in paused_parts(db)],
            "compare_revs": _labelled(services, revs.ROWS, list(revs.OUTCOMES)),
            "quarantine": db.cursor(QUARANTINE_NEXT) or 0,
        },
        "writer": plain(writer.stats),
        "backfill": {"pending": pending(services), **_figures(services.backfill)},
        "crawler": _figures(services.crawler),
        "workers": workers(services),
        "store": store(services),
        "streams": streams.status() if streams else {},
        "xrpc": _answers(xrpc),
    }


def by_state(services: Services) -> dict[str, int]:
    """Repositories by sync state; those of deleted accounts, which wait for nothing, apart."""
    deleted = services.db.count(DELETED)
    found = _labelled(services, "repos/state/", [state.label for state in SyncState])
    return {**found, "pending": found["pending"] - deleted, "deleted": deleted}


def sources_of(services: Services) -> list[dict[str, Any]]:
    """Every upstream: url, connected, seq, lag_s and what it counted."""
    return [dict(source) for source in services.ingest.status()] if services.ingest else []


def outcomes(services: Services) -> list[dict[str, Any]]:
    """The persistent counts of what became of frames, by source, outcome and reason."""
    found = []
    for name, count in services.db.counts("ingest/").items():
        # A source is a URL, so it may hold slashes itself.
        source, outcome, reason = [*name.removeprefix("ingest/").rsplit("/", 2), "", ""][:3]
        found.append({"source": source, "outcome": outcome, "reason": reason, "count": count})
    return found


def pending(services: Services) -> int:
    """Repositories that wait for background work, by RocksDB's estimate: counting would read the queue."""
    return services.db.stats()[PENDING.name]["rows"]


def workers(services: Services) -> dict[str, dict[str, Any]]:
    """The figures of the background workers of the store."""
    return {name: plain(worker.stats) for name, worker in services.workers.items()}


def store(services: Services) -> dict[str, Any]:
    """Bytes and rows by keyspace, in total, and memory."""
    keyspaces = services.db.stats()
    totals = {key: sum(row[key] for row in keyspaces.values()) for key in ("sst_bytes", "live_bytes")}
    return {"keyspaces": keyspaces, "totals": totals, "memory": services.db.memory()}


def plain(value: Any) -> dict[str, Any]:
    """A part's figures as a dict, whichever kind of value it keeps them in."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "_asdict"):
        return dict(value._asdict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def _labelled(services: Services, prefix: str, labels: list[str]) -> dict[str, int]:
    stored = services.db.counts(prefix)
    return {label: stored.get(prefix + label, 0) for label in labels}


def _collections(services: Services) -> dict[str, int]:
    start = b"records/"
    rows = services.db.scan(COUNTS, start, after_prefix(start), limit=_SCANNED_COLLECTIONS)
    largest = sorted(rows, key=lambda row: -row[1])[:_SHOWN_COLLECTIONS]
    return {name.removeprefix("records/"): count for name, count in largest if count}


def _figures(part: Any) -> dict[str, Any]:
    return dict(part.status()) if part is not None else {}


def _answers(xrpc: Xrpc | None) -> dict[str, Any]:
    if xrpc is None:
        return {}
    answers: dict[str, dict[str, int]] = {}
    for (method, status), count in xrpc.answers.items():
        answers.setdefault(method, {})[str(status)] = count
    return {"answers": answers, "trees_built": xrpc.trees.built, "tree_cache_bytes": xrpc.trees.size}
