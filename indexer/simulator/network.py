"""The simulated network as one object: its state, its servers, and the task that makes things happen.

Owns sequencing and publication: a happening gets its numbers, goes to the journal, and only then to
the subscribers. Runs on the event loop that called `start`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from indexer.simulator.account import DELETED, Account, ActionError
from indexer.simulator.chooser import Chooser, Rates, past
from indexer.simulator.control import control_app
from indexer.simulator.draft import Outgoing
from indexer.simulator.fault_answers import SUITED
from indexer.simulator.faults import Fault, Faults
from indexer.simulator.framelog import FrameLog, Lane, Turn
from indexer.simulator.journal import Journal, JournalError, Place
from indexer.simulator.lies import Lies
from indexer.simulator.listener import Listener
from indexer.simulator.names import NameServer
from indexer.simulator.servers import by_handle, pds_app, plc_app, relay_app
from indexer.simulator.world import Clock, Happening, World

_TURN_S = 0.01
_MAX_BURST_S = 0.25


@dataclass(frozen=True, slots=True)
class SimConfig:
    """What network to make. With ``state`` an existing journal decides seed and number of PDSes."""

    seed: int = 1
    accounts: int = 20  # that appear in the stream from their creation
    history_accounts: int = 5  # that were there before the stream begins
    history_records: int = 200  # records of each of those
    pds: int = 2
    relays: int = 1  # each with numbers of its own
    rate: float = 50.0  # steps a second (nearly all are commits); 0: nothing happens by itself
    commits: int | None = None  # stop by itself when this many commits are in the stream
    state: Path | None = None  # folder of the journal; None: nothing survives
    window_mib: int = 1024  # replay window without ``state``; with it everything is kept
    host: str = "127.0.0.1"
    port_base: int = 0  # control, PLC, relay, PDS 0, … from here; 0: any free ports
    paused: bool = False
    rates: Rates = field(default_factory=Rates)
    faults: tuple[Fault, ...] = ()  # that hold from the start; more by `SimulatedNetwork.faults`
    lie_rate: float = 0.0  # chance that a step is a lie
    lies: Mapping[str, float] = field(default_factory=dict)  # kind → weight; empty: all kinds alike
    lie_lanes: tuple[str, ...] = ()  # where lies are told by chance; empty: by the relays


class SimulatedNetwork:
    """PLC directory, PDSes and relays on loopback, with a control API, a ledger, and a ledger of lies."""

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.rate = config.rate
        self.commits = 0
        self._journal = Journal(config.state, keep_bytes=config.window_mib << 20)
        self._log = FrameLog(self._journal)
        self.relays: list[Lane] = []
        self.lanes: dict[str, Lane] = {}  # every sender by name: relay0, relay1, …, pds0, pds1, …
        self._listeners: dict[str, Listener] = {}
        self._ports: dict[str, int] = {}
        self.faults = Faults(config.seed, SUITED, config.faults)
        self._names = NameServer(self._did_of, self.faults)
        self.pds_lanes: list[Lane] = []
        self.world: World
        self.lies: Lies = Lies(self)
        try:
            self.world = self._open()
        except BaseException:
            self._journal.close()
            raise
        self._chooser = Chooser(self.world, config.rates)
        try:
            self.lies.plan(config.lie_rate, config.lies, config.lie_lanes)
        except BaseException:
            self._journal.close()
            raise
        self._running = asyncio.Event()
        self._parked = asyncio.Event()
        self._generator: asyncio.Task[None] | None = None

    # -- addresses

    @property
    def plc_url(self) -> str:
        return self._listeners["plc"].url

    @property
    def relay_url(self) -> str:
        return self.relay_urls[0]

    @property
    def relay_urls(self) -> list[str]:
        names = ["relay", *(f"relay{number}" for number in range(1, len(self.relays)))]
        return [self._listeners[name].url.replace("http", "ws", 1) for name in names]

    @property
    def pds_urls(self) -> list[str]:
        return [self._listeners[f"pds{number}"].url for number in range(self.world.pds)]

    @property
    def control_url(self) -> str:
        return self._listeners["control"].url

    @property
    def dns_address(self) -> str:
        """``address:port`` of the name server, for `network.dns_server`."""
        return f"{self.config.host}:{self._names.port}"

    # -- life

    async def start(self) -> None:
        apps = {"control": control_app(self), "plc": plc_app(self), "relay": relay_app(self)}
        apps |= {f"pds{number}": pds_app(self, number) for number in range(self.world.pds)}
        apps |= {f"relay{number}": relay_app(self, number) for number in range(1, len(self.relays))}
        for offset, (name, app) in enumerate(apps.items()):
            wanted = self.config.port_base + offset if self.config.port_base else self._ports.get(name, 0)
            self._listeners[name] = await Listener.open(
                app, self.config.host, wanted, exact=self.config.port_base > 0
            )
        await self._names.open(self.config.host, self._ports.get("dns", 0))
        self._ports = {name: listener.port for name, listener in self._listeners.items()}
        self._ports["dns"] = self._names.port
        self._journal.append({"kind": "ports", "ports": self._ports}, [])
        if not self.config.paused:
            self._running.set()
        self._generator = asyncio.create_task(self._generate())

    async def stop(self) -> None:
        if self._generator is not None:
            self._generator.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._generator
        self._names.close()
        await asyncio.gather(*(listener.close() for listener in self._listeners.values()))
        self._journal.close()

    async def pause(self) -> int:
        """Stop the generator; returns the relay's last seq once nothing more will come."""
        self._running.clear()
        if self._generator is not None and not self._generator.done():
            await self._parked.wait()
        return self.relay.seq

    def resume(self) -> None:
        self._running.set()

    @property
    def paused(self) -> bool:
        return not self._running.is_set()

    def finished(self) -> bool:
        """Whether the configured number of commits is reached."""
        return self.config.commits is not None and self.commits >= self.config.commits

    def failure(self) -> BaseException | None:
        """What ended the generator, if something did."""
        done = self._generator is not None and self._generator.done() and not self._generator.cancelled()
        return self._generator.exception() if self._generator is not None and done else None

    # -- lanes

    @property
    def relay(self) -> Lane:
        """The first relay's."""
        return self.relays[0]

    # -- happenings

    def publish(self, happening: Happening) -> int:
        """Number, journal and send what a happening emits; returns the relay's last seq."""
        rows: list[list[Any]] = []
        halves: list[bytes] = []
        heads = {name: lane.head for name, lane in self.lanes.items()}
        for frame in happening.frames:
            rows.append(self._numbered(frame, heads))
            halves += frame.halves
        row = happening.row | {"us": self.world.clock.last, "frames": rows, "emits": bool(rows)}
        self.lies.enter(row)
        self._index(rows, self._journal.append(row, halves))
        for name, lane in self.lanes.items():
            lane.skip(heads[name])
            lane.wake()
        return self.relay.seq

    def _numbered(self, frame: Outgoing, heads: dict[str, int]) -> list[Any]:
        """A frame's row: PDS, seq there, seq on the first relay, two lengths, kind, seqs on other relays."""
        pds = f"pds{frame.pds}"
        usual = {pds, *self._relay_names} if frame.relayed else {pds}
        lanes = usual if frame.lanes is None else frame.lanes
        for name in lanes | frame.withheld:
            heads[name] += 1
        first, *others = (heads[name] if name in lanes else 0 for name in self._relay_names)
        before, after = map(len, frame.halves)
        return [frame.pds, heads[pds] if pds in lanes else 0, first, before, after, frame.kind, *others]

    def journal(self, row: dict[str, Any]) -> None:
        """Writes a row that emits nothing."""
        self._journal.append(row, [])

    def reset(self, name: str, base: int, *, mute: bool) -> None:
        """A lane forgets all that it sent and goes on above ``base``; who listens is cut off."""
        row = {"kind": "reset", "lane": name, "base": base, "mute": mute}
        self._journal.append(row, [])
        self.lanes[name].reset(base, mute=mute)
        self.lanes[name].play(Turn(cut=True))

    def step(self) -> int:
        """One happening by the generator's choice, or a lie."""
        if self.lies.by_chance():
            return self.relay.seq
        return self.publish(self._chooser.step())

    def add_account(
        self,
        records: int,
        *,
        pds: int | None = None,
        handle: str | None = None,
        curve: str | None = None,
        did: str | None = None,
    ) -> str:
        """A new account; with ``records`` one that has a past and does not show in the stream yet."""
        world = self.world
        rng = Random(f"{world.seed}/{len(world.accounts)}")
        made = world.create(
            pds=pds,
            handle=handle,
            curve=curve,
            past=(lambda did: past(rng, world, did, records)) if records else None,
            did=did,
        )
        self.publish(made)
        return str(made.row["did"])

    def ledger(self, values: bool) -> dict[str, Any]:
        """The truth at this moment."""
        urls = self.pds_urls
        accounts = {
            did: account.ledger(urls[account.pds], values) for did, account in self.world.accounts.items()
        }
        return {"seq": self.relay.seq, "commits": self.commits, "accounts": accounts}

    # -- inside

    def by_handle(self, handle: str) -> Account | None:
        """Who has a handle now, deleted accounts included."""
        return by_handle(self, handle)

    def _did_of(self, handle: str) -> str | None:
        account = by_handle(self, handle)
        return None if account is None or account.status == DELETED else account.did

    def _open(self) -> World:
        """The world of the journal, or a new one with its first accounts."""
        world: World | None = None
        complete = False  # a first start may have been killed before its last account
        for row, place in self._journal.rows():
            if row["kind"] == "genesis":
                world = self._world(row["seed"], row["pds"], row.get("relays", 1))
            elif row["kind"] == "ports":
                self._ports, complete = row["ports"], True
            elif world is None:
                raise JournalError("the journal does not begin with a genesis row")
            elif row["kind"] == "reset":
                self.lanes[row["lane"]].reset(row["base"], mute=row["mute"])
            elif row["kind"] == "trick":
                self.lies.restore(row)
            else:
                world.restore(row)
                self._index(row["frames"], place)
                self.lies.restore(row)
        config = self.config
        if world is None:
            world = self._world(config.seed, config.pds, config.relays)
            genesis = {"kind": "genesis", "seed": config.seed, "pds": config.pds, "relays": config.relays}
            self._journal.append(genesis, [])
        world.settle()
        self.world = world
        if not complete:
            first = [config.history_records or 1] * config.history_accounts + [0] * config.accounts
            for records in first[len(world.accounts) :]:
                self.add_account(records)
        return world

    def _world(self, seed: int, pds: int, relays: int) -> World:
        self.pds_lanes = [Lane(self._log, f"pds{number}") for number in range(pds)]
        self.relays = [Lane(self._log, f"relay{number}") for number in range(relays)]
        self._relay_names = [lane.name for lane in self.relays]
        self.lanes = {lane.name: lane for lane in (*self.relays, *self.pds_lanes)}
        return World(seed, pds, Clock())

    def _index(self, rows: list[Any], place: Place) -> None:
        numbers = self._log.add(place, [(row[3], row[4]) for row in rows])
        for (pds, pds_seq, relay_seq, _, _, kind, *others), number in zip(rows, numbers, strict=True):
            if pds_seq:
                self.pds_lanes[pds].add(pds_seq, number)
            for lane, seq in zip(self.relays, (relay_seq, *others), strict=True):
                if seq:
                    lane.add(seq, number)
            self.commits += kind == "#commit" and relay_seq > 0

    async def _generate(self) -> None:
        """Steps at the rate that holds now; what a busy machine could not make is not made up for."""
        due, last = 0.0, time.monotonic()
        while True:
            if self.paused or self.finished():
                self._parked.set()
                await (self._running.wait() if self.paused else asyncio.sleep(_TURN_S))
                due, last = 0.0, time.monotonic()
                continue
            self._parked.clear()
            now = time.monotonic()
            due = min(due + (now - last) * self.rate, max(1.0, self.rate * _MAX_BURST_S))
            last = now
            while due >= 1 and time.monotonic() - now < _TURN_S and not self.finished():
                self._attempt()
                due -= 1
            await asyncio.sleep(0 if due >= 1 else _TURN_S)

    def _attempt(self) -> None:
        with contextlib.suppress(ActionError):  # the dice asked for what cannot be, as a handle that is taken
            self.step()
