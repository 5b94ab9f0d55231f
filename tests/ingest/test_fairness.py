"""What strangers' frames can cause is bounded by host, by account and by handle, and holds nobody else up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from indexer.identity.http import HttpClient, Response
from indexer.simulator.wire import frame, timestamp
from indexer.store.codecs import NEW_REPO, Work
from tests.ingest.forge import Forge
from tests.ingest.node import Node
from tests.ingest.test_hostile import row_of_rev
from tests.ingest.test_pipeline import count, holds, row_of, world

LETTERS = "abcdefghijklmnopqrstuvwxyz234567"
DIDS = ["did:plc:" + "".join(LETTERS[(n >> 5 * at) & 31] for at in range(24)) for n in range(1, 81)]
NOW_US = 1_767_225_600_000_000


def documents_asked(monkeypatch: pytest.MonkeyPatch, did: str) -> list[str]:
    """The requests to the directory about an account, from now on."""
    asked: list[str] = []
    get = HttpClient.get

    async def seen(self: HttpClient, url: str, **options: object) -> Response:
        if url.endswith(f"/{did}"):
            asked.append(url)
        return await get(self, url, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(HttpClient, "get", seen)
    return asked


async def hinted(node: Node, net: object, lane: int, did: str, number: int) -> None:
    """An `#identity` on one of the upstreams, taken in."""
    said = frame("#identity", {"did": did, "time": timestamp(NOW_US + number)}).numbered(number)
    net.network.playbacks[lane].add([said])  # type: ignore[attr-defined]
    await node.until(lambda: node.seqs()[lane] == number)


async def test_hints_cut_a_wait_once_and_are_answered_together_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interval, clock = 0.5, asyncio.get_running_loop().time
    async with world() as net, net.node(tmp_path, ingest={"refresh_interval": interval}) as node:
        forge = net.account()
        net.send(forge.parts())
        await node.until(lambda: holds(node, forge) and not node.ingest.due)
        asked, began = documents_asked(monkeypatch, forge.did), clock()
        for number in range(net.seq + 1, net.seq + 31):
            await hinted(node, net, 0, forge.did, number)
        await node.until(lambda: not row_of(node, forge).work)
        assert 1 <= len(asked) <= 3 + (clock() - began) / interval


async def test_a_stranger_s_hint_cuts_no_wait_and_purges_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world() as net:
        lanes = [net.network.stream_urls[0], f"pds::{net.network.stream_urls[1]}"]
        async with net.node(tmp_path, upstreams=lanes, ingest={"refresh_interval": 600}) as node:
            forge = net.account()
            net.send(forge.parts())
            await node.until(lambda: row_of_rev(node, forge))
            asked = documents_asked(monkeypatch, forge.did)
            resolver = node.backfill.tools.resolver
            for number in range(1, 11):
                await hinted(node, net, 1, forge.did, number)
            assert row_of(node, forge).work & Work.RESOLVE  # it is asked, in its time
            assert resolver.cached(forge.did) is not None
            assert asked == []
            await hinted(node, net, 0, forge.did, net.seq + 1)
            await node.until(lambda: bool(asked))


async def test_a_hint_about_an_account_that_is_not_followed_purges_nothing(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path, filter={"mode": "filter"}) as node:
        forge = net.account()
        resolver = node.backfill.tools.resolver
        await resolver.resolve(forge.did)
        net.send(net.plain(forge.identity))
        await node.until(lambda: count(node, "drop/unwanted") == 1)
        assert resolver.cached(forge.did) is not None


async def test_a_did_web_that_never_answers_is_given_up(tmp_path: Path) -> None:
    did = "did:web:nobody.test"
    limits = {"web_tries": 3, "error_ttl": 0.01}
    waits = {"work_retry_min": 0.01, "work_retry_max": 0.02, "refresh_interval": 0.01}
    network = {"connect_to": ["nobody.test:443=127.0.0.1:9"]}
    async with world() as net, net.node(tmp_path, network=network, identity=limits, ingest=waits) as node:
        row = NEW_REPO._replace(tracked=True, work=Work.RESOLVE)
        await node.writer.run("t", lambda tx: tx.set_repo(did, row))
        net.send(net.account().parts())  # the queue has read its rows long ago
        said = frame("#identity", {"did": did, "time": timestamp(NOW_US)}).numbered(net.seq + 1)
        net.network.playbacks[0].add([said])
        await node.until(lambda: (now := node.db.repo(did)) is None or not now.work & Work.RESOLVE)


async def test_accounts_that_claim_one_handle_have_it_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    get = HttpClient.get

    async def seen(self: HttpClient, url: str, **options: object) -> Response:
        if "atproto-did" in url:
            asked.append(url)
        return await get(self, url, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(HttpClient, "get", seen)
    async with world() as net:
        for did in DIDS[:20]:
            net.publish(Forge(did), handle="someone.test")
        async with net.node(tmp_path, ingest={"refresh_interval": 600}) as node:
            net.network.playbacks[0].add(
                [
                    frame("#identity", {"did": did, "time": timestamp(NOW_US)}).numbered(n + 1)
                    for n, did in enumerate(DIDS[:20])
                ]
            )
            await node.until(lambda: all((row := node.db.repo(did)) and row.pds for did in DIDS[:20]))
            await node.until(lambda: bool(asked) and not node.ingest._handles._working)
            assert len(asked) <= 2  # https, then http
