"""A clock that is behind: what it has refused is made up for, and somebody is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from indexer.atproto.syntax import tid_micros
from indexer.ingest import clock
from indexer.ingest.answers import Answers
from indexer.ingest.clock import ClockWatch
from indexer.ingest.machine import Act, Situation, decide
from indexer.ingest.verify import VerifyLimits
from indexer.serve.health import not_ready
from indexer.store.codecs import SyncState, Work
from tests.ingest.forge import Forge
from tests.ingest.test_identities import scene
from tests.ingest.test_machine import BROKEN, FETCHING, LIVE, REV_2, SYNCED, refused
from tests.ingest.test_verify import verdict_on

DAY = 86_400.0
FUTURE = refused(7, "future_rev")


@pytest.mark.parametrize("kind", ["commit", "sync"])
def test_only_a_rev_in_the_future_that_is_signed_is_ahead(kind: str) -> None:
    forge = Forge()
    forge.parts()
    parts = forge.posts(2)
    data = (parts if kind == "commit" else forge.sync()).encode()
    before = VerifyLimits("2222222222222")
    verdict = verdict_on(forge, data, before)
    assert (verdict.row, verdict.reason, verdict.ahead, verdict.signed) == (7, "future_rev", True, False)
    verdict = verdict_on(Forge("did:plc:ewvi7nxzyoun6zhxrhs64oiy"), data, before)
    assert (verdict.row, verdict.reason, verdict.ahead, verdict.signed) == (7, "future_rev", False, False)
    assert not verdict_on(forge, data).ahead


def test_row_7_a_signed_commit_from_the_future_has_its_host_asked() -> None:
    ahead = FUTURE._replace(ahead=True)
    decision = decide(SYNCED, ahead, LIVE)
    assert (decision.act, decision.reason) == (Act.REJECT, "future_rev")
    assert decision.row == SYNCED._replace(work=int(Work.COMPARE_REV))
    assert decide(SYNCED, FUTURE, LIVE).row == SYNCED
    assert decide(FETCHING, ahead, LIVE).row == FETCHING._replace(min_rev=REV_2)
    assert decide(BROKEN, ahead, LIVE).row == BROKEN  # a fetch is due


@pytest.mark.parametrize(("ahead_s", "due_s"), [(-1, 0), (0, 0), (7, 7), (DAY, 60)])
def test_a_rev_of_the_future_is_fetched_when_it_has_become_the_present(ahead_s: float, due_s: float) -> None:
    ingest, backfill = SimpleNamespace(max_future=300.0), SimpleNamespace(retry_max=60.0)
    tools = SimpleNamespace(settings=SimpleNamespace(ingest=ingest, backfill=backfill))
    answers = Answers.__new__(Answers)
    answers._tools = cast(Any, tools)
    now = tid_micros(REV_2) - int((300 + ahead_s) * 1e6)
    row = BROKEN._replace(due=now)
    assert answers._awaited(row, REV_2, Situation(now)).due == now + int(due_s * 1e6)
    assert answers._awaited(row, REV_2, Situation(now, ephemeral=True)) == row


def noted(*flags: bool, accounts: int = 4, clock: Callable[[], float] = lambda: 0.0) -> ClockWatch:
    watch = ClockWatch(clock)
    for number, ahead in enumerate(flags):
        watch.note(f"did:plc:{number % accounts}", ahead=ahead)
    return watch


def test_most_of_what_is_signed_lies_ahead_only_where_our_clock_is_wrong() -> None:
    problem = noted(*[True] * 9, *[False] * 8).problem
    assert problem == (
        "9 of the last 17 signed commits lie in the future and were refused: check the clock of this machine"
    )
    assert noted(*[True] * 9, *[False] * 9).problem is None
    assert noted(*[True] * 5).problem is not None
    assert noted(*[True] * 4).problem is None
    assert noted(*[True] * 60, accounts=2).problem is None  # two accounts that lie
    assert noted(*[True] * 64, *[False] * 32).problem is None  # it was set right


def test_what_is_long_ago_says_nothing_of_the_clock() -> None:
    now = [0.0]
    watch = noted(*[True] * 9, clock=lambda: now[0])
    now[0] = clock._COUNTS_S
    assert watch.problem is not None
    now[0] += 1
    assert watch.problem is None


async def test_what_a_clock_that_was_behind_refused_is_made_up_for(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        accounts = [at.account() for _ in range(3)]
        await at.settled(*accounts)
        tools = at.node.ingest.applier._tools
        right = tools.clock
        object.__setattr__(tools, "clock", lambda: right() - DAY)
        for one in accounts:
            at.post(one, 2)
        await at.node.until(lambda: at.count("/reject/future_rev") == 6)
        writer = SimpleNamespace(poisoned=False)
        services = SimpleNamespace(
            settings=at.node.settings, writer=writer, pools={}, ingest=at.node.ingest,
            db=at.node.db,
        )  # fmt: skip
        (reason,) = not_ready(cast(Any, services))
        assert reason.startswith("clock: 6 of the last ")
        object.__setattr__(tools, "clock", right)
        await at.settled(*accounts)  # without another commit of theirs
        assert all(at.row(one).state is SyncState.SYNCED for one in accounts)
