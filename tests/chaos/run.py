"""One chaos run, from its seed: the storm, the calm after it, and the verdict.

Owns the order of events. In the storm the network lives, lies and misbehaves while the daemon is killed at
random; then everything that was planned must have happened. In the calm the faults end, hosts say once more
what is true, and lies about open sockets are told to a daemon that lives. At last some lanes begin their
numbering anew. One event loop.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import aiohttp

from indexer.simulator.account import ACTIVE
from indexer.simulator.faults import LIST_REPOS
from indexer.simulator.framelog import Line
from indexer.simulator.lie_kinds import KINDS
from indexer.store.check import check
from indexer.store.database import Database
from tests.chaos import verdict
from tests.chaos.network import ChaosNetwork
from tests.chaos.plan import RENUMBERING, SOCKETS, STUCK, Plan, followed
from tests.chaos.reader import Subscriber
from tests.chaos.verdict import Judge
from tests.chaos.victim import Victim

_TURN_S = 0.05
_SETTLE_S = 120.0
_HEARD_S = 40.0
_POKE_S = 1.0
_FAIR_KILLS = 2
#: Of the kills that come at any moment of a start.
_AT_START = 0.2


class Options(NamedTuple):
    """How much of everything. The storm lasts for ``seconds``, and until all that was planned happened."""

    seed: int
    accounts: int = 200
    seconds: float = 12.0
    commits: int = 0  # at least so many
    rate: float = 60.0  # steps of the network a second
    lies: float = 20.0  # a second
    life: tuple[float, float] = (0.3, 5.0)  # seconds that a daemon lives once it is ready
    patience: float = 200.0  # seconds beyond ``seconds`` until a plan that is not complete fails the run


class Report(NamedTuple):
    """What a run was; ``faults`` is empty when all is well."""

    seed: int
    faults: list[str]
    figures: dict[str, Any]


class ChaosRun:
    """``run`` gives the report, whatever happened; what it started has ended by then."""

    def __init__(self, options: Options, folder: Path, told: Callable[[str], None]) -> None:
        self.options = options
        self.rng = Random(f"chaos/{options.seed}")
        self.faults: list[str] = []
        self.figures: dict[str, Any] = {}
        self.network = ChaosNetwork(options.seed, options.rate)
        self._folder = folder
        self._told = told
        self._tasks: list[asyncio.Task[None]] = []
        self._lanes = followed()
        self._poked = 0.0
        self._stormy = 0  # samples of memory
        self._began = time.monotonic()
        self._fair: list[int] = []
        self._rebirth: asyncio.Future[None] | None = None

    async def run(self) -> Report:
        await self.network.start()
        try:
            self.victim = Victim(self.network, self._lanes, self._folder)
            self.reader = Subscriber(self.victim.stream_url)
            self._tasks = [asyncio.create_task(self.reader.run()), asyncio.create_task(self.victim.watch())]
            await self._acts()
        except (AssertionError, aiohttp.ClientError, TimeoutError) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.faults.append(f"{type(error).__name__} at {place.filename}:{place.lineno}: {error}")
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.victim.close()
            await self.network.stop()
        self.figures["seconds"] = round(time.monotonic() - self._began, 1)
        return Report(self.options.seed, self.faults + self.victim.faults + self.reader.faults, self.figures)

    async def _acts(self) -> None:
        await self._first_light()
        await self._storm()
        self._stormy = len(self.victim.samples)
        await self._calm()
        await self._settled()
        self._say("settled")
        await self._fair_weather()
        await self._sockets()
        await self._settled()
        self._say("settled, nothing was excused")
        await self.victim.stop()
        self._count()
        await self._begin_anew()
        await self._settled()
        await self._last_look()

    def _say(self, what: str) -> None:
        self._told(f"{time.monotonic() - self._began:.0f} s: {what}")

    # -- acts

    async def _first_light(self) -> None:
        """The daemon has a cursor on every lane before anything happens that it must not miss."""
        self.victim.start()
        await self.victim.ready()
        for lane in self._lanes:
            await self._connected(lane)
        for pds in range(self.network.world.pds):
            self.network.add_account(0, pds=pds)
        await self._caught_up()
        self.network.populate(self.options.accounts - self.network.world.pds)

    async def _storm(self) -> None:
        """Everything at once."""
        options, network = self.options, self.network
        self.plan = plan = Plan(network, self._lanes, self.rng)
        network.resume()
        ends = time.monotonic() + options.seconds
        killing = asyncio.create_task(self._kill_at_random())
        due, last = 0.0, time.monotonic()
        try:
            while not (time.monotonic() > ends and plan.complete and network.commits >= options.commits):
                if killing.done():
                    break
                if time.monotonic() > ends + options.patience:
                    self.faults.append(f"planned, and never happened: {', '.join(plan.missing())}")
                    break
                now = time.monotonic()
                due, last = min(due + (now - last) * options.lies, 5.0), now
                while due >= 1:
                    plan.lie()
                    due -= 1
                plan.pump()
                await self._poke()
                await asyncio.sleep(_TURN_S)
        finally:
            killing.cancel()
            await asyncio.gather(killing, return_exceptions=True)
            if self._rebirth is not None:  # a kill under way is followed by its start
                await asyncio.gather(self._rebirth, return_exceptions=True)
        if killing.done() and not killing.cancelled() and killing.exception() is not None:
            raise killing.exception() or AssertionError
        self._say(
            f"storm over: {network.commits} commits, {sum(network.lies.told.values())} lies, "
            f"{sum(network.faults.fired.values())} faults, {self.victim.kills} kills"
        )

    async def _poke(self) -> None:
        """An operator has revs compared when a fault waits for somebody who lists repositories."""
        if not self.plan.waits_for(LIST_REPOS) or time.monotonic() < self._poked + _POKE_S:
            return
        self._poked = time.monotonic()
        url = self.network.url_of(self.rng.choice(self._lanes))
        with suppress(aiohttp.ClientError, TimeoutError, AssertionError):  # it may be dead just now
            await self.victim.post("/firehose/compare", {"url": url})

    async def _kill_at_random(self) -> None:
        """Life after life; the moments are random, nothing is waited for."""
        victim, rng = self.victim, self.rng
        while True:
            if rng.random() > _AT_START:
                await victim.ready()
                await asyncio.sleep(rng.uniform(*self.options.life))
            else:
                await asyncio.sleep(rng.uniform(0, 1))
            self._rebirth = asyncio.ensure_future(self._reborn())
            await asyncio.shield(self._rebirth)

    async def _reborn(self) -> None:
        await self.victim.kill()
        self.victim.start()

    async def _calm(self) -> None:
        """The weather calms down, and hosts say what is true."""
        await asyncio.sleep(0)
        await self.network.pause()
        self.plan.calm()
        self.figures["server_faults"] = self.plan.hosts()
        await self.victim.ready()
        self.network.say_the_truth()

    async def _fair_weather(self) -> None:
        """Lies of accounts of which nothing else is told, and kills: each is refused once, for its reason."""
        self._fair = self.plan.fair()
        for _ in range(_FAIR_KILLS):
            await asyncio.sleep(self.rng.uniform(0, 0.3))
            await self._reborn()
            await self.victim.ready()
        await self._settled()

    async def _sockets(self) -> None:
        """Each lie about an open socket once, to a daemon that lives long enough to count it."""
        url = self.network.url_of("relay0")
        await self._caught_up()
        for name in (*SOCKETS, STUCK):
            await self._connected("relay0")
            before = Counter((await self.victim.source(url))["outcomes"])
            if self.network.lie(name, ["relay0"]) is None:
                self.faults.append(f"{name} could not be told")
                continue
            await self._heard(url, before, name)
            self.network.say_one()
            await self._caught_up()  # on a socket that lives

    async def _heard(self, url: str, before: Counter[str], name: str) -> None:
        """Waits until a lie was counted under its reason."""
        ends = time.monotonic() + _HEARD_S
        missing = set(KINDS[name].expect)
        while missing:
            counts = Counter((await self.victim.source(url))["outcomes"]) - before
            missing -= counts.keys()
            if missing and time.monotonic() > ends:
                self.faults.append(f"{name}: never counted as {', '.join(missing)}, but {dict(counts)}")
                return
            await asyncio.sleep(0.02)

    async def _begin_anew(self) -> None:
        """Lanes whose numbering begins anew: followed at once, and for good once an operator says so."""
        self.victim.start()
        await self.victim.ready()
        for name, lane in zip(RENUMBERING, self._lanes, strict=True):
            url = self.network.url_of(lane)
            old = await self._connected(lane)
            if self.network.lie(name, [lane]) is None:
                self.faults.append(f"{name} could not be told")
                continue
            await self._connected(lane, but=old)
            self.network.say_the_truth()
            await self._renumbered(url, name)
            await self.victim.post("/firehose/cursors", {"url": url, "cursor": "accept"})
        for _ in range(2):
            self.network.say_the_truth()
            await asyncio.sleep(self.rng.uniform(0, 0.5))
            await self._reborn()
        await self.victim.ready()
        self.network.say_the_truth()

    async def _renumbered(self, url: str, name: str) -> None:
        ends = time.monotonic() + _HEARD_S
        while time.monotonic() < ends:
            source = await self.victim.source(url)
            if source["renumbered"] and source["connected"] and source["seq"]:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{name}: the new numbering was not noticed: {await self.victim.source(url)}")

    # -- waiting

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        ends = time.monotonic() + _SETTLE_S
        while not condition():
            self.victim.alive()
            if time.monotonic() > ends:
                raise AssertionError(f"never came: {what}; {self.victim.tail()}")
            await asyncio.sleep(0.02)

    async def _connected(self, lane: str, but: Sequence[Line] = ()) -> list[Line]:
        """Waits until the daemon is on a lane, on a socket that is none of those; the lane's sockets."""
        lines = self.network.lanes[lane].lines
        await self._until(lambda: any(line not in but for line in lines), f"a connection to {lane}")
        return list(lines)

    async def _caught_up(self) -> None:
        """Waits until the stored cursor of each lane is its newest number."""
        ends = time.monotonic() + _SETTLE_S
        while behind := await self._behind():
            self.victim.alive()
            if time.monotonic() > ends:
                sources = await self.victim.get("/firehose/sources")
                raise AssertionError(f"never caught up: {behind}; {sources}")
            await asyncio.sleep(0.05)

    async def _behind(self) -> list[str]:
        cursors = {row["name"]: row["cursor"] for row in await self.victim.get("/firehose/cursors")}
        return [
            f"{lane} at {cursors[url]} of {self.network.lanes[lane].seq}"
            for lane in self._lanes
            if cursors[url := self.network.url_of(lane)] != self.network.lanes[lane].seq
        ]

    async def _settled(self) -> None:
        """Waits until nothing is left to do, and says what is when it never ends."""
        await self._caught_up()
        ends = time.monotonic() + _SETTLE_S
        while unsettled := self._unsettled(await self.victim.repos()):
            self.victim.alive()
            if time.monotonic() > ends:
                self.faults += [f"never settled: {line}" for line in unsettled[:20]]
                return
            await asyncio.sleep(0.2)

    def _unsettled(self, rows: dict[str, dict[str, Any]]) -> list[str]:
        found = []
        for did, account in self.network.world.accounts.items():
            row = rows.get(did)
            if row is None:
                found.append(f"{did} is not there")
            elif row["status"] != account.status:
                found.append(f"{did} is not {account.status}: {row}")
            elif account.status == ACTIVE and (
                row["state"] != "synced" or row["rev"] != account.rev or row["work"]
                or row["handle"] != account.handle
            ):  # fmt: skip
                found.append(f"{did} is not at {account.rev} as {account.handle}: {row}")
        return found

    # -- verdict

    def _count(self) -> None:
        """What the counters say of the storm, while numbers still mean what they did."""
        with Database.open(self.victim.data / "db", memory_mib=32) as db:
            judge = Judge(db, self.network, self._lanes, self._fair)
            self.faults += judge.faults()
            self.faults += verdict.index_differences(db, self.network)
        self.figures |= {
            "frames": {lane: sum(self.network.sent[lane].values()) for lane in self._lanes},
            "commits": self.network.commits,
            "lies_told": sum(self.network.lies.told.values()),
            "lies_of_kinds": sum(n > 0 for n in self.network.lies.told.values()),
            "fair": len(self._fair),
            "refusals": {
                "told": sum(kind.told for kind in judge.kinds.values()),
                "found": sum(kind.found for kind in judge.kinds.values()),
                "never": [name for name, kind in judge.kinds.items() if not kind.found],
            },
            "deceived": dict(judge.deceived),
            "sums": judge.sums,
            "rounds": self.plan.rounds,
        }

    async def _last_look(self) -> None:
        """The log as it stands, read anew; then the database at rest."""
        log = Subscriber(self.victim.stream_url, "a reader of the whole log")
        reading = asyncio.create_task(log.run())
        try:
            head = await self.victim.head()
            await self._until(lambda: min(log.next_id, self.reader.next_id) >= head, "the log is read")
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await self.victim.stop()
        with Database.open(self.victim.data / "db", memory_mib=32) as db:
            gone = verdict.wiped(db, self.network)
            self.faults += verdict.index_differences(db, self.network)
            self.faults += check(db).problems
        self.faults += log.faults
        self.faults += verdict.log_differences(log.folded, self.network)
        self.faults += self.reader.compared_with(log, gone)
        told = {did: records for did, records in self.reader.folded.items() if did not in gone}
        told |= {did: records for did, records in log.folded.items() if did in gone}
        self.faults += verdict.log_differences(told, self.network)
        self._figures(len(gone))

    def _figures(self, wiped: int) -> None:
        with suppress(ValueError):
            self.figures["memory_mib"] = round(max(sample.mib for sample in self.victim.samples))
        self.figures |= {
            "kills": self.victim.kills,
            "events": len(self.reader.seen),
            "connections_of_the_reader": self.reader.connections,
            "wiped": wiped,
            "memory_by_quarter": self._quarters(),
        }

    def _quarters(self) -> list[int]:
        """The highest resident memory in each quarter of the storm, MiB; later whole lanes are read anew."""
        samples = self.victim.samples[: self._stormy]
        if not samples:
            return []
        length = samples[-1].at / 4 or 1.0
        peaks = [0.0] * 4
        for sample in samples:
            at = min(3, int(sample.at / length))
            peaks[at] = max(peaks[at], sample.mib)
        return [round(peak) for peak in peaks]
