"""A lying network and a node that follows it, for scenarios: told a lie, it counts it and ends up right."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.simulator.account import Write
from indexer.simulator.cbor import cid_text
from indexer.simulator.content import POST
from indexer.simulator.framelog import Line
from indexer.simulator.wire import tid
from indexer.store.codecs import SyncState, Work
from indexer.store.keyspaces import QUARANTINE
from tests.ingest.node import Node

#: Work that says nothing about records.
IDLE = Work.VERIFY_HANDLE


class Scene:
    """One network, one node on some of its lanes."""

    def __init__(self, network: SimulatedNetwork, node: Node, lanes: Iterable[str]) -> None:
        self.network = network
        self.node = node
        self.sources = dict(zip(lanes, node.settings.upstreams, strict=True))

    # -- what the node made of it

    def counts(self, lane: str) -> Counter[str]:
        """outcome/reason → how often, of one source; those of its connections too."""
        source = self.sources[lane]
        prefix = f"ingest/{source}/"
        stored = Counter({name.removeprefix(prefix): n for name, n in self.node.db.counts(prefix).items()})
        status = next(entry for entry in self.node.ingest.status() if entry["name"] == source)
        live: Counter[str] = Counter(status["outcomes"])
        return stored | live

    def refused(self) -> list[tuple[str, int, str]]:
        """Quarantine rows: source, seq, reason."""
        return [(row.source, row.seq, row.reason) for _, row in self.node.db.scan(QUARANTINE)]

    def at_rest(self) -> bool:
        """Everything sent is taken in, and the index equals the ledger."""
        network = self.network
        for lane, seq in zip(self.sources, self.node.seqs(), strict=True):
            if seq < network.lanes[lane].seq:
                return False
        return not any(self.differences())

    def differences(self) -> Iterable[str]:
        """What the index has otherwise than the ledger."""
        for did, account in self.network.world.accounts.items():
            if not account.seen:
                continue
            row = self.node.db.repo(did)
            if row is None:
                yield f"{did} is not there"
                continue
            if row.status.active != (account.status == "active"):
                yield f"{did} is {row.status.label}, truly {account.status}"
            if account.status != "active":
                continue
            if row.state is not SyncState.SYNCED or row.work & ~IDLE:
                yield f"{did} is {row.state.label}, work {row.work}"
            elif (row.rev, row.data) != (account.rev, account.data):
                yield f"{did} has rev {row.rev}, truly {account.rev}"
            else:
                stored = {
                    path: (bytes(record.cid), bool(record.flags))
                    for path, record in self.node.db.records(did)
                }
                truth = {
                    path: (bytes(record.cid), path in account.flaws)
                    for path, record in account.records.items()
                }
                if stored != truth:
                    yield f"{did} holds {len(stored)} records, truly {len(truth)}"

    def folded(self) -> dict[str, dict[str, str]]:
        """DID → path → CID, as the events tell it."""
        records: dict[str, dict[str, str]] = {}
        for event in self.node.events():
            if event.kind != "record":
                continue
            kept, path = records.setdefault(event.did, {}), f"{event.collection}/{event.rkey}"
            if event.action == "delete":
                del kept[path]
            else:
                assert (path in kept) == (event.action == "update"), event
                kept[path] = cid_text(event.cid)
        return records

    def check_log(self) -> None:
        """The log, folded, gives the ledger's records, without those that are none."""
        folded = self.folded()
        for did, account in self.network.world.accounts.items():
            if account.seen and account.status == "active":
                truth = {
                    path: cid_text(record.cid)
                    for path, record in account.records.items()
                    if path not in account.flaws
                }
                assert folded.get(did, {}) == truth, did

    # -- acts

    def act(self, happening: Any) -> None:
        self.network.publish(happening)

    async def ready(self, lane: str, did: str | None) -> None:
        """The lane has somebody to lie to, and its cursor has moved on since the last lie."""
        await self.node.until(lambda: bool(self.network.lanes[lane].lines))
        someone = did or next(account.did for account in self.network.world.active if account.seen)
        self.act(self.network.world.commit(someone, [true_write(self)]))
        await self.settled()

    async def reconnected(self, lane: str, lines: list[Line]) -> None:
        """Waits for a socket that is none of these, and has something true said on it."""
        new = self.network.lanes[lane].lines
        await self.node.until(lambda: any(line not in lines for line in new))
        self.network.publish(self.network.world.commit(self.network.world.active[0].did, [true_write(self)]))

    async def counted(self, lane: str, before: Counter[str], names: Iterable[str]) -> None:
        """Waits until all of these were counted since ``before``."""
        try:
            async with asyncio.timeout(12):
                await self.node.until(lambda: all((self.counts(lane) - before)[name] for name in names))
        except TimeoutError:
            raise AssertionError(f"{list(names)} expected, counted {self.counts(lane) - before}") from None

    async def settled(self) -> None:
        """Waits until the node is at rest; says what is missing when it never is."""
        try:
            async with asyncio.timeout(12):
                await self.node.until(self.at_rest)
        except TimeoutError:
            raise AssertionError(
                f"not at rest: {list(self.differences())}, cursors {self.node.seqs()}, "
                f"sent {[self.network.lanes[lane].seq for lane in self.sources]}, "
                f"{self.node.ingest.status()}"
            ) from None


def true_write(scene: Scene) -> Write:
    """Something new and true."""
    return Write("create", f"{POST}/{tid(scene.network.world.clock())}", {"$type": POST, "text": "true"})


@asynccontextmanager
async def scene(
    folder: Path, lanes: Iterable[str] = ("relay0",), seed: int = 7, **tables: Any
) -> AsyncIterator[Scene]:
    """A small network whose accounts are all known, and the node at rest upon it."""
    network = SimulatedNetwork(SimConfig(seed=seed, accounts=0, history_accounts=0, relays=2, rate=0))
    await network.start()
    try:
        lanes = list(lanes)
        urls = dict(zip(network.lanes, [*network.relay_urls, *network.pds_urls], strict=True))
        upstreams = [
            "pds::" + urls[lane].replace("http", "ws", 1) if lane.startswith("pds") else urls[lane]
            for lane in lanes
        ]
        defaults: dict[str, Any] = {
            "upstreams": upstreams,
            "plc_urls": [network.plc_url],
            "verifiers": 0,
            "filter": {"mode": "full"},
            "network": {"dns_server": network.dns_address},
            "identity": {"error_ttl": 0.05},
            "ingest": {
                "refresh_interval": 0.02, "first_sight_wait": 0.02, "reconnect_max": 0.02,
                "receive_timeout": 1.0,
            },
            "backfill": {"retry_min": 0.05, "retry_max": 0.1},
        }  # fmt: skip
        merged = {
            name: {**value, **tables.get(name, {})} if isinstance(value, dict) else tables.get(name, value)
            for name, value in defaults.items()
        }
        async with Node(folder, {**tables, **merged}) as node:
            made = Scene(network, node, lanes)
            await node.until(lambda: all(network.lanes[lane].lines for lane in lanes))
            for _ in range(5):
                network.add_account(0, pds=None, handle=None, curve=None)
            network.add_account(60, pds=0, handle=None, curve=None)
            for _ in range(40):
                network.step()
            await made.settled()
            yield made
    finally:
        await network.stop()
