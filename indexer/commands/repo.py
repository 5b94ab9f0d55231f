"""`indexer repo`: follow repositories, look at their state, verify them, get their archived CARs.

Owns the options and the output. Everything goes through a running daemon's management listener, but for
`verify` of a data directory that no daemon holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode

import click

from indexer.atproto.syntax import check_did
from indexer.commands.client import Daemon, run_client, with_daemon
from indexer.errors import IndexerError, RequestError
from indexer.ingest.audit import Audit, audit
from indexer.pool import Pool
from indexer.store.database import Database

#: Time between two looks of `repo add --wait`, in seconds.
_POLL_S = 0.5
_PIECE = 1 << 18


@click.group()
def repo() -> None:
    """Follow repositories and look at their state."""


@repo.command()
@click.argument("dids", nargs=-1, required=True, metavar="DID…")
@click.option("--wait", is_flag=True, help="Return when all are synced, or one cannot be.")
@click.option("--json", "raw", is_flag=True, help="NDJSON.")
@with_daemon
def add(daemon: Daemon, dids: tuple[str, ...], wait: bool, raw: bool) -> None:
    """Follow repositories."""

    async def main() -> None:
        wanted = [check_did(did) for did in dids]
        await daemon.manage("PUT", "/repos", [{"did": did} for did in wanted])
        for did in wanted:
            row = await (_settled(daemon, did) if wait else daemon.manage("GET", _path(did)))
            if not row["tracked"]:
                raise RequestError(f"{did} is excluded by the filter and was not added")
            click.echo(json.dumps(row) if raw else _line(row))

    run_client(main())


async def _settled(daemon: Daemon, did: str) -> dict[str, Any]:
    """The repository's state once it is synced or inactive."""
    while True:
        row: dict[str, Any] = await daemon.manage("GET", _path(did))
        if row["state"] == "synced" or not row["active"] or not row["tracked"]:
            return row
        if row["error"] and not row["due_us"]:
            raise RequestError(f"{did}: {row['error']}")
        await asyncio.sleep(_POLL_S)


@repo.command("list")
@click.option("--state", type=click.Choice(["pending", "backfilling", "synced", "desynchronized"]))
@click.option("--json", "raw", is_flag=True, help="NDJSON.")
@with_daemon
def list_repos(daemon: Daemon, state: str | None, raw: bool) -> None:
    """List known repositories in the order of their DIDs."""

    async def main() -> None:
        async with aclosing(daemon.lines(f"/repos?state={state}" if state else "/repos")) as rows:
            async for row in rows:
                click.echo(json.dumps(row) if raw else _line(row))

    run_client(main())


@repo.command()
@click.argument("did")
@click.option("--json", "raw", is_flag=True, help="One line of JSON.")
@with_daemon
def status(daemon: Daemon, did: str, raw: bool) -> None:
    """Show everything known about one repository."""

    async def main() -> None:
        row = await daemon.manage("GET", _path(check_did(did)))
        if raw:
            click.echo(json.dumps(row))
        else:
            for line in _details(row):
                click.echo(line)

    run_client(main())


@repo.command()
@click.argument("did")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write.")
@click.option("--rev", help="That rev instead of the newest one.")
@click.option("--list", "listed", is_flag=True, help="List what is archived instead.")
@click.option("--json", "raw", is_flag=True, help="The list as NDJSON.")
@with_daemon
def archive(daemon: Daemon, did: str, output: Path | None, rev: str | None, listed: bool, raw: bool) -> None:
    """Write the CAR of a repository as it was fetched (archive.cars), to standard output without -o."""

    async def main() -> None:
        if listed:
            for row in (await daemon.manage("GET", f"{_path(check_did(did))}/archives"))["archives"]:
                click.echo(json.dumps(row) if raw else _archive_line(row))
            return
        query = f"?{urlencode({'rev': rev})}" if rev else ""
        async with daemon.content(f"{_path(check_did(did))}/archive{query}") as content:
            with _written(output) as file:
                while piece := await content.read(_PIECE):
                    file.write(piece)

    if output is None and not listed and sys.stdout.isatty():
        raise click.UsageError("a CAR is binary: name a file with -o, or redirect standard output")
    run_client(main())


@repo.command()
@click.argument("did")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Look into this data directory while no daemon runs.",
)
@click.option("--json", "raw", is_flag=True, help="One line of JSON.")
@with_daemon
def verify(daemon: Daemon, did: str, data_dir: Path | None, raw: bool) -> None:
    """Rebuild the tree of a repository from the index and compare it with the signed commit.

    Exit code 1 when they differ, or the signature is not by the account's key.
    """

    async def main() -> dict[str, Any]:
        known = check_did(did)
        if data_dir is not None:
            return (await verify_offline(data_dir, known))._asdict()
        found: dict[str, Any] = await daemon.manage("POST", f"{_path(known)}/verify", patient=True)
        return found

    found = run_client(main())
    if raw:
        click.echo(json.dumps(found))
    else:
        text = f"{found['records']} records, rev {found['rev']}, signature {found['signature']}"
        click.echo(f"{did}: {'ok' if found['outcome'] == 'ok' else 'MISMATCH'} ({text})")
        if found["message"]:
            click.echo(found["message"])
    if found["outcome"] != "ok":
        raise SystemExit(1)


async def verify_offline(data_dir: Path, did: str) -> Audit:
    """An audit of a database that no daemon holds."""
    with Database.open(data_dir / "db", create=False) as db:
        if db.mode.ephemeral:
            raise RequestError("the database keeps no records (ephemeral mode)")
        return await audit(db, Pool(0), did, max_records=sys.maxsize)


@contextmanager
def _written(output: Path | None) -> Iterator[BinaryIO]:
    """Standard output, or a file that is there whole or not at all."""
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        try:
            with part.open("wb") as file:
                yield file
            part.replace(output)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise IndexerError(f"cannot write {output}: {error.strerror}") from error


def _archive_line(row: Mapping[str, Any]) -> str:
    when = datetime.fromtimestamp(row["time_us"] / 1e6, UTC)
    return f"{row['rev']} {when:%Y-%m-%dT%H:%M:%SZ} {row['bytes']:>12} sha256:{row['sha256']}"


def _path(did: str) -> str:
    return f"/repos/{quote(did, safe=':')}"


def _line(row: Mapping[str, Any]) -> str:
    status = "" if row["active"] else f" ({row['status']})"
    return f"{row['did']} {row['state']}{status} {row['rev'] or '-'} {row['handle'] or '-'}"


def _details(row: Mapping[str, Any]) -> Iterator[str]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield f"{key}:"
            yield from (f"  {name:<40} {count}" for name, count in value.items())
        elif isinstance(value, list):
            yield f"{key:<16} {', '.join(map(str, value)) or '-'}"
        else:
            yield f"{key:<16} {'-' if value is None else value}"
