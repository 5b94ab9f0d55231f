"""What the demo says: readings of the running daemon, the greeting, the summary."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from indexer.commands.demo.reader import CheckingReader
from indexer.commands.demo.table import Rates, Reading
from indexer.daemon import Daemon
from indexer.serve import health


def outcome_counts(daemon: Daemon) -> tuple[int, dict[str, int]]:
    """Commits verified and applied, and refused frames by reason, over all sources."""
    commits = 0
    rejected: dict[str, int] = {}
    for row in health.outcomes(daemon.services):
        if row["outcome"] == "ok" and row["reason"] == "commit":
            commits += row["count"]
        elif row["outcome"] == "reject":
            rejected[row["reason"]] = rejected.get(row["reason"], 0) + row["count"]
    return commits, rejected


def read(daemon: Daemon) -> Reading:
    """The figures of this moment."""
    db, services = daemon.db, daemon.services
    commits, rejected = outcome_counts(daemon)
    lags = [source["lag_s"] for source in daemon.ingest.status() if source["lag_s"] is not None]
    workers = health.workers(services)
    return Reading(
        commits=commits,
        records=db.count("records"),
        events=db.count("events"),
        head=daemon.writer.head,
        floor=services.log.floor,
        lag_s=max(lags, default=None),
        states=health.by_state(services),
        rejected=sum(rejected.values()),
        checkpoints=workers["checkpoint"]["passes"],
        reclaimed=workers["blocks_gc"]["reclaimed"],
        pruned=workers["retention"]["pruned"],
        disk_bytes=sum(file.stat().st_size for file in db.path.glob("*") if file.is_file()),
        queue=health.pending(services),
    )


def one_line(reading: Reading, rates: Rates) -> str:
    """A reading for a log, where there is no terminal to draw a table on."""
    return (
        f"{time.monotonic() - rates.started:5.0f} s  "
        f"{reading.commits:,} commits ({rates.commits_per_s:,.0f}/s)  "
        f"{reading.records:,} records  {reading.head - 1:,} events  {reading.checkpoints} checkpoints  "
        f"{reading.reclaimed:,} blocks reclaimed  {reading.pruned:,} events pruned"
    )


def greet(console: Console, daemon: Daemon, ledger: dict[str, Any], *, kept: bool) -> None:
    """Where everything listens, and commands to try."""
    public, management = daemon.public_url, daemon.management_url
    repo, sync = f"{public}/xrpc/com.atproto.repo", f"{public}/xrpc/com.atproto.sync"
    did = next(iter(ledger["accounts"]), "")  # the network never takes its first account away
    python = _interpreter()
    lines = [f"public      {public}", f"management  {management}"]
    lines += [f"index       {daemon.settings.data_dir}"] if kept else []
    lines += ["", "Try:"]
    if did and not daemon.settings.ephemeral.enabled:
        lines += [
            f"  curl -s '{repo}.describeRepo?repo={did}'",
            f"  curl -s '{repo}.listRecords?repo={did}&collection=app.bsky.feed.post&limit=2'",
            f"  curl -s -o repo.car '{sync}.getRepo?did={did}' && {python} -m indexer car verify repo.car",
        ]
    if did and daemon.settings.archive.cars:
        lines.append(f"  {python} -m indexer repo archive --list {did} --management-url {management}")
    lines += [
        f"  {python} -m indexer stream --url {public} --cursor 0 --collection app.bsky.feed.post",
        f"  curl -s {public}/stats",
        f"  curl -s {management}/repos",
        "",
    ]
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def _interpreter() -> str:
    """How a person in this folder names the interpreter that runs the demo."""
    here = Path(sys.executable)
    if here.is_relative_to(Path.cwd()):
        return str(here.relative_to(Path.cwd()))
    return "python" if shutil.which("python") == str(here) else str(here)


def summarise(daemon: Daemon, reader: CheckingReader, differences: list[str]) -> dict[str, Any]:
    """The JSON object that the demo ends with."""
    reading = read(daemon)
    _, rejected = outcome_counts(daemon)
    return {
        "repos": daemon.db.count("repos"),
        "records": reading.records,
        "commits_verified": reading.commits,
        "events": reading.head - 1,
        "rejected": rejected,
        "checkpoints": reading.checkpoints,
        "blocks_reclaimed": reading.reclaimed,
        "events_pruned": reading.pruned,
        "events_streamed": reader.events,
        "differences": len(differences),
    }
