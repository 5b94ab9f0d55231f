"""A store, a backfill and one host on loopback that plays directory and PDS, for the tests of this part."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import orjson
from aiohttp import web

from indexer.atproto.frames import AccountFrame
from indexer.atproto.types import Cid, Did
from indexer.backfill import Backfill
from indexer.backfill.job import Job
from indexer.config import Settings
from indexer.identity.http import HttpClient
from indexer.identity.resolver import Resolver
from indexer.ingest import Ingest
from indexer.ingest.filters import Filters
from indexer.pool import Pool
from indexer.simulator.account import Account, Write
from indexer.simulator.keys import SigningKey
from indexer.simulator.wire import car, tid
from indexer.store.codecs import NEW_REPO, Event, Mode, RepoRow, SyncState, Work, decode_event
from indexer.store.database import Database
from indexer.store.keyspaces import EVENTS
from indexer.store.transaction import Transaction
from indexer.store.writer import Writer, clock_us

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: The revs of the tests: minutes after some moment in the past.
START_US = 1_780_000_000_000_000


def rev(minutes: int) -> str:
    return tid(START_US + minutes * 60_000_000)


def account(name: str, records: dict[str, str] | None = None, minutes: int = 1) -> Account:
    """A signed repository whose records hold one text each."""
    did = "did:plc:" + name.ljust(24, "a")
    made = Account(did, f"{name}.test", 0, SigningKey.derive("k256", name))
    return edit(made, minutes, dict(records or {}))


def edit(one: Account, minutes: int, changes: dict[str, str | None]) -> Account:
    """The repository after a commit that sets (or, with None, deletes) records."""
    writes = []
    for path, text in changes.items():
        if text is None:
            writes.append(Write("delete", path, None))
        else:
            value = {"$type": path.partition("/")[0], "text": text}
            writes.append(Write("update" if path in one.records else "create", path, value))
    one.write(writes)
    one.sign(rev(minutes))
    return one


def car_of(one: Account) -> bytes:
    return car(one.commit_cid, one.blocks())


def cids_of(one: Account) -> dict[str, Cid]:
    return {path: bytes(record.cid) for path, record in one.records.items()}


class Host:
    """Directory and PDS in one. ``answers`` replaces the getRepo of a DID; ``asked`` counts requests."""

    def __init__(self) -> None:
        self.url = ""
        self.cars: dict[Did, bytes] = {}
        self.keys: dict[Did, str] = {}  # multikeys
        self.pds: dict[Did, str] = {}  # of those who live elsewhere
        self.answers: dict[Did, Handler] = {}
        self.asked: list[Did] = []
        self.tombstones: set[Did] = set()
        self.documents = 0
        self.active = self.most_active = 0
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        for path, handler in self.routes().items():
            app.router.add_get(path, handler)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    def routes(self) -> dict[str, Handler]:
        return {"/xrpc/com.atproto.sync.getRepo": self._get_repo, "/{did}": self._document}

    async def __aexit__(self, *_: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    def serve(self, one: Account) -> None:
        self.cars[one.did] = car_of(one)
        self.keys[one.did] = one.key.multikey

    async def _get_repo(self, request: web.Request) -> web.StreamResponse:
        did = request.query["did"]
        self.asked.append(did)
        self.active += 1
        self.most_active = max(self.active, self.most_active)
        try:
            if did in self.answers:
                return await self.answers[did](request)
            if did not in self.cars:
                return refusal("RepoNotFound")
            return web.Response(body=self.cars[did], content_type="application/vnd.ipld.car")
        finally:
            self.active -= 1

    async def _document(self, request: web.Request) -> web.StreamResponse:
        did = request.match_info["did"]
        self.documents += 1
        if did in self.tombstones:
            return web.Response(status=410, body=b"{}")
        if did not in self.keys:
            return web.Response(status=404, body=b"{}")
        return web.Response(body=orjson.dumps(document(did, self.keys[did], self.pds.get(did, self.url))))


def document(did: Did, multikey: str, pds: str) -> dict[str, Any]:
    return {
        "@context": ["https://www.w3.org/ns/did/v1"],
        "id": did,
        "alsoKnownAs": ["at://someone.test"],
        "verificationMethod": [
            {
                "id": f"{did}#atproto",
                "type": "Multikey",
                "controller": did,
                "publicKeyMultibase": multikey,
            }
        ],
        "service": [
            {"id": "#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": pds},
        ],
    }


def refusal(name: str, status: int = 400, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, headers=headers, body=orjson.dumps({"error": name, "message": name}))


def answer_car(
    one: Account, before: Callable[[], Awaitable[object]] | None = None, *, body: bytes | None = None
) -> Handler:
    """The repository (or ``body``), after something else was done."""
    body = body or car_of(one)

    async def answer(_: web.Request) -> web.StreamResponse:
        if before is not None:
            await before()
        return web.Response(body=body)

    return answer


def answer_with(status: int, headers: dict[str, str] | None = None) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers=headers)

    return answer


class HookedWriter(Writer):
    """Lets a test do something right after a unit of a given name is committed."""

    hook: Callable[[str], Awaitable[None]] | None = None

    async def run(self, name: str, fn: Callable[[Transaction], T], *, ahead: bool = False) -> T:
        result = await super().run(name, fn, ahead=ahead)
        if self.hook is not None:
            await self.hook(name)
        return result


class World:
    """``async with World(tmp_path, host) as world``; close and open again on the same path to restart."""

    db: Database
    writer: HookedWriter
    backfill: Backfill

    def __init__(self, path: Path, host: Host, **sections: Any) -> None:
        self.host = host
        self.settings = settings(path, host, **sections)
        self.http = HttpClient(self.settings.network)
        self.drained: list[Did] = []
        self.woken: list[Did] = []
        self.can_drain = True
        #: Replays in place of `_pretend`.
        self.drain_with: Callable[[Did], Awaitable[object]] | None = None
        #: Called with "before NAME" and "after NAME" around each commit; may raise to play a crash.
        self.at: Callable[[str], None] = lambda _: None
        self._committed = asyncio.Event()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        stack = self._stack
        mode = Mode(ephemeral=self.settings.ephemeral.enabled)
        self.db = Database.open(self.settings.data_dir / "db", memory_mib=32, mode=mode)
        stack.callback(self.db.close)
        self.writer = HookedWriter(self.db, self.settings, crash_point=self._crash_point)
        await self.writer.start()
        stack.push_async_callback(self.writer.stop)
        pool = Pool(0)
        stack.push_async_callback(pool.stop)
        http = await stack.enter_async_context(self.http)
        self.resolver = Resolver(http, self.settings)
        stack.push_async_callback(self.resolver.close)
        self.backfill = Backfill(
            self.db, self.writer, pool, self.resolver, http, self.settings, drain=self.drain,
            woken=self.woken.append, jitter=lambda: 0.0,
        )  # fmt: skip
        self.spool = self.settings.data_dir / "spool"
        self.spool.mkdir(exist_ok=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _crash_point(self, name: str) -> None:
        self._committed.set()
        self.at(name)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a commit after which the condition holds."""
        while not condition():
            self._committed.clear()
            await self._committed.wait()

    async def running(self, condition: Callable[[], bool]) -> None:
        """Runs the backfill until the condition holds."""
        task = asyncio.create_task(self.backfill.run())
        waiting = asyncio.create_task(self.until(condition))
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        await self.backfill.stop()
        await task

    async def fetch(self, one: Account) -> RepoRow:
        """One job for the repository, now; its row afterwards."""
        row = self.db.repo(one.did)
        if row is None or row.due == 0:
            await self.backfill.add([one.did], again=True)
        await Job(self.backfill.tools, one.did).run()
        return self.row(one)

    def forgive(self) -> None:
        """No host is left alone any more."""
        hosts = self.backfill.tools.hosts
        hosts._hosts.clear()
        hosts._changed.clear()

    async def drain(self, did: Did) -> None:
        self.drained.append(did)
        if self.can_drain:
            await (self.drain_with or self._pretend)(did)

    async def _pretend(self, did: Did) -> None:
        """Stands in for ingest's replay: takes the frames away and declares the repository synced."""

        def finish(tx: Transaction) -> None:
            row = tx.repo(did)
            assert row is not None
            assert row.state is SyncState.BACKFILLING
            assert row.work & Work.DRAIN
            tx.drop_buffered(did)
            tx.set_repo(did, row._replace(state=SyncState.SYNCED, due=0, work=row.work & ~Work.DRAIN))

        await self.writer.run("drain", finish)

    async def buffer(self, one: Account, minutes: int) -> None:
        """A frame of the repository waits."""
        await self.writer.run(
            "frame", lambda tx: tx.buffer_frame(one.did, rev(minutes), "commit", "relay", b"frame")
        )

    async def change(self, one: Account, **fields: Any) -> None:
        """Sets fields of the repository's row."""
        await self.writer.run(
            "change", lambda tx: tx.set_repo(one.did, (tx.repo(one.did) or NEW_REPO)._replace(**fields))
        )

    def row(self, one: Account) -> RepoRow:
        row = self.db.repo(one.did)
        assert row is not None
        return row

    def records(self, one: Account) -> dict[str, Cid]:
        return {path: row.cid for path, row in self.db.records(one.did)}

    def events(self, one: Account) -> list[tuple[str, str, str]]:
        """(action, path, rev) of the repository's record events, in the order of the log."""
        return [
            (event.action, f"{event.collection}/{event.rkey}", event.rev)
            for event in self.log()
            if event.did == one.did and event.kind == "record"
        ]

    async def word(self, one: Account, source: str, active: bool, status: str | None = None) -> None:
        """An `#account` of now comes in, and is taken by ingest."""
        filters = Filters.of(self.settings.filter)
        ingest = Ingest(self.db, self.writer, Pool(0), self.resolver, filters, self.settings)
        frame = AccountFrame(clock_us(), one.did, datetime.now(UTC).isoformat(), active, status)
        await self.writer.run("account", lambda tx: ingest.applier.account(tx, source, frame))

    def statuses(self, one: Account) -> list[str]:
        """The statuses of the repository's account events."""
        found = (event for event in self.log() if event.did == one.did and event.kind == "account")
        return [event.fields.get("status", "active") for event in found]

    def log(self) -> list[Event]:
        return [decode_event(key, raw) for key, raw in self.db.scan(EVENTS)]

    def spooled(self) -> list[Path]:
        return list(self.spool.iterdir())


def settings(path: Path, host: Host, **sections: Any) -> Settings:
    tables: dict[str, Any] = {
        "data_dir": path,
        "upstreams": [],
        "plc_urls": [host.url],
        "verifiers": 0,
        "network": {"allow_private": True},
        "disk": {"soft_floor_mib": 0, "hard_floor_mib": 0},
        "durability": {"flush_interval": 3600},
        "backfill": {"retry_min": 10, "retry_max": 1000, "chunk_records": 5},
    }
    for name, values in sections.items():
        tables[name] = {**tables[name], **values} if isinstance(values, dict) and name in tables else values
    return Settings(**tables)
