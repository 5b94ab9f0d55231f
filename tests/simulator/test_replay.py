from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from indexer.simulator.cbor import encode
from indexer.simulator.frames import frame_seq
from indexer.simulator.replay import ReplayNetwork, ReplaySource
from indexer.simulator.wire import error_frame, info_frame
from tests.paths import shared_data
from tests.simulator import strict

DID = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"


def numbered(seq: int, size: int = 0) -> bytes:
    body = {"ops": [{"path": "a.cseq/x"}], "seq": seq, "did": DID, "blocks": bytes(size)}
    return encode({"op": 1, "t": "#sync"}) + encode(body)


async def take(session: aiohttp.ClientSession, url: str, count: int, query: str = "") -> list[bytes]:
    frames: list[bytes] = []
    async with session.ws_connect(
        f"{url}/xrpc/com.atproto.sync.subscribeRepos{query}", max_msg_size=0
    ) as socket:
        while len(frames) < count:
            message = await socket.receive()
            if message.type is not aiohttp.WSMsgType.BINARY:
                break
            frames.append(message.data)
    return frames


@pytest.mark.parametrize("seq", [1, 23, 24, 255, 256, 70_000, 2**40])
def test_seq_is_read_without_being_fooled_by_content(seq: int) -> None:
    assert frame_seq(numbered(seq)) == seq


def test_frames_without_a_seq_have_none() -> None:
    assert frame_seq(info_frame("OutdatedCursor", "…")) == 0
    assert frame_seq(error_frame("FutureCursor", "seq")) == 0


async def test_plays_all_then_what_is_added_and_honours_cursors() -> None:
    frames = [numbered(seq) for seq in (5, 6, 9)]
    async with ReplayNetwork([frames], {}, {}) as network, aiohttp.ClientSession() as session:
        url = network.stream_urls[0]
        assert await take(session, url, 3) == frames
        assert await take(session, url, 2, "?cursor=5") == frames[1:]
        assert await take(session, url, 3, "?cursor=0") == frames
        outdated = await take(session, url, 1, "?cursor=2")
        assert strict.split_frame(outdated[0])[1]["name"] == "OutdatedCursor"
        future = await take(session, url, 9, "?cursor=10")
        assert [strict.split_frame(frame)[1]["error"] for frame in future] == ["FutureCursor"]
        waiting = asyncio.create_task(take(session, url, 1, "?cursor=9"))
        network.playbacks[0].add([numbered(11)])
        assert await waiting == [numbered(11)]


async def test_a_rate_holds_frames_back() -> None:
    frames = [numbered(seq) for seq in range(1, 41)]
    async with ReplayNetwork([frames], {}, {}, rate=400) as network, aiohttp.ClientSession() as session:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        assert await take(session, network.stream_urls[0], 40) == frames
        assert 0.09 < loop.time() - begun < 5


async def test_many_frames_go_out_fast(tmp_path: Path) -> None:
    """20,000 frames a second are asked for; a shared, busy machine still has to give a quarter of it."""
    path, count = tmp_path / "frames", 10_000
    frame = numbered(1, 2000)
    path.write_bytes((len(frame).to_bytes(4, "big") + frame) * count)
    async with ReplayNetwork([path], {}, {}) as network:
        host, port = network.urls[0].removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"GET /xrpc/com.atproto.sync.subscribeRepos HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        loop = asyncio.get_running_loop()
        begun = loop.time()
        left = count * (len(frame) + 4)
        while left:
            left -= len(await reader.read(min(left, 1 << 20)))
        assert loop.time() - begun < count / 5_000
        writer.close()
        await writer.wait_closed()


