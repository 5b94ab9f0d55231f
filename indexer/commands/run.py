"""`indexer run`: the daemon in the foreground until SIGTERM or SIGINT.

Owns the event loop of a command and what a signal means to it: the main task is cancelled once, at any
moment, and whatever it has open is closed in order.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click
import structlog

from indexer.commands.config import cautions
from indexer.commands.early import signal_came
from indexer.commands.paths import NamedPath
from indexer.config import Settings, load
from indexer.daemon import Daemon
from indexer.logs import configure_logging
from indexer.memory import IN_DAEMON, collect_rarely

log = structlog.get_logger()


@click.command()
@click.option("--config", "file", type=NamedPath(dir_okay=False), help="Settings file (TOML).")
def run(file: Path | None) -> None:
    """Run the daemon.

    Settings come from the file, then from INDEXER_* variables. SIGTERM and Ctrl-C drain and exit 0.
    """
    settings = load(file)
    configure_logging(settings.log)
    for caution in cautions(settings):
        log.warning("setting", caution=caution)
    if signal_came():
        log.info("stopped", why="a signal came before the start")
        return
    collect_rarely(IN_DAEMON)
    run_until_signal(_serve(settings))


async def _serve(settings: Settings) -> None:
    async with Daemon(settings) as daemon:
        await daemon.wait_failed()


def run_until_signal(main: Coroutine[Any, Any, None]) -> bool:
    """Runs ``main``, on uvloop where it exists; false when SIGTERM or SIGINT ended it early."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    try:
        import uvloop
    except ImportError:
        pass
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_interruptible(main))


async def _interruptible(main: Coroutine[Any, Any, None]) -> bool:
    task = asyncio.ensure_future(main)
    told = False

    def tell() -> None:
        nonlocal told
        if not told:  # a second signal does not cut the drain short
            told = True
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, tell)
    if signal_came():  # before that
        tell()
    try:
        await task
    except asyncio.CancelledError:
        if not told:
            raise
    return not told
