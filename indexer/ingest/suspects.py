"""Verdicts from worker processes that may die of what they are given.

Owns the search for the frame that kills: after a death every frame of the batch is verified by itself, so
that its neighbours get their own verdicts. Leaves out what becomes of such a frame (`apply.Applier.failed`:
it is set aside and its repository fetched anew). Event loop only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from indexer.errors import WorkerDied
from indexer.ingest.tools import IngestTools
from indexer.ingest.verify import Item, Outcome, Verdict, verify_batch

WORKER_DIED: Final = "worker_died"


async def verified(tools: IngestTools, items: Sequence[Item]) -> list[Verdict]:
    """A verdict on each item, in order; `WORKER_DIED` is the reason where verifying it ends the process."""
    limits = tools.limits()
    try:
        return await tools.pool.run(verify_batch, items, limits)
    except WorkerDied as error:
        if len(items) == 1:
            return [Verdict(Outcome.DESYNC, 0, WORKER_DIED, f"verifying it killed the process: {error}")]
    return [(await verified(tools, [item]))[0] for item in items]
