"""`indexer host`: the hosts that are asked for repositories, through a running daemon's management listener.

Owns the options and the output. A host is named as in a PDS's address: `pds.example.com`, with its port where
that is not 443.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode

import click

from indexer.commands.client import Daemon, json_option, run_client, say, with_daemon
from indexer.commands.numbers import Finite

_STATES: Final = ("active", "idle", "offline", "throttled", "banned")
_host = click.argument("name", metavar="HOST")


@click.group()
def host() -> None:
    """Look at hosts; set their tiers and limits; ban them."""


@host.command("list")
@click.option("--status", type=click.Choice(_STATES), help="Only those in this state.")
@json_option
@with_daemon
def list_hosts(daemon: Daemon, status: str | None, raw: bool) -> None:
    """List hosts: state, accounts, tier, limits, last failure."""

    async def main() -> None:
        query: dict[str, str] = {"limit": "1000"} | ({"status": status} if status else {})
        while True:
            answer = await daemon.manage("GET", f"/pds?{urlencode(query)}")
            for item in answer["hosts"]:
                _print(item, raw)
            if "cursor" not in answer:
                return
            query["cursor"] = answer["cursor"]

    run_client(main())


@host.command()
@_host
@click.argument("tier", required=False)
@json_option
@with_daemon
def tier(daemon: Daemon, name: str, tier: str | None, raw: bool) -> None:
    """Give HOST a tier of the settings (`hosts.tiers`); without one the rules decide again."""
    body = {"host": name} | ({"tier": tier} if tier else {})
    _print(run_client(daemon.manage("PUT" if tier else "DELETE", "/pds/tiers", body)), raw)


@host.command()
@_host
@click.option("--fetches", type=click.IntRange(1), help="Fetches at one time.")
@click.option("--requests-per-s", type=Finite(0), help="Requests a second; 0 is no limit.")
@click.option("--accounts", type=click.IntRange(0), help="Accounts above which it is held back; 0: no limit.")
@json_option
@with_daemon
def limit(
    daemon: Daemon,
    name: str,
    fetches: int | None,
    requests_per_s: float | None,
    accounts: int | None,
    raw: bool,
) -> None:
    """Give HOST limits of its own; without any option its tier's count again."""
    given = {"fetches": fetches, "requests_per_s": requests_per_s, "account_limit": accounts}
    limits = {key: value for key, value in given.items() if value is not None}
    method = "PUT" if limits else "DELETE"
    _print(run_client(daemon.manage(method, "/pds/limits", {"host": name, **limits})), raw)


@host.command()
@_host
@click.option("--note", default="", help="Why, for people.")
@json_option
@with_daemon
def ban(daemon: Daemon, name: str, note: str, raw: bool) -> None:
    """Fetch nothing from HOST, take no frames of it or of its accounts."""
    _print(run_client(daemon.manage("PUT", "/pds/banned", {"host": name, "note": note})), raw)


@host.command()
@_host
@json_option
@with_daemon
def unban(daemon: Daemon, name: str, raw: bool) -> None:
    """Let HOST be fetched from again; what was missed is fetched."""
    _print(run_client(daemon.manage("DELETE", "/pds/banned", {"host": name})), raw)


def _print(item: Mapping[str, Any], raw: bool) -> None:
    say(item, raw, _line(item, time.time()))


def _line(item: Mapping[str, Any], now: float) -> str:
    """One line for a person."""
    rate = f"{item['requests_per_s']:g}/s" if item["requests_per_s"] else "any rate"
    notes = [f"{item['accounts']} accounts", f"{item['tier']}: {item['fetches']} at once, {rate}"]
    if item["account_limit"]:
        notes.append(f"up to {item['account_limit']} accounts")
    left = (item["left_alone_until_us"] or 0) / 1e6 - now
    if left > 0:
        notes.append(f"left alone for {left:.0f} s")
    if item["error"] and item["faults"]:
        notes.append(item["error"])
    if item["note"]:
        notes.append(item["note"])
    return f"{item['host']}  {item['status']}  {', '.join(notes)}"
