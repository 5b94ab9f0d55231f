"""Each benchmark runs on tiny input and ends with one JSON object of the promised form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench.verify
from bench.__main__ import main


def _result(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> dict[str, float]:
    assert main([*arguments, "--runs", "1", "--cache", str(tmp_path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(answer) == ["bench", "metrics", "targets", "met"]
    assert answer["bench"] == arguments[0]
    assert set(answer["targets"]) <= set(answer["metrics"])
    metrics: dict[str, float] = answer["metrics"]
    assert all(value > 0 for value in metrics.values())
    return metrics


def test_car_walk_measures_every_size_both_ways(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    metrics = _result(capsys, tmp_path, "car_walk", "3000", "9000")
    assert {"hashed_2kib_mib_per_s", "unhashed_8kib_mib_per_s", "peak_memory_mib"} <= set(metrics)


def test_verify_measures_and_profiles(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.verify, "_COMMITS", 20)
    profile = tmp_path / "profile.txt"
    metrics = _result(capsys, tmp_path, "verify", "10", "--profile", str(profile))
    assert "commits_per_s_10" in metrics
    assert "verify_batch" in profile.read_text()


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["verify", "many"]])
def test_wrong_arguments_are_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
