"""The management API: who may use it, repositories, filters, the database."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from pydantic import ValidationError

from indexer.ingest.filters import Filters
from indexer.ingest.sources import Sources
from indexer.serve.management import ManagementServer
from indexer.serve.management_filter import patched
from indexer.serve.management_repos import RepoRoutes
from indexer.store.codecs import NEW_REPO, AccountStatus, SyncState
from indexer.store.refcounts import CheckpointWorker
from tests.serve.node import ALICE, BOB, POST, Node, fill, running, settings

TOKEN = "a-secret-token"


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


_CREDENTIALS = [
    (f"Bearer {TOKEN}", True),
    (f"bearer {TOKEN}", True),
    (_basic("admin", TOKEN), True),
    (_basic("root", TOKEN), False),
    (_basic("admin", "wrong"), False),
    ("Basic !!!", False),
    (f"Bearer {TOKEN}x", False),
    (f"Token {TOKEN}", False),
    ("Bearer ", False),
    ("", False),
]


async def test_with_a_token_every_request_must_carry_it(tmp_path: Path) -> None:
    async with running(tmp_path, management={"token": TOKEN}) as node:
        for header, allowed in _CREDENTIALS:
            headers = {"Authorization": header} if header else {}
            for path in ("/readyz", "/metrics", "/repos", "/nothing"):
                async with node.http.get(f"{node.management.url}{path}", headers=headers) as response:
                    assert (response.status != 401) is allowed
                    if not allowed:
                        assert (await response.json())["error"] == "AuthenticationRequired"


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "192.0.2.1:3001", "[::]:0", "example.org:3001"])
def test_an_open_bind_needs_a_token(tmp_path: Path, bind: str) -> None:
    with pytest.raises(ValidationError, match=r"set management\.token"):
        settings(tmp_path, management={"bind": bind})
    settings(tmp_path, management={"bind": bind, "token": TOKEN})


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example:3001"}]
)
async def test_web_pages_may_not_manage(tmp_path: Path, headers: dict[str, str]) -> None:
    async with running(tmp_path) as node:
        status, answer = await node.manage("GET", "/filter", headers=headers)
        assert (status, answer["error"]) == (403, "Forbidden")


async def test_management_answers_carry_no_cors(tmp_path: Path) -> None:
    async with running(tmp_path) as node, node.http.get(f"{node.management.url}/repos") as response:
        assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize(
    "body", [json.dumps([{"did": ALICE}, {"did": BOB}]), f'{{"did":"{ALICE}"}}\n\n{{"did":"{BOB}"}}\n']
)
async def test_repositories_are_followed_from_json_and_ndjson(tmp_path: Path, body: str) -> None:
    async with running(tmp_path, filter={"excludes": [BOB]}) as node:
        status, answer = await node.manage("PUT", "/repos", data=body)
        assert (status, answer) == (200, [{"did": ALICE}])
        status, row = await node.manage("GET", f"/repos/{ALICE}")
        assert (row["tracked"], row["state"], row["records"]) == (True, "pending", 0)
        assert row["due_us"] > 0
        assert (await node.manage("GET", f"/repos/{BOB}"))[0] == 404


_MALFORMED = ["{", "[1]", '{"dids": []}', '[{"did": "alice"}]', '{"did": 5}', "[[]]", '"did:plc:x"']


async def test_a_malformed_body_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        for body in _MALFORMED:
            good = json.dumps({"did": ALICE}) + "\n" if not body.startswith("[") else ""
            status, answer = await node.manage("PUT", "/repos", data=good + body)
            assert (status, answer["error"]) == (400, "InvalidRequest")
            assert node.services.db.repo(ALICE) is None


async def test_a_body_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        status, answer = await node.manage("PUT", "/repos", data=io.BytesIO(b" " * ((8 << 20) + 1)))
        assert (status, answer["error"]) == (413, "PayloadTooLarge")
        assert str(8 << 20) in answer["message"]


async def test_repositories_are_listed_by_state_in_pages_and_as_ndjson(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        dids = [f"did:plc:{letter * 24}" for letter in "cdefg"]
        for index, did in enumerate(dids):
            await fill(node, did, [], state=SyncState.SYNCED if index % 2 else SyncState.PENDING)
        _, page = await node.manage("GET", "/repos?limit=3")
        _, rest = await node.manage("GET", f"/repos?limit=3&cursor={page['cursor']}")
        assert [row["did"] for row in page["repos"] + rest["repos"]] == dids
        assert "cursor" not in rest
        _, synced = await node.manage("GET", "/repos?state=synced&limit=2")
        assert [row["did"] for row in synced["repos"]] == dids[1::2]
        assert "cursor" not in synced
        headers = {"Accept": "application/x-ndjson"}
        async with node.http.get(f"{node.management.url}/repos?state=pending", headers=headers) as response:
            lines = (await response.text()).splitlines()
        assert [json.loads(line)["did"] for line in lines] == dids[::2]
        status, answer = await node.manage("GET", "/repos?state=nonsense")
        assert (status, answer["error"]) == (400, "InvalidRequest")


async def test_a_removed_repository_keeps_its_data_unless_purged(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        body = json.dumps([{"did": ALICE}, {"did": BOB}])
        assert await node.manage("DELETE", "/repos", data=body) == (200, [{"did": ALICE}])
        row = node.services.db.repo(ALICE)
        assert row is not None
        assert not row.tracked
        assert node.services.db.record(ALICE, f"{POST}/a") is not None
        await node.manage("DELETE", "/repos?purge=true", data=body)
        assert node.services.db.record(ALICE, f"{POST}/a") is None
        row = node.services.db.repo(ALICE)
        assert row is not None
        assert (row.tracked, row.epoch) == (False, 1)


async def test_of_a_repository_that_never_was_known_nothing_is_claimed_and_a_purge_leaves_nothing(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as node:
        heard = NEW_REPO._replace(tracked=True, hearsay=True)
        await node.writer.run("heard", lambda tx: tx.set_repo(ALICE, heard))
        shown = (await node.manage("GET", f"/repos/{ALICE}"))[1]
        assert (shown["active"], shown["status"], shown["resolved"]) == (False, "unresolved", False)
        assert len((await node.manage("GET", "/repos?status=unresolved"))[1]["repos"]) == 1
        assert (await node.manage("GET", "/repos?status=active"))[1]["repos"] == []
        answer = await node.xrpc("com.atproto.sync.getRepoStatus", did=ALICE)
        assert (answer[0], answer[1]["error"]) == (400, "RepoNotFound")
        body = json.dumps([{"did": ALICE}])
        assert await node.manage("PUT", "/repos", data=body) == (200, [{"did": ALICE}])  # asked for by now
        row = node.services.db.repo(ALICE)
        assert row is not None
        assert (row.hearsay, row.due > 0) == (False, True)
        assert await node.manage("DELETE", "/repos?purge=true", data=body) == (200, [{"did": ALICE}])
        assert node.services.db.repo(ALICE) is None
        await fill(node, ALICE, [])
        assert (await node.manage("GET", f"/repos/{ALICE}"))[1]["active"]


async def test_a_resync_queues_followed_repositories_only(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [])
        await fill(node, BOB, [], tracked=False)
        body = json.dumps([{"did": ALICE}, {"did": BOB}])
        assert await node.manage("POST", "/repos/resync", data=body) == (200, [{"did": ALICE}])
        row = node.services.db.repo(ALICE)
        assert row is not None
        assert row.state is SyncState.DESYNCHRONIZED
        assert row.due > 0


class _Backfill:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], bool]] = []
        self.woken = 0

    async def add(self, dids: Any, /, *, again: bool = False) -> list[str]:
        self.asked.append((list(dids), again))
        return list(dids)

    def wake(self) -> None:
        self.woken += 1

    def pause(self, paused: bool, /) -> None:
        raise AssertionError("nobody pauses it")

    def status(self) -> dict[str, Any]:
        return {"in_flight": 0}


class _Ingest:
    """Notes the filters that it is told of."""

    def __init__(self) -> None:
        self.filters: list[Filters] = []

    def status(self) -> list[dict[str, Any]]:
        return [{"name": "ws://up", "connected": True, "seq": 7, "lag_s": 0.5, "frames": 9}]

    @property
    def sources(self) -> Sources:
        raise AssertionError("nobody asks for them")

    @property
    def clock_problem(self) -> str | None:
        return None

    def set_filters(self, filters: Filters, /) -> None:
        self.filters.append(filters)


async def _managed(node: Node) -> tuple[ManagementServer, _Ingest, _Backfill]:
    ingest, backfill = _Ingest(), _Backfill()
    services = dataclasses.replace(node.services, ingest=ingest, backfill=backfill)
    server = ManagementServer(services, node.public)
    await server.start()
    return server, ingest, backfill


async def test_requests_go_to_the_backfill(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [])
        server, _, backfill = await _managed(node)
        for method, path in (("PUT", "/repos"), ("POST", "/repos/resync")):
            async with node.http.request(method, server.url + path, json=[{"did": ALICE}]) as response:
                assert await response.json() == [{"did": ALICE}]
        assert backfill.asked == [([ALICE], False), ([ALICE], True)]
        await server.stop()


async def test_a_patched_filter_is_stored_told_and_queues_what_it_affects(tmp_path: Path) -> None:
    async with running(tmp_path, filter={"collections": [POST]}) as node:
        await fill(node, ALICE, [f"{POST}/a", "app.bsky.graph.follow/a"])
        await fill(node, BOB, [], tracked=False)
        server, ingest, backfill = await _managed(node)
        patch = {"mode": "full", "collections": {"app.bsky.graph.*": True}, "signals": ["app.bsky.feed.like"]}
        async with node.http.patch(f"{server.url}/filter", json=patch) as response:
            answer = await response.json()
        wanted = {
            "mode": "full",
            "signals": ["app.bsky.feed.like"],
            "collections": [POST, "app.bsky.graph.*"],
            "excludes": [],
        }
        assert answer == {**wanted, "done": True, "queued": 1, "purged": 0}
        assert (await node.manage("GET", "/filter"))[1] == wanted
        assert ingest.filters[0].mode == "full"
        assert backfill.woken == 1
        row = node.services.db.repo(ALICE)
        assert row is not None
        assert (row.state, row.complete, row.due > 0) == (SyncState.DESYNCHRONIZED, False, True)
        # A narrower filter needs no fetch.
        async with node.http.patch(f"{server.url}/filter", json={"collections": [POST]}) as response:
            assert (await response.json())["queued"] == 0
        assert len(node.services.db.records(ALICE)) == 2
        for purged in (1, 0):
            url = f"{server.url}/filter?purge=true"
            async with node.http.patch(url, json={"collections": [POST]}) as response:
                assert (await response.json())["purged"] == purged
        assert [path for path, _ in node.services.db.records(ALICE)] == [f"{POST}/a"]
        await server.stop()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b"{}", "object"),
        (b'{"nope": 1}', "nope"),
        (b'{"mode": "half"}', "mode"),
        (b'{"signals": "a.b.c"}', "signals"),
        (b'{"signals": {"a.b.c": 1}}', "signals"),
        (b'{"signals": [1]}', "signals must be strings"),
        (b'{"collections": ["*"]}', "pattern"),
        (b'{"excludes": ["alice"]}', "DID"),
    ],
)
def test_a_bad_filter_is_named(body: bytes, named: str) -> None:
    with pytest.raises(Exception, match=named):
        patched(Filters(), body)


def test_an_object_patches_and_a_list_replaces() -> None:
    old = Filters.checked("filter", ["a.b.c", "d.e.f"], [], [])
    assert patched(old, b'{"signals": {"a.b.c": false, "g.h.i": true}}').signals == ("d.e.f", "g.h.i")
    assert patched(old, b'{"signals": ["g.h.i"]}').signals == ("g.h.i",)
    assert patched(old, b'{"mode": "full"}').signals == old.signals


async def test_concurrent_patches_are_all_kept_and_told_in_their_order(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        server, ingest, _ = await _managed(node)
        names = [f"com.example.n{number}" for number in range(12)]

        async def body(name: str) -> AsyncIterator[bytes]:
            await asyncio.sleep(0.02)  # the head is there long before the body
            yield json.dumps({"signals": {name: True}}).encode()

        async def patch(name: str) -> None:
            async with node.http.patch(f"{server.url}/filter", data=body(name)) as response:
                assert response.status == 200

        await asyncio.gather(*(patch(name) for name in names))
        stored = node.services.current_filters()
        assert sorted(stored.signals) == sorted(names)
        assert [len(filters.signals) for filters in ingest.filters] == list(range(1, 13))
        assert set(ingest.filters[-1].signals) == set(stored.signals)
        await server.stop()


async def test_a_wider_filter_leaves_inactive_accounts_alone_until_they_return(tmp_path: Path) -> None:
    async with running(tmp_path, filter={"collections": [POST]}) as node:
        await fill(node, ALICE, [], status=AccountStatus.DEACTIVATED)
        await fill(node, BOB, [])
        answer = (await node.manage("PATCH", "/filter", json={"collections": []}))[1]
        assert answer["queued"] == 1
        row = node.services.db.repo(ALICE)
        assert row is not None
        assert (row.due, row.state) == (0, SyncState.DESYNCHRONIZED)


async def test_ephemeral_mode_has_nothing_to_fetch_for_a_wider_filter(tmp_path: Path) -> None:
    async with running(tmp_path, filter={"collections": [POST]}, ephemeral={"enabled": True}) as node:
        await node.writer.run(
            "row", lambda tx: tx.set_repo(ALICE, NEW_REPO._replace(tracked=True, state=SyncState.SYNCED))
        )
        head = node.writer.head
        assert (await node.manage("PATCH", "/filter", json={"collections": []}))[1]["queued"] == 0
        row = node.services.db.repo(ALICE)
        assert row is not None
        assert (row.state, row.due, node.writer.head) == (SyncState.SYNCED, 0, head)


_HOPELESS = [
    *("did:web:127.0.0.1", "did:web:example.com%3A8443", "did:web:localhost%3A8080", "did:web:example"),
    *("did:plc:short", "did:key:zQ3shqwJEJyMBsBXCWyCBpUBMqxcon9oHB7mCvx4sSpMdLJwc"),
]


async def test_a_did_that_can_never_resolve_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        for did in _HOPELESS:
            status, answer = await node.manage("PUT", "/repos", json=[{"did": ALICE}, {"did": did}])
            assert (status, answer["error"]) == (400, "InvalidRequest"), did
            assert did in answer["message"]
            assert node.services.db.repo(ALICE) is None
        assert (await node.manage("PUT", "/repos", json=[{"did": "did:web:example.com"}]))[0] == 200
    async with running(tmp_path / "local", network={"allow_private": True}) as node:
        assert (await node.manage("PUT", "/repos", json=[{"did": "did:web:localhost%3A8080"}]))[0] == 200


async def test_repositories_are_listed_by_account_status(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [], status=AccountStatus.DELETED)
        await fill(node, BOB, [])
        _, found = await node.manage("GET", "/repos?status=deleted")
        assert [row["did"] for row in found["repos"]] == [ALICE]
        assert (await node.manage("GET", "/repos?status=deleted&state=pending"))[1]["repos"] == []
        status, answer = await node.manage("GET", "/repos?status=gone")
        assert (status, answer["message"]) == (400, "parameter status: not an account status: 'gone'")


async def test_many_dids_leave_turns_for_others(tmp_path: Path) -> None:
    """The largest body is read, checked and looked up in steps."""
    async with running(tmp_path) as node:
        await fill(node, ALICE, [])
        dids = [f"did:web:host{number}.example.com" for number in range(100_000)]
        body = b"".join(b'{"did":"%b"}\n' % did.encode() for did in [*dids, ALICE])
        turns, longest = 0, 0.0

        async def watch() -> None:
            nonlocal turns, longest
            loop = asyncio.get_running_loop()
            while True:
                before = loop.time()
                await asyncio.sleep(0)
                longest, turns = max(longest, loop.time() - before), turns + 1

        request = make_mocked_request("POST", "/repos/resync")
        request.read = _bytes(body)  # type: ignore[method-assign]
        routes = RepoRoutes(node.services)
        watcher = asyncio.create_task(watch())
        answer = await routes.resync(request)
        watcher.cancel()
        assert isinstance(answer, web.Response)
        assert json.loads(answer.body) == [{"did": ALICE}]  # type: ignore[arg-type]
        assert turns > 300


def _bytes(body: bytes) -> Callable[[], Coroutine[Any, Any, bytes]]:
    async def read() -> bytes:
        return body

    return read


async def test_database_requests(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/{number}" for number in range(20)])
        assert (await node.manage("POST", "/db/checkpoint"))[0] == 503
        worker = CheckpointWorker(node.services.db, node.writer, node.services.settings.gc)
        services = dataclasses.replace(node.services, workers={"checkpoint": worker})
        server = ManagementServer(services)
        await server.start()
        async with node.http.post(f"{server.url}/db/checkpoint") as response:
            assert (await response.json())["report"]["changes"] == 20
        async with node.http.get(f"{server.url}/db/stats") as response:
            stats = await response.json()
        assert stats["workers"]["checkpoint"]["passes"] == 1
        assert stats["counts"]["records"] == 20
        async with node.http.post(f"{server.url}/db/compact") as response:
            assert (await response.json())["after"]["sst_bytes"] > 0
        await server.stop()
