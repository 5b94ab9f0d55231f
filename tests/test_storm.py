"""Ten random kills under the whole mixed load; `python -m tests.store.storm --kills 200` is the long run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.store.storm import Storm


@pytest.mark.slow
@pytest.mark.limit(180)
def test_ten_kills_at_random_moments_lose_double_and_leave_nothing(tmp_path: Path) -> None:
    storm = Storm(tmp_path)
    storm.run(10)
    assert storm.faults == []
    assert storm.events > 500
    assert all(storm.totals.values()), f"a worker had nothing to do: {storm.totals}"
