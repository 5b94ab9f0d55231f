"""Lists that lie, stall or never end: a sweep ends or waits, and nothing else is held up."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.simulator.account import Write
from indexer.simulator.fault_answers import KINDS
from indexer.simulator.faults import BY_COLLECTION, LIST_HOSTS, LIST_REPOS, Fault
from tests.crawl.node import dids_of, network, node

POST = "app.bsky.feed.post"
#: Fault of `listRepos` → how the sweep ends; "" for one that is asked again until it works.
OUTCOMES = {
    "repeated_cursor": "endless", "circular_cursor": "endless", "endless_list": "endless",
    "broken_entries": "done", "invented_repos": "done", "html": "malformed", "empty": "malformed",
    "garbage": "malformed", "truncated": "malformed", "endless": "malformed", "gzip_bomb": "",
    "redirect_loop": "malformed", "redirect_scheme": "refused", "status_400": "malformed",
    "status_404": "unsupported", "status_501": "unsupported", "status_403": "malformed",
    "status_500": "", "rate_limited": "", "rate_limited_retry_after": "", "reset": "", "cut": "",
}  # fmt: skip


async def lied(tmp_path: Path, kind: str, outcome: str) -> None:
    async with network(pds=1, history_accounts=4, history_records=1) as net:
        times = 3 if outcome == "" else None
        value = 0.01 if kind == "rate_limited_retry_after" else None
        net.faults.add(Fault("pds0", kind, LIST_REPOS, times=times, value=value))
        backfill = {"retry_min": 0.1, "retry_max": 0.1}
        tables = {"hosts": {"requests_per_s": 0, "rate_limit_wait": 0.05}, "backfill": backfill}
        crawler = {"page_size": 2, "max_page_kib": 256, "page_tries": 2, "max_pages": 20}
        async with node(tmp_path, net, net.pds_urls, crawler=crawler, **tables) as n:  # type: ignore[arg-type]
            await n.until(lambda: n.source()["last_outcome"] == (outcome or "done"))
            assert n.ended(outcome or "done")
            assert net.faults.fired.total() >= (times or 1)
            source = n.source()
            assert not source["sweeping"]
            if outcome not in ("", "done"):
                assert source["error"]
                assert source["next_us"] > 0
            if outcome in ("", "done"):
                await n.until(lambda: n.synced(dids_of(net)))
            assert n.known() >= (dids_of(net) if outcome in ("", "done") else set())


@pytest.mark.parametrize("kind", ["circular_cursor", "garbage"])
async def test_a_list_that_is_none_ends_its_sweep(tmp_path: Path, kind: str) -> None:
    await lied(tmp_path, kind, OUTCOMES[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(OUTCOMES) - {"circular_cursor", "garbage"}))
async def test_every_lie_of_a_list_ends_or_is_waited_for(tmp_path: Path, kind: str) -> None:
    await lied(tmp_path, kind, OUTCOMES[kind])


def test_every_kind_of_lists_is_in_the_table() -> None:
    own = {kind for kind, made in KINDS.items() if made.routes <= {LIST_REPOS, BY_COLLECTION, LIST_HOSTS}}
    assert own <= set(OUTCOMES)


@pytest.mark.slow
async def test_accounts_that_nobody_has_are_put_off_and_hold_nobody_up(tmp_path: Path) -> None:
    async with network(pds=1, history_accounts=6, history_records=1) as net:
        net.faults.add(Fault("pds0", "invented_repos", LIST_REPOS, value=40))
        crawler = {"page_size": 2, "max_queued": 25}
        async with node(tmp_path, net, net.pds_urls, crawler=crawler) as n:
            await n.until(lambda: n.ended() and n.synced(dids_of(net)))
            invented = n.known() - dids_of(net)
            assert len(invented) == 3 * 40
            rows = [n.db.repo(did) for did in invented]
            assert not any(row is not None and row.rev for row in rows)
            assert n.db.count("records") == sum(len(a.records) for a in net.world.accounts.values())


@pytest.mark.slow
async def test_a_pds_that_lies_of_collections_is_followed_by_nobody_else(tmp_path: Path) -> None:
    async with network(pds=1, history_accounts=3) as net:
        net.faults.add(Fault("pds0", "garbage", "describeRepo"))
        crawler = {"check_tries": 2}
        tables = {"filter": {"signals": ["com.example.rare"]}}
        async with node(tmp_path, net, net.pds_urls, mode="filter", crawler=crawler, **tables) as n:
            await n.until(lambda: n.total("unanswered") == 3)
            assert n.known() == set()
            assert n.db.count("crawl/waiting") == 0


@pytest.mark.slow
async def test_the_firehose_goes_on_while_lists_stall_and_never_end(tmp_path: Path) -> None:
    async with network(pds=3, accounts=4, history_accounts=6, history_records=2) as net:
        net.faults.add(Fault("pds0", "no_answer", LIST_REPOS))
        net.faults.add(Fault("pds1", "endless", LIST_REPOS))
        net.faults.add(Fault("relay0", "endless_list", LIST_REPOS, value=50))
        relay = net.relay_url.replace("ws", "http", 1)
        tables = {"upstreams": [net.relay_url], "network": {"timeout": 1.0}}
        crawler = {"max_page_kib": 512, "max_pages": 40, "pages_per_s": 20}
        seen = [did for did, account in net.world.accounts.items() if account.seen]
        async with node(tmp_path, net, [*net.pds_urls, relay], crawler=crawler, **tables) as n:  # type: ignore[arg-type]
            await n.until(lambda: n.synced(dids_of(net, 2)))
            for number in range(20):
                for did in seen:
                    value = {"$type": POST, "text": f"{number}"}
                    net.publish(net.world.commit(did, [Write("create", f"{POST}/live{number}", value)]))
            await n.until(lambda: all(n.db.record(did, f"{POST}/live19") for did in seen))
            stalled = f"list_repos::{net.pds_urls[0]}"
            await n.until(lambda: n.source(stalled)["failures"] > 0)
            await n.until(lambda: n.ended("endless"))
