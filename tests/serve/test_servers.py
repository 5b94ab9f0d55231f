"""What both servers share: errors, CORS, limits, health, statistics, metrics, binding."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
from aiohttp.test_utils import make_mocked_request
from prometheus_client.parser import text_string_to_metric_families

from indexer.errors import ConfigError
from indexer.serve.listener import client_address
from indexer.serve.management import ManagementServer
from indexer.serve.public import PublicServer
from tests.serve.node import ALICE, POST, fill, running, settings

_ERRORS = [
    ("GET", "/xrpc/com.example.nope", 501, "MethodNotImplemented"),
    ("POST", "/xrpc/com.example.nope", 501, "MethodNotImplemented"),
    ("POST", "/xrpc/com.atproto.repo.getRecord", 405, "InvalidRequest"),
    ("GET", "/nothing", 404, "NotFound"),
    ("POST", "/health", 405, "MethodNotAllowed"),
    ("GET", "/stream", 426, "UpgradeRequired"),
]


async def test_every_error_has_the_shape_of_the_protocol(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        for method, path, status, name in _ERRORS:
            async with node.http.request(method, node.public.url + path) as response:
                answer = await response.json()
                assert (response.status, answer["error"]) == (status, name)
                assert isinstance(answer["message"], str)
                assert ("Access-Control-Allow-Origin" in response.headers) is path.startswith("/xrpc/")


async def test_a_browser_may_ask_first(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        url = f"{node.public.url}/xrpc/com.atproto.repo.getRecord"
        async with node.http.options(url, headers={"Origin": "https://app.example"}) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "*"


async def test_a_query_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    async with running(tmp_path, public={"request_timeout": 0.05}) as node:
        await fill(node, ALICE, [f"{POST}/a"])

        async def never(handle: str, /) -> str:
            await asyncio.Event().wait()
            return handle

        node.resolver.resolve_handle = never  # type: ignore[method-assign]
        status, answer = await node.xrpc("com.atproto.repo.describeRepo", repo="alice.test")
        assert (status, answer["error"]) == (504, "RequestTimeout")


async def test_expensive_queries_are_limited(tmp_path: Path) -> None:
    async with running(tmp_path, xrpc={"max_concurrent": 1}) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        async with node.public.xrpc._context.expensive.take():
            status, answer = await node.xrpc("com.atproto.sync.getRepo", did=ALICE)
        assert (status, answer["error"]) == (503, "ServerBusy")
        await node.car("com.atproto.sync.getRepo", did=ALICE)


async def test_health_and_statistics(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a", f"{POST}/b"])
        await node.xrpc("com.atproto.repo.getRecord", repo=ALICE, collection=POST, rkey="a")
        async with node.http.get(f"{node.public.url}/health") as response:
            summary = await response.json()
            assert (response.status, summary["status"], summary["records"]) == (200, "ok", 2)
        async with node.http.get(f"{node.public.url}/stats") as response:
            stats = await response.json()
        assert stats["repos"]["by_state"]["synced"] == 1
        assert stats["repos"]["by_status"]["active"] == 1
        assert stats["records"]["by_collection"] == {POST: 2}
        assert stats["events"] == {"head": 3, "floor": 1, "total": 2}
        assert stats["xrpc"]["answers"] == {"com.atproto.repo.getRecord": {"200": 1}}
        assert (await node.manage("GET", "/readyz")) == (200, {"ready": True})


async def test_a_poisoned_writer_is_not_healthy(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        node.writer._poison = OSError("disk on fire")
        try:
            async with node.http.get(f"{node.public.url}/health") as response:
                assert (response.status, (await response.json())["status"]) == (503, "failed")
            assert (await node.manage("GET", "/readyz"))[0] == 503
        finally:
            node.writer._poison = None


async def test_metrics_are_readable_and_may_have_a_listener_of_their_own(tmp_path: Path) -> None:
    async with running(tmp_path, metrics={"bind": "127.0.0.1:0"}, management={"token": "t"}) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        await node.writer.run(
            "count", lambda tx: tx.add_count("ingest/wss://relay.test/a/reject/signature", 3)
        )
        async with node.http.get(node.management.metrics_url) as response:
            assert response.status == 200, "needs no token"
            families = {
                family.name: family for family in text_string_to_metric_families(await response.text())
            }
        values = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in families.values()
            for sample in family.samples
        }
        assert values["indexer_events_head",] == 2
        assert values["indexer_repos_by_state", "synced"] == 1
        assert values["indexer_frames_total", "reject", "signature", "wss://relay.test/a"] == 3
        async with node.http.get(f"{node.management.url}/metrics") as response:
            assert response.status == 401


async def test_a_busy_port_is_one_clear_error(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        port = node.public.address[1]
        config = settings(tmp_path, public={"bind": f"127.0.0.1:{port}"})
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*public\.bind"):
            await PublicServer(dataclasses.replace(node.services, settings=config)).start()
        config = settings(tmp_path, metrics={"bind": f"127.0.0.1:{port}"})
        with pytest.raises(ConfigError, match=r"metrics\.bind"):
            await ManagementServer(dataclasses.replace(node.services, settings=config)).start()


@pytest.mark.parametrize(
    ("remote", "forwarded", "wanted"),
    [
        ("10.0.0.1", "203.0.113.5", "203.0.113.5"),
        ("10.0.0.1", "203.0.113.5, 10.0.0.2", "203.0.113.5"),
        ("10.0.0.1", "198.51.100.1, 203.0.113.5", "203.0.113.5"),
        ("192.0.2.1", "203.0.113.5", "192.0.2.1"),
        ("10.0.0.1", "", "10.0.0.1"),
    ],
)
def test_only_trusted_proxies_are_believed(remote: str, forwarded: str, wanted: str) -> None:
    headers = {"X-Forwarded-For": forwarded} if forwarded else {}
    request = make_mocked_request("GET", "/", headers=headers).clone(remote=remote)
    assert client_address(request, ["10.0.0.0/8"]) == wanted
    assert client_address(request, []) == remote
