"""`indexer demo`: the daemon against a simulated network, on loopback only.

Owns the run: start the network, start the daemon, show what happens, and with ``--seconds`` stop,
compare the index and the folded log with the ledger and say so in one JSON line.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import orjson
from click.core import ParameterSource
from rich.console import Console
from rich.live import Live

from indexer.atproto.cid import format_cid
from indexer.commands.demo import oracle
from indexer.commands.demo.network import SimulatedNetwork
from indexer.commands.demo.reader import CheckingReader, Fold
from indexer.commands.demo.report import greet, one_line, read, summarise
from indexer.commands.demo.table import Rates, render
from indexer.commands.numbers import Finite
from indexer.commands.paths import NamedPath
from indexer.commands.run import run_until_signal
from indexer.config import LogSettings, Settings, load, parse_bind
from indexer.daemon import Daemon
from indexer.errors import StoreError
from indexer.logs import configure_logging
from indexer.serve.listener import expect_free
from indexer.store.check import check

CATCH_UP_S = 60.0
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, as values."""

    seconds: float | None
    as_json: bool
    ephemeral: bool
    data_dir: Path | None
    archive: bool
    seed: int
    accounts: int
    rate: float
    retention: str
    public: str
    management: str


def _address(context: click.Context, option: click.Parameter, value: str) -> str:
    try:
        parse_bind(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if context.get_parameter_source(option.name or "") is ParameterSource.DEFAULT:
        return _free_address(value)
    expect_free(value, option.opts[-1])
    return value


@click.command()
@click.option("--seconds", type=Finite(min=1), help="Stop after this time and compare with the ledger.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
@click.option("--ephemeral", is_flag=True, help="Keep no records, only the log within its retention.")
@click.option(
    "--data-dir",
    type=NamedPath(file_okay=False),
    metavar="DIR",
    help="Keep the data in DIR: DIR/index is the daemon's data directory, DIR/network the network's state.",
)
@click.option("--archive", is_flag=True, help="Keep the CARs that are fetched (archive.cars).")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the simulated network.")
@click.option(
    "--accounts", type=click.IntRange(1), default=60, show_default=True, help="Accounts at the start."
)
@click.option("--rate", type=Finite(min=0), default=120, show_default=True, help="Commits a second.")
@click.option("--retention", default="10s", show_default=True, help="How long events are kept, or `forever`.")
@click.option(
    "--public", default="127.0.0.1:3000", show_default=True, callback=_address, help="Public address:port."
)
@click.option(
    "--management", default="127.0.0.1:3001", show_default=True, callback=_address, help="Management one."
)
def demo(**arguments: Any) -> None:
    """Run the daemon against an embedded simulated network; no internet needed.

    Runs until Ctrl-C. With --seconds it stops by itself, compares the index with the network's ledger
    and exits 1 if anything differs.
    """
    options = Options(**arguments)
    if options.archive and options.ephemeral:
        raise click.UsageError("--ephemeral fetches no repository, so there is nothing to --archive")
    configure_logging(LogSettings(level="warning"))
    with _folder(options.data_dir) as folder:
        ended = run_until_signal(_demo(options, folder))
    if not ended and options.seconds is not None:
        sys.exit(INTERRUPTED)  # it was to compare, and did not


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """The folder to work in: the one asked for, or a temporary one."""
    if kept is not None:
        try:
            kept.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {kept}: {error.strerror}") from error
        yield kept
        return
    folder = Path(tempfile.mkdtemp(prefix="indexer-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _demo(options: Options, folder: Path) -> None:
    network = SimulatedNetwork(folder / "network", _simulated(options))
    fresh = not (folder / "index").exists()
    async with network:
        await network.pause()  # so that the ledger of the start is exact
        ledger = await network.ledger()
        async with Daemon(_settings(options, folder / "index", network)) as daemon:
            await daemon.wait_connected(30)
            if fresh and not options.ephemeral:
                await daemon.add_repos(list(ledger["accounts"]))
            if options.seconds is None:
                await network.resume()
                greet(_console(options), daemon, ledger, kept=options.data_dir is not None)
                await _show(daemon, options, asyncio.create_task(daemon.wait_failed()))
            else:
                reader = await _reader(options, network, daemon, ledger, fresh=fresh)
                await network.resume()
                greet(_console(options), daemon, ledger, kept=options.data_dir is not None)
                await _run_and_compare(options, network, daemon, reader)


def _simulated(options: Options) -> dict[str, str]:
    return {
        "seed": str(options.seed),
        "accounts": str(options.accounts),
        "history-accounts": str(max(1, options.accounts // 3)),
        "rate": str(options.rate),
    }


def _settings(options: Options, data_dir: Path, network: SimulatedNetwork) -> Settings:
    """The demo's own settings alone: what the shell has exported is for another daemon."""
    return load(
        environment=False,
        overrides={
            "data_dir": data_dir,
            "upstreams": [network.relay_url],
            "plc_urls": [network.plc_url],
            "memory_mib": 64,
            "filter": {"mode": "full"},
            "public": {"bind": options.public},
            "management": {"bind": options.management},
            "network": {"allow_private": True, "dns_server": network.dns_address},
            "gc": {"checkpoint_interval": "2s", "ttl_interval": "2s", "blocks_interval": "2s"},
            "events": {"retention": options.retention},
            "ephemeral": {"enabled": options.ephemeral},
            "archive": {"cars": options.archive},
        },
    )


def _free_address(wanted: str) -> str:
    """``wanted``, or its host with port 0 (any free one) when the port is taken."""
    host, port = parse_bind(wanted)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return wanted.rpartition(":")[0] + ":0"
    return wanted


async def _reader(
    options: Options, network: SimulatedNetwork, daemon: Daemon, ledger: dict[str, Any], *, fresh: bool
) -> CheckingReader:
    """A subscriber that starts where the fold's base ends."""
    base: Fold | None = {}
    cursor = 0
    if options.ephemeral:
        base = {did: account["records"] for did, account in ledger["accounts"].items()} if fresh else None
    elif not fresh:
        await _catch_up(daemon, ledger, options)
        cursor, base = daemon.writer.head, _records(daemon)
    return CheckingReader(daemon.public_url.replace("http", "ws", 1), cursor, base)


def _records(daemon: Daemon) -> Fold:
    fold: Fold = {}
    for did, _ in oracle.all_repos(daemon.db):
        fold[did] = {path: format_cid(row.cid) for path, row in daemon.db.records(did)}
    return fold


async def _catch_up(daemon: Daemon, ledger: dict[str, Any], options: Options) -> None:
    """Waits until the index has everything that the paused network sent, at most a minute."""
    deadline = time.monotonic() + CATCH_UP_S
    while oracle.behind(daemon.db, ledger, ephemeral=options.ephemeral) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)


def _console(options: Options) -> Console:
    """Standard output is for the JSON object alone when there is to be one."""
    return Console(stderr=options.as_json)


async def _show(daemon: Daemon, options: Options, until: asyncio.Task[Any]) -> None:
    """The live table on a terminal, a line every few seconds elsewhere, until ``until`` ends."""
    console = _console(options)
    rates = Rates()
    live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
    with live or contextlib.nullcontext():
        while not until.done():
            reading = read(daemon)
            rates.update(reading)
            if live is not None:
                live.update(render(reading, rates))
            else:
                console.print(one_line(reading, rates), soft_wrap=True)
            await asyncio.wait([until], timeout=0.5 if live is not None else 5)
    await until


async def _run_and_compare(
    options: Options, network: SimulatedNetwork, daemon: Daemon, reader: CheckingReader
) -> None:
    reading = asyncio.create_task(reader.run())
    assert options.seconds is not None
    stopped = asyncio.create_task(daemon.wait_failed(options.seconds))
    await _show(daemon, options, stopped)
    await network.pause()
    ledger = await network.ledger(values=True)
    await _catch_up(daemon, ledger, options)
    deadline = time.monotonic() + CATCH_UP_S
    while reader.next_id < daemon.writer.head and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    found = compare(daemon, reader, ledger, options)
    for line in found[:20]:
        click.echo(f"difference: {line}", err=True)
    summary = summarise(daemon, reader, found)
    if options.as_json:
        click.echo(orjson.dumps(summary).decode())
    else:
        click.echo(f"{len(found)} differences between the index, the log and the network's ledger")
    if found:
        sys.exit(1)


def compare(daemon: Daemon, reader: CheckingReader, ledger: dict[str, Any], options: Options) -> list[str]:
    """Every way in which index, log and store fall short of the ledger and of their own rules."""
    found = oracle.differences(daemon.db, ledger, ephemeral=options.ephemeral)
    found += reader.differences(ledger)
    found += check(daemon.db).problems
    return found
