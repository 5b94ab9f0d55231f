"""The crawler against the simulated network: accounts that nobody announced are found and fetched."""

from __future__ import annotations

from pathlib import Path

from tests.crawl.node import dids_of, network, node


async def test_a_pdses_accounts_are_found_page_by_page_and_fetched(tmp_path: Path) -> None:
    async with network() as net:
        crawler = {"page_size": 3}
        async with node(tmp_path, net, net.pds_urls, crawler=crawler) as n:
            await n.until(lambda: n.ended(times=2) and n.synced(dids_of(net)))
            assert n.known() == dids_of(net)
            assert n.total("pages") >= 4
            assert n.total("found") == len(dids_of(net)) == n.total("listed")
            assert sum(source["found"] for source in n.crawler.sources()) == len(dids_of(net))
            assert all(source["next_us"] > 0 and not source["sweeping"] for source in n.crawler.sources())
