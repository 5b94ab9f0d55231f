"""After a possible loss the upstream's list is compared with what is held, and what is behind is fetched."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from indexer.ingest.revs import OUTCOMES, ROWS, RevComparison, list_url, read_page, schedule
from indexer.simulator.wire import tid
from indexer.store.codecs import NEW_REPO, SyncState
from indexer.store.keyspaces import CURSORS
from tests.ingest.node import Node
from tests.ingest.test_pipeline import holds, world
from tests.ingest.upstream import scripted

FAST = {"rev_pages_per_s": 100, "rev_delay": 0}
AHEAD = tid(time.time_ns() // 1000)


def did(number: int) -> str:
    return f"did:plc:{number:a>24}".replace("0", "z").replace("1", "y")


def outcomes(node: Node) -> dict[str, int]:
    counts = {name: node.db.count(ROWS + name) for name in OUTCOMES}
    return {name: count for name, count in counts.items() if count}


def pending(node: Node, name: str) -> Any:
    return node.db.get(CURSORS, ROWS + name)


@pytest.mark.parametrize(
    ("url", "listed"),
    [
        ("wss://relay.test", "https://relay.test/xrpc/com.atproto.sync.listRepos?limit=1000"),
        ("ws://a.test:81/x", "http://a.test:81/x/xrpc/com.atproto.sync.listRepos?limit=1000"),
    ],
)
def test_the_list_is_beside_the_firehose(url: str, listed: str) -> None:
    assert list_url(url, "") == listed
    assert list_url(f"{url}/xrpc/com.atproto.sync.subscribeRepos", "a b") == f"{listed}&cursor=a+b"


def test_a_page_gives_the_revs_of_active_repositories_alone() -> None:
    page = read_page(
        b'{"repos":[{"did":"did:a:b","rev":"3jzfcijpj2z2a","active":true},{"did":"did:a:c","rev":"x"},5,'
        b'{"did":"did:a:d","rev":"3jzfcijpj2z2a","active":false},{"did":7,"rev":"3jzfcijpj2z2a"}],"cursor":"n"}'
    )
    assert page == ({"did:a:b": "3jzfcijpj2z2a"}, "n", 5)


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"repos":{}}', b'{"repos":[],"cursor":5}', b'{"cursor":"x"}', b"null"]
)
def test_what_is_no_list_is_said(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_page(body)


async def test_a_repository_that_is_behind_is_found_and_fetched(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path, audit=FAST) as node:
        forge, same = net.account("a"), net.account("b")
        net.send(forge.parts(), same.parts())
        await node.until(lambda: holds(node, forge) and holds(node, same))
        forge.posts(2)  # lost on the way
        net.store(forge)
        net.store(same)
        done = node.backfill.status()["done"]
        name = net.network.stream_urls[0]
        assert await node.ingest.sources.compare_revs(name) == name
        await node.until(lambda: holds(node, forge))
        assert outcomes(node) == {"scheduled": 1, "behind": 1, "done": 1}
        assert node.backfill.status()["done"] == done + 1
        assert pending(node, name) is None


async def test_what_is_on_its_way_is_awaited_first(tmp_path: Path) -> None:
    async with (
        scripted() as upstream,
        world() as net,
        net.node(tmp_path, upstreams=[upstream.url], audit={**FAST, "rev_delay": 0.3}) as node,
    ):
        began = time.time()
        await node.ingest.sources.compare_revs(upstream.url)
        await node.until(lambda: pending(node, upstream.url) is None)
        assert time.time() - began >= 0.3


async def test_a_pass_goes_on_after_a_restart_page_by_page(tmp_path: Path) -> None:
    async with scripted() as upstream, world() as net:
        upstream.pages = {
            "": (200, {"repos": [{"did": did(1), "rev": AHEAD}], "cursor": "1"}),
            "1": (503, {}),
        }
        tables = {"upstreams": [upstream.url], "filter": {"mode": "filter"}, "audit": FAST}
        async with net.node(tmp_path, **tables) as node:
            await node.ingest.sources.compare_revs(upstream.url)
            await node.until(lambda: node.db.count(ROWS + "page_failed") == 1)
            assert pending(node, upstream.url)[0] == "1"
        upstream.pages["1"] = (200, {"repos": [{"did": did(2), "rev": AHEAD}]})
        upstream.listed.clear()
        async with net.node(tmp_path, **tables) as node:
            await node.until(lambda: pending(node, upstream.url) is None)
            assert upstream.listed == ["1"]
            assert outcomes(node) == {"scheduled": 1, "page_failed": 1, "done": 1}


@pytest.mark.parametrize(
    ("pages", "outcome"),
    [
        ({"": (501, {})}, "unsupported"),
        ({"": (404, {})}, "unsupported"),
        ({"": (200, {"nothing": 1})}, "malformed"),
        ({"": (200, {"repos": [], "cursor": "a"}), "a": (200, {"repos": [], "cursor": "a"})}, "malformed"),
    ],
)
async def test_a_list_that_cannot_be_had_ends_the_pass(tmp_path: Path, pages: Any, outcome: str) -> None:
    async with (
        scripted() as upstream,
        world() as net,
        net.node(tmp_path, upstreams=[upstream.url], audit=FAST) as node,
    ):
        upstream.pages = pages
        await node.ingest.sources.compare_revs(upstream.url)
        await node.until(lambda: pending(node, upstream.url) is None)
        assert outcomes(node) == {"scheduled": 1, outcome: 1}


@pytest.mark.parametrize("entries", [1000, 0])
async def test_endless_paging_is_given_up(tmp_path: Path, entries: int) -> None:
    async with scripted() as upstream, world() as net:
        full = [{"did": did(n), "rev": AHEAD} for n in range(entries)]
        upstream.pages = {"": (200, {"repos": full, "cursor": "0"})}
        upstream.pages |= {str(n): (200, {"repos": full, "cursor": str(n + 1)}) for n in range(9)}
        limits = {**FAST, "rev_max_pages": 3}
        async with net.node(tmp_path, upstreams=[upstream.url], audit=limits) as node:
            await node.ingest.sources.compare_revs(upstream.url)
            await node.until(lambda: pending(node, upstream.url) is None)
            assert outcomes(node) == {"scheduled": 1, "malformed": 1}
            assert len(upstream.listed) == 4


async def test_an_alarm_during_a_pass_makes_one_more(tmp_path: Path) -> None:
    async with scripted() as upstream, world() as net:
        tables = {"upstreams": [upstream.url], "audit": FAST}
        async with net.node(tmp_path, **tables) as node:
            for _ in range(3):
                await node.writer.run("t", lambda tx: schedule(tx, upstream.url, "possible_loss"))
            node.ingest.sources.revs.wake()
            await node.until(lambda: pending(node, upstream.url) is None)
            assert outcomes(node) == {"scheduled": 1, "done": 2}


async def test_only_synced_followed_repositories_below_the_pass_s_begin_are_asked(tmp_path: Path) -> None:
    later = tid(time.time_ns() // 1000 + 3_600_000_000)
    rows: dict[str, dict[str, Any]] = {
        did(1): {"tracked": True, "state": SyncState.SYNCED, "rev": "3jzfcijpj2z2a"},
        did(2): {"tracked": False, "state": SyncState.SYNCED, "rev": "3jzfcijpj2z2a"},
        did(3): {"tracked": True, "state": SyncState.BACKFILLING, "rev": "3jzfcijpj2z2a"},
        did(4): {"tracked": True, "state": SyncState.SYNCED, "rev": AHEAD},
        did(5): {"tracked": True, "state": SyncState.SYNCED, "rev": "3jzfcijpj2z2a"},
    }
    async with (
        scripted() as upstream,
        world() as net,
        net.node(tmp_path, upstreams=[upstream.url], audit=FAST) as node,
    ):
        for name, row in rows.items():
            changed = NEW_REPO._replace(**row)
            await node.writer.run("t", lambda tx, n=name, r=changed: tx.set_repo(n, r))  # type: ignore[misc]
        listed = [{"did": name, "rev": later if name == did(5) else AHEAD} for name in rows]
        upstream.pages[""] = (200, {"repos": [*listed, {"did": did(6), "rev": AHEAD}]})
        await node.ingest.sources.compare_revs(upstream.url)
        await node.until(lambda: pending(node, upstream.url) is None)
        assert outcomes(node) == {"scheduled": 1, "behind": 1, "done": 1}


async def test_a_removed_upstream_s_pass_is_dropped(tmp_path: Path) -> None:
    async with scripted() as upstream, world() as net:
        upstream.pages[""] = (503, {})
        async with net.node(tmp_path, upstreams=[], audit=FAST) as node:
            await node.ingest.sources.add(upstream.url)
            await node.ingest.sources.compare_revs(upstream.url)
            await node.until(lambda: node.db.count(ROWS + "page_failed") == 1)
            await node.ingest.sources.remove(upstream.url)
            assert pending(node, upstream.url) is None


async def test_a_fault_of_ours_costs_a_try_and_not_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(RevComparison, "_behind", fails)
    async with (
        scripted() as upstream,
        world() as net,
        net.node(tmp_path, upstreams=[upstream.url], audit=FAST) as node,
    ):
        await node.ingest.sources.compare_revs(upstream.url)
        await node.until(lambda: node.db.count(ROWS + "page_failed") == 1)
        assert pending(node, upstream.url) is not None
