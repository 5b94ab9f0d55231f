"""Both servers over a store of their own, for tests: no ingest, no network."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import structlog

from indexer.atproto import mst
from indexer.atproto.cid import dag_cbor_cid
from indexer.atproto.commit import Commit, encode_commit
from indexer.atproto.dagcbor import record_from_json
from indexer.backfill.host_book import HostBook
from indexer.backfill.hosts import Hosts, Views
from indexer.config import Settings
from indexer.errors import IdentityGone
from indexer.ingest.bans import Bans
from indexer.ingest.filters import Filters
from indexer.ingest.revisit import Revisit
from indexer.pool import Pool
from indexer.repo.walker import load_repo
from indexer.serve.management import ManagementServer
from indexer.serve.public import PublicServer
from indexer.serve.services import Services
from indexer.store.codecs import NEW_REPO, AccountStatus, Mode, SyncState
from indexer.store.database import Database
from indexer.store.events import EventLog
from indexer.store.host_rows import ACCOUNTS
from indexer.store.keyspaces import HOSTS
from indexer.store.transaction import Transaction
from indexer.store.writer import Writer
from tests.commands.real_repos import repo_file, truth_of

ALICE = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
BOB = "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb"
POST = "app.bsky.feed.post"
LIKE = "app.bsky.feed.like"
REV = "3jzfcijpj2z2a"


class FakeResolver:
    """Knows the handles that a test gives it."""

    def __init__(self) -> None:
        self.handles: dict[str, str] = {}

    async def resolve_handle(self, handle: str, /) -> str:
        if handle not in self.handles:
            raise IdentityGone(f"no such handle: {handle}")
        return self.handles[handle]

    async def verified_handle(self, did: str, /) -> str:
        return next((handle for handle, owner in self.handles.items() if owner == did), "handle.invalid")


class Node(NamedTuple):
    """A running pair of servers and what is behind them."""

    services: Services
    public: PublicServer
    management: ManagementServer
    resolver: FakeResolver
    http: aiohttp.ClientSession

    @property
    def writer(self) -> Writer:
        return self.services.writer

    async def xrpc(self, method: str, /, **params: object) -> tuple[int, Any]:
        """Status and JSON of a query."""
        query = {key: str(value) for key, value in params.items()}
        async with self.http.get(f"{self.public.url}/xrpc/{method}", params=query) as response:
            return response.status, await response.json()

    async def car(self, method: str, /, **params: object) -> bytes:
        """The body of a query that answers a CAR."""
        query = {key: str(value) for key, value in params.items()}
        async with self.http.get(f"{self.public.url}/xrpc/{method}", params=query) as response:
            body = await response.read()
            assert response.status == 200, body
            assert response.content_type == "application/vnd.ipld.car"
            return body

    async def manage(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Status and JSON of a management request."""
        async with self.http.request(method, f"{self.management.url}{path}", **options) as response:
            return response.status, await response.json()


def settings(tmp_path: Path, **sections: dict[str, Any]) -> Settings:
    """Settings on free ports, with ``sections`` over the defaults."""
    values: dict[str, Any] = {"data_dir": tmp_path, "public": {}, "management": {}, **sections}
    values["public"] = {"bind": "127.0.0.1:0", **values["public"]}
    values["management"] = {"bind": "127.0.0.1:0", **values["management"]}
    return Settings.model_validate(values)


@asynccontextmanager
async def running(tmp_path: Path, **sections: dict[str, Any]) -> AsyncIterator[Node]:
    """Both servers on loopback, stopped at the end."""
    config = settings(tmp_path, **sections)
    mode = Mode(config.ephemeral.enabled, config.store.blocks)
    with Database.open(tmp_path / "db", memory_mib=32, mode=mode) as db:
        writer = Writer(db, config)
        await writer.start()
        resolver = FakeResolver()
        views = Views(partial(db.get, HOSTS), lambda host: db.count(ACCOUNTS + host))
        hosts = HostBook(db, writer, Hosts(config, views=views), Bans(db), lambda _host: None)
        services = Services(
            db=db, writer=writer, log=EventLog(db, writer), resolver=resolver, pool=Pool(0),
            filters=Filters.of(config.filter), settings=config, revisit=Revisit(db, writer, config),
            hosts=hosts,
        )  # fmt: skip
        public = PublicServer(services)
        management = ManagementServer(services, public)
        await public.start()
        await management.start()
        revisiting = asyncio.create_task(services.revisit.run())
        logging_as = structlog.get_config()["wrapper_class"]
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
        try:  # debug lines of workers would stand among what commands print
            async with aiohttp.ClientSession() as http:
                yield Node(services, public, management, resolver, http)
        finally:
            await management.stop()
            await public.stop()
            revisiting.cancel()
            await asyncio.wait([revisiting])
            await writer.stop()
            structlog.configure(wrapper_class=logging_as)


def record_block(text: str = "hello", kind: str = POST) -> bytes:
    """A small record."""
    return record_from_json({"$type": kind, "text": text, "createdAt": "2024-05-01T00:00:00.000Z"})


def put(tx: Transaction, did: str, path: str, text: str = "", rev: str = REV, flags: int = 0) -> None:
    """Stores a record with a text of its own."""
    block = record_block(text or path, path.partition("/")[0])
    tx.put_record(did, path, dag_cbor_cid(block), block, rev, live=True, flags=flags)


async def fill(node: Node, did: str, paths: Sequence[str], **row: Any) -> None:
    """Stores records and a matching (unsigned) commit, synced and complete."""

    def work(tx: Transaction) -> None:
        for path in paths:
            put(tx, did, path)
        records = [(path, record.cid) for path, record in tx.records(did)]
        root = mst.build(records).root
        commit = encode_commit(Commit(did, 3, root, REV, None, b"\1" * 64))
        old = tx.repo(did) or NEW_REPO
        fresh = old._replace(
            tracked=True, state=SyncState.SYNCED, complete=True, rev=REV, commit=commit, data=root
        )
        tx.set_repo(did, fresh._replace(**row))

    await node.writer.run("fill", work)


async def set_status(node: Node, did: str, status: AccountStatus) -> None:
    """Changes an account's status."""

    def work(tx: Transaction) -> None:
        row = tx.repo(did)
        assert row is not None
        tx.set_repo(did, row._replace(status=status))

    await node.writer.run("status", work)


async def load_car(node: Node, name: str) -> dict[str, Any]:
    """Stores a captured repository (``repos/NAME.car``) and returns its ground truth."""
    data = repo_file(f"{name}.car").read_bytes()
    truth = truth_of(name)
    repo = load_repo(data)
    did = repo.commit.did

    def work(tx: Transaction) -> None:
        for path, cid, block in repo.records:
            tx.put_record(did, path, cid, block, repo.commit.rev, live=False)
        tx.set_repo(
            did,
            NEW_REPO._replace(
                tracked=True, state=SyncState.SYNCED, complete=True, rev=repo.commit.rev,
                commit=repo.commit_block, data=repo.commit.data, signing_key=truth["signingKey"],
            ),
        )  # fmt: skip

    await node.writer.run("load", work)
    return truth


async def messages(socket: aiohttp.ClientWebSocketResponse, count: int) -> list[dict[str, Any]]:
    """The next messages of a stream."""
    async with asyncio.timeout(10):
        return [json.loads((await socket.receive()).data) for _ in range(count)]
