"""Random SIGKILLs while repositories are backfilled, with a ledger of what every one of them ever held.

``python -m tests.backfill.storm --kills 50 [--seed N]``: a child (`storm_child`) fetches repositories from a
host in this process, which are edited between its lives, and is killed at random moments. After each kill:
the store's check is clean; every repository is the ledger's at its rev, or on the way there from the state
that its events tell; the log goes on where it was, and no event tells what another has told; what was synced
is not asked for again. In the end all are synced, and the index equals the ledger.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from pathlib import Path

from indexer.atproto.types import Cid, Did, Rev
from indexer.simulator.account import Account
from indexer.store.check import check
from indexer.store.codecs import Event, SyncState, decode_event
from indexer.store.database import Database
from indexer.store.keyspaces import EVENTS
from tests.backfill.test_verify import shuffled
from tests.backfill.world import Host, account, car_of, cids_of, edit
from tests.paths import ROOT

SEED = 20261121
_LONGEST_S = 0.7  # a child lives, from when it has requested its work
_AT_START = 0.1  # of the kills come at any moment of the start
_WITHIN = 0.5  # and so many soon after a repository was seen to be there in part
_SOON_S = 0.01
_POST = "app.bsky.feed.post/"
#: Records of the accounts; the largest does not fit into the child's memory and lies in any order.
_SIZES = (*[3, 30, 90, 250] * 5, 1200)


class Storm:
    """Kills, and what was found. ``faults`` stays empty when the backfill keeps its word."""

    def __init__(self, folder: Path, seed: int = SEED) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.accounts: dict[Did, Account] = {}
        self.history: dict[Did, dict[Rev, dict[str, Cid]]] = {}
        self.index: dict[Did, dict[str, Cid]] = {}  # what the events tell
        self.log: list[Event] = []
        self.settled: set[Did] = set()  # synced at the last kill, and not edited since
        self.minute = 0
        self.kills = self.midway = 0
        self.faults: list[str] = []

    async def run(self, kills: int, told: Callable[[str], None] = lambda _line: None) -> None:
        async with Host() as host:
            for number, size in enumerate(_SIZES):
                self._found(host, number, size)
            for _ in range(kills):
                self.kills += 1
                await self._life(host, killed=True)
                self._compare()
                told(f"kill {self.kills}: {len(self.log)} events, {len(self.settled)} settled")
                for fault in self.faults:
                    told(f"  FAULT {fault}")
                self._edit(host)
            await self._life(host, killed=False)
            self._compare()
            self._expect(len(self.settled) == len(self.accounts), "not everything was synced in the end")
            revs = {did: one.rev for did, one in self.accounts.items()}
            with Database.open(self.folder / "db", memory_mib=32) as db:
                self._expect(
                    {did: row.rev for did, row in db.repos(limit=1000)} == revs, "revs are not the last"
                )

    def _expect(self, holds: bool, text: str) -> None:
        if not holds:
            self.faults.append(f"kill {self.kills}: {text}")

    # ---- the host

    def _found(self, host: Host, number: int, size: int) -> None:
        texts = {f"{_POST}3k{at:011d}": f"{number}/{at} " * (250 if size > 1000 else 1) for at in range(size)}
        one = account(f"user{chr(97 + number)}", texts)
        self.accounts[one.did], self.index[one.did], self.history[one.did] = one, {}, {}
        self._serve(host, one)

    def _serve(self, host: Host, one: Account) -> None:
        host.serve(one)
        if len(one.records) > 1000:
            host.cars[one.did] = shuffled(car_of(one))
        self.history[one.did][one.rev] = cids_of(one)
        self.settled.discard(one.did)

    def _edit(self, host: Host) -> None:
        """The largest account and some others write, change and delete."""
        self.minute += 2
        *others, largest = self.accounts.values()
        for one in [*self.chance.sample(others, 4), largest]:
            changes: dict[str, str | None] = {
                path: self.chance.choice((None, f"changed at {self.minute}"))
                for path in self.chance.sample(sorted(one.records), max(1, len(one.records) // 5))
            }
            changes |= {f"{_POST}3m{self.minute:05d}{at:06d}": f"new {at}" for at in range(len(changes))}
            edit(one, self.minute, changes)
            self._serve(host, one)

    # ---- the child

    async def _life(self, host: Host, *, killed: bool) -> None:
        command = [sys.executable, "-m", "tests.backfill.storm_child", str(self.folder), host.url]
        host.asked.clear()
        errors = self.folder / "errors"
        with errors.open("w") as file:
            child = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=file, cwd=ROOT
            )
        try:
            wanted = [did for did in self.accounts if did not in self.settled]
            code = await self._watched(child, json.dumps(wanted).encode(), killed)
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        self._expect(code in (0, -signal.SIGKILL), f"the child ended by itself: {errors.read_text()[-3000:]}")
        again = self.settled & set(host.asked)
        self._expect(not again, f"synced, and fetched again: {again}")

    async def _watched(self, child: Process, wanted: bytes, killed: bool) -> int:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(wanted)
        child.stdin.close()
        if killed:
            moment, longest = self.chance.random(), _LONGEST_S
            if moment >= _AT_START:
                await child.stdout.readline()
            if moment >= 1 - _WITHIN:
                await child.stdout.readline()
                longest = _SOON_S
            await asyncio.sleep(self.chance.uniform(0, longest))  # the random moment
            if child.returncode is None:
                child.kill()
        return await child.wait()

    # ---- what it left

    def _compare(self) -> None:
        if not (self.folder / "db").exists():
            return
        with Database.open(self.folder / "db", memory_mib=32) as db:
            for problem in check(db).problems:
                self._expect(False, problem)
            self._read(db)
            self.settled = set()
            for did in self.accounts:
                self._compare_one(db, did)

    def _read(self, db: Database) -> None:
        """The log goes on where it was, and each event changes what those before it told."""
        events = [decode_event(key, raw) for key, raw in db.scan(EVENTS)]
        self._expect(events[: len(self.log)] == self.log, "the log is not what it was")
        for event in events[len(self.log) :]:
            if event.kind != "record":
                continue
            held = self.index[event.did]
            path = f"{event.collection}/{event.rkey}"
            before = held.pop(path, None)
            told = "create" if before is None else "delete" if event.cid is None else "update"
            what = f"event {event.id}: {event.action} of {path} of {event.did}"
            self._expect(event.action == told and event.cid != before, f"{what} tells nothing new")
            if event.cid is not None:
                held[path] = event.cid
        self.log = events

    def _compare_one(self, db: Database, did: Did) -> None:
        row = db.repo(did)
        if row is None:
            return
        rows = {path: record.cid for path, record in db.records(did)}
        self._expect(rows == self.index[did], f"{did}: the index is not what its events tell")
        if row.complete:
            self._expect(rows == self.history[did][row.rev], f"{did} is not the ledger's at {row.rev}")
        else:
            ever = {item for state in self.history[did].values() for item in state.items()}
            self._expect(set(rows.items()) <= ever, f"{did} holds what it never had")
            self.midway += bool(rows)
        if row.state is SyncState.SYNCED and row.rev == self.accounts[did].rev:
            self._expect(row.complete, f"{did} is synced and not complete")
            self.settled.add(did)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.backfill.storm", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        storm = Storm(Path(folder), given.seed)
        asyncio.run(storm.run(given.kills, lambda line: print(line, flush=True)))
    print(f"{storm.kills} kills, {storm.midway} times within a repository, {len(storm.log)} events")
    return 1 if storm.faults else 0


if __name__ == "__main__":
    sys.exit(main())
