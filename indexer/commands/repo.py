"""`indexer repo`: follow repositories, look at their state, verify them, get their archived CARs.

Owns the options and the output. Everything goes through a running daemon's management listener, but for
`verify` of a data directory that no daemon holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode

import click

from indexer.atproto.syntax import check_did
from indexer.backfill.outcome import HOST_RESTS
from indexer.commands.client import Daemon, run_client, safe_text, with_daemon
from indexer.commands.paths import NamedPath
from indexer.commands.progress import Tell, bar, counted
from indexer.errors import FetchRefused, IdentityGone, IndexerError, RequestError
from indexer.ingest.audit import Audit, audit
from indexer.pool import Pool
from indexer.serve.management_repos import UNRESOLVED
from indexer.store.codecs import AccountStatus, SyncState
from indexer.store.database import Database
from indexer.store.restore import expect_whole

#: Time between two looks of `repo add --wait`, in seconds.
_POLL_S = 0.5
_PIECE = 1 << 18
#: Of why a repository waits so much is shown beside its bar.
_REASON_WIDTH = 120
#: What `repo status` shows of the backfill's figures, in order.
_OVERVIEW = (
    "due", "later", "held", "in_flight", "eta_s", "repos_per_s", "records_per_s", "oldest_due_us",
    "next_due_us", "done", "failed", "paused",
)  # fmt: skip
_STATUSES = (*(status.label for status in AccountStatus), UNRESOLVED)
#: How the error of a row begins when a directory or host says that there is no such account.
_NO_IDENTITY = f"{IdentityGone.reason}: "
_HOST_RESTS = f"{HOST_RESTS}: "


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
        wanted = list(dict.fromkeys(check_did(did) for did in dids))
        acted = await daemon.manage("PUT", "/repos", [{"did": did} for did in wanted])
        told = {item["did"] for item in acted}
        problems: list[str] = []
        with bar("fetching") if wait else nullcontext() as tell:
            left = wanted
            while left and not problems:
                if left is not wanted:
                    await asyncio.sleep(_POLL_S)
                look = _Look(daemon, told, tell, len(wanted) - len(left), len(wanted))
                rows, left = await look.at(left)
                for did, row in rows.items():
                    if row is not None and row["tracked"]:
                        click.echo(json.dumps(row) if raw else _line(row))
                    if problem := _problem(did, row, waited=wait):
                        problems.append(problem)
        if left:
            problems.append(f"{counted(len(left), 'repository', 'repositories')} not synced so far")
        if problems:
            raise RequestError("; ".join(problems))

    run_client(main())


@repo.command()
@click.argument("dids", nargs=-1, required=True, metavar="DID…")
@click.option("--purge", is_flag=True, help="Delete what is held of them too.")
@click.option("--json", "raw", is_flag=True, help="NDJSON.")
@with_daemon
def remove(daemon: Daemon, dids: tuple[str, ...], purge: bool, raw: bool) -> None:
    """Follow repositories no longer; what is held stays, unless --purge is given."""
    path = f"/repos{'?purge=true' if purge else ''}"
    done = "followed no longer, what was held is deleted" if purge else "followed no longer"
    run_client(_act_on(daemon, "DELETE", path, dids, done, "is not known here", raw=raw))


@repo.command()
@click.argument("dids", nargs=-1, required=True, metavar="DID…")
@click.option("--json", "raw", is_flag=True, help="NDJSON.")
@with_daemon
def resync(daemon: Daemon, dids: tuple[str, ...], raw: bool) -> None:
    """Fetch followed repositories again, before all others."""
    run_client(_act_on(daemon, "POST", "/repos/resync", dids, "queued", "is not followed", raw=raw))


async def _act_on(
    daemon: Daemon, method: str, path: str, dids: tuple[str, ...], done: str, not_done: str, *, raw: bool
) -> None:
    """Has the daemon do something to repositories; those that it did nothing to are an error."""
    wanted = list(dict.fromkeys(check_did(did) for did in dids))
    acted = [item["did"] for item in await daemon.manage(method, path, [{"did": did} for did in wanted])]
    for did in acted:
        click.echo(json.dumps({"did": did}) if raw else f"{did} {done}")
    if left := [did for did in wanted if did not in acted]:
        raise RequestError("; ".join(f"{did} {not_done}" for did in left))


def _is_hidden(row: Mapping[str, Any]) -> bool:
    """Whether somebody said that the account is not active."""
    return not row["active"] and row["status"] != UNRESOLVED


def _problem(did: str, row: Mapping[str, Any] | None, *, waited: bool) -> str | None:
    """Why a repository was not added, or will not be synced."""
    if row is None or not row["tracked"]:
        return f"{did} is excluded by the filter and was not added"
    if not waited or (row["state"] == "synced" and row["active"]):
        return None
    if _is_hidden(row):
        return f"the account {did} is {row['status']}"
    return f"{did} cannot be synced: {safe_text(row['error'])}"


@dataclass(slots=True)
class _Look:
    """One look at every repository that is waited for, so that none hides another. Without ``tell`` nothing
    is waited for. ``told``: the daemon said that it knows them."""

    daemon: Daemon
    told: set[str]
    tell: Tell | None
    done: int
    total: int

    async def at(self, dids: Sequence[str]) -> tuple[dict[str, dict[str, Any] | None], list[str]]:
        """The rows of those that are settled, None for an unknown one, and the DIDs of the others."""
        settled: dict[str, dict[str, Any] | None] = {}
        left = []
        for did in dids:
            row = await self._row(did)
            if row is not None and self.tell is not None:
                why = f", {safe_text(row['error'])[:_REASON_WIDTH]}" if row["error"] else ""
                about = f"{did} {row['state']}, {counted(row['records'], 'record')}{why}"
                self.tell(about, self.done + len(settled), self.total)
            if row is None or self.tell is None or _is_settled(row):
                settled[did] = row
            else:
                left.append(did)
        return settled, left

    async def _row(self, did: str) -> dict[str, Any] | None:
        try:
            row: dict[str, Any] = await self.daemon.manage("GET", _path(did))
        except FetchRefused as error:
            if error.status != HTTPStatus.NOT_FOUND or did in self.told:
                raise
            return None
        return row


def _is_settled(row: Mapping[str, Any]) -> bool:
    """Whether a repository is synced, or known not to become so."""
    if not row["tracked"] or (row["state"] == "synced" and row["active"]):
        return True
    error = row["error"] or ""
    # An account known as inactive is asked for once more, as it was just requested.
    waits = not error or error.startswith(_HOST_RESTS)
    if _is_hidden(row) and (not waits or row["attempt"] or not row["due_us"]):
        return True
    return bool(error) and (not row["due_us"] or error.startswith(_NO_IDENTITY))


@repo.command("list")
@click.option("--state", type=click.Choice([state.label for state in SyncState]), help="Only these.")
@click.option("--status", type=click.Choice(_STATUSES), help="Only these accounts.")
@click.option("--json", "raw", is_flag=True, help="NDJSON.")
@with_daemon
def list_repos(daemon: Daemon, state: str | None, status: str | None, raw: bool) -> None:
    """List known repositories in the order of their DIDs: DID, sync state, account status, rev, handle."""
    wanted = urlencode({name: value for name, value in (("state", state), ("status", status)) if value})

    async def main() -> None:
        async with aclosing(daemon.lines(f"/repos?{wanted}")) as rows:
            async for row in rows:
                click.echo(json.dumps(row) if raw else _line(row))

    run_client(main())


@repo.command()
@click.argument("did", required=False)
@click.option("--json", "raw", is_flag=True, help="One line of JSON.")
@with_daemon
def status(daemon: Daemon, did: str | None, raw: bool) -> None:
    """Show everything known about one repository, or without DID how far the backfill is."""

    async def main() -> None:
        row = await (daemon.manage("GET", _path(check_did(did))) if did else _overview(daemon))
        if raw:
            click.echo(json.dumps(row))
        else:
            for line in (*_details(row), *_outlook(row)):
                click.echo(line)

    run_client(main())


def _outlook(row: Mapping[str, Any]) -> Iterator[str]:
    """What else is to come, where nothing is due of which one could say when it is done."""
    if row.get("later") and row["next_due_us"] and row["eta_s"] is None:
        waiting = counted(row["later"], "repository waits", "repositories wait")
        yield f"{waiting} for a later try, the next at {_moment(row['next_due_us'])}"


async def _overview(daemon: Daemon) -> dict[str, Any]:
    """Totals, and what the backfill says of itself."""
    stats = await daemon.stats()
    shown = {name: stats["backfill"][name] for name in _OVERVIEW if name in stats["backfill"]}
    return {"repos": stats["repos"]["total"], **shown, "states": stats["repos"]["by_state"]}


@repo.command()
@click.argument("did")
@click.option("-o", "--output", type=NamedPath(dir_okay=False), help="File to write.")
@click.option("--rev", help="That rev instead of the newest one.")
@click.option("--list", "listed", is_flag=True, help="List what is archived instead.")
@click.option("--json", "raw", is_flag=True, help="The list as NDJSON.")
@with_daemon
def archive(daemon: Daemon, did: str, output: Path | None, rev: str | None, listed: bool, raw: bool) -> None:
    """Write the CAR of a repository as it was fetched (archive.cars), to standard output without -o."""

    async def main() -> None:
        if listed:
            rows = (await daemon.manage("GET", f"{_path(check_did(did))}/archives"))["archives"]
            for row in rows:
                click.echo(json.dumps(row) if raw else _archive_line(row))
            if not rows and not raw:
                click.echo(
                    f"no CAR of {did} is archived (archive.cars keeps those that are fetched)", err=True
                )
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
    type=NamedPath(file_okay=False),
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
        text = f"{counted(found['records'], 'record')}, rev {found['rev']}, signature {found['signature']}"
        click.echo(f"{did}: {'ok' if found['outcome'] == 'ok' else 'MISMATCH'} ({text})")
        if found["message"]:
            click.echo(safe_text(found["message"]))
    if found["outcome"] != "ok":
        raise SystemExit(1)


async def verify_offline(data_dir: Path, did: str) -> Audit:
    """An audit of a database that no daemon holds."""
    expect_whole(data_dir)
    with Database.open(data_dir / "db", create=False, read_only=True) as db:
        if db.mode.ephemeral:
            raise RequestError("the database keeps no records (ephemeral mode)")
        return await audit(db, Pool(0), did)


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
    handle = safe_text(row["handle"] or "-")
    return f"{row['did']} {row['state']} {row['status']} {row['rev'] or '-'} {handle}"


def _moment(time_us: int) -> str:
    """A due time: what is due already may stand long before now, to be in front of the queue."""
    when = datetime.fromtimestamp(time_us / 1e6, UTC)
    return f"{when:%Y-%m-%dT%H:%M:%SZ}{' (now)' if when <= datetime.now(UTC) else ''}"


def _details(row: Mapping[str, Any]) -> Iterator[str]:
    for key, value in row.items():
        if key.endswith("due_us"):
            yield f"{key.removesuffix('_us'):<16} {'-' if value is None else _moment(value)}"
        elif isinstance(value, dict):
            yield f"{key}:"
            yield from (f"  {name:<40} {count}" for name, count in value.items())
        elif isinstance(value, list):
            yield f"{key:<16} {safe_text(', '.join(map(str, value)) or '-')}"
        else:
            yield f"{key:<16} {'-' if value is None else safe_text(value)}"
