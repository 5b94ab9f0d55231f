"""The crawler against the simulated network: accounts that nobody announced are found and fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.backfill.hosts import host_of
from indexer.crawl import sweeper
from indexer.crawl.sweep import Sweep
from indexer.crawl.targets import host_url
from indexer.errors import RequestError, UrlRefused
from indexer.ingest.controls import CRAWLER, change_paused
from indexer.simulator import SimulatedNetwork
from indexer.simulator.account import Write
from indexer.simulator.faults import Fault
from indexer.store.codecs import NEW_REPO, AccountStatus
from indexer.store.keyspaces import CRAWL
from tests.crawl.node import CrawlNode, dids_of, network, node

POST, RARE = "app.bsky.feed.post", "com.example.rare.thing"


def write(net: SimulatedNetwork, did: str, collection: str, rkey: str = "one") -> None:
    """A record, in a commit that every relay sends."""
    value = {"$type": collection, "text": "x"}
    net.publish(net.world.commit(did, [Write("create", f"{collection}/{rkey}", value)]))


async def test_a_pdses_accounts_are_found_page_by_page_and_fetched(tmp_path: Path) -> None:
    async with network() as net, node(tmp_path, net, net.pds_urls, crawler={"page_size": 3}) as n:
        await n.until(lambda: n.ended(times=2) and n.synced(dids_of(net)))
        assert n.known() == dids_of(net)
        assert n.total("pages") >= 4
        assert n.total("found") == len(dids_of(net)) == n.total("listed")
        assert sum(source["found"] for source in n.crawler.sources()) == len(dids_of(net))
        assert all(source["next_us"] > 0 and not source["sweeping"] for source in n.crawler.sources())


@pytest.mark.slow
async def test_what_a_relay_knows_is_found_and_later_accounts_by_the_timer(tmp_path: Path) -> None:
    async with network(accounts=2, history_accounts=0) as net:
        relay = net.relay_url.replace("ws", "http", 1)
        first = dids_of(net)
        async with node(tmp_path, net, [relay], crawler={"interval": 0.05}) as n:
            await n.until(lambda: n.synced(first))
            did = net.add_account(0)
            await n.until(lambda: n.synced({did}))
            assert n.total("done") >= 2
            assert n.total("found") == 3


@pytest.mark.slow
async def test_a_stop_at_any_moment_has_no_page_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "STEP", 2)  # so that a page takes several steps
    async with network(pds=1, history_accounts=23, history_records=1) as net:
        done = False
        while not done:
            async with node(tmp_path, net, net.pds_urls, crawler={"page_size": 5, "pages_per_s": 20}) as n:
                pages = n.total("pages")
                await n.until(lambda: n.total("pages") > pages)  # noqa: B023
                if done := n.ended():
                    await n.until(lambda: n.synced(dids_of(net)))
                    sweep = Sweep.of(n.db.get(CRAWL, ("source", f"list_repos::{net.pds_urls[0]}")))
                    assert (n.total("pages"), n.total("listed")) == (sweep.pages, sweep.listed) == (5, 23)
                    assert sweep.found == n.total("found") == 23
                    assert sum(event.kind == "record" for event in n.events()) == n.db.count("records")


async def test_nothing_is_asked_where_nothing_is_looked_for(tmp_path: Path) -> None:
    async with network() as net:
        sources = [*net.pds_urls, f"by_collection::{net.relay_url.replace('ws', 'http', 1)}"]
        async with node(tmp_path, net, sources, mode="filter") as n:
            await n.until(lambda: all(source["note"] for source in n.crawler.sources()))
            assert "filter.signals is empty" in n.crawler.sources()[0]["note"]
            assert n.total("pages") == 0
            assert n.known() == set()


@pytest.mark.parametrize(
    ("mode", "why"), [("full", "left alone until 20"), ("filter", "nothing is looked for")]
)
async def test_a_source_whose_host_rests_says_what_it_waits_for(tmp_path: Path, mode: str, why: str) -> None:
    url = "http://127.0.0.1:9"  # nobody is asked
    settings = {"upstreams": [], "plc_urls": [url], "verifiers": 0, "filter": {"mode": mode}}
    async with CrawlNode(tmp_path, settings) as n:
        n.backfill.tools.hosts.fault(host_of(url), jitter=0.0, retry_after=500.0, error="busy: HTTP 503")
        await n.crawler.add(url)
        await n.until(lambda: n.source()["note"])
        assert why in n.source()["note"]
        assert ("busy: HTTP 503" in n.source()["note"]) == (mode == "full")
        assert n.total("pages") == 0
        await n.backfill.hosts.save()


@pytest.mark.slow
async def test_hosts_that_a_relay_lists_are_crawled(tmp_path: Path) -> None:
    async with network(pds=3) as net:
        seed = f"hosts::{net.relay_url.replace('ws', 'http', 1)}"
        async with node(tmp_path, net, [seed], crawler={"page_size": 2}) as n:
            await n.until(lambda: n.synced(dids_of(net)))
            assert n.source()["hosts"] == 3
            assert set(n.crawler.targets.hosts) == set(net.pds_urls)
        async with node(tmp_path, net, [seed]) as n:  # they are known after a restart
            assert set(n.crawler.targets.hosts) == set(net.pds_urls)
            await n.crawler.remove(seed)
            assert n.crawler.targets.hosts == {}
            assert list(n.db.scan(CRAWL)) == []
            assert not n.source()["enabled"]


@pytest.mark.slow
async def test_listed_hosts_pass_the_guard_and_their_number_is_bounded(tmp_path: Path) -> None:
    async with network(pds=3) as net:
        seed = f"hosts::{net.relay_url.replace('ws', 'http', 1)}"
        async with node(tmp_path, net, [seed], crawler={"max_hosts": 2}) as n:
            await n.until(lambda: n.total("hosts_left_out") > 0)
            assert len(n.crawler.targets.hosts) == 2
            tools = n.crawler.targets._tools
            assert host_url("pds.example.com", tools) == "https://pds.example.com"
            for name in ("a b", "user@a.test", "a.test/x", "a.test?q", "", "a.test:99999", "-" * 300):
                with pytest.raises(UrlRefused):
                    host_url(name, tools)


async def test_accounts_with_a_signal_are_told_by_their_pds(tmp_path: Path) -> None:
    async with network(pds=2) as net:
        wanted = sorted(dids_of(net))[:3]
        for did in wanted:
            write(net, did, RARE)
        async with node(tmp_path, net, net.pds_urls, mode="filter", filter={"signals": [RARE]}) as n:
            await n.until(lambda: n.synced(set(wanted)) and n.ended(times=2))
            await n.until(lambda: n.total("without_signal") == len(dids_of(net)) - 3)
            assert n.known() == set(wanted)
            assert n.db.count("crawl/waiting") == 0
            assert n.db.count("crawl/without") == len(dids_of(net)) - 3
            assert n.total("with_signal") == 3
            for url in net.pds_urls:  # those without are not asked about again
                await n.crawler.reset(url)
            await n.until(lambda: n.ended(times=4))
            assert n.db.count("crawl/waiting") == 0
            assert n.total("without_signal") == len(dids_of(net)) - 3


async def test_other_signals_begin_a_new_sweep_and_new_questions(tmp_path: Path) -> None:
    async with network(pds=1, history_accounts=6) as net:
        first, second = sorted(dids_of(net))[:2]
        write(net, first, RARE)
        write(net, second, "com.example.other")
        async with node(tmp_path, net, net.pds_urls, mode="filter", filter={"signals": [RARE]}) as n:
            await n.until(lambda: n.synced({first}) and n.total("without_signal") == 5)
            filters = n.ingest.filters
            n.ingest.set_filters(type(filters).checked("filter", ["com.example.*"], [], []))
            n.crawler.look_again()
            await n.until(lambda: n.synced({first, second}))
            assert n.known() == {first, second}


@pytest.mark.slow
async def test_a_pds_that_does_not_answer_is_asked_again_and_a_kill_forgets_nobody(tmp_path: Path) -> None:
    async with network(pds=1, history_accounts=4) as net:
        for did in dids_of(net):
            write(net, did, RARE)
        net.faults.add(Fault("pds0", "status_503", "describeRepo"))
        tables = {"mode": "filter", "filter": {"signals": [RARE]}}
        crawler = {"check_tries": 1000}
        async with node(tmp_path, net, net.pds_urls, crawler=crawler, **tables) as n:  # type: ignore[arg-type]
            await n.until(lambda: n.ended() and net.faults.fired.total() > 0)
            assert n.db.count("crawl/waiting") == 4
        net.faults.clear()
        async with node(tmp_path, net, net.pds_urls, crawler=crawler, **tables) as n:  # type: ignore[arg-type]
            await n.until(lambda: n.synced(dids_of(net)))
            assert (n.db.count("crawl/waiting"), n.total("found")) == (0, 4)


@pytest.mark.slow
async def test_collections_are_asked_for_and_wildcards_stand_for_those_seen(tmp_path: Path) -> None:
    async with network(accounts=5, history_accounts=0) as net:
        one, two, *_ = sorted(dids_of(net))
        write(net, one, RARE)
        write(net, two, "com.example.other")
        source = f"by_collection::{net.relay_url.replace('ws', 'http', 1)}"
        signals = {"signals": [RARE, "com.example.*"]}
        async with node(tmp_path, net, [source], mode="filter", filter=signals) as n:
            await n.until(lambda: n.synced({one}) and n.ended())
            assert n.known() == {one}  # of com.example.* nothing else was seen yet
            write(net, one, "com.example.other")
            await n.backfill.add([one], again=True)
            await n.until(lambda: n.db.count("records/com.example.other") == 1)
            await n.crawler.reset(source)
            await n.until(lambda: n.synced({two}))
            assert n.source()["name"] == source


def test_collections_are_bounded_by_their_size() -> None:
    class Counts:
        def scan(self, *_: object, limit: int) -> list[tuple[str, int]]:
            return [("records/a.b.c", 1), ("records/a.b.d", 9), ("records/a.b.e", 5)][:limit]

    from indexer.ingest.filters import Filters

    filters = Filters("filter", ("a.b.*", "x.y.z"))
    assert sweeper.collections_of(Counts(), filters, 3) == ["a.b.d", "a.b.e", "x.y.z"]  # type: ignore[arg-type]
    assert sweeper.collections_of(Counts(), filters, 1) == ["x.y.z"]  # type: ignore[arg-type]
    assert sweeper.nothing_to_find(Filters("filter")) != ""
    assert sweeper.nothing_to_find(Filters("full")) == ""


async def test_a_known_account_is_left_alone_unless_a_newer_rev_is_listed(tmp_path: Path) -> None:
    async with network(pds=1, history_accounts=3) as net:
        stale, removed, fresh = sorted(dids_of(net))
        async with node(tmp_path, net, []) as n:
            await n.backfill.add([stale, fresh])
            await n.until(lambda: n.synced({stale, fresh}))
            row = NEW_REPO._replace(tracked=False)
            await n.writer.run("removed", lambda tx: tx.set_repo(removed, row))
            write(net, stale, POST, "late")
            await n.crawler.add(net.pds_urls[0])
            await n.until(lambda: n.ended())
            assert n.total("behind") == 1
            await n.until(lambda: n.db.record(stale, f"{POST}/late") is not None)
            assert n.total("found") == 0
            assert n.db.repo(removed) == row


@pytest.mark.slow
async def test_a_relays_word_on_a_status_counts_until_it_says_otherwise_or_is_removed(tmp_path: Path) -> None:
    async with network(accounts=2, history_accounts=0) as net:
        relay = net.relay_url.replace("ws", "http", 1)
        hidden, other = sorted(dids_of(net))
        async with node(tmp_path, net, [relay]) as n:
            await n.until(lambda: n.synced({hidden, other}))
            account = net.world.accounts[hidden]
            account.status = "takendown"
            await n.crawler.reset(relay)
            await n.until(lambda: n.db.repo(hidden).status is AccountStatus.TAKENDOWN)  # type: ignore[union-attr]
            assert n.total("words") == 1
            account.status = "active"
            await n.crawler.reset(relay)
            await n.until(lambda: n.db.repo(hidden).status is AccountStatus.ACTIVE)  # type: ignore[union-attr]
            assert n.db.repo(other).status is AccountStatus.ACTIVE  # type: ignore[union-attr]
            account.status = "takendown"
            await n.crawler.reset(relay)
            await n.until(lambda: n.db.repo(hidden).status is AccountStatus.TAKENDOWN)  # type: ignore[union-attr]
            await n.crawler.remove(relay)
            await n.until(
                lambda: not [word for word in n.db.account_words(hidden) if word.source.startswith("crawler")]
            )


@pytest.mark.slow
async def test_an_inactive_account_that_a_pds_lists_is_known_by_its_status(tmp_path: Path) -> None:
    async with network(pds=1, history_accounts=2) as net:
        hidden, shown = sorted(dids_of(net))
        net.world.accounts[hidden].status = "deactivated"
        async with node(tmp_path, net, net.pds_urls) as n:
            await n.until(lambda: n.synced({shown}) and n.db.repo(hidden) is not None)
            await n.until(lambda: n.db.repo(hidden).status is AccountStatus.DEACTIVATED)  # type: ignore[union-attr]


@pytest.mark.slow
async def test_an_excluded_account_is_not_found(tmp_path: Path) -> None:
    async with network(pds=1, history_accounts=2) as net:
        left_out, kept = sorted(dids_of(net))
        async with node(tmp_path, net, net.pds_urls, filter={"excludes": [left_out]}) as n:
            await n.until(lambda: n.synced({kept}) and n.ended())
            assert n.known() == {kept}


@pytest.mark.slow
async def test_a_full_queue_pauses_the_sweep_until_half_is_left(tmp_path: Path) -> None:
    async with network(pds=1, history_accounts=20, history_records=1) as net:
        crawler = {"page_size": 4, "max_queued": 8}
        paused = {"backfill": {"concurrency": 1}}
        async with node(tmp_path, net, net.pds_urls, crawler=crawler, **paused) as n:  # type: ignore[arg-type]
            n.backfill.pause(True)
            await n.until(lambda: n.crawler.status()["paused"] == "queue")
            assert (n.total("pages"), len(n.known())) == (2, 8)
            n.backfill.pause(False)
            await n.until(lambda: n.synced(dids_of(net)))


@pytest.mark.slow
async def test_an_operator_pauses_it_also_over_a_restart(tmp_path: Path) -> None:
    async with network() as net:
        async with node(tmp_path, net, []) as n:
            await n.writer.run("ingestion", lambda tx: change_paused(tx, {CRAWLER: False}))
        async with node(tmp_path, net, net.pds_urls) as n:
            assert n.crawler.status()["paused"] == "operator"
            await n.backfill.add([min(dids_of(net))])
            await n.until(lambda: n.synced({min(dids_of(net))}))
            assert n.total("pages") == 0
            n.crawler.pause(False)
            await n.until(lambda: n.synced(dids_of(net)))


@pytest.mark.slow
async def test_sources_come_and_go_at_run_time_and_are_kept(tmp_path: Path) -> None:
    async with network() as net:
        first, second = net.pds_urls
        async with node(tmp_path, net, [first], crawler={"max_sources": 2}) as n:
            assert (await n.crawler.add(f"list_repos::{second}/")).new
            assert not (await n.crawler.add(second)).new
            await n.until(lambda: n.synced(dids_of(net)))
            with pytest.raises(RequestError, match="crawler.max_sources"):
                await n.crawler.add("https://third.test")
            await n.crawler.remove(first)
        async with node(tmp_path, net, [first]) as n:
            shown = {item["url"]: (item["enabled"], item["persisted"]) for item in n.crawler.sources()}
            assert shown == {first: (False, False), second: (True, True)}
            with pytest.raises(RequestError, match="no such source"):
                await n.crawler.remove("https://third.test")
            await n.crawler.add(first)
            await n.crawler.remove(second)
            assert [item["url"] for item in n.crawler.sources()] == [first]
        async with node(tmp_path, net, []) as n:  # what is kept of one that left the settings goes
            await n.until(lambda: list(n.db.scan(CRAWL)) == [])


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("wss://a.test", "not a URL of the form https://host"),
        ("all::https://a.test", "no mode of the crawler"),
        ("https://user:secret@a.test", "credentials"),
        ("https://a.test/xrpc", "not an origin"),
    ],
)
async def test_what_cannot_be_a_source_is_named(tmp_path: Path, url: str, why: str) -> None:
    async with network(history_accounts=0) as net, node(tmp_path, net, []) as n:
        with pytest.raises(RequestError, match=why) as caught:
            await n.crawler.add(url)
        assert "secret" not in str(caught.value)


async def test_a_private_address_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    public = {"allow_private": False}
    async with network(history_accounts=0) as net, node(tmp_path, net, [], network=public) as n:
        for url in ("https://127.0.0.1", "https://10.0.0.1", "http://a.test"):
            with pytest.raises(RequestError, match="refused URL"):
                await n.crawler.add(url)
