"""A host that takes its time over every question, named by very many accounts, holds nobody else up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from indexer.simulator.wire import frame, timestamp
from indexer.store.codecs import Work
from tests.identity.servers import http_server
from tests.ingest.forge import Forge
from tests.ingest.test_fairness import LETTERS, NOW_US
from tests.ingest.test_pipeline import holds, world

VICTIMS = ["did:plc:" + "".join(LETTERS[(n >> 5 * at) & 31] for at in range(24)) for n in range(1, 201)]
TIMEOUT_S = 600.0  # of a question: the test is over long before


@pytest.mark.limit(20)
async def test_a_host_that_never_answers_holds_no_other_account_up(tmp_path: Path) -> None:
    asked: list[str] = []

    async def tarpit(request: web.Request) -> web.Response:
        asked.append(request.query["did"])
        await asyncio.Event().wait()
        raise AssertionError

    async with world() as net, http_server(tarpit) as port:
        for did in VICTIMS:
            net.publish(Forge(did), "http://victim.test:80", handle="")
        places = [*net.network.connect_to, *net.handles, f"victim.test:80=127.0.0.1:{port}"]
        tables = {
            "network": {"timeout": TIMEOUT_S, "connect_to": places},
            "plc": {"max_requests_per_s": 5000.0}, "identity": {"concurrency": 8},
        }  # fmt: skip
        async with net.node(tmp_path, upstreams=net.network.stream_urls[:2], **tables) as node:
            about = {"time": timestamp(NOW_US), "active": False, "status": "deactivated"}
            said = [frame("#account", {"did": did, **about}).numbered(n + 1) for n, did in enumerate(VICTIMS)]
            net.network.playbacks[1].add(said)
            await node.until(lambda: len(asked) == 4)  # ingest.host_questions
            forge = net.account("a")
            net.send(forge.parts())
            await node.until(lambda: holds(node, forge))
            # Their own identities are learned too, whatever their host does.
            await node.until(lambda: all((row := node.db.repo(did)) and row.pds for did in VICTIMS))
            row = node.db.repo(asked[0])
            assert row is not None
            assert row.work & Work.CHECK_STATUS
            assert len(asked) == 4
