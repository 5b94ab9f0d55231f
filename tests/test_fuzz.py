"""A few seconds of each fuzz target; `python -m tests.fuzz frames|car|tree --minutes 10` is the long run."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

import pytest

from indexer.errors import CarError
from tests.fuzz import __main__ as command
from tests.fuzz.targets import TARGETS, Contradiction

#: What some inputs must come to, or nothing deep is reached.
REACHED = {
    "frames": {"commit/OK/", "commit/REJECT/tree", "commit/REJECT/inversion", "record/valid", "frame/fields"},
    "car": {"archive/read/whole", "archive/read/refused", "archive/refused/refused"},
    "tree": {"tree/short", "tree/full", "tree/mst", "tree/inversion", "tree/missing_block"},
}


@pytest.mark.slow
@pytest.mark.limit(60)
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_nothing_but_our_errors_comes_out_and_no_limit_is_exceeded(target: str) -> None:
    result = command.fuzz(target, command.SEED, 20, most=600)
    assert result.faults == []
    assert REACHED[target] <= result.outcomes.keys()


def _foreign() -> str:
    raise KeyError("a fault of ours")


def _escaped() -> str:
    raise CarError("nobody caught this")


def _contradicted() -> str:
    raise Contradiction("both cannot be right")


def _slow() -> str:
    ends = time.thread_time() + 0.05
    while time.thread_time() < ends:
        pass
    return "slow"


@pytest.mark.parametrize("attempt", [_foreign, _escaped, _contradicted, _slow])
def test_what_is_wrong_with_an_input_is_a_fault_under_its_number(
    attempt: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(seed: int, rng: Random) -> tuple[bytes, Callable[[], str]]:
        return b"", attempt

    monkeypatch.setattr(command, "TARGETS", {"odd": make})
    monkeypatch.setattr(command, "MOST_S", 0.02)
    result = command.fuzz("odd", 1, 10, first=7, most=1)
    assert [fault.number for fault in result.faults] == [7]
