"""Upstreams whose list of repositories never ends or makes no sense: a comparison of revs ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.simulator.fault_answers import KINDS
from indexer.simulator.faults import LIST_REPOS, Fault
from tests.ingest.test_identities import scene

#: Fault of `listRepos` → how the comparison ends.
OUTCOMES = {
    "repeated_cursor": "malformed", "broken_entries": "done", "html": "malformed", "empty": "malformed",
    "garbage": "malformed", "truncated": "malformed", "endless": "malformed", "redirect_loop": "malformed",
    "status_404": "unsupported", "status_501": "unsupported", "status_403": "malformed", "slow": "done",
}  # fmt: skip


@pytest.mark.slow
async def test_a_list_that_is_none_ends_the_comparison_and_costs_nothing_else(tmp_path: Path) -> None:
    async with scene(tmp_path, audit={"rev_delay": 0, "rev_pages_per_s": 100}) as at:
        one = at.account()
        await at.settled(one)
        (upstream,) = at.node.settings.upstreams
        expected: dict[str, int] = {"done": 0, "malformed": 0, "unsupported": 0}
        for kind, outcome in OUTCOMES.items():
            assert LIST_REPOS in KINDS[kind].routes
            planned = at.net.faults.add(
                Fault("relay0", kind, LIST_REPOS, value=20_000 if kind == "slow" else None)
            )
            await at.node.ingest.sources.compare_revs(upstream)
            expected[outcome] += 1
            name = f"compare_revs/{outcome}"
            await at.node.until(lambda: at.node.db.count(name) == expected[outcome])  # noqa: B023
            assert planned.fired, kind
            at.net.faults.clear()
        at.post(one, 2)
        await at.settled(one)
        told = {outcome: at.node.db.count(f"compare_revs/{outcome}") for outcome in expected}
        assert told == expected
