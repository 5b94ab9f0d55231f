"""The simulated network as one object: its state, its servers, and the task that makes things happen.

Owns sequencing and publication: a happening gets its numbers, goes to the journal, and only then to
the subscribers. Runs on the event loop that called `start`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from indexer.simulator.account import DELETED, Account, ActionError
from indexer.simulator.chooser import Chooser, Rates, past
from indexer.simulator.control import control_app
from indexer.simulator.fault_answers import SUITED
from indexer.simulator.faults import Fault, Faults
from indexer.simulator.framelog import FrameLog, Lane
from indexer.simulator.journal import Journal, JournalError, Place
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
    rate: float = 50.0  # steps a second (nearly all are commits); 0: nothing happens by itself
    commits: int | None = None  # stop by itself when this many commits are in the stream
    state: Path | None = None  # folder of the journal; None: nothing survives
    window_mib: int = 1024  # replay window without ``state``; with it everything is kept
    host: str = "127.0.0.1"
    port_base: int = 0  # control, PLC, relay, PDS 0, … from here; 0: any free ports
    paused: bool = False
    rates: Rates = field(default_factory=Rates)
    faults: tuple[Fault, ...] = ()  # that hold from the start; more by `SimulatedNetwork.faults`


class SimulatedNetwork:
    """PLC directory, PDSes and a relay on loopback, with a control API and a ledger."""

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.rate = config.rate
        self.commits = 0
        self._journal = Journal(config.state, keep_bytes=config.window_mib << 20)
        self._log = FrameLog(self._journal)
        self.relay = Lane(self._log)
        self._listeners: dict[str, Listener] = {}
        self._ports: dict[str, int] = {}
        self.faults = Faults(config.seed, SUITED, config.faults)
        self._names = NameServer(self._did_of, self.faults)
        self.pds_lanes: list[Lane] = []
        self.world: World
        try:
            self.world = self._open()
        except BaseException:
            self._journal.close()
            raise
        self._chooser = Chooser(self.world, config.rates)
        self._running = asyncio.Event()
        self._parked = asyncio.Event()
        self._generator: asyncio.Task[None] | None = None

    # -- addresses

    @property
    def plc_url(self) -> str:
        return self._listeners["plc"].url

    @property
    def relay_url(self) -> str:
        return self._listeners["relay"].url.replace("http", "ws", 1)

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
        for offset, (name, app) in enumerate(apps.items()):
            wanted = self.config.port_base + offset if self.config.port_base else self._ports.get(name, 0)
            self._listeners[name] = await Listener.open(app, self.config.host, wanted)
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

    # -- happenings

    def publish(self, happening: Happening) -> int:
        """Number, journal and send what a happening emits; returns the relay's last seq."""
        rows: list[tuple[int, int, int, int, int, str]] = []
        halves: list[bytes] = []
        next_relay = self.relay.seq
        next_pds = [lane.seq for lane in self.pds_lanes]
        for frame in happening.frames:
            next_pds[frame.pds] += 1
            next_relay += frame.relayed
            before, after = frame.halves
            relay_seq = next_relay if frame.relayed else 0
            rows.append((frame.pds, next_pds[frame.pds], relay_seq, len(before), len(after), frame.kind))
            halves += frame.halves
        row = happening.row | {"us": self.world.clock.last, "frames": rows, "emits": bool(rows)}
        self._index(rows, self._journal.append(row, halves))
        for frame in happening.frames:
            self.pds_lanes[frame.pds].wake()
        self.relay.wake()
        return self.relay.seq

    def step(self) -> int:
        """One happening by the generator's choice."""
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
                world = self._world(row["seed"], row["pds"])
            elif row["kind"] == "ports":
                self._ports, complete = row["ports"], True
            elif world is None:
                raise JournalError("the journal does not begin with a genesis row")
            else:
                world.restore(row)
                self._index(row["frames"], place)
        config = self.config
        if world is None:
            world = self._world(config.seed, config.pds)
            self._journal.append({"kind": "genesis", "seed": config.seed, "pds": config.pds}, [])
        world.settle()
        self.world = world
        if not complete:
            first = [config.history_records or 1] * config.history_accounts + [0] * config.accounts
            for records in first[len(world.accounts) :]:
                self.add_account(records)
        return world

    def _world(self, seed: int, pds: int) -> World:
        self.pds_lanes = [Lane(self._log) for _ in range(pds)]
        return World(seed, pds, Clock())

    def _index(self, rows: list[Any], place: Place) -> None:
        numbers = self._log.add(place, [(row[3], row[4]) for row in rows])
        for (pds, pds_seq, relay_seq, _, _, kind), number in zip(rows, numbers, strict=True):
            self.pds_lanes[pds].add(pds_seq, number)
            if relay_seq:
                self.relay.add(relay_seq, number)
                self.commits += kind == "#commit"

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
