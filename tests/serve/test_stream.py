"""/stream: one log, read by cursor."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import zstandard

from indexer.serve import stream_format as wire
from indexer.serve.stream_rules import EventFilter
from indexer.store.codecs import AccountStatus
from indexer.store.keyspaces import BLOCKS, FLOOR
from indexer.store.transaction import Transaction
from tests.serve.node import ALICE, BOB, LIKE, POST, Node, messages, put, running

FAST = {"batch_events": 8}


@asynccontextmanager
async def _reader(node: Node, query: str = "") -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with node.http.ws_connect(f"{node.public.url}/stream?{query}", max_msg_size=0) as socket:
        yield socket


async def _posts(node: Node, start: int, count: int, did: str = ALICE, kind: str = POST) -> None:
    def work(tx: Transaction) -> None:
        for number in range(start, start + count):
            put(tx, did, f"{kind}/{number}")

    await node.writer.run("posts", work)


async def _set_floor(node: Node, floor: int) -> None:
    await node.writer.run("floor", lambda tx: tx.set_cursor(FLOOR, floor))


async def _wipe(node: Node, did: str) -> None:
    await node.writer.run("wipe", lambda tx: tx.wipe_repo(did, AccountStatus.ACTIVE))


async def _gap(node: Node, did: str) -> None:
    await node.writer.run("gap", lambda tx: tx.append_event("sync", did, fields={}))


def _ids(found: list[dict[str, Any]]) -> list[int]:
    return [message["id"] for message in found]


async def test_a_record_event_has_the_documented_shape(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await _posts(node, 0, 1)
        await node.writer.run(
            "delete", lambda tx: tx.delete_record(ALICE, f"{POST}/0", "3jzfcijpj2z2b", live=True)
        )
        async with _reader(node, "cursor=0") as socket:
            create, delete = await messages(socket, 2)
        body = create["record"]
        assert (create["id"], create["type"]) == (1, "record")
        assert list(body) == ["live", "did", "rev", "collection", "rkey", "action", "cid", "record"]
        assert body["record"]["text"] == f"{POST}/0"
        assert (body["live"], body["did"], body["action"]) == (True, ALICE, "create")
        assert "cid" not in delete["record"]
        assert "record" not in delete["record"]
        assert (delete["record"]["action"], delete["record"]["rev"]) == ("delete", "3jzfcijpj2z2b")


async def test_identity_and_account_events(tmp_path: Path) -> None:
    def work(tx: Transaction) -> None:
        tx.append_event("identity", ALICE, fields={"handle": "alice.test"})
        tx.append_event("account", ALICE, fields={"active": False, "status": "deactivated"})

    async with running(tmp_path) as node:
        await node.writer.run("events", work)
        async with _reader(node, "cursor=0") as socket:
            assert await messages(socket, 2) == [
                {"id": 1, "type": "identity", "identity": {"did": ALICE, "handle": "alice.test"}},
                {
                    "id": 2,
                    "type": "account",
                    "account": {"did": ALICE, "active": False, "status": "deactivated"},
                },
            ]


async def test_early_and_late_readers_see_the_same_run(tmp_path: Path) -> None:
    async with running(tmp_path, stream=FAST) as node, _reader(node, "cursor=0") as early:
        for start in range(0, 30, 5):
            await _posts(node, start, 5)
        first = await messages(early, 30)
        async with _reader(node, "cursor=0") as late:
            assert await messages(late, 30) == first
        async with _reader(node, "cursor=13") as middle:
            assert await messages(middle, 18) == first[12:]
        assert _ids(first) == list(range(1, 31))


async def test_without_a_cursor_only_what_is_new(tmp_path: Path) -> None:
    async with running(tmp_path, stream=FAST) as node:
        await _posts(node, 0, 3)
        async with _reader(node) as socket, _reader(node, "cursor=4") as waiting:
            await _posts(node, 3, 1)
            assert _ids(await messages(socket, 1)) == [4]
            assert _ids(await messages(waiting, 1)) == [4]


async def test_a_cursor_beyond_the_next_id_is_an_error(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await _posts(node, 0, 3)
        async with _reader(node, "cursor=5") as socket:
            (error,) = await messages(socket, 1)
            assert (error["type"], error["name"]) == ("error", "FutureCursor")
            assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
            assert socket.close_code == 1008


async def test_below_the_floor_is_said_and_starts_at_the_floor(tmp_path: Path) -> None:
    async with running(tmp_path, stream=FAST) as node:
        await _posts(node, 0, 20)
        await _set_floor(node, 12)
        async with _reader(node, "cursor=3") as socket:
            notice, first = await messages(socket, 2)
            assert notice == {"type": "info", "name": "OutdatedCursor", "id": 12}
            assert first["id"] == 12
        async with _reader(node, "cursor=0") as socket:
            notice, first = await messages(socket, 2)
            assert notice == {"type": "info", "name": "OutdatedCursor", "id": 12}
            assert first["id"] == 12


async def test_filters_choose_collections_and_accounts(tmp_path: Path) -> None:
    async with running(tmp_path, stream=FAST) as node:
        await _posts(node, 0, 10)
        await _posts(node, 0, 10, kind=LIKE)
        await _posts(node, 0, 10, did=BOB)
        await node.writer.run(
            "event", lambda tx: tx.append_event("identity", BOB, fields={"handle": "b.test"})
        )
        for query, wanted in [
            (f"wantedCollections={LIKE}", [*range(11, 21), 31]),
            ("wantedCollections=app.bsky.feed.*", list(range(1, 32))),
            (f"wantedCollections={LIKE},com.example.*&wantedDids={BOB}", [31]),
            (f"wantedDids={BOB}", list(range(21, 32))),
        ]:
            async with _reader(node, f"cursor=0&{query}") as socket:
                assert _ids(await messages(socket, len(wanted))) == wanted


async def test_a_filtered_reader_is_told_how_far_it_is(tmp_path: Path) -> None:
    async with running(tmp_path, stream={**FAST, "cursor_notice_interval": 0.02}) as node:
        await _posts(node, 0, 20)
        async with _reader(node, f"cursor=0&wantedDids={BOB}") as socket:
            assert await messages(socket, 1) == [{"type": "info", "name": "Cursor", "id": 21}]


async def test_readers_share_encoded_frames(tmp_path: Path) -> None:
    async with running(tmp_path, stream=FAST) as node:
        await _posts(node, 0, 40)
        async with _reader(node, "cursor=0") as one, _reader(node, "cursor=0") as two:
            assert await messages(one, 40) == await messages(two, 40)
        assert node.public.streams.encoded.encoded == 40


async def test_the_cache_keeps_within_its_bytes(tmp_path: Path) -> None:
    async with running(tmp_path, stream=FAST) as node:
        encoded = node.public.streams.encoded
        encoded._budget = 20_000
        await _posts(node, 0, 400)
        async with _reader(node, "cursor=0") as socket:
            assert _ids(await messages(socket, 400)) == list(range(1, 401))
        assert 0 < encoded.size <= 20_000
        assert encoded.size == sum(batch.size for batch in encoded._batches.values())


async def test_large_records_end_a_batch_early(tmp_path: Path) -> None:
    """Neither what is sent at once nor what is read at once grows with the records' size."""
    async with running(tmp_path, stream={"batch_kib": 64}) as node:

        def work(tx: Transaction) -> None:
            for number in range(40):
                put(tx, ALICE, f"{POST}/{number}", text=f"{number}" + "x" * 100_000)

        await node.writer.run("large", work)
        encoded, events = node.public.streams.encoded, node.services.log
        read: list[int] = []
        blocks = events.blocks

        def counted(asked: Any) -> Any:
            read.append(len(asked))
            return blocks(asked)

        encoded._events = SimpleNamespace(page=events.page, blocks=counted, floor=1)  # type: ignore[assignment]
        position, sent = 1, []
        while position < 41:
            taken = encoded.take(position, EventFilter(), False)
            sent.append(len(taken.payload))
            position = taken.next_id
        assert len(sent) == 40
        assert max(sent) < (64 << 10) + 110_000
        assert read[:4] == [32, 8, 2, 1]
        assert set(read[4:]) == {1}
        async with _reader(node, "cursor=0") as socket:
            assert _ids(await messages(socket, 40)) == list(range(1, 41))


