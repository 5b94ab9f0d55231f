"""`indexer filter`: show and change what is followed and which collections are kept.

Owns the options and the output. Everything goes through a running daemon's management listener, which
checks what it is given, stores it and carries it out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from indexer.commands.client import Daemon, run_client, safe_text, with_daemon
from indexer.errors import RequestError

_FIELDS = ("mode", "signals", "collections", "excludes")


@click.group("filter")
def filter_() -> None:
    """Show and change what is followed and kept."""


@filter_.command()
@click.option("--json", "raw", is_flag=True, help="One line of JSON.")
@with_daemon
def show(daemon: Daemon, raw: bool) -> None:
    """Show the filter in force: mode, signals, collections, excludes."""

    async def main() -> None:
        _print(await daemon.manage("GET", "/filter"), raw=raw)

    run_client(main())


@filter_.command("set")
@click.argument("field", type=click.Choice(_FIELDS))
@click.argument("items", nargs=-1, metavar="[ITEM…]")
@click.option("--add", "adds", is_flag=True, help="Add the items to the list instead of replacing it.")
@click.option("--drop", "drops", is_flag=True, help="Take the items off the list instead of replacing it.")
@click.option("--clear", is_flag=True, help="Empty the list.")
@click.option("--purge", is_flag=True, help="Delete what is held and not kept any more.")
@click.option("--json", "raw", is_flag=True, help="One line of JSON.")
@with_daemon
def set_(
    daemon: Daemon,
    field: str,
    items: tuple[str, ...],
    adds: bool,
    drops: bool,
    clear: bool,
    purge: bool,
    raw: bool,
) -> None:
    """Change one field: mode (full or filter), signals and collections (NSIDs, also ns.*), excludes (DIDs).

    Wider collections queue the repositories that they affect; narrower ones keep what is held unless --purge
    is given.
    """
    if adds and drops:
        raise click.UsageError("--add and --drop are two commands")
    change = _change(field, items, "add" if adds else "drop" if drops else None, clear)

    async def main() -> None:
        if drops:
            _expect(field, items, await daemon.manage("GET", "/filter"))
        answer = await daemon.manage("PATCH", f"/filter{'?purge=true' if purge else ''}", {field: change})
        _print(answer, raw=raw)

    run_client(main())


def _change(field: str, items: tuple[str, ...], how: str | None, clear: bool) -> Any:
    """The new value of the field, or the object that patches it."""
    if clear:
        if items or how or field == "mode":
            raise click.UsageError("--clear empties a list and goes with no items, --add or --drop")
        return []
    if field == "mode":
        if len(items) != 1 or how:
            raise click.UsageError("mode takes one word: full or filter")
        return items[0]
    if not items:
        raise click.UsageError(f"name at least one item of {field}, or --clear")
    return list(items) if how is None else dict.fromkeys(items, how == "add")


def _expect(field: str, items: tuple[str, ...], now: Mapping[str, Any]) -> None:
    """Refuses to take off a list what is not on it: it is probably misspelt."""
    if missing := [item for item in items if item not in now[field]]:
        raise RequestError(f"not in {field}: {safe_text(' '.join(missing))}")


def _print(answer: Mapping[str, Any], *, raw: bool) -> None:
    if raw:
        click.echo(json.dumps(answer))
        return
    for field in _FIELDS:
        value = answer[field]
        none = "all" if field == "collections" else "none"
        click.echo(f"{field:<12} {value if isinstance(value, str) else ' '.join(value) or none}")
    if "queued" in answer:
        click.echo(f"queued       {answer['queued']} repositories to be fetched again")
        click.echo(f"purged       {answer['purged']} records")
        if not answer["done"]:
            click.echo("the daemon goes on with the rest; `indexer db stats` tells how far it is")
