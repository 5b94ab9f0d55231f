"""`indexer simulate`: the simulated network as a process of its own.

Owns the command line, the line of JSON that tells the addresses, and the ways to end. One event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import sys
import threading
from pathlib import Path

import click

from indexer.commands.numbers import Finite
from indexer.commands.paths import NamedPath
from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.simulator.journal import JournalError

try:
    import uvloop
except ImportError:  # not on this platform
    uvloop = None  # type: ignore[assignment]


@click.command()
@click.option("--seed", type=int, default=1, show_default=True, help="What the content derives from.")
@click.option(
    "--accounts", type=click.IntRange(0), default=20, show_default=True, help="Accounts at the start."
)
@click.option(
    "--history-accounts",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Accounts with a past that the stream does not show.",
)
@click.option(
    "--history-records",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Records of each of those.",
)
@click.option("--pds", type=click.IntRange(1, 64), default=2, show_default=True, help="Number of PDSes.")
@click.option("--relays", type=click.IntRange(1, 16), default=1, show_default=True, help="Number of relays.")
@click.option(
    "--lies",
    type=Finite(0, 1),
    default=0.0,
    show_default=True,
    help="Chance that a relay's next message is a lie; see docs/simulator.md.",
)
@click.option("--rate", type=Finite(0), default=50.0, show_default=True, help="Commits a second.")
@click.option("--commits", type=click.IntRange(0), default=None, help="Stop generating after this many.")
@click.option(
    "--state",
    type=NamedPath(file_okay=False),
    default=None,
    help="Folder to keep and resume from.",
)
@click.option(
    "--window-mib",
    type=click.IntRange(64),
    default=1024,
    show_default=True,
    help="Replay window without --state.",
)
@click.option(
    "--port-base",
    type=click.IntRange(0, 65000),
    default=0,
    help="First of the ports to use; 0 takes free ones.",
)
@click.option("--paused", is_flag=True, help="Begin with the generator paused.")
@click.option("--exit-with-parent", is_flag=True, help="End when standard input reaches its end.")
@click.option("--json", "as_json", is_flag=True, help="Print the addresses as one line of JSON.")
def simulate(
    seed: int,
    accounts: int,
    history_accounts: int,
    history_records: int,
    pds: int,
    relays: int,
    lies: float,
    rate: float,
    commits: int | None,
    state: Path | None,
    window_mib: int,
    port_base: int,
    paused: bool,
    exit_with_parent: bool,
    as_json: bool,
) -> None:
    """Run a small AT Protocol network on this machine: PLC directory, PDSes, relay, control API."""
    config = SimConfig(
        seed=seed,
        accounts=accounts,
        history_accounts=history_accounts,
        history_records=history_records,
        pds=pds,
        relays=relays,
        lie_rate=lies,
        rate=rate,
        commits=commits,
        state=state,
        window_mib=window_mib,
        port_base=port_base,
        paused=paused,
    )
    try:
        if uvloop is None:
            asyncio.run(_serve(config, exit_with_parent, as_json))
        else:
            uvloop.run(_serve(config, exit_with_parent, as_json))
    except OSError as problem:
        told = problem.strerror or str(problem)
        if port_base and problem.errno == errno.EADDRINUSE:
            raise click.ClickException(f"{told}; choose another --port-base") from None
        raise click.ClickException(str(problem)) from None
    except JournalError as problem:
        raise click.ClickException(str(problem)) from None


async def _serve(config: SimConfig, exit_with_parent: bool, as_json: bool) -> None:
    end = _end_event(exit_with_parent)
    network = SimulatedNetwork(config)
    try:
        await network.start()
        _tell(network, as_json)
        await end.wait()
    finally:
        await network.stop()


def _tell(network: SimulatedNetwork, as_json: bool) -> None:
    addresses = {
        "plc": network.plc_url,
        "relay": network.relay_url,
        "relays": network.relay_urls,
        "pds": network.pds_urls,
        "control": network.control_url,
        "dns": network.dns_address,
    }
    if as_json:
        print(json.dumps(addresses), flush=True)
        return
    for name, address in addresses.items():
        print(f"{name:8} {address if isinstance(address, str) else ' '.join(address)}", flush=True)
    print(f"\nFollow it with `indexer run --config FILE`, where FILE holds:\n\n{settings_text(network)}")
    print("Ctrl-C ends it.", flush=True)


def settings_text(network: SimulatedNetwork) -> str:
    """The settings, as TOML, of a daemon that follows the network. Its data are no others' beside it."""
    return (
        f'data_dir = "simulated-{network.relay_url.rpartition(":")[2]}"\n'
        f'upstreams = ["{network.relay_url}"]\n'
        f'plc_urls = ["{network.plc_url}"]\n'
        'filter = { mode = "full" }\n'
        f'network = {{ allow_private = true, dns_server = "{network.dns_address}" }}\n'
    )


def _end_event(exit_with_parent: bool) -> asyncio.Event:
    """Set at SIGINT, SIGTERM or, when asked for, at the end of standard input."""
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end.set)

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop has ended before the parent did
            loop.call_soon_threadsafe(end.set)

    if exit_with_parent:
        threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    return end
