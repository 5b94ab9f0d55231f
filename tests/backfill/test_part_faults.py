"""Every fault of the simulated hosts against a part of a repository: nothing wrong is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.simulator.content import POST
from indexer.simulator.fault_answers import KINDS
from indexer.simulator.faults import GET_BLOCKS, GET_RECORD, Fault
from indexer.store.codecs import SyncState
from tests.backfill.test_faults import LIMITS, account, faulty, reason, simulated
from tests.backfill.test_sparse import SMALL, outcome, wanted

#: Faults after which the same host is asked for the whole at once: what it said is final, or no CAR.
FINAL = {
    *(f"status_{status}" for status in (400, 401, 403, 404, 408, 410, 501)),
    "redirect_loop", "html", "empty", "garbage", "truncated", "endless", "gzip_bomb",
}  # fmt: skip
#: Those of a host in trouble, which is not asked for more.
TROUBLE = {
    *(f"status_{status}" for status in (500, 502, 503, 504)),
    "rate_limited", "rate_limited_retry_after", "rate_limited_reset", "unavailable_retry_after",
    "no_answer", "slow", "stalled", "reset", "not_http", "cut", "redirect_private", "redirect_scheme",
}  # fmt: skip
VALUES: dict[str, float | str] = {"redirect_private": "http://127.0.0.1:9/", "slow": 1000.0}


def test_every_fault_of_getblocks_has_its_expectation() -> None:
    assert {kind for kind, made in KINDS.items() if GET_BLOCKS in made.routes} == FINAL | TROUBLE


@pytest.mark.slow
@pytest.mark.limit(120)
@pytest.mark.parametrize("route", [GET_RECORD, GET_BLOCKS])
async def test_every_fault_of_a_part_is_answered_as_it_deserves(tmp_path: Path, route: str) -> None:
    sections = {
        "filter": {"collections": [POST]},
        "backfill": LIMITS | SMALL,
        "network": {"allow_private": True, "timeout": 0.4},
    }
    async with simulated(tmp_path, **sections) as (net, world):
        hosts = world.backfill.tools.hosts
        for kind in sorted(FINAL | TROUBLE):
            one = account(net, 150)
            parts, wholes = outcome(world)
            with faulty(net, Fault("pds1", kind, route, one.did, value=VALUES.get(kind))):
                row = await world.fetch(one)
            if kind in FINAL:
                assert (row.state, row.sparse, reason(row)) == (SyncState.SYNCED, False, ""), kind
                assert world.records(one) == wanted(one, POST), kind
                assert sum(outcome(world)[1].values()) == sum(wholes.values()) + 1, kind
            else:
                assert (row.state, row.attempt, world.records(one)) == (SyncState.PENDING, 1, {}), kind
                assert outcome(world) == (parts, wholes), kind
            assert hosts.status()["active"] == 0, kind
            assert world.spooled() == [], kind
            world.forgive()
            row = await world.fetch(one)
            assert (row.state, row.sparse, row.error) == (SyncState.SYNCED, True, ""), kind
            assert world.records(one) == wanted(one, POST), kind
        assert world.backfill.status()["in_flight_bytes"] == 0
