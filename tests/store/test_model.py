"""The store against its twin: some hundred steps each time, some thousand in the slow suite."""

from __future__ import annotations

import pytest

from tests.store.model import StoreMachine, run_model


def test_the_store_equals_its_twin_after_any_steps() -> None:
    before = StoreMachine.steps
    run_model(150)
    assert StoreMachine.steps - before >= 150


@pytest.mark.slow
@pytest.mark.limit(600)
def test_the_store_equals_its_twin_after_two_thousand_steps() -> None:
    before = StoreMachine.steps
    run_model(2000)
    assert StoreMachine.steps - before >= 2000
