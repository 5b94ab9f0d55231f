"""The store against a plain dict twin: any order of writes, wipes, folds, collections, prunes, restarts."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from indexer.errors import BadInput
from indexer.store.check import check
from indexer.store.codecs import INVALID, OVERSIZE, AccountStatus, Mode
from indexer.store.transaction import Transaction
from tests.store.support import SYNCED, Clock, Store, block_of, cid_of, opened

DIDS = ("did:web:a.test", "did:web:ab.test", "did:web:b.test")
PATHS = ("a.b.c/1", "a.b.c/2", "a.b.d/1")
TEXTS = ("one", "two", "three")
FLAGS = (0, 0, 0, INVALID, OVERSIZE)
RETENTION_S = 100
Change = tuple[str, str, str, int]  # DID, path, text ("" deletes), flags


class Twin:
    """What the store should hold, as plainly as can be."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.events: list[tuple[int, str, str, str, bytes | None]] = []  # id, DID, path, action, CID
        self.dead: set[int] = set()  # ids of ended lives
        self.floor = 1
        self.head = 1

    def append(self, did: str, path: str, action: str, cid: bytes | None) -> None:
        self.events.append((self.head, did, path, action, cid))
        self.head += 1

    def apply(self, change: Change) -> None:
        did, path, text, flags = change
        old = self.records.get((did, path))
        served = old is not None and not old[1]
        if not text:
            if old is not None:
                del self.records[did, path]
                if served:
                    self.append(did, path, "delete", None)
            return
        cid = cid_of(block_of(text))
        if old == (cid, flags):
            return
        self.records[did, path] = (cid, flags)
        if not flags:
            self.append(did, path, "update" if served else "create", cid)
        elif served:
            self.append(did, path, "delete", None)

    def wipe(self, did: str) -> None:
        self.records = {key: value for key, value in self.records.items() if key[0] != did}
        self.dead |= {event[0] for event in self.events if event[1] == did}
        self.append(did, "", "account", None)

    def visible(self) -> list[tuple[int, str, str, str, bytes | None]]:
        return [event for event in self.events if event[0] >= self.floor and event[0] not in self.dead]


def write(change: Change, tx: Transaction) -> None:
    did, path, text, flags = change
    if text:
        block = block_of(text)
        tx.put_record(did, path, cid_of(block), block, "3ka", live=True, flags=flags)
    else:
        tx.delete_record(did, path, "3ka", live=True)


CHANGES = st.tuples(
    st.sampled_from(DIDS), st.sampled_from(PATHS), st.sampled_from(("", *TEXTS)), st.sampled_from(FLAGS)
)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.twin = Twin()
        self.loop = asyncio.new_event_loop()
        self.marks: list[tuple[int, int]] = []  # time of a retention pass, head at that time
        self.open()

    def open(self, point_rows: int = 3) -> None:
        self.context = opened(
            self.folder,
            mode=Mode(),
            clock=self.clock,
            clean=False,
            events={"retention": RETENTION_S},
            gc={"step_rows": 2, "wipe_point_rows": point_rows, "compact_after": 3},
            writer={"group_ops": 20},
        )
        self.store: Store = self.do(self.context.__aenter__)

    def do(self, call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        async def run() -> Any:
            return await call(*arguments)

        return self.loop.run_until_complete(run())

    @rule(changes=st.lists(CHANGES, min_size=1, max_size=8))
    def commit(self, changes: list[Change]) -> None:
        def all_of_them(tx: Transaction) -> None:
            for change in changes:
                write(change, tx)

        self.do(self.store.writer.run, "commit", all_of_them)
        for change in changes:
            self.twin.apply(change)

    @rule(did=st.sampled_from(DIDS), texts=st.dictionaries(st.sampled_from(PATHS), st.sampled_from(TEXTS)))
    def fetched_repository(self, did: str, texts: dict[str, str]) -> None:
        blocks = {path: block_of(texts[path]) for path in sorted(texts)}
        records = [(path, cid_of(block), block, 0) for path, block in blocks.items()]
        self.do(self.store.writer.run, "bulk", lambda tx: tx.put_records(did, "3ka", records, live=False))
        for path in blocks:
            self.twin.apply((did, path, texts[path], 0))

    @rule(changes=st.lists(CHANGES, min_size=2, max_size=6))
    def commit_in_steps_of_which_every_second_fails(self, changes: list[Change]) -> None:
        def step(number: int) -> Callable[[Transaction], None]:
            def run(tx: Transaction) -> None:
                write(changes[number], tx)
                if number % 2:
                    raise BadInput("no")

            return run

        steps = [step(number) for number in range(len(changes))]
        self.do(self.store.writer.run_ordered, "frames", steps, lambda _index, _error: lambda _tx: None)
        for change in changes[::2]:
            self.twin.apply(change)

    @rule(did=st.sampled_from(DIDS), after=st.lists(CHANGES, max_size=3))
    def wipe_and_go_on(self, did: str, after: list[Change]) -> None:
        def run(tx: Transaction) -> None:
            tx.wipe_repo(did, AccountStatus.DELETED)
            for change in after:
                write(change, tx)

        self.do(self.store.writer.run, "wipe", run)
        self.twin.wipe(did)
        for change in after:
            self.twin.apply(change)

    @rule(did=st.sampled_from(DIDS), due=st.integers(0, 3))
    def schedule(self, did: str, due: int) -> None:
        def run(tx: Transaction) -> None:
            tx.set_repo(did, (tx.repo(did) or SYNCED)._replace(due=due, tracked=True))

        self.do(self.store.writer.run, "schedule", run)

    @rule()
    def checkpoint(self) -> None:
        self.do(self.store.checkpoint.run_once)

    @rule()
    def collect(self) -> None:
        assert self.do(self.store.gc.run_once).faults == 0

    @rule(seconds=st.integers(0, 150))
    def prune_and_sweep(self, seconds: int) -> None:
        self.clock.forward(seconds)
        report = self.do(self.store.retention.run_once)
        assert report.floor >= self.twin.floor
        now = self.clock.now
        if not self.marks or self.marks[-1][1] < self.twin.head:
            self.marks.append((now, self.twin.head))
        # The pass took its time a tick or two ago: no mark lies that close to the cutoff.
        old = [head for time, head in self.marks if time <= now - RETENTION_S * 1_000_000]
        self.twin.floor = max([self.twin.floor, *old])

    @precondition(lambda self: self.twin.head > 1)
    @rule(point_rows=st.sampled_from([0, 3, 1000]))
    def kill_and_reopen(self, point_rows: int) -> None:
        self.do(self.context.__aexit__, None, None, None)
        self.open(point_rows)

    @invariant()
    def the_store_equals_its_twin(self) -> None:
        store, twin = self.store, self.twin
        rows = {(did, path): (row.cid, row.flags) for did in DIDS for path, row in store.db.records(did)}
        assert rows == twin.records
        events = [
            (e.id, e.did, f"{e.collection}/{e.rkey}".strip("/"), e.action or e.kind, e.cid)
            for e in store.events()
        ]
        assert events == twin.visible()
        assert (store.log.head, store.log.floor) == (twin.head, twin.floor)
        assert check(store.db).problems == []

    def teardown(self) -> None:
        self.do(self.context.__aexit__, None, None, None)
        self.loop.close()
        shutil.rmtree(self.folder)


StoreMachine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStoreMachine = StoreMachine.TestCase
