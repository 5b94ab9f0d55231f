"""`indexer run`: the daemon in the foreground until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click

from indexer.config import Settings, load
from indexer.daemon import Daemon
from indexer.logs import configure_logging


@click.command()
@click.option(
    "--config", "file", type=click.Path(path_type=Path, dir_okay=False), help="Settings file (TOML)."
)
def run(file: Path | None) -> None:
    """Run the daemon.

    Settings come from the file, then from INDEXER_* variables. SIGTERM and Ctrl-C drain and exit 0.
    """
    settings = load(file)
    configure_logging(settings.log)
    run_loop(_serve(settings))


async def _serve(settings: Settings) -> None:
    async with Daemon(settings) as daemon:
        await daemon.run_until_signal()


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Runs ``main`` on uvloop where it exists, else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main)