async def test_the_captured_session_is_served_as_it_was() -> None:
    folder = shared_data("session")
    truth = json.loads((folder / "truth.json").read_bytes())
    async with ReplayNetwork.from_session(folder) as network, aiohttp.ClientSession() as session:
        frames = await take(session, network.stream_urls[0], network.playbacks[0].end)
        assert (
            b"".join(len(item).to_bytes(4, "big") + item for item in frames)
            == (folder / "pds0.frames").read_bytes()
        )
        for account in truth["accounts"]:
            did = account["did"]
            async with session.get(
                f"{network.plc_url}/xrpc/com.atproto.sync.getRepo", params={"did": did}
            ) as answer:
                if account["active"]:
                    root, _ = strict.read_car(await answer.read())
                    assert str(root) == account["commit"]
                else:
                    names = {
                        "deactivated": "RepoDeactivated",
                        "takendown": "RepoTakendown",
                        "deleted": "RepoNotFound",
                    }
                    assert (answer.status, (await answer.json())["error"]) == (400, names[account["status"]])


async def test_documents_name_the_replays_own_addresses() -> None:
    folder = shared_data("session")
    async with ReplayNetwork.from_session(folder) as network, aiohttp.ClientSession() as session:
        documents = json.loads((folder / "diddocs.json").read_bytes())
        for did, entry in documents.items():
            if did.startswith("did:web:"):
                host = did[8:].replace("%3A", ":")
                request = session.get(f"{network.plc_url}/.well-known/did.json", headers={"Host": host})
                assert any(item.startswith(f"{host}=127.0.0.1:") for item in network.connect_to)
            else:
                request = session.get(f"{network.plc_url}/{did}")
            async with request as answer:
                assert answer.status == entry["status"]
                document = await answer.json(content_type=None)
            if entry["status"] == 200:
                number = int(entry["doc"]["service"][0]["serviceEndpoint"][-4:]) - 2583
                assert document["service"][0]["serviceEndpoint"] == network.urls[number]
                assert document["verificationMethod"] == entry["doc"]["verificationMethod"]
        async with session.get(f"{network.plc_url}/{DID}") as answer:
            assert answer.status == 404


async def test_cars_may_be_files_or_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.car"
    file.write_bytes(b"filed")
    sources = [ReplaySource([], "http://pds0.test")]
    documents = {DID: {"id": DID, "service": []}}
    async with (
        ReplayNetwork(sources, documents, {"did:a": file, "did:b": b"held"}) as network,
        aiohttp.ClientSession() as session,
    ):
        for did, body in (("did:a", b"filed"), ("did:b", b"held")):
            async with session.get(
                f"{network.urls[0]}/xrpc/com.atproto.sync.getRepo", params={"did": did}
            ) as answer:
                assert await answer.read() == body
                assert answer.content_type == "application/vnd.ipld.car"
        async with session.get(f"{network.plc_url}/{DID}") as answer:
            assert (await answer.json())["id"] == DID


async def test_a_source_lists_its_own_accounts_in_pages_and_the_hosts_beside_it() -> None:
    homes = {"did:a": "http://pds0.test", "did:b": "http://pds1.test", "did:c": "http://pds0.test"}
    documents = {did: {"id": did, "service": [{"serviceEndpoint": home}]} for did, home in homes.items()}
    sources = [
        ReplaySource([], "http://pds0.test"),
        ReplaySource([], "http://pds1.test", latency_s=0.001, busy_every=2),
        ReplaySource([]),
    ]
    cars = dict.fromkeys(homes, b"a car")
    async with ReplayNetwork(sources, documents, cars) as network, aiohttp.ClientSession() as session:

        async def ask(source: int, question: str) -> Any:
            async with session.get(f"{network.urls[source]}/xrpc/com.atproto.sync.{question}") as answer:
                return await answer.json() if answer.status == 200 else answer

        first = await ask(0, "listRepos?limit=1")
        assert [repo["did"] for repo in first["repos"]] == ["did:a"]
        rest = await ask(0, f"listRepos?cursor={first['cursor']}")
        assert [repo["did"] for repo in rest["repos"]] == ["did:c"]
        assert "cursor" not in rest
        assert [repo["did"] for repo in (await ask(1, "listRepos"))["repos"]] == ["did:b"]
        assert [repo["did"] for repo in (await ask(2, "listRepos"))["repos"]] == sorted(homes)
        refused = await ask(1, "listRepos")
        assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        hosts = [urlsplit(url).netloc for url in network.urls[:2]]
        assert [host["hostname"] for host in (await ask(0, "listHosts"))["hosts"]] == hosts
