"""The process that `storm` kills: it backfills what it is told to, from a host that lives elsewhere.

``python -m tests.backfill.storm_child FOLDER URL``: the DIDs to be fetched again come as one JSON list on
standard input. Says ``ready`` once they are requested, ``within`` when a repository is first seen to be in
the store in part, and ``done`` when nothing waits any more.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import structlog

from indexer.store.codecs import SyncState
from indexer.store.database import Database
from tests.backfill.world import Host, World

#: Small steps and a small memory, so that kills fall between them.
BACKFILL: dict[str, Any] = {
    "chunk_records": 20, "chunk_kib": 16, "verify_mib": 1, "concurrency": 6, "per_host": 6,
    "retry_min": 0.05, "retry_max": 0.2,
}  # fmt: skip


class Watch:
    """Whether all are synced; tells of the first that is being applied."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._told = False

    def __call__(self) -> bool:
        rows = list(self._db.repos(limit=1000))
        begun = (did for did, row in rows if row.state is SyncState.BACKFILLING and not row.complete)
        if not self._told and any(self._db.records(did, limit=1) for did in begun):
            self._told = True
            print("within", flush=True)
        return all(row.state is SyncState.SYNCED for _did, row in rows)


async def main(folder: Path, url: str, dids: list[str]) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    host = Host()
    host.url = url
    patient = {"requests_per_s": 0, "faults": 1000}
    async with World(folder, host, backfill=BACKFILL, hosts=patient) as world:
        await world.backfill.add(dids, again=True)
        print("ready", flush=True)
        await world.running(Watch(world.db))
        print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.stdin.read())))
