"""What both servers share: errors, CORS, limits, health, statistics, metrics, binding."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import suppress
from pathlib import Path

import pytest
from aiohttp.test_utils import make_mocked_request
from prometheus_client.parser import text_string_to_metric_families

from indexer.config import ListenerSettings
from indexer.errors import ConfigError, IdentityGone, IdentityUnavailable
from indexer.serve.http_errors import Patience, Terms
from indexer.serve.listener import Gate, client_address
from indexer.serve.management import ManagementServer
from indexer.serve.public import PublicServer
from indexer.store.codecs import AccountStatus
from indexer.store.transaction import Transaction
from tests.serve.node import ALICE, BOB, POST, Node, fill, put, running, settings

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
            for name in ("Access-Control-Allow-Origin", "Access-Control-Expose-Headers"):
                assert response.headers.getall(name) == ["*"]


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
        with node.public.xrpc._context.expensive.take("192.0.2.1"):
            status, answer = await node.xrpc("com.atproto.sync.getRepo", did=ALICE)
        assert (status, answer["error"]) == (503, "ServerBusy")
        await node.car("com.atproto.sync.getRepo", did=ALICE)


async def test_one_address_has_a_share_of_the_expensive_queries(tmp_path: Path) -> None:
    async with running(tmp_path, xrpc={"max_concurrent": 4, "max_concurrent_per_address": 1}) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        slots = node.public.xrpc._context.expensive
        with slots.take("127.0.0.1"):
            status, answer = await node.xrpc("com.atproto.sync.getRepo", did=ALICE)
            assert (status, answer["error"]) == (429, "TooManyRequests")
            with slots.take("192.0.2.1"):
                pass
        await node.car("com.atproto.sync.getRepo", did=ALICE)
        assert not slots._taken


async def _connect(node: Node, head: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*node.public.address)
    writer.write(head)
    await writer.drain()
    return reader, writer


async def test_a_request_that_is_never_finished_is_ended(tmp_path: Path) -> None:
    async with running(tmp_path, public={"header_timeout": "50ms", "idle_timeout": "50ms"}) as node:
        heads = [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n", b"GET /heal"]
        pairs = [await _connect(node, head) for head in heads]
        pairs.append(await _connect(node, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /he"))
        async with asyncio.timeout(5):
            for reader, _ in pairs[:3]:
                with suppress(ConnectionError):
                    assert await reader.read() == b""
            assert b"200 OK" in await pairs[3][0].read()
            for _, writer in pairs:
                writer.close()
            while node.public.listener.gate._open:
                await asyncio.sleep(0.001)


async def test_connections_are_limited_in_total_and_by_address(tmp_path: Path) -> None:
    for limits in ({"max_connections": 2}, {"max_connections_per_address": 2}):
        async with running(tmp_path, public=limits) as node:
            first, second = await _connect(node), await _connect(node)
            reader, refused = await _connect(node)
            assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
            assert node.public.listener.gate.refused == 1
            for _, writer in (first, second):
                writer.close()
            refused.close()
            async with asyncio.timeout(5):
                while node.public.listener.gate._open:
                    await asyncio.sleep(0.001)
            async with node.http.get(f"{node.public.url}/health") as response:
                assert response.status == 200


def test_trusted_proxies_may_have_every_connection() -> None:
    limits = ListenerSettings(
        max_connections_per_address=1, max_connections=3, trusted_proxies=["10.0.0.0/8"]
    )
    gate = Gate(limits)
    assert [gate.enter(address) for address in ("10.0.0.1", "10.0.0.1", "192.0.2.1")] == [True] * 3
    assert not gate.enter("10.0.0.1")
    gate.leave("10.0.0.1")
    assert not gate.enter("192.0.2.1")
    assert gate.enter("10.0.0.1")


class _Leaping(asyncio.SelectorEventLoop):
    """A loop whose clock leaps to the next timer: no wait is longer than asked for, none takes time."""

    _now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


async def _cut_after(terms: Terms, seconds: float, size: int, writes: int) -> int | None:
    """The write at which a reader is given up that takes ``seconds`` for every ``size`` bytes."""
    patience = Patience(terms)
    for number in range(writes):
        try:
            await patience.wait(asyncio.sleep(seconds), size)
        except TimeoutError:
            return number
    return None


def test_a_reader_may_neither_stall_nor_trickle() -> None:
    with asyncio.Runner(loop_factory=_Leaping) as runner:

        def cut_after(terms: Terms, seconds: float, size: int, writes: int) -> int | None:
            return runner.run(_cut_after(terms, seconds, size, writes))

        assert cut_after(Terms(piece=20), 1000, 1, 1) == 0
        assert cut_after(Terms(piece=1000), 10, 1, 10) is None
        assert cut_after(Terms(piece=50, rate=1e3), 20, 10, 50) == 2
        assert cut_after(Terms(piece=50, rate=1e3), 10, 100_000, 20) is None
        assert cut_after(Terms(piece=1000, total=50), 20, 10, 50) == 2


async def test_a_reader_that_trickles_loses_its_answer_and_its_slot(tmp_path: Path) -> None:
    limits = {"request_timeout": "200ms", "min_kib_per_s": 1e6}
    async with running(tmp_path, public=limits) as node:

        def large(tx: Transaction) -> None:
            for number in range(120):
                put(tx, ALICE, f"{POST}/{number}", text=f"{number}" + "x" * 200_000)

        await node.writer.run("large", large)
        await fill(node, ALICE, [])
        request = f"GET /xrpc/com.atproto.sync.getRepo?did={ALICE} HTTP/1.1\r\nHost: a\r\n\r\n"
        reader, writer = await _connect(node, request.encode())
        read = 0
        with suppress(ConnectionError):
            while piece := await reader.read(65536):
                read += len(piece)
                await asyncio.sleep(0.005)
        assert 0 < read < 120 * 200_000
        assert not node.public.xrpc._context.expensive._taken
        writer.close()


async def test_somebody_who_looks_in_is_told_what_there_is(tmp_path: Path) -> None:
    async with running(tmp_path) as node, node.http.get(f"{node.public.url}/") as response:
        answer = await response.json()
        assert {"/xrpc/{method}", "/stream", "/health", "/stats"} <= set(answer["endpoints"])
        assert "com.atproto.sync.getRepo" in answer["endpoints"]["/xrpc/{method}"]


async def test_a_number_out_of_range_is_told_the_range(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        for limit in ("-1", "0", "101", "x", "1.5"):
            status, answer = await node.xrpc(
                "com.atproto.repo.listRecords", repo=ALICE, collection=POST, limit=limit
            )
            assert (status, answer["error"]) == (400, "InvalidRequest")
            assert answer["message"] == "parameter limit must be a whole number from 1 to 100"


async def test_a_handle_without_an_answer_shows_nothing_of_how_it_was_asked(tmp_path: Path) -> None:
    failures = [
        (IdentityGone("status 404 from https://a.test/secret"), 400, "HandleNotFound"),
        (IdentityUnavailable("cannot connect to host a.test:443 secret"), 400, "HandleNotFound"),
        (IdentityUnavailable("10.0.0.53 secret timed out", reason="dns"), 502, "UpstreamFailure"),
    ]
    async with running(tmp_path) as node:
        for failure, wanted, name in failures:

            async def fail(_handle: str, /, failure: Exception = failure) -> str:
                raise failure

            node.resolver.resolve_handle = fail  # type: ignore[method-assign]
            status, answer = await node.xrpc("com.atproto.repo.describeRepo", repo="a.test")
            assert (status, answer["error"]) == (wanted, name)
            assert "secret" not in answer["message"]


async def test_a_deleted_account_is_counted_as_that_and_not_as_pending(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await node.writer.run("count", lambda tx: tx.count_deleted(9))
        for did in (ALICE, BOB):
            await fill(node, did, [f"{POST}/a"])
        await node.writer.run("wipe", lambda tx: tx.wipe_repo(BOB, AccountStatus.DELETED))
        async with node.http.get(f"{node.public.url}/stats") as response:
            states = (await response.json())["repos"]["by_state"]
        assert {name: number for name, number in states.items() if number} == {"synced": 1, "deleted": 1}


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
        assert stats["repos"]["by_state"]["deleted"] == 0
        assert stats["repos"]["by_status"]["active"] == 1
        assert stats["records"]["by_collection"] == {POST: 2}
        assert stats["events"] == {"head": 3, "floor": 1, "total": 2}
        assert stats["xrpc"]["answers"] == {"com.atproto.repo.getRecord": {"200": 1}}
        assert (await node.manage("GET", "/readyz")) == (200, {"ready": True, "reasons": []})


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
