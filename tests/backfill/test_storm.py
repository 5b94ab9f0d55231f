"""A few random kills during a backfill; `python -m tests.backfill.storm --kills 50` is the long run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backfill.storm import Storm


@pytest.mark.slow
@pytest.mark.limit(240)
async def test_kills_at_random_moments_double_no_event_and_fetch_nothing_twice(tmp_path: Path) -> None:
    storm = Storm(tmp_path)
    await storm.run(5)
    assert storm.faults == []
    assert len(storm.log) > 1000
