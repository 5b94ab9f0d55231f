"""`/firehose`, `/ingestion`, `/readyz` and upstreams in figures: the management API of a whole daemon."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from indexer.config import load
from indexer.daemon import Daemon
from indexer.ingest.controls import paused_parts
from tests.ingest.upstream import Scripted, scripted


class Managed(NamedTuple):
    daemon: Daemon
    http: aiohttp.ClientSession

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.http.request(method, f"{self.daemon.management_url}{path}", json=body) as answer:
            return answer.status, await answer.json()

    async def ready(self) -> tuple[int, list[str]]:
        status, answer = await self.call("GET", "/readyz")
        assert answer["ready"] is (status == 200)
        return status, answer["reasons"]

    async def sources(self, query: str = "") -> list[str]:
        status, answer = await self.call("GET", f"/firehose/sources{query}")
        assert status == 200, answer
        return [source["name"] for source in answer]


@asynccontextmanager
async def managed(tmp_path: Path, upstreams: list[str], **tables: Any) -> AsyncIterator[Managed]:
    settings = load(
        overrides={
            "data_dir": tmp_path, "upstreams": upstreams, "verifiers": 0, "memory_mib": 32,
            "network": {"allow_private": True}, "public": {"bind": "127.0.0.1:0"},
            "management": {"bind": "127.0.0.1:0"}, "backfill": {"memory_workers": 0},
            "disk": {"soft_floor_mib": 0, "hard_floor_mib": 0},
            "audit": {"repos_per_minute": 0, "rev_delay": 0}, **tables,
        },
        environment=False,
    )  # fmt: skip
    async with Daemon(settings) as daemon, aiohttp.ClientSession() as http:
        yield Managed(daemon, http)


async def until_cursors(upstream: Scripted, count: int) -> None:
    while len(upstream.cursors) < count:
        await asyncio.sleep(0.005)


async def test_upstreams_are_listed_added_and_removed(tmp_path: Path) -> None:
    async with scripted() as upstream, managed(tmp_path, ["ws://127.0.0.1:9"]) as node:
        body = {"url": upstream.url, "is_pds": True, "cursor": 4}
        status, added = await node.call("POST", "/firehose/sources", body)
        assert (status, added["name"], added["is_pds"], added["persisted"]) == (
            201, f"pds::{upstream.url}", True, True,
        )  # fmt: skip
        await until_cursors(upstream, 1)
        assert upstream.cursors == ["4"]
        assert (await node.call("POST", "/firehose/sources", {"url": upstream.url, "is_pds": True}))[0] == 200
        await until_cursors(upstream, 2)
        assert await node.sources() == ["ws://127.0.0.1:9", f"pds::{upstream.url}"]
        assert await node.sources("?is_pds=true") == [f"pds::{upstream.url}"]
        assert await node.sources("?persisted=false&is_pds=false") == ["ws://127.0.0.1:9"]
        assert await node.sources("?host=nowhere.test") == []
        assert (await node.call("GET", f"/firehose/source?url={upstream.url}"))[1]["cursor"] == 4
        status, gone = await node.call("DELETE", "/firehose/sources", {"url": upstream.url})
        assert (status, gone["persisted"], gone["forgotten"]) == (200, True, False)
        status, gone = await node.call("DELETE", f"/firehose/sources?url={upstream.url}&forget=true")
        assert (status, gone["error"]) == (404, "SourceNotFound")


_REFUSED: list[tuple[str, str, Any, str]] = [
    ("POST", "/firehose/sources", {}, "url: "),
    ("POST", "/firehose/sources", {"url": 5}, "url: "),
    ("POST", "/firehose/sources", {"url": "wss://a.test", "is_pds": "yes"}, "is_pds"),
    ("POST", "/firehose/sources", {"url": "wss://a.test", "cursor": -1}, "cursor"),
    ("POST", "/firehose/sources", {"url": "https://a.test"}, "not a URL of the form"),
    ("POST", "/firehose/sources", {"url": "wss://a.test", "more": 1}, "unknown field: more"),
    ("POST", "/firehose/sources", [], "must be an object"),
    ("POST", "/firehose/cursors", {"url": "ws://127.0.0.1:9"}, "cursor is required"),
    ("POST", "/firehose/cursors", {"url": "ws://127.0.0.1:9", "cursor": "now"}, "cursor must be"),
    ("PATCH", "/ingestion", {}, "firehose"),
    ("PATCH", "/ingestion", {"firehose": 1}, "true or false"),
    ("PATCH", "/ingestion", {"crawler": 1}, "crawler"),
    ("GET", "/firehose/sources?running=maybe", None, "running"),
]


async def test_what_is_wrong_is_named_and_changes_nothing(tmp_path: Path) -> None:
    async with managed(tmp_path, ["ws://127.0.0.1:9"]) as node:
        for method, path, body, why in _REFUSED:
            status, answer = await node.call(method, path, body)
            assert 400 <= status < 502, (path, body)
            assert why in answer["message"], (path, body)
        assert await node.sources() == ["ws://127.0.0.1:9"]


async def test_cursors_are_shown_set_and_reset(tmp_path: Path) -> None:
    async with scripted() as upstream, managed(tmp_path, [upstream.url]) as node:
        await until_cursors(upstream, 1)
        body = {"url": upstream.url, "cursor": 12}
        assert await node.call("POST", "/firehose/cursors", body) == (
            200,
            {"name": upstream.url, "cursor": 12},
        )
        await until_cursors(upstream, 2)
        (shown,) = (await node.call("GET", "/firehose/cursors"))[1]
        assert (shown["cursor"], shown["renumbered"]) == (12, False)
        assert (await node.call("DELETE", "/firehose/cursors", {"key": upstream.url}))[1]["cursor"] == 0
        await until_cursors(upstream, 3)
        live = {"key": upstream.url, "cursor": "live"}
        assert (await node.call("POST", "/firehose/cursors", live))[1]["cursor"] is None
        await until_cursors(upstream, 4)
        assert upstream.cursors == [None, "12", "0", None]
        accept = {"url": upstream.url, "cursor": "accept"}
        assert (await node.call("POST", "/firehose/cursors", accept))[0] == 409


async def test_a_comparison_of_revs_can_be_asked_for(tmp_path: Path) -> None:
    async with scripted() as upstream, managed(tmp_path, [upstream.url]) as node:
        status, answer = await node.call("POST", "/firehose/compare", {"url": upstream.url})
        assert (status, answer["name"]) == (202, upstream.url)
        while not upstream.listed:
            await asyncio.sleep(0.005)


async def test_parts_are_paused_over_restarts(tmp_path: Path) -> None:
    async with scripted() as upstream:
        async with managed(tmp_path, [upstream.url]) as node:
            on = {"crawler": True, "firehose": True, "backfill": True}
            assert await node.call("GET", "/ingestion") == (200, on)
            off = {"firehose": False, "backfill": False}
            assert await node.call("PATCH", "/ingestion", off) == (200, {"crawler": True, **off})
            assert await node.sources("?running=true") == []
            assert node.daemon.backfill.status()["paused"] == "operator"
            assert await node.ready() == (503, ["sources: the firehose is paused (PATCH /ingestion)"])
        upstream.cursors.clear()
        async with managed(tmp_path, [upstream.url]) as node:
            assert paused_parts(node.daemon.db) == {"firehose", "backfill"}
            assert node.daemon.backfill.status()["paused"] == "operator"
            assert upstream.cursors == []
            assert (await node.call("PATCH", "/ingestion", {"firehose": True}))[1]["backfill"] is False
            await until_cursors(upstream, 1)
            assert (await node.call("PATCH", "/ingestion", {"backfill": True}))[1]["backfill"] is True
            assert node.daemon.backfill.status()["paused"] == ""


async def test_no_pause_is_lost_between_two_requests(tmp_path: Path) -> None:
    async with managed(tmp_path, []) as node:
        for _ in range(5):
            await node.call("PATCH", "/ingestion", {"firehose": True, "backfill": True})
            one, other = {"firehose": False}, {"backfill": False}
            await asyncio.gather(
                node.call("PATCH", "/ingestion", one), node.call("PATCH", "/ingestion", other)
            )
            off = {"crawler": True, **one, **other}
            assert await node.call("GET", "/ingestion") == (200, off)
            assert paused_parts(node.daemon.db) == {"firehose", "backfill"}


async def test_readiness_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted() as upstream, managed(tmp_path, [upstream.url, "ws://127.0.0.1:9"]) as node:
        await until_cursors(upstream, 1)
        while not node.daemon.ingest.status()[0]["connected"]:
            await asyncio.sleep(0.005)
        assert await node.ready() == (200, [])  # any of them will do
        services = node.daemon.services
        strict = services.settings.model_copy(
            update={"ingest": services.settings.ingest.model_copy(update={"ready_sources": "all"})}
        )
        object.__setattr__(services, "settings", strict)
        status, (missing,) = await node.ready()
        assert status == 503
        assert missing.startswith("sources: not connected: ws://127.0.0.1:9 (")
        await node.call("DELETE", "/firehose/sources", {"url": "ws://127.0.0.1:9"})
        assert await node.ready() == (200, [])
        assert services.verifiers is not None
        services.verifiers.failing = True
        assert await node.ready() == (503, ["verifiers: its processes die under their work"])
        services.verifiers.failing = False

        class Usage(NamedTuple):
            free: int

        floor = services.settings.model_copy(
            update={"disk": services.settings.disk.model_copy(update={"hard_floor_mib": 512})}
        )
        object.__setattr__(services, "settings", floor)
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda _path: Usage(5 << 20))
            assert (await node.ready())[1] == ["disk: 5 MiB are free, ingest needs 512 (disk.hard_floor_mib)"]


async def test_without_a_connection_the_daemon_is_not_ready(tmp_path: Path) -> None:
    async with managed(tmp_path, ["ws://127.0.0.1:9"]) as node:
        assert (await node.ready())[0] == 503
    async with managed(tmp_path, ["ws://127.0.0.1:9"], ingest={"ready_sources": "none"}) as node:
        assert await node.ready() == (200, [])


async def test_who_follows_nothing_is_not_ready(tmp_path: Path) -> None:
    async with managed(tmp_path, []) as node:
        status, (reason,) = await node.ready()
        assert (status, reason.split(";")[0]) == (503, "sources: no upstream is followed")
    async with managed(tmp_path, [], ingest={"ready_sources": "none"}) as node:
        assert await node.ready() == (200, [])


async def test_figures_of_upstreams_are_in_stats_and_metrics(tmp_path: Path) -> None:
    async with scripted() as upstream, managed(tmp_path, [upstream.url]) as node:
        await until_cursors(upstream, 1)
        await node.daemon.writer.run("t", lambda tx: tx.add_count("compare_revs/done", 2))
        async with node.http.get(f"{node.daemon.public_url}/stats") as answer:
            ingest = (await answer.json())["ingest"]
        assert ingest["sources"][0]["attempts"] == 1
        assert ingest["compare_revs"]["done"] == 2
        assert ingest["paused"] == []
        async with node.http.get(f"{node.daemon.management_url}/metrics") as answer:
            text = await answer.text()
        label = f'{{source="{upstream.url}"}}'
        for line in (
            f"indexer_source_attempts{label} 1.0",
            f"indexer_source_renumbered{label} 0.0",
            'indexer_compare_revs{outcome="done"} 2.0',
            'indexer_pool_restarts{pool="verifiers"} 0.0',
        ):
            assert line in text
