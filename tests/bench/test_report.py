"""The arithmetic of the benchmarks: medians, spread, targets, growth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.options import Options, cached, timed
from bench.report import Report, Target


def _report(*values: float, target: Target | None = None) -> Report:
    report = Report("example")
    report.add("speed", "MiB/s", values, target)
    return report


def test_json_has_the_median_and_the_spread() -> None:
    assert json.loads(json.dumps(_report(3, 1, 2, target=Target(2)).as_json())) == {
        "bench": "example",
        "metrics": {"speed": 2.0, "speed_min": 1.0, "speed_max": 3.0},
        "targets": {"speed": {"at_least": 2}},
        "met": True,
    }


@pytest.mark.parametrize(
    ("target", "met"),
    [(Target(2), True), (Target(2.1), False), (Target(2, True), True), (Target(1, True), False)],
)
def test_a_target_is_judged_by_the_median(target: Target, met: bool) -> None:
    report = _report(1, 2, 9, target=target)
    assert report.met is met
    assert ("MISSED" in report.as_table()) is not met


def test_one_missed_target_is_enough() -> None:
    report = _report(5, target=Target(1))
    report.add("latency", "ms", [50], Target(10, at_most=True))
    assert not report.met


def test_growth_compares_the_smallest_with_the_largest() -> None:
    report = Report("example")
    for size, value in ((100, 5.0), (10, 10.0), (50, 7.0)):
        report.add(f"speed_{size}", "MiB/s", [value], series="speed", size=size)
    assert report.growth() == ["growth speed: size × 10, MiB/s × 0.50"]
    assert report.growth()[0] in report.as_table()


def test_input_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"input"

    assert [cached(tmp_path / "a.car", make) for _ in range(2)] == [b"input"] * 2
    assert len(made) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.car"]


def test_quick_functions_are_repeated_within_a_run() -> None:
    calls: list[int] = []
    seconds = timed(lambda: calls.append(1), 3, least_s=0.001)
    assert len(seconds) == 3
    assert len(calls) > 30


def test_sizes_come_from_the_command_line_first() -> None:
    options = Options(sizes=(), runs=1, full=False, cache=Path())
    assert options.chosen((1,), (2,)) == (1,)
    assert options._replace(full=True).chosen((1,), (2,)) == (2,)
    assert options._replace(sizes=(3,), full=True).chosen((1,), (2,)) == (3,)
