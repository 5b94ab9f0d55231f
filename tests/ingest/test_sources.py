"""Upstreams come and go at run time, each by itself: what one does holds no other up."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from indexer.errors import RequestError
from indexer.ingest.pipeline import Pipeline
from indexer.ingest.source import Source
from indexer.store.codecs import SourceRow
from indexer.store.keyspaces import QUARANTINE, SOURCES
from tests.ingest.node import Node
from tests.ingest.test_pipeline import followed, holds, world
from tests.ingest.upstream import raw, scripted


def of(node: Node, name: str) -> dict[str, Any]:
    """The status of one upstream."""
    return next(source for source in node.ingest.status() if source["name"] == name)


def cursor_of(node: Node, name: str) -> int | None:
    return node.db.cursor(f"upstream/{name}")


async def upgraded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A WebSocket handshake as a server makes it."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    key = next(
        line.split(": ")[1] for line in head.split("\r\n") if line.lower().startswith("sec-websocket-key")
    )
    digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
    accept = base64.b64encode(digest).decode()
    writer.write(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
    )


async def test_one_dead_slow_or_lying_upstream_holds_no_other_up(tmp_path: Path) -> None:
    async def stall(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgraded(reader, writer)
        writer.write(b"\x82\x7f" + (4_000_000).to_bytes(8) + bytes(1000))  # the rest never comes
        await reader.read()

    async def refuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgraded(reader, writer)
        writer.write(b"\x82\x7e" + (1000).to_bytes(2) + bytes(range(250)) * 4)
        await reader.read()

    async with (
        world() as net,
        raw(stall) as stalled,
        raw(half) as halved,
        raw(refuse) as dead,
        raw(garbage) as liar,
    ):
        good = net.network.stream_urls[0]
        async with net.node(tmp_path, upstreams=[stalled, halved, dead, liar, good]) as node:
            forge = net.account()
            net.send(forge.parts(), *(forge.posts(1) for _ in range(20)))
            await node.until(lambda: holds(node, forge))
            await node.until(lambda: of(node, liar)["failing"])
            await node.until(lambda: of(node, dead)["last_failure"] is not None)
            assert of(node, liar)["outcomes"]["connection/frame"] >= 1
            assert not of(node, stalled)["connected"]
            assert of(node, halved)["connected"]
            assert of(node, halved)["frames"] == 0
            net.send(forge.posts(1))
            await node.until(lambda: holds(node, forge))
            assert cursor_of(node, good) == net.seq
            assert [cursor_of(node, name) for name in (stalled, halved, dead, liar)] == [None] * 4


async def test_an_added_upstream_is_followed_at_once_and_after_a_restart(tmp_path: Path) -> None:
    async with world() as net:
        name = net.network.stream_urls[0]
        forge = net.account()
        net.send(forge.parts(), forge.posts(2))
        async with net.node(tmp_path, upstreams=[]) as node:
            assert node.ingest.status() == []
            assert await node.ingest.sources.add(name + "/", cursor=0) == (name, True)
            await node.until(lambda: holds(node, forge))
            assert of(node, name)["persisted"]
        net.send(forge.posts(1))
        async with net.node(tmp_path, upstreams=[]) as node:
            assert of(node, name)["cursor"] == net.seq - 1
            await node.until(lambda: holds(node, forge))
            assert node.db.count(f"ingest/{name}/drop/stale_rev") == 0  # it went on, and did not begin anew


async def test_a_removed_upstream_keeps_its_cursor_unless_it_is_to_be_forgotten(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path, upstreams=[]) as node:
        sources, name, forge = node.ingest.sources, net.network.stream_urls[0], net.account()
        await sources.add(name)
        net.send(forge.parts(), forge.posts(1))
        await node.until(lambda: holds(node, forge))
        await sources.remove(name)
        assert node.ingest.status() == []
        net.send(forge.posts(1))
        assert cursor_of(node, name) == net.seq - 1
        await sources.add(name)
        await node.until(lambda: holds(node, forge))
        assert node.db.counts(f"ingest/{name}/")
        await sources.remove(name, forget=True)
        assert cursor_of(node, name) is None
        assert not node.db.counts(f"ingest/{name}/")
        assert list(node.db.scan(SOURCES)) == []
        with pytest.raises(RequestError, match="no such upstream"):
            await sources.remove(name)


async def test_an_upstream_of_the_settings_is_switched_off_for_good_and_on_again(tmp_path: Path) -> None:
    async with world() as net:
        name, forge = net.network.stream_urls[0], net.account()
        async with net.node(tmp_path) as node:
            await node.until(lambda: of(node, name)["connected"])
            await node.ingest.sources.remove(name)
            assert (of(node, name)["enabled"], of(node, name)["persisted"]) == (False, False)
            assert not of(node, name)["connected"]
        net.send(forge.parts())
        async with net.node(tmp_path) as node:
            assert [(of(node, name)[key]) for key in ("enabled", "running", "attempts")] == [False, False, 0]
            assert await node.ingest.sources.add(name) == (name, False)
            await node.until(lambda: holds(node, forge))
            assert list(node.db.scan(SOURCES)) == []


async def test_a_row_of_a_source_that_left_the_settings_is_not_followed(tmp_path: Path) -> None:
    async with world() as net:
        async with net.node(tmp_path, upstreams=[]) as node:
            row = SourceRow(False, False, 1)
            await node.writer.run("t", lambda tx: tx.set_source("firehose", "ws://gone.test", row))
        async with net.node(tmp_path, upstreams=[]) as node:
            assert node.ingest.status() == []


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://relay.test", "not a URL of the form"),
        ("ws://user:secret@relay.test", "credentials"),
        ("ws://relay.test\0x", "characters"),
        ("wss://", "not a URL"),
        ("relay.test", "not a URL"),
    ],
)
async def test_an_address_that_cannot_be_one_is_refused(tmp_path: Path, url: str, why: str) -> None:
    async with world() as net, net.node(tmp_path, upstreams=[]) as node:
        with pytest.raises(RequestError, match=why) as caught:
            await node.ingest.sources.add(url)
        assert "secret" not in str(caught.value)


async def test_the_guard_and_the_bound_judge_what_is_added(tmp_path: Path) -> None:
    async with world() as net:
        guarded = {"network": {"allow_private": False}}
        async with net.node(tmp_path / "a", upstreams=[], **guarded) as node:
            for url in ("wss://127.0.0.1", "wss://relay.test:8443", "ws://relay.test"):
                with pytest.raises(RequestError) as caught:
                    await node.ingest.sources.add(url)
                assert caught.value.name == "UrlRefused"
        limits = {"max_sources": 1}
        async with net.node(tmp_path / "b", upstreams=["ws://127.0.0.1:9"], ingest=limits) as node:
            with pytest.raises(RequestError, match=r"ingest\.max_sources"):
                await node.ingest.sources.add("ws://127.0.0.1:10")
            with pytest.raises(RequestError, match="followed as a relay"):
                await node.ingest.sources.add("ws://127.0.0.1:9", is_pds=True)


async def test_an_operator_sets_the_cursor_without_a_restart(tmp_path: Path) -> None:
    async with (
        scripted() as upstream,
        world() as net,
        net.node(tmp_path, upstreams=[upstream.url]) as node,
    ):
        await node.until(lambda: upstream.cursors == [None])
        for place, asked in ((7, "7"), (0, "0"), (None, None)):
            upstream.cursors.clear()
            await node.ingest.sources.set_cursor(upstream.url, place)
            assert cursor_of(node, upstream.url) == place
            await node.until(lambda: bool(upstream.cursors))
            assert upstream.cursors == [asked]


async def test_a_pause_ends_connections_and_is_over_when_it_is_said(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        name, forge = net.network.stream_urls[0], net.account()
        net.send(forge.parts())
        await node.until(lambda: holds(node, forge))
        await node.ingest.sources.pause(True)
        assert (of(node, name)["connected"], of(node, name)["running"]) == (False, False)
        net.send(forge.posts(3))
        await node.ingest.sources.add(name)  # connects nothing while the pause lasts
        assert not of(node, name)["running"]
        await node.ingest.sources.pause(False)
        await node.until(lambda: holds(node, forge))


async def test_a_connection_s_task_that_fails_is_started_again_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 2
    session = Source._session

    async def fails(self: Source) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise ZeroDivisionError("a fault of ours")
        return await session(self)

    monkeypatch.setattr(Source, "_session", fails)
    async with followed(tmp_path) as (net, node, _forge):
        source = of(node, net.network.stream_urls[0])
        assert source["restarts"] == 2
        assert source["outcomes"]["connection/failed"] == 2


async def test_a_host_without_a_firehose_is_asked_again_when_it_is_added_anew(tmp_path: Path) -> None:
    async def none(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 501 Not Implemented\r\nContent-Length: 0\r\n\r\n")
        await reader.read()

    async with raw(none) as url, world() as net, net.node(tmp_path, upstreams=[url]) as node:
        await node.until(lambda: not of(node, url)["running"] and of(node, url)["no_firehose"])
        assert of(node, url)["attempts"] == 1
        await node.ingest.sources.add(url)
        await node.until(lambda: of(node, url)["attempts"] == 2 and of(node, url)["no_firehose"])


async def test_a_path_that_fails_takes_ingest_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(Pipeline, "_submit", fails)
    async with world() as net:
        node = Node(tmp_path, {"upstreams": [net.network.stream_urls[0]], "verifiers": 0})
        net.send(net.account().parts())

        async def until_it_fails() -> None:
            async with node:
                await node.until(lambda: False)

        with pytest.raises(ZeroDivisionError):
            await until_it_fails()


async def test_a_fault_of_ours_at_the_intake_does_not_hold_an_upstream_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sort: Callable[..., Any] = Pipeline._sort
    async with world() as net, net.node(tmp_path) as node:
        forge, other = net.account("a"), net.account("b")

        def fails(self: Pipeline, did: str, *rest: Any) -> Any:
            if did == other.did:
                raise ZeroDivisionError("a fault of ours")
            return sort(self, did, *rest)

        monkeypatch.setattr(Pipeline, "_sort", fails)
        net.send(forge.parts(), other.parts(), forge.posts(1))
        await node.until(lambda: holds(node, forge))
        name = net.network.stream_urls[0]
        assert of(node, name)["outcomes"]["connection/intake"] == 2
        assert node.db.count(f"ingest/{name}/reject/intake") == 1
        (row,) = (row for _, row in node.db.scan(QUARANTINE))
        assert (row.reason, row.message) == ("intake", "ZeroDivisionError: a fault of ours")


@pytest.mark.limit(10)
async def test_a_change_ends_when_the_path_to_the_writer_does(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path, upstreams=[]) as node:
        sources = node.ingest.sources
        await node.until(lambda: sources._tasks is not None)
        await sources.add(net.network.stream_urls[0])
        followed = sources.find(net.network.stream_urls[0])
        assert followed.path is not None
        followed.pipeline._bytes += 1  # something on its way, which nobody carries on
        change = asyncio.create_task(sources.set_cursor(followed.name, 0))
        await node.until(lambda: followed.connection is None)
        followed.path.cancel()
        await change


async def test_a_comparison_waits_for_the_change_before_it(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        sources, name = node.ingest.sources, net.network.stream_urls[0]
        async with sources._turn:
            asked = asyncio.create_task(sources.compare_revs(name))
            await asyncio.sleep(0)
            del sources._all[name]
        with pytest.raises(RequestError, match="no such upstream"):
            await asked


async def test_another_spelling_is_no_other_upstream(tmp_path: Path) -> None:
    name = "pds::ws://LOCALHOST:9/"  # as the settings have it, and the stored cursor
    async with Node(tmp_path, {"upstreams": [name]}) as node:
        sources = node.ingest.sources
        for url in ("ws://localhost:9", "ws://localhost:9/xrpc/com.atproto.sync.subscribeRepos"):
            added = await sources.add(url, is_pds=True, cursor=5)
            assert (added.name, added.new) == (name, False)
        assert node.db.cursor(f"upstream/{name}") == 5
        assert sources.find("ws://LOCALHOST:9/", True).name == name
        with pytest.raises(RequestError, match="it is followed as pds::"):
            sources.find("ws://localhost:9", False)
        assert (await sources.add("WS://LocalHost:10/", is_pds=False)).name == "ws://localhost:10"


async def test_without_room_on_the_disk_an_upstream_says_what_it_waits_for(tmp_path: Path) -> None:
    name = "ws://127.0.0.1:9"
    async with Node(tmp_path, {"upstreams": [name], "disk": {"hard_floor_mib": 1 << 40}}) as node:
        await node.until(lambda: not node.ingest._space.is_set())
        assert of(node, name)["error"].startswith("the disk is nearly full: ")
