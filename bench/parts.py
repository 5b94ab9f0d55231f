"""`bench parts [RECORDS]`: one repository of which one collection of six is wanted, as a part and as a whole.

Measured are the bytes of answers and of the URLs that ask for them, the requests, the time from the request
to follow the account until it is synced, with 20 ms until each answer, and the daemon's processor time
meanwhile. Both ways are measured for each size, whatever the settings would choose.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import aiohttp
import orjson
from aiohttp import web

from bench.daemon import running_daemon
from bench.options import Options, machine
from bench.report import Report
from indexer.simulator.account import Account, Write
from indexer.simulator.cbor import cid_bytes
from indexer.simulator.documents import document
from indexer.simulator.keys import K256, SigningKey
from indexer.simulator.wire import car, tid

SIZES = (1_000, 10_000, 100_000)
_LATENCY_S = 0.02
_COLLECTIONS = (
    "app.bsky.feed.like", "app.bsky.feed.post", "app.bsky.feed.repost", "app.bsky.graph.block",
    "app.bsky.graph.follow", "app.bsky.graph.listitem",
)  # fmt: skip
_WANTED = "app.bsky.feed.repost"
_DID = "did:plc:" + "p" * 24
_START_US = 1_700_000_000_000_000
#: Bytes of a record's text; with its other fields a record has a little over 100 more.
_TEXT = (20, 300)
_XRPC = "/xrpc/com.atproto.sync."
_POLL_S = 0.005


class Figures(NamedTuple):
    """One run."""

    kib: float
    requests: float
    seconds: float
    cpu_seconds: float


class Pds:
    """Directory and PDS of one account; counts what it is asked and what it answers."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._whole = car(account.commit_cid, account.blocks())
        account.chosen([])
        self.url = ""
        self.bytes = self.requests = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        app = web.Application()
        routes = {"getRepo": self._repo, "getRecord": self._proof, "getBlocks": self._blocks}
        for name, handler in routes.items():
            app.router.add_get(_XRPC + name, handler)
        app.router.add_get("/{did}", self._document)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request, body: bytes) -> web.Response:
        await asyncio.sleep(_LATENCY_S)
        self.bytes += len(request.raw_path) + len(body)
        self.requests += 1
        return web.Response(body=body, content_type="application/vnd.ipld.car")

    async def _repo(self, request: web.Request) -> web.Response:
        return await self._answer(request, self._whole)

    async def _proof(self, request: web.Request) -> web.Response:
        path = f"{request.query['collection']}/{request.query['rkey']}"
        return await self._answer(request, car(self._account.commit_cid, self._account.proof(path)))

    async def _blocks(self, request: web.Request) -> web.Response:
        found = self._account.chosen([cid_bytes(text) for text in request.query.getall("cids")])
        return await self._answer(request, car(None, found or []))

    async def _document(self, request: web.Request) -> web.Response:
        body = document(_DID, self._account.handle, self._account.key.multikey, self.url)
        return web.Response(body=orjson.dumps(body), content_type="application/did+ld+json")


def run(options: Options) -> Report:
    """Bytes, requests and seconds, as a part and as a whole, for each number of records."""
    report = Report("parts", notes=[machine(), f"{_LATENCY_S * 1000:g} ms until each answer"])
    for records in options.sizes or SIZES:
        account = repository(records)
        for way, sparse in (("part", True), ("whole", False)):
            job = partial(measure, account, options.cache, sparse=sparse)
            runs = [asyncio.run(job()) for _ in range(options.runs)]
            if options.profile is not None:
                asyncio.run(job(profile=options.profile))
            for name, unit in zip(Figures._fields, ("KiB", "", "s", "s"), strict=True):
                values = [getattr(each, name) for each in runs]
                report.add(f"{way}_{name}_{records}", unit, values, series=f"{way}_{name}", size=records)
    return report


def repository(records: int) -> Account:
    """So many records in equal parts, written over some years."""
    rng = Random(records)
    account = Account(_DID, "parts.simnet.test", 0, SigningKey.derive(K256, _DID))
    writes = []
    for number in range(records):
        collection = _COLLECTIONS[number % len(_COLLECTIONS)]
        value: dict[str, Any] = {
            "$type": collection,
            "text": rng.randbytes(rng.randint(*_TEXT) // 2).hex(),
            "createdAt": "2026-01-01T00:00:00.000Z",
        }
        writes.append(Write("create", f"{collection}/{tid(_START_US + number * 1_000_003)}", value))
    account.write(writes)
    account.sign(tid(_START_US + records * 1_000_003))
    return account


async def measure(account: Account, folder: Path, *, sparse: bool, profile: Path | None = None) -> Figures:
    """One fresh daemon that fetches it."""
    pds = Pds(account)
    settings = {
        "upstreams": "",
        "filter.collections": _WANTED,
        "backfill.sparse": sparse,
        "backfill.sparse_min_records": 0,
        "backfill.sparse_share": 1.0,
    }
    async with (
        pds.serving(),
        running_daemon({**settings, "plc_urls": pds.url}, folder, profile=profile) as daemon,
        aiohttp.ClientSession(daemon.management) as http,
    ):
        start, cpu = time.perf_counter(), daemon.cpu_seconds()
        async with http.put("/repos", data=orjson.dumps({"did": _DID})) as answer:
            answer.raise_for_status()
        while await _state(http) != "synced":
            daemon.check()
            await asyncio.sleep(_POLL_S)
        seconds = time.perf_counter() - start
        return Figures(pds.bytes / 1024, pds.requests, seconds, daemon.cpu_seconds() - cpu)


async def _state(http: aiohttp.ClientSession) -> str:
    async with http.get(f"/repos/{_DID}") as answer:
        state: str = (await answer.json())["state"]
        return state
