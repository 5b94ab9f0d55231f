"""The process that the backfill's crash tests kill: it fetches one repository from a host of its own.

``python -m tests.backfill.crash_child FOLDER RECORDS POINT COUNT``: SIGKILLs itself at the COUNT-th pass of
the crash point (``before backfill_claim``, ``after backfill_apply``, …).
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from indexer.simulator.account import Account
from tests.backfill.world import Host, World, account
from tests.store.crash_child import crasher


def one_with(count: int) -> Account:
    return account(
        "one", {f"app.bsky.feed.post/3k{number:011d}": f"text {number}" for number in range(count)}
    )


async def main(folder: Path, records: int, point: str, count: int) -> None:
    one = one_with(records)
    async with Host() as host:
        host.serve(one)
        async with World(folder, host) as world:
            world.at = crasher(point, count)
            await world.backfill.add([one.did])
            await world.backfill.run()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
