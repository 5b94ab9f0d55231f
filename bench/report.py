"""What a benchmark measured: medians, spread, growth, and whether the targets are met.

Owns the arithmetic and the two printed forms, a table and one JSON object. No clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple


class Target(NamedTuple):
    """A metric's bound: at least, or at most, this much."""

    bound: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether a measured value satisfies the bound."""
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {_number(self.bound)}"


class Metric(NamedTuple):
    """One measured quantity over several runs. ``size`` orders metrics of one ``series`` for the growth."""

    name: str
    unit: str
    values: tuple[float, ...]
    target: Target | None = None
    series: str = ""
    size: float = 0

    @property
    def median(self) -> float:
        return median(self.values)


@dataclass(slots=True)
class Report:
    """Collects the metrics of one benchmark."""

    bench: str
    metrics: list[Metric] = field(default_factory=list)
    #: What a reader should know to judge the numbers: the machine, the input.
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        unit: str,
        values: Iterable[float],
        target: Target | None = None,
        *,
        series: str = "",
        size: float = 0,
    ) -> None:
        """Adds a metric; ``values`` holds one number a run."""
        self.metrics.append(Metric(name, unit, tuple(values), target, series, size))

    @property
    def met(self) -> bool:
        """All targets of what was measured; true when there is none."""
        return all(each.target.met(each.median) for each in self.metrics if each.target)

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` ends with: medians under the metric's name, the spread beside it."""
        numbers: dict[str, float] = {}
        for each in self.metrics:
            numbers[each.name] = _rounded(each.median)
            if len(each.values) > 1:
                numbers[f"{each.name}_min"] = _rounded(min(each.values))
                numbers[f"{each.name}_max"] = _rounded(max(each.values))
        targets: Mapping[str, Any] = {
            each.name: {"at_most" if each.target.at_most else "at_least": each.target.bound}
            for each in self.metrics
            if each.target
        }
        return {"bench": self.bench, "metrics": numbers, "targets": targets, "met": self.met}

    def as_table(self) -> str:
        """The same for people, with the growth of each series at the end."""
        width = max((len(each.name) for each in self.metrics), default=0)
        lines = [f"{self.bench}", *(f"  {note}" for note in self.notes)]
        for each in self.metrics:
            spread = (
                f"{_number(min(each.values))} – {_number(max(each.values))}" if len(each.values) > 1 else ""
            )
            verdict = ""
            if each.target:
                verdict = f"{each.target} {'met' if each.target.met(each.median) else 'MISSED'}"
            number = f"{_number(each.median):>11} {each.unit:<10}"
            lines.append(f"  {each.name:<{width}}  {number} {spread:>23}  {verdict}".rstrip())
        return "\n".join([*lines, *(f"  {line}" for line in self.growth())])

    def growth(self) -> list[str]:
        """For every series: how the metric changed while the size grew."""
        series: dict[str, list[Metric]] = {}
        for each in self.metrics:
            if each.series:
                series.setdefault(each.series, []).append(each)
        lines = []
        for name, rows in series.items():
            rows.sort(key=lambda row: row.size)
            if len(rows) > 1 and rows[0].median and rows[0].size:
                grown, change = rows[-1].size / rows[0].size, rows[-1].median / rows[0].median
                lines.append(f"growth {name}: size × {grown:,.0f}, {rows[0].unit} × {change:.2f}")
        return lines


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
