"""Each benchmark runs on tiny input and ends with one JSON object of the promised form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench.backfill
import bench.gc
import bench.live
import bench.tuning
import bench.verify
from bench.__main__ import main
from bench.network import Sample, eta_error


def _result(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> dict[str, float]:
    assert main([*arguments, "--runs", "1", "--cache", str(tmp_path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(answer) == ["bench", "metrics", "targets", "met"]
    assert answer["bench"] == arguments[0]
    assert set(answer["targets"]) <= set(answer["metrics"])
    metrics: dict[str, float] = answer["metrics"]
    assert all(value > 0 or name.startswith("eta_error") for name, value in metrics.items())
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


@pytest.mark.slow
@pytest.mark.limit(120)
def test_live_measures_a_daemon_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_ACCOUNTS", 3), ("_RECORDS", 20), ("_PACED", 50)):
        monkeypatch.setattr(bench.live, name, value)
    profile = tmp_path / "profile.txt"
    metrics = _result(capsys, tmp_path, "live", "100", "--profile", str(profile))
    assert {"commits_per_s_100", "p50_ms_100", "p99_ms_100"} <= set(metrics)
    assert "run.py" in profile.read_text()
    assert not list(tmp_path.glob("data-*")), "the daemon's folder is gone"


@pytest.mark.slow
@pytest.mark.limit(120)
def test_backfill_measures_a_daemon_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.backfill, "_SIZES", (10, 50))
    metrics = _result(capsys, tmp_path, "backfill", "100")
    assert {"records_per_s_100", "compacted_records_per_s_100", "peak_mib_100"} <= set(metrics)


@pytest.mark.slow
@pytest.mark.limit(120)
def test_network_finds_every_account_from_one_address(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    metrics = _result(capsys, tmp_path, "network", "60")
    assert {"repos_per_s_60", "records_per_s_60", "peak_mib_60", "eta_error_percent_60"} <= set(metrics)


@pytest.mark.slow
@pytest.mark.limit(120)
def test_parts_are_compared_with_wholes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    metrics = _result(capsys, tmp_path, "parts", "600")
    assert metrics["whole_requests_600"] == 1 < metrics["part_requests_600"]
    assert metrics["part_kib_600"] < metrics["whole_kib_600"] / 2


def test_the_time_foretold_is_judged_from_the_first_tenth_on() -> None:
    samples = [Sample(0.5, 1, 0.1), Sample(1.0, 5, 11.0), Sample(5.0, 50, 4.0), Sample(10.0, 99, None)]
    assert eta_error(samples) == pytest.approx(0.2)
    assert eta_error([*samples[:2], Sample(5.0, 50, None), samples[-1]]) == 1.0


@pytest.mark.slow
@pytest.mark.limit(120)
def test_gc_churns_and_kills(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.gc, "_TAIL", 2_000)
    metrics = _result(capsys, tmp_path, "gc", "1000", "--records", "400", "--rounds", "2")
    assert {"sst_ratio_400", "churn_peak_mib_400", "start_s_1000", "checkpoint_p99_ms_1000"} <= set(metrics)
    assert metrics["sst_ratio_400"] < 1.3
    assert not list(tmp_path.glob("gc-*")), "the stores are gone"


@pytest.mark.slow
@pytest.mark.limit(120)
def test_gc_uses_a_store_that_is_loaded_already(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.gc, "_TAIL", 1_000)
    data = ("--data", str(tmp_path / "loaded"))
    first = _result(capsys, tmp_path, "gc", "1000", *data)
    again = _result(capsys, tmp_path, "gc", "1000", *data)
    assert "start_s_1000" in again
    assert first.keys() - again.keys() == {"load_records_per_s_1000", "load_peak_mib_1000"}
    assert (tmp_path / "loaded" / "1000" / "next_record").read_text() == "3000"


def test_disk_counts_every_keyspace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    metrics = _result(capsys, tmp_path, "disk", "100")
    assert metrics["car_ratio_100"] > metrics["car_ratio_without_log_100"]


@pytest.mark.slow
@pytest.mark.limit(120)
def test_tuning_compares_layouts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("as_is", "no_zstd")
    monkeypatch.setattr(bench.tuning, "LAYOUTS", {name: bench.tuning.LAYOUTS[name] for name in names})
    metrics = _result(capsys, tmp_path, "tuning", "4000")
    assert metrics["as_is_bytes_per_record_4000"] < metrics["no_zstd_bytes_per_record_4000"]


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["verify", "many"]])
def test_wrong_arguments_are_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
