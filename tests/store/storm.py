"""Random SIGKILLs under the whole mixed load, with an oracle for everything that must be there afterwards.

``python -m tests.store.storm --kills 200 [--seed N]``: a child (`storm_child`) is killed at random moments,
now and then while it starts. After each kill a copy of what it left is opened: the check is clean, the
state is that of the units up to the stored cursor, none that was acknowledged is missing, and what only the
workers bring about (no dead block, no dead event, no stray file) they bring about. The reader resumes at
its own cursor all the time and must be told of every event exactly once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from indexer.cas import FsBlobStore
from indexer.store.archive_check import check_archives
from indexer.store.archives import Archives, archives_of
from indexer.store.check import check
from indexer.store.codecs import OVERSIZE, did_range
from indexer.store.database import Database
from indexer.store.events import EventLog
from indexer.store.gc import BlocksGcWorker
from indexer.store.keyspaces import (
    ACCOUNT_STATUS,
    ARCHIVE_QUEUE,
    BLOCKS,
    CURSORS,
    EVENTS,
    FLOOR,
    GC_QUEUE,
    HEAD,
    HOLE,
    QUARANTINE,
    REFLOG,
    RESYNC_BUFFER,
    WIPE,
)  # fmt: skip
from indexer.store.refcounts import CheckpointWorker
from indexer.store.retention import RetentionWorker
from indexer.store.writer import Writer
from tests.paths import ROOT
from tests.store.storm_child import RETENTION_S, set_clock, settings, told_of
from tests.store.storm_load import CURSOR, Told, Twin, op_of
from tests.store.support import Clock

SEED = 20261121
_LONGEST_S = 1.2  # a child lives, from when it is ready
_AT_START = 0.2  # of the kills come at any moment of the start
_POWER_CUT = 0.1  # of the starts find another boot id
_SLACK_US = 500_000  # that the clock may have run on after the last event


class Life(NamedTuple):
    """What a killed child said."""

    ready: bool
    acknowledged: int
    told: list[tuple[int, int, Told]]  # event id, time, event
    overtaken: int  # the floor that overtook the reader, 0 when none did
    errors: str


class Storm:
    """Kills, and what was found. ``faults`` stays empty when the store keeps its word."""

    def __init__(self, folder: Path, seed: int = SEED) -> None:
        self.folder = folder
        self.seed = seed
        self.chance = random.Random(seed)
        self.twin = Twin()
        self.next_id = 1  # the reader's cursor
        self.floor = 1
        self.boot = 0
        self.times: dict[int, int] = {}  # event id → time, as the reader was told
        self.holes: dict[int, int] = {}
        self.faults: list[str] = []
        self.kills = self.at_start = self.events = self.overtaken = 0
        self.totals: dict[str, int] = {}

    def run(self, kills: int, told: Callable[[str], None] = lambda _line: None) -> None:
        for _ in range(kills):
            self.kills += 1
            faults = len(self.faults)
            before = {did: one.row.epoch for did, one in self.twin.accounts.items()}
            life = self._live_and_die()
            copy = self._copy()
            with Database.open(copy / "db", memory_mib=32) as db:
                self._compare(db, life)
                self._reader(life, before)
            asyncio.run(self._settle(copy))
            shutil.rmtree(copy)
            self._forget()
            told(f"kill {self.kills}: unit {self.twin.number}, head {self.twin.head}, floor {self.floor}")
            for fault in self.faults[faults:]:
                told(f"  FAULT {fault}")

    def fault(self, text: str) -> None:
        self.faults.append(f"kill {self.kills}: {text}")

    # ---- the child

    def _live_and_die(self) -> Life:
        if self.chance.random() < _POWER_CUT:
            self.boot += 1
        command = [
            sys.executable, "-m", "tests.store.storm_child", str(self.folder), str(self.seed),
            str(self.kills), str(self.next_id), f"boot {self.boot}",
        ]  # fmt: skip
        lines: list[str] = []
        ready = threading.Event()
        early = self.chance.random() < _AT_START
        delay = self.chance.uniform(0, _LONGEST_S)
        with (self.folder / "errors").open("w") as errors:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
        reading = threading.Thread(target=_read, args=(child, lines, ready))
        reading.start()
        try:
            if not early:
                ready.wait(30)
            time.sleep(delay)  # the random moment; nothing is waited for
        finally:
            child.kill()
            reading.join()
        died = child.wait() != -9
        life = _life(lines, (self.folder / "errors").read_text())
        if died:
            self.fault(f"the child ended by itself: {life.errors[-3000:]}")
        self.at_start += not life.ready
        return life

    def _copy(self) -> Path:
        """What the child left, to be opened without touching it: the next child recovers it itself."""
        copy = self.folder / "copy"

        def link(source: str, target: str) -> None:
            if source.endswith((".sst", ".zst")):
                os.link(source, target)
            else:
                shutil.copy2(source, target)

        for name in ("db", "cas"):
            if (self.folder / name).exists():
                shutil.copytree(self.folder / name, copy / name, copy_function=link)
        return copy

    # ---- the state

    def _compare(self, db: Database, life: Life) -> None:
        twin = self.twin
        for problem in check(db).problems:
            self.fault(problem)
        self._take_holes(db)
        number = db.cursor(CURSOR) or 0
        if number < max(life.acknowledged, twin.number):
            self.fault(f"unit {max(life.acknowledged, twin.number)} is lost, the cursor is at {number}")
        for unit in range(twin.number + 1, number + 1):
            twin.apply(op_of(self.seed, unit))
        self.equal("head", (db.get(CURSORS, HEAD) or [1])[0], twin.head)
        for did in twin.accounts:
            self._compare_account(db, did)
        for name in twin.tallies:
            self.equal(name, db.count(name), twin.tallies[name])
        self._compare_refused(db)
        self._compare_floor(db)
        for name in ("gc/checkpoints", "gc/blocks_reclaimed", "gc/events_pruned"):
            self.totals[name] = db.count(name)

    def equal(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            self.fault(f"{what}: the store has {found!r}, the twin {wanted!r}")

    def _take_holes(self, db: Database) -> None:
        """After what looked like a power cut the ids go on above a hole, which is announced."""
        for name, stop in db.scan(CURSORS, HOLE.encode(), HOLE.encode() + b"\xff"):
            start = int(name.removeprefix(HOLE))
            if start not in self.holes:
                self.equal("start of a hole", start, self.twin.head)
                self.holes[start] = self.twin.head = stop

    def _compare_account(self, db: Database, did: str) -> None:
        one = self.twin.accounts[did]
        rows = {path: (row.cid, row.flags, row.rev) for path, row in db.records(did)}
        self.equal(f"records of {did}", rows, {path: tuple(row) for path, row in one.records.items()})
        row = db.repo(did)
        if row is not None or one.row.tracked:
            self.equal(f"row of {did}", row, one.row)
        start, stop = did_range(did)
        buffered = {key[1:]: row.data for key, row in db.scan(RESYNC_BUFFER, start, stop)}
        self.equal(f"buffer of {did}", buffered, one.buffered)
        words = {source: word[2] for (_, source), word in db.scan(ACCOUNT_STATUS, start, stop)}
        self.equal(f"words on {did}", words, one.words)
        archives = [(archive.rev, archive.digest) for archive in archives_of(db, did)]
        self.equal(f"archives of {did}", archives, one.archives)

    def _compare_refused(self, db: Database) -> None:
        """Those of ended lives may be swept already."""
        stored = {number: row.did for number, row in db.scan(QUARANTINE)}
        for number, did in self.twin.refused.items():
            gone = number not in stored and number < self.twin.accounts[did].refused_before_wipe
            if not gone and stored.get(number) != did:
                self.fault(f"quarantine: {number} of {did} is {stored.get(number)}")
        if stored.keys() - self.twin.refused.keys():
            self.fault("quarantine: the ring holds too much")

    def _compare_floor(self, db: Database) -> None:
        floor = db.cursor(FLOOR) or 1
        if floor < self.floor:
            self.fault(f"the floor went back from {self.floor} to {floor}")
        self.floor = floor
        newest = (db.get(CURSORS, HEAD) or [1, 0])[1]
        last = self.times.get(floor - 1)
        if last is not None and last > newest - RETENTION_S * 1_000_000 + _SLACK_US:
            self.fault(f"event {floor - 1} was pruned {(newest - last) / 1e6} s after it happened")

    # ---- the reader

    def _reader(self, life: Life, before: dict[str, int]) -> None:
        """Every event once, in order; what is left out was wiped, or lies in a hole or below the floor."""
        if life.overtaken:
            self.overtaken += 1
        latest = 0
        for event_id, time_us, told in life.told:
            if event_id < self.next_id:
                self.fault(f"event {event_id} was told twice or out of order")
            self._left_out(self.next_id, event_id, life.overtaken)
            self.equal(f"event {event_id}", told, self.twin.events.get(event_id))
            if told.epoch < before[told.did]:
                self.fault(f"event {event_id} was told though its life had ended before the start")
            if time_us <= latest:
                self.fault(f"event {event_id} is not later than the one before")
            self.times[event_id] = latest = time_us
            self.next_id = event_id + 1
            self.events += 1

    def _left_out(self, start: int, stop: int, overtaken: int) -> None:
        event_id = start
        while event_id < stop:
            if event_id in self.holes:
                event_id = self.holes[event_id]
                continue
            if event_id >= overtaken and not self.twin.dead(self.twin.events[event_id]):
                self.fault(f"event {event_id} was never told: {self.twin.events[event_id]}")
            event_id += 1

    # ---- what the workers still have to do

    async def _settle(self, copy: Path) -> None:
        """Reads everything afresh, then lets every worker finish; nothing of the past may be left."""
        with Database.open(copy / "db", memory_mib=32) as db:
            clock = Clock()
            writer = Writer(db, settings(), clock=clock, boot=f"boot {self.boot}")
            set_clock(clock, writer)
            await writer.start()
            try:
                log = EventLog(db, writer)
                events = log.read(0, 1_000_000)
                log.blocks(events)
                told = {event.id: told_of(event) for event in events}
                visible = self.twin.events.items()
                wanted = {key: one for key, one in visible if key >= log.floor and not self.twin.dead(one)}
                self.equal("the log", told, wanted)
                await self._finish(db, writer, copy)
            finally:
                await writer.stop()

    async def _finish(self, db: Database, writer: Writer, copy: Path) -> None:
        gc, blobs = settings().gc, FsBlobStore(copy / "cas", level=1)
        checkpoint, retention = CheckpointWorker(db, writer, gc), RetentionWorker(db, writer, settings())
        for _ in range(2):
            await checkpoint.run_once()
            await retention.run_once()
        await checkpoint.run_once()
        await BlocksGcWorker(db, writer, gc).run_once()
        await Archives(db, writer, blobs, settings()).run_once()
        for problem in (*check(db).problems, *check_archives(db, blobs)):
            self.fault(f"settled: {problem}")
        records = {(did, row.cid) for did, one in self.twin.accounts.items() for row in one.records.values()
                   if row.flags != OVERSIZE}  # fmt: skip
        events = {(event.did, event.cid) for event in EventLog(db, writer).read(0, 1_000_000) if event.cid}
        blocks = {key for key, _ in db.scan(BLOCKS)}
        self.equal("settled: dead blocks", len(blocks - records - events), 0)
        for name in (REFLOG.name, GC_QUEUE.name, ARCHIVE_QUEUE.name):
            self.equal(f"settled: {name}", len(list(db.raw_scan(name, None, None))), 0)
        self.equal("settled: wipes", len(list(db.scan(CURSORS, WIPE.encode(), WIPE.encode() + b"\xff"))), 0)
        dead = [key for key, _ in db.scan(EVENTS) if self.twin.dead(self.twin.events[key])]
        self.equal("settled: dead events", dead, [])
        held = {digest for one in self.twin.accounts.values() for _, digest in one.archives}
        self.equal("settled: archived files", {blob.digest for blob in blobs.files()}, held)

    def _forget(self) -> None:
        keep = min(self.floor, self.next_id)
        self.twin.events = {key: told for key, told in self.twin.events.items() if key >= keep}
        self.times = {key: time_us for key, time_us in self.times.items() if key >= keep - 1}


def _read(child: subprocess.Popen[str], lines: list[str], ready: threading.Event) -> None:
    assert child.stdout is not None
    with child.stdout as stdout:
        for line in stdout:
            lines.append(line)
            ready.set()
    ready.set()


def _life(lines: list[str], errors: str) -> Life:
    """The last line may be half a line; what the reader did not get whole it did not get."""
    acknowledged = overtaken = 0
    told: list[tuple[int, int, Told]] = []
    for line in lines:
        if not line.endswith("\n"):
            break
        match line[0]:
            case "a":
                acknowledged = int(line[2:])
            case "o":
                overtaken = int(line[2:])
            case "e":
                event_id, time_us, fields = json.loads(line[2:])
                told.append((event_id, time_us, Told(*fields)))
    return Life(bool(lines), acknowledged, told, overtaken, errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="storm-") as folder:
        storm = Storm(Path(folder), options.seed)
        storm.run(options.kills, partial(print, flush=True))
    wipes = sum(one.row.epoch for one in storm.twin.accounts.values())
    print(
        f"{storm.kills} kills ({storm.at_start} in a start) in {time.monotonic() - started:.0f} s: "
        f"{storm.twin.number} units, {storm.events} events told, {wipes} wipes, {len(storm.holes)} holes, "
        f"reader overtaken {storm.overtaken} times, {storm.totals}; {len(storm.faults)} faults"
    )
    return 1 if storm.faults else 0


if __name__ == "__main__":
    sys.exit(main())
