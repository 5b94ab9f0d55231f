"""`indexer crawler source`: the lists of accounts that are read, through a running daemon.

Owns the options and the output. A source is named as in the settings: `[mode::]https://host`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from indexer.commands.client import Daemon, json_option, run_client, say, with_daemon

_wanted = click.argument("wanted", metavar="[MODE::]URL")


@click.group()
def crawler() -> None:
    """Look for accounts in the lists of relays, collection directories and PDSes."""


@crawler.group()
def source() -> None:
    """List, add and remove the lists that are read; begin their sweeps anew."""


@source.command("list")
@json_option
@with_daemon
def list_sources(daemon: Daemon, raw: bool) -> None:
    """List sources: name, state, how far the sweep is, what it found."""
    for item in run_client(daemon.manage("GET", "/crawler/sources")):
        say(item, raw, _line(item))


@source.command()
@_wanted
@json_option
@with_daemon
def add(daemon: Daemon, wanted: str, raw: bool) -> None:
    """Read the list at URL from now on, also after a restart. MODE: list_repos, by_collection or hosts."""
    item = run_client(daemon.manage("POST", "/crawler/sources", {"url": wanted}))
    say(item, raw, _line(item))


@source.command()
@_wanted
@json_option
@with_daemon
def remove(daemon: Daemon, wanted: str, raw: bool) -> None:
    """Read it no longer. One of the settings stays listed, switched off."""
    answer = run_client(daemon.manage("DELETE", "/crawler/sources", {"url": wanted}))
    say(answer, raw, f"{answer['name']}  removed")


@source.command()
@_wanted
@json_option
@with_daemon
def reset(daemon: Daemon, wanted: str, raw: bool) -> None:
    """Begin a new sweep of it now."""
    item = run_client(daemon.manage("DELETE", "/crawler/cursors", {"url": wanted}))
    say(item, raw, _line(item))


def _line(item: Mapping[str, Any]) -> str:
    """A source for people."""
    state = "off" if not item["enabled"] else "sweeping" if item["sweeping"] else "waiting"
    notes = [f"{item['pages']} pages", f"{item['listed']} listed", f"{item['found']} new"]
    if item["collection"]:
        notes.append(f"at {item['collection']}")
    if "hosts" in item:
        notes.append(f"{item['hosts']} hosts")
    if item["last_outcome"]:
        notes.append(f"last sweep: {item['last_outcome']}")
    notes += [text for text in (item["error"], item["note"]) if text]
    return f"{item['name']}  {state}  {', '.join(notes)}"
