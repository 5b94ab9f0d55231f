"""The demo's live table: rates, lag, repositories by state, events, disk, workers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Reading:
    """What the table shows, at one moment. Lag in seconds, disk in bytes."""

    commits: int
    records: int
    events: int
    head: int
    floor: int
    lag_s: float | None
    states: dict[str, int]
    rejected: int
    checkpoints: int
    reclaimed: int
    pruned: int
    disk_bytes: int
    queue: int


@dataclass(slots=True)
class Rates:
    """Turns two readings into rates per second."""

    last: Reading | None = None
    at: float = 0.0
    commits_per_s: float = 0.0
    events_per_s: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def update(self, reading: Reading) -> None:
        now = time.monotonic()
        if self.last is not None and now > self.at:
            self.commits_per_s = (reading.commits - self.last.commits) / (now - self.at)
            self.events_per_s = (reading.head - self.last.head) / (now - self.at)
        self.last, self.at = reading, now


def render(reading: Reading, rates: Rates) -> Table:
    """The table for one reading."""
    table = Table(title=f"indexer demo, {time.monotonic() - rates.started:.0f} s", min_width=64)
    table.add_column("what", no_wrap=True)
    table.add_column("total", justify="right")
    table.add_column("now", justify="right")
    lag = "-" if reading.lag_s is None else f"lag {reading.lag_s * 1000:.0f} ms"
    states = ", ".join(f"{count:,} {name}" for name, count in reading.states.items() if count)
    table.add_row("commits verified", f"{reading.commits:,}", f"{rates.commits_per_s:,.0f}/s, {lag}")
    table.add_row("events written", f"{reading.head - 1:,}", f"{rates.events_per_s:,.0f}/s")
    table.add_row("events kept", f"{reading.events:,}", f"ids {reading.floor:,} to {reading.head - 1:,}")
    table.add_row("records", f"{reading.records:,}", "")
    table.add_row("repositories", f"{sum(reading.states.values()):,}", states)
    table.add_row("waiting for a fetch", f"{reading.queue:,}", "")
    table.add_row("refused", f"{reading.rejected:,}", "")
    table.add_row("checkpoints", f"{reading.checkpoints:,}", "")
    table.add_row("blocks reclaimed", f"{reading.reclaimed:,}", "")
    table.add_row("events pruned", f"{reading.pruned:,}", "")
    table.add_row("disk", f"{reading.disk_bytes / 2**20:.1f} MiB", "")
    return table
