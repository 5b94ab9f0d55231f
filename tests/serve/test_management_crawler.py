"""`/crawler`, `PATCH /ingestion` and the figures of the crawler, on a whole daemon; and its commands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog

from indexer.cli import main
from indexer.config import Settings
from indexer.daemon import Daemon
from indexer.simulator import SimulatedNetwork
from tests.crawl.node import FAST, dids_of, network


@pytest.fixture(autouse=True)
def _no_log_lines() -> Iterator[None]:
    """The daemon in the same process logs where the commands print."""
    with structlog.testing.capture_logs():
        yield


@asynccontextmanager
async def running(folder: Path, net: SimulatedNetwork, **tables: Any) -> AsyncIterator[Daemon]:
    settings = Settings(
        data_dir=folder, upstreams=[], plc_urls=[net.plc_url], verifiers=0,
        network={"allow_private": True}, disk={"soft_floor_mib": 0, "hard_floor_mib": 0},
        public={"bind": "127.0.0.1:0"}, management={"bind": "127.0.0.1:0"},
        backfill={"memory_workers": 0}, filter={"mode": "full"}, crawler={**FAST, **tables},
    )  # fmt: skip
    async with Daemon(settings) as daemon:
        yield daemon


async def call(daemon: Daemon, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    url = daemon.management_url + path
    async with aiohttp.ClientSession() as http, http.request(method, url, json=body) as response:
        text = await response.text()
        return response.status, json.loads(text) if response.content_type == "application/json" else text


async def until_found(daemon: Daemon, number: int) -> None:
    while daemon.db.count("crawler/found") < number:
        await daemon.wait_failed(0.01)


_REFUSED: list[tuple[str, str, Any, str]] = [
    ("POST", "/crawler/sources", {}, "url: "),
    ("POST", "/crawler/sources", {"url": 7}, "url: "),
    ("POST", "/crawler/sources", {"url": "wss://a.test"}, "not a URL of the form"),
    ("POST", "/crawler/sources", {"url": "https://a.test", "mode": "all"}, "mode must be one of"),
    ("POST", "/crawler/sources", {"url": "hosts::https://a.test", "mode": "list_repos"}, "both given"),
    ("POST", "/crawler/sources", {"url": "https://a.test", "more": 1}, "unknown field: more"),
    ("DELETE", "/crawler/sources", {"url": "https://a.test"}, "no such source"),
    ("DELETE", "/crawler/cursors", {"key": "https://a.test"}, "no such source"),
]


async def test_sources_are_listed_added_reset_and_removed(tmp_path: Path) -> None:
    async with network(pds=1, history_accounts=3) as net, running(tmp_path, net) as daemon:
        for method, path, wrong, why in _REFUSED:
            status, answer = await call(daemon, method, path, wrong)
            assert 400 <= status < 500, (path, wrong)
            assert why in answer["message"], (path, wrong)
        assert await call(daemon, "GET", "/crawler/sources") == (200, [])
        url = net.pds_urls[0]
        status, added = await call(daemon, "POST", "/crawler/sources", {"url": url, "mode": "list_repos"})
        assert (status, added["name"], added["persisted"]) == (201, f"list_repos::{url}", True)
        await until_found(daemon, 3)
        assert (await call(daemon, "POST", "/crawler/sources", {"url": url}))[0] == 200
        (shown,) = (await call(daemon, "GET", "/crawler/cursors"))[1]
        assert (shown["name"], shown["cursor"]) == (f"list_repos::{url}", None)
        assert (await call(daemon, "DELETE", "/crawler/cursors", {"key": url}))[0] == 200
        while daemon.db.count("crawler/done") < 2:
            await daemon.wait_failed(0.01)
        stats = (await call(daemon, "GET", "/metrics"))[1]
        assert 'indexer_crawler_total{outcome="found"} 3.0' in stats
        assert 'indexer_crawler{figure="sources"} 1.0' in stats
        assert await call(daemon, "DELETE", f"/crawler/sources?url={url}") == (
            200, {"name": f"list_repos::{url}", "persisted": True},
        )  # fmt: skip
        assert await call(daemon, "GET", "/crawler/sources") == (200, [])


@pytest.mark.slow
async def test_the_crawler_is_paused_and_goes_on(tmp_path: Path) -> None:
    async with network(pds=1, history_accounts=3) as net, running(tmp_path, net) as daemon:
        off = {"crawler": False}
        assert (await call(daemon, "PATCH", "/ingestion", off))[1]["crawler"] is False
        await call(daemon, "POST", "/crawler/sources", {"url": net.pds_urls[0]})
        async with aiohttp.ClientSession() as http, http.get(f"{daemon.public_url}/stats") as response:
            crawler = (await response.json())["crawler"]
        assert (crawler["paused"], crawler["sources"], crawler["totals"]) == ("operator", 1, {})
        assert await call(daemon, "GET", "/ingestion") == (
            200, {"crawler": False, "firehose": True, "backfill": True},
        )  # fmt: skip
        await call(daemon, "PATCH", "/ingestion", {"crawler": True})
        await until_found(daemon, len(dids_of(net)))


def _code(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


@pytest.mark.slow
async def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with network(pds=1, history_accounts=3) as net, running(tmp_path, net) as daemon:

        async def run(*arguments: str) -> str:
            manage = ("--management-url", daemon.management_url)
            assert await asyncio.to_thread(_code, "crawler", "source", *arguments, *manage) == 0
            return capsys.readouterr().out

        url = net.pds_urls[0]
        assert (await run("add", url)).startswith(f"list_repos::{url}  ")
        await until_found(daemon, 3)
        while not daemon.crawler.sources()[0]["last_outcome"]:
            await daemon.wait_failed(0.01)
        text = "waiting  1 pages, 3 listed, 3 new, last sweep: done"
        assert (await run("list")).strip() == f"list_repos::{url}  {text}"
        assert json.loads(await run("list", "--json"))["found"] == 3
        assert (await run("reset", url)).startswith(f"list_repos::{url}  ")
        assert (await run("remove", url)).strip() == f"list_repos::{url}  removed"
        assert await run("list") == ""
