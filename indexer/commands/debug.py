"""`indexer debug`: refused frames, through the daemon that holds the database or on a closed data directory.

Owns the options and the output; what an entry and a frame look like is `indexer.ingest.quarantine`'s.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from indexer.atproto.syntax import check_did
from indexer.commands.client import Daemon, safe_json, safe_text
from indexer.commands.db import Place, with_place
from indexer.commands.paths import NamedPath
from indexer.errors import FetchError, RequestError
from indexer.ingest import quarantine as refused
from indexer.store.codecs import QuarantineRow
from indexer.store.database import Database
from indexer.store.keyspaces import QUARANTINE

_LINE = "{:>8}  {:<24}  {:<20}  {:>12}  {}"


@click.group()
def debug() -> None:
    """Look at what was refused."""


@debug.command()
@click.option("--did", metavar="DID", help="Only frames of this account.")
@click.option("--reason", help="Only frames refused for this reason.")
@click.option("--source", help="Only frames of this upstream, by name.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At most so many, the newest."
)
@click.option("--show", type=click.IntRange(min=0), metavar="ID", help="One frame, decoded.")
@click.option(
    "--extract", type=(click.IntRange(min=0), NamedPath(dir_okay=False)), metavar="ID FILE",
    help="Write the bytes of one frame, as far as they are kept.",
)  # fmt: skip
@click.option("--json", "raw", is_flag=True, help="JSON: a line for each frame.")
@with_place
def quarantine(
    place: Place,
    did: str | None,
    reason: str | None,
    source: str | None,
    limit: int,
    show: int | None,
    extract: tuple[int, Path] | None,
    raw: bool,
) -> None:
    """List refused frames, newest first; show or extract one."""
    if extract is not None:
        _extract(place, *extract)
    elif show is not None:
        _show(place, show, raw=raw)
    else:
        wanted = refused.Wanted(None if did is None else check_did(did), reason, source)
        here, there = _list_here(wanted, limit), _list_there(wanted, limit)
        entries = place.here_or_there(here, there, any_daemon=True)["entries"]
        _print_list(entries, wanted, raw=raw)


# --- list -------------------------------------------------------------------------------------------------


def _list_here(wanted: refused.Wanted, limit: int) -> Callable[[Database], dict[str, Any]]:
    def here(db: Database) -> dict[str, Any]:
        entries: list[dict[str, Any]] = []
        before: int | None = None
        while True:
            page = refused.list_refused(db, wanted, before=before, limit=limit - len(entries))
            entries += [refused.summary(*entry) for entry in page.entries]
            before = page.cursor
            if before is None or len(entries) >= limit:
                return {"entries": entries}

    return here


def _list_there(wanted: refused.Wanted, limit: int) -> Callable[[Daemon], Awaitable[dict[str, Any]]]:
    async def there(daemon: Daemon) -> dict[str, Any]:
        entries: list[dict[str, Any]] = []
        query = {name: value for name, value in wanted._asdict().items() if value is not None}
        while True:
            query["limit"] = str(min(limit - len(entries), refused.MAX_PAGE))
            page = await daemon.manage("GET", f"/debug/quarantine?{urlencode(query)}")
            entries += page["entries"]
            if "cursor" not in page or len(entries) >= limit:
                return {"entries": entries}
            query["cursor"] = page["cursor"]

    return there


def _print_list(entries: list[Mapping[str, Any]], wanted: refused.Wanted, *, raw: bool) -> None:
    if raw:
        for entry in entries:
            click.echo(safe_json(json.dumps(entry)))
        return
    if not entries:
        options = [f"--{name} {value}" for name, value in wanted._asdict().items() if value is not None]
        which = f"that is kept fits {' '.join(options)}" if options else "is kept"
        click.echo(safe_text(f"no refused frame {which}"), err=True)
        return
    click.echo(_LINE.format("id", "time", "reason", "seq", "account, upstream, message"))
    for entry in entries:
        about = safe_text(f"{entry['did'] or '-'} {entry['source']} {entry['message']}")
        time = entry["time"].removesuffix("+00:00")
        click.echo(_LINE.format(entry["id"], time, safe_text(entry["reason"]), entry["seq"], about))


# --- one frame --------------------------------------------------------------------------------------------


def _row(db: Database, number: int) -> QuarantineRow:
    row = db.get(QUARANTINE, number)
    if row is None:
        raise RequestError(
            f"no refused frame has the number {number}; older ones leave when the ring is full"
        )
    return row


def _show(place: Place, number: int, *, raw: bool) -> None:
    shown = place.here_or_there(
        lambda db: refused.details(number, _row(db, number)),
        lambda daemon: daemon.manage("GET", f"/debug/quarantine/{number}"),
        any_daemon=True,
    )
    if raw:
        click.echo(safe_json(json.dumps(shown)))
        return
    for name in ("id", "time", "source", "seq", "did", "reason", "message", "size", "kept"):
        click.echo(f"{name + ':':<9}{safe_text('-' if shown[name] is None else shown[name])}")
    frame = shown["frame"]
    click.echo(f"{'type:':<9}{safe_text(frame['type'])}")
    if "problem" in frame:
        click.echo(f"{'problem:':<9}{safe_text(frame['problem'])}")
    click.echo(safe_json(json.dumps(frame["fields"], indent=2)))


def _extract(place: Place, number: int, file: Path) -> None:
    async def there(daemon: Daemon) -> dict[str, Any]:
        async with daemon.content(f"/debug/quarantine/{number}?raw=true") as content:
            return {"data": await content.read()}

    def here(db: Database) -> dict[str, Any]:
        return {"data": _row(db, number).data}

    data: bytes = place.here_or_there(here, there, any_daemon=True)["data"]
    try:
        file.write_bytes(data)
    except OSError as error:
        raise FetchError(f"cannot write {file}: {error.strerror}") from error
    click.echo(f"{file}: {len(data)} bytes", err=True)