async def test_a_plain_request_is_told_what_this_is(tmp_path: Path) -> None:
    async with running(tmp_path) as node, node.http.get(f"{node.public.url}/stream") as response:
        answer = await response.json()
        assert (response.status, answer["error"]) == (426, "UpgradeRequired")
        assert response.headers["Upgrade"] == "websocket"
        assert "WebSocket client" in answer["message"]


async def test_readers_that_left_are_not_waited_for(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        pulse = node.public.streams.pulse
        for _ in range(3):
            async with _reader(node):
                async with asyncio.timeout(5):
                    while not pulse._waiting:
                        await asyncio.sleep(0.001)
            async with asyncio.timeout(5):
                while node.public.streams.addresses:
                    await asyncio.sleep(0.001)
            assert not pulse._waiting


async def test_zstd_messages_are_frames_of_their_own(tmp_path: Path) -> None:
    async with running(tmp_path, stream=FAST) as node:
        await _posts(node, 0, 10)
        async with _reader(node, "cursor=0") as plain, _reader(node, "cursor=0&compress=zstd") as packed:
            wanted = await messages(plain, 10)
            found = [await packed.receive() for _ in range(10)]
        assert {message.type for message in found} == {aiohttp.WSMsgType.BINARY}
        assert [json.loads(zstandard.decompress(message.data)) for message in found] == wanted


async def test_holes_are_announced(tmp_path: Path) -> None:
    """A gap note of our own and a wiped account leave ids that will not come."""
    async with running(tmp_path, stream=FAST) as node, _reader(node, "cursor=0") as early:
        await _posts(node, 0, 2)
        await node.writer.run("gap", lambda tx: tx.append_event("sync", ALICE, fields={}))
        await _posts(node, 0, 10, did=BOB)
        assert [(m["type"], m["id"]) for m in await messages(early, 13)][2] == ("info", 4)
        await node.writer.run("wipe", lambda tx: tx.wipe_repo(BOB, AccountStatus.DELETED))
        assert (await messages(early, 1))[0]["account"]["status"] == "deleted"
        async with _reader(node, "cursor=0") as late:
            seen = await messages(late, 5)
            while seen[-1]["type"] == "info":
                seen += await messages(late, 1)
        assert [m["id"] for m in seen if m["type"] != "info"] == [1, 2, 14]
        assert all(m["name"] == "Skipped" for m in seen if m["type"] == "info")
        assert seen[-2]["id"] == 14


async def test_a_long_hole_is_crossed_in_one_step(tmp_path: Path) -> None:
    async with running(tmp_path, stream=FAST) as node:
        await _posts(node, 0, 2)
        # As after a power cut: ids go on far above.
        node.writer.state.next_id += 1 << 30
        await _posts(node, 2, 2)
        async with _reader(node, "cursor=0") as socket:
            seen = await messages(socket, 5)
        assert seen[2] == {"type": "info", "name": "Skipped", "id": 3 + (1 << 30)}
        assert _ids(seen)[3:] == [3 + (1 << 30), 4 + (1 << 30)]
        async with _reader(node, "cursor=1000") as socket:
            assert (await messages(socket, 1))[0]["name"] == "Skipped"


async def test_a_lost_block_is_corruption_and_ends_the_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await _posts(node, 0, 1)
        record = node.services.db.record(ALICE, f"{POST}/0")
        assert record is not None
        cid = record.cid
        await node.writer.run("lose", lambda tx: tx.delete(BLOCKS, (ALICE, cid)))
        async with _reader(node, "cursor=0") as socket:
            assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
            assert socket.close_code == 1011
        assert node.public.streams.status()["dropped"] == {"StoreError": 1}


async def test_index_only_events_carry_no_record(tmp_path: Path) -> None:
    async with running(tmp_path, store={"blocks": False}) as node:
        await _posts(node, 0, 1)
        async with _reader(node, "cursor=0") as socket:
            (event,) = await messages(socket, 1)
        assert "cid" in event["record"]
        assert "record" not in event["record"]


_BAD_OPTIONS = [
    ("cursor=-1", "cursor"),
    ("cursor=x", "cursor"),
    ("wantedCollections=*", "wantedCollections"),
    ("wantedDids=alice", "wantedDids"),
    ("compress=gzip", "compress"),
]


async def test_bad_options_are_refused_before_the_upgrade(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        for query, named in _BAD_OPTIONS:
            async with node.http.get(f"{node.public.url}/stream?{query}") as response:
                answer = await response.json()
                assert (response.status, answer["error"]) == (400, "InvalidRequest")
                assert named in answer["message"]


async def test_sockets_are_limited(tmp_path: Path) -> None:
    limits = {"max_sockets": 3, "max_sockets_per_address": 2}
    async with running(tmp_path, public=limits) as node:
        url = f"{node.public.url}/stream"
        async with _reader(node), _reader(node), node.http.get(url) as response:
            assert (response.status, (await response.json())["error"]) == (429, "TooManyConnections")
        async with asyncio.timeout(5):
            while node.public.streams.addresses:
                await asyncio.sleep(0.001)
        async with _reader(node, "cursor=0"):
            pass


async def _dropped(node: Node) -> dict[str, int]:
    async with asyncio.timeout(10):
        while node.public.streams.readers or not node.public.streams.dropped:
            await asyncio.sleep(0.005)
    return dict(node.public.streams.dropped)


async def test_a_dead_peer_is_dropped(tmp_path: Path) -> None:
    quick = {"ping_interval": 0.02, "slow_window": 10}
    async with running(tmp_path, stream=quick) as node:
        # The client never reads, so it never answers a ping.
        socket = await node.http.ws_connect(f"{node.public.url}/stream", autoping=False)
        assert await _dropped(node) == {"DeadPeer": 1}
        await socket.close()


async def test_a_reader_that_is_far_behind_and_too_slow_is_dropped(tmp_path: Path) -> None:
    strict = {
        "send_buffer_kib": 64,
        "slow_window": 0.1,
        "slow_lag_events": 50,
        "slow_min_events_per_s": 1e9,
    }
    async with running(tmp_path, stream=strict) as node:

        def work(tx: Transaction) -> None:
            for number in range(1500):
                put(tx, ALICE, f"{POST}/{number}", text=f"{number}" + "x" * 20_000)

        await node.writer.run("large", work)
        socket = await node.http.ws_connect(f"{node.public.url}/stream?cursor=0")
        assert await _dropped(node) == {"ConsumerTooSlow": 1}
        await socket.close()


async def test_a_quiet_peer_that_answers_pings_stays(tmp_path: Path) -> None:
    quick = {"ping_interval": 0.02, "slow_window": 10}
    async with running(tmp_path, stream=quick) as node, _reader(node) as socket:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(socket.receive(), 0.3)
        assert not node.public.streams.dropped


async def test_a_stopping_server_says_goodbye(tmp_path: Path) -> None:
    async with running(tmp_path) as node, _reader(node) as socket:
        await _posts(node, 0, 1)
        await messages(socket, 1)
        await node.public.streams.stop()
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        assert socket.close_code == 1001


@pytest.mark.parametrize(
    ("seed", "sizes"),
    [
        *((seed, {"batch_events": 5}) for seed in range(4)),
        *((seed, {"batch_events": 40, "batch_kib": 1, "cache_mib": 1}) for seed in range(4)),
    ],
)
async def test_takes_agree_with_a_plain_read_of_the_log(
    tmp_path: Path, seed: int, sizes: dict[str, int]
) -> None:
    """From any position, whatever was encoded before: the events of the log, in order, each once."""
    chance = random.Random(seed)
    dids = [f"did:plc:{letter * 24}" for letter in "abcd"]
    async with running(tmp_path, stream=sizes) as node:
        encoded, events = node.public.streams.encoded, node.services.log

        def ids_from(position: int, wanted: EventFilter) -> list[int]:
            found: list[int] = []
            while position < events.head:
                taken = encoded.take(position, wanted, False)
                assert taken.next_id > position
                texts = [json.loads(text) for text in _texts(taken.payload)]
                found += [text["id"] for text in texts if text["type"] != "info"]
                position = taken.next_id
            return found

        for _ in range(25):
            did = chance.choice(dids)
            match chance.randrange(6):
                case 0:
                    await _wipe(node, did)
                case 1:
                    await _gap(node, did)
                case 2:
                    await _set_floor(node, chance.randint(events.floor, events.head))
                case _:
                    await _posts(node, chance.randrange(1000), chance.randint(1, 7), did)
            start = chance.randint(events.floor, events.head)
            plain = [event for event in events.read(start, 10_000) if event.kind != "sync"]
            assert ids_from(start, EventFilter()) == [event.id for event in plain]
            wanted = EventFilter(dids=frozenset({did}))
            assert ids_from(start, wanted) == [event.id for event in plain if event.did == did]
            batches = list(encoded._batches.values())
            assert encoded.size == sum(batch.size for batch in batches)
            assert encoded._starts == sorted(encoded._batches)


def _texts(payload: bytes) -> list[bytes]:
    texts = []
    while payload:
        text = wire.payload_of(payload)
        head = len(payload) - len(text)
        size = payload[1] if head == 2 else int.from_bytes(payload[2:head], "big")
        texts.append(text[:size])
        payload = text[size:]
    return texts
