"""`indexer source`: the upstreams that are followed, through a running daemon's management listener.

Owns the options and the output. An upstream is named as in the settings: `wss://host` is a relay,
`pds::wss://host` a PDS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode

import click

from indexer.commands.client import Daemon, json_option, run_client, say, with_daemon
from indexer.errors import RequestError

_PDS: Final = "pds::"
_PLACES: Final = ("oldest", "live")
_upstream = click.argument("upstream", metavar="URL")


@click.group()
def source() -> None:
    """List, add and remove upstreams; set their cursors."""


@source.command("list")
@json_option
@with_daemon
def list_sources(daemon: Daemon, raw: bool) -> None:
    """List upstreams: name, state, cursor, lag, last failure."""
    for item in run_client(daemon.manage("GET", "/firehose/sources")):
        say(item, raw, _line(item))


@source.command()
@_upstream
@click.option("--cursor", help="Where to begin: a sequence number, oldest or live  [default: live]")
@json_option
@with_daemon
def add(daemon: Daemon, upstream: str, cursor: str | None, raw: bool) -> None:
    """Follow URL from now on, also after a restart."""
    body = _named(upstream) | ({} if cursor is None else {"cursor": _cursor(cursor)})
    item = run_client(daemon.manage("POST", "/firehose/sources", body))
    say(item, raw, _line(item))


@source.command()
@_upstream
@click.option("--forget", is_flag=True, help="Its cursor and its counts go too.")
@json_option
@with_daemon
def remove(daemon: Daemon, upstream: str, forget: bool, raw: bool) -> None:
    """Follow URL no longer. One of the settings stays listed, switched off."""
    query = urlencode({"forget": "true"} if forget else {})
    answer = run_client(daemon.manage("DELETE", f"/firehose/sources?{query}", _named(upstream)))
    say(answer, raw, f"{answer['name']}: removed, {'cursor forgotten' if forget else 'cursor kept'}")


@source.command()
@_upstream
@click.argument("place", metavar="SEQ|oldest|live|accept")
@json_option
@with_daemon
def cursor(daemon: Daemon, upstream: str, place: str, raw: bool) -> None:
    """Set where following URL goes on; `accept` takes a new numbering of its stream for good."""
    body = _named(upstream) | {"cursor": place if place == "accept" else _cursor(place)}
    answer = run_client(daemon.manage("POST", "/firehose/cursors", body))
    at = "the live tail" if answer["cursor"] is None else answer["cursor"]
    say(answer, raw, f"{answer['name']}: goes on at {at}")


@source.command()
@_upstream
@json_option
@with_daemon
def compare(daemon: Daemon, upstream: str, raw: bool) -> None:
    """Compare the revs that URL lists with ours, as after a possible loss; what is behind is fetched."""
    answer = run_client(daemon.manage("POST", "/firehose/compare", _named(upstream)))
    say(answer, raw, f"{answer['name']}: scheduled")


def _named(url: str) -> dict[str, Any]:
    return {"url": url.removeprefix(_PDS), "is_pds": url.startswith(_PDS)}


def _cursor(text: str) -> int | str:
    if text in _PLACES:
        return text
    if not (text.isascii() and text.isdigit()):
        raise RequestError(f"cursor: a sequence number, {' or '.join(_PLACES)} is wanted, not {text!r}")
    return int(text)


def _line(item: Mapping[str, Any]) -> str:
    """One line for a person."""
    if not item["enabled"]:
        state = "off"
    elif item["connected"]:
        state = "connected"
    else:
        state = "no firehose" if item["no_firehose"] else "waiting" if item["running"] else "stopped"
    notes = [
        f"cursor {'-' if item['cursor'] is None else item['cursor']}",
        f"lag {item['lag_s']:.1f} s",
        f"{item['frames']} frames",
    ]
    if item["renumbered"]:
        notes.append("its numbering is new: see `indexer source cursor … accept`")
    if item["error"]:
        notes.append(item["error"])
    return f"{item['name']}  {state}  {', '.join(notes)}"
