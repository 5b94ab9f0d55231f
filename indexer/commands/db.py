"""`indexer db`: look at, check, repair, compact, back up, restore and migrate the database.

Owns the options and the output. Works on the data directory while no daemon runs; `stats`, `compact` and
`backup` go through the management listener of a daemon that holds it, the others say that it must be stopped.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import click

from indexer.atproto.syntax import check_did
from indexer.cas import FsBlobStore
from indexer.commands.client import Daemon, checked_url, daemon_of, run_client
from indexer.commands.paths import NamedPath
from indexer.commands.progress import Tell, bar, counted
from indexer.config import Settings, load
from indexer.errors import FetchRefused, FetchTransient, StoreError, StoreLocked
from indexer.store import backup as backups
from indexer.store.archive_check import check_archives
from indexer.store.check import Report
from indexer.store.check import check as check_store
from indexer.store.database import FORMAT, Database
from indexer.store.migration import Migrated
from indexer.store.migration import migrate as migrate_store
from indexer.store.repair import Repaired
from indexer.store.repair import repair as repair_store
from indexer.store.restore import expect_own, expect_whole
from indexer.store.restore import restore as restore_backup
from indexer.store.upkeep import compact_all, damage, describe, identity


@dataclass(frozen=True, slots=True)
class Place:
    """A data directory and the daemon that may hold it."""

    settings: Settings
    data_dir: Path
    daemon: Daemon
    named: bool  # the daemon was named, and no data directory

    @property
    def path(self) -> Path:
        return self.data_dir / "db"

    def opened(self, *, any_format: bool = False) -> Database:
        """The database, in whatever mode it was made. Raises `StoreLocked` while a daemon holds it."""
        path, memory_mib = self.path, self.settings.memory_mib
        expect_own(self.data_dir)
        if any_format:
            return Database.open_unchecked(path, memory_mib=memory_mib)
        return Database.open(path, memory_mib=memory_mib, create=False)

    def looked_at(self) -> Database:
        """As `opened`, for reading: nothing in the folder changes, which may be a backup, and its disk full
        or read-only."""
        expect_whole(self.data_dir)
        return Database.open(self.path, memory_mib=self.settings.memory_mib, create=False, read_only=True)

    def here_or_there(
        self,
        here: Callable[[Database], dict[str, Any]],
        there: Callable[[Daemon], Awaitable[dict[str, Any]]],
        *,
        open_: Callable[[], Database] | None = None,
        any_daemon: bool = False,
    ) -> dict[str, Any]:
        """``here`` on the database, to look at or as ``open_`` opens it, or ``there`` with the daemon that
        holds it. With ``any_daemon`` one that was named is asked, whatever it holds."""
        if any_daemon and self.named:
            return run_client(self._asked(there))
        try:
            with (open_ or self.looked_at)() as db:
                return here(db)
        except StoreLocked:
            return run_client(self._asked(there, ours=True))

    async def _asked(
        self, there: Callable[[Daemon], Awaitable[dict[str, Any]]], *, ours: bool = False
    ) -> dict[str, Any]:
        """The daemon's answer; with ``ours`` only when it is the one that holds this database."""
        try:
            if ours:
                await self._expect_holder()
            return await there(self.daemon)
        except FetchRefused as error:  # as the command says it when no daemon runs
            raise StoreError(str(error).removeprefix(f"{error.name}: ")) from error

    async def _expect_holder(self) -> None:
        """Raises unless the daemon is the one that holds this database."""
        held, where = f"another process holds {self.data_dir}", self.daemon.management
        name_it = "name the daemon that holds it with --management-url or --config"
        try:
            theirs = await self.daemon.manage("GET", "/db/stats", patient=True)
        except FetchTransient as error:
            raise StoreLocked(f"{held}, and no daemon answers at {where}; {name_it}, or stop it") from error
        except FetchRefused as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            raise StoreLocked(f"{held}, and no management listener is at {where}; {name_it}") from error
        if theirs.get("identity") != identity(self.path):
            other = theirs.get("data_dir", "another one")
            raise StoreLocked(f"{held}, not the daemon at {where}, which holds {other}; {name_it}")


def with_place(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that say where the database is; the command gets it as ``place``."""

    @functools.wraps(command)
    def wrapper(
        config: Path | None, data_dir: Path | None, management_url: str | None, token: str | None, **rest: Any
    ) -> None:
        settings = load(config)
        daemon = daemon_of(settings, None, management_url, token)
        named = management_url is not None and data_dir is None
        command(place=Place(settings, data_dir or settings.data_dir, daemon, named), **rest)

    file, folder = NamedPath(dir_okay=False), NamedPath(file_okay=False)
    for option in (
        click.option("--config", type=file, help="Settings file (TOML)."),
        click.option("--token", help="Management token  [default: the setting management.token]"),
        click.option(
            "--management-url",
            callback=checked_url,
            help="Management listener  [default: from management.bind]",
        ),
        click.option("--data-dir", type=folder, help="Data directory  [default: the setting data_dir]"),
    ):
        wrapper = option(wrapper)
    return wrapper


_json = click.option("--json", "raw", is_flag=True, help="One line of JSON.")


@click.group()
def db() -> None:
    """Look after the database."""


# --- stats and compact ------------------------------------------------------------------------------------


@db.command()
@_json
@with_place
def stats(place: Place, raw: bool) -> None:
    """Rows, bytes, compression and pending compaction by keyspace."""
    figures = place.here_or_there(describe, lambda daemon: daemon.manage("GET", "/db/stats"))
    if raw:
        click.echo(json.dumps(figures))
        return
    counts = figures["counts"]
    click.echo(
        f"{counted(counts['repos'], 'repository', 'repositories')}, {counted(counts['records'], 'record')}, "
        f"{counted(counts['events'], 'event')}; the rows below are estimates\n"
    )
    click.echo(_COLUMNS.format(*_TITLES))
    for name, row in (*figures["keyspaces"].items(), ("total", figures["totals"])):
        rows = f"~{row['rows_estimated']:,}"
        click.echo(
            _COLUMNS.format(
                name, rows, size_text(row["sst_bytes"]), size_text(row["live_bytes"]),
                size_text(row["memtable_bytes"]), _ratio(row["raw_bytes"], row["data_bytes"]),
                size_text(row["pending_compaction_bytes"]),
            )
        )  # fmt: skip


_TITLES = ("keyspace", "rows, about", "on disk", "live", "in memory", "compression", "to compact")
_COLUMNS = "{:<16}{:>15}{:>12}{:>12}{:>12}{:>13}{:>13}"


def size_text(size: int) -> str:
    """Bytes for a person: ``0``, ``812 B``, ``3.4 MiB``."""
    if size < 1024:
        return f"{size} B" if size else "0"
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / (1 << 10 * power):.1f} {'KMGT'[power - 1]}iB"


def _ratio(raw: int, packed: int) -> str:
    return f"{raw / packed:.1f} : 1" if packed else "-"


@db.command()
@_json
@with_place
def compact(place: Place, raw: bool) -> None:
    """Compact everything: obsolete versions and dead rows leave the disk."""

    def here(db: Database) -> dict[str, Any]:
        before = describe(db)["totals"]
        with bar("compacting") as tell:
            compact_all(db, tell)
        return {"before": before, "after": describe(db)["totals"]}

    answer = place.here_or_there(
        here, lambda daemon: daemon.manage("POST", "/db/compact", patient=True), open_=place.opened
    )
    if raw:
        click.echo(json.dumps(answer))
    else:
        before, after = (size_text(answer[when]["sst_bytes"]) for when in ("before", "after"))
        click.echo(f"compacted: {before} before, {after} after")


# --- check ------------------------------------------------------------------------------------------------


@db.command()
@click.option("--repo", "did", metavar="DID", help="Only this repository.")
@click.option("--repair", is_flag=True, help="Set counts and references to a recount; deletes no record.")
@_json
@with_place
def check(place: Place, did: str | None, repair: bool, raw: bool) -> None:
    """Verify every guarantee of the store; exit code 1 when one is broken.

    Every file can be read, blocks exist and hash, references and totals equal a recount, the log and the
    queues are in order, archived files are whole. Without --repair nothing is changed, so it may look at a
    backup. Stop the daemon first.
    """
    did = None if did is None else check_did(did)
    repaired: Repaired | None = None
    if repair:
        expect_own(place.data_dir)
    with bar("checking") as tell:
        report = _looked_through(place, did, tell)
        if repair and report.repairable:
            tell("repairing", 0, 0)
            with place.opened() as db:
                repaired = asyncio.run(repair_store(db, place.settings, did))
            report = _looked_through(place, did, tell)
    if raw:
        mended = None if repaired is None else repaired._asdict()
        click.echo(json.dumps({**report._asdict(), "repaired": mended}))
    else:
        for line in _findings(report, repaired):
            click.echo(line)
        if repair and report.problems and not report.repairable:
            click.echo("no count or reference is wrong: there is nothing that a repair sets right")
    if report.problems:
        raise SystemExit(1)


def _looked_through(place: Place, did: str | None, tell: Tell) -> Report:
    """The check of what can be read; where not everything can, there is nothing to count. One repository is
    looked at without reading all others."""
    with place.looked_at() as db:
        damaged = [str(error) for error in damage(db, tell)] if did is None else []
        return Report(damaged, 0, 0, 0, 0) if damaged else _checked(place, db, did, tell)


def _checked(place: Place, db: Database, did: str | None, tell: Tell) -> Report:
    report = check_store(db, did, progress=lambda done, total: tell("checking", done, total))
    blobs, what = FsBlobStore(place.data_dir / "cas", tidy=False), "checking archived files"
    tell(what, 0, 0)
    report.problems.extend(check_archives(db, blobs, did, progress=partial(tell, what)))
    return report


def _findings(report: Report, repaired: Repaired | None) -> Iterator[str]:
    yield from report.problems
    if repaired is not None:
        yield f"repaired: {counted(repaired.references, 'reference')}, {counted(repaired.totals, 'total')}"
    looked = (
        f"{counted(report.repos, 'repository', 'repositories')}, {counted(report.records, 'record')}, "
        f"{counted(report.blocks, 'block')}, {counted(report.events, 'event')}"
    )
    yield f"{counted(len(report.problems), 'problem') if report.problems else 'no problem'} in {looked}"


# --- backup, restore, migrate -----------------------------------------------------------------------------


@db.command()
@click.argument("dest", type=NamedPath())
@_json
@with_place
def backup(place: Place, dest: Path, raw: bool) -> None:
    """Back up the database and the archived files into the new folder DEST.

    A daemon that holds the database makes it, on its own machine, and goes on meanwhile.
    """
    target = dest.absolute()

    def here(db: Database) -> dict[str, Any]:
        with bar("backing up") as tell:
            return backups.backup(db, target, progress=tell)._asdict()

    def there(daemon: Daemon) -> Awaitable[dict[str, Any]]:
        return daemon.manage("POST", "/db/backup", {"to": str(target)}, patient=True)

    any_format = partial(place.opened, any_format=True)  # it is made before a migration, too
    made = place.here_or_there(here, there, open_=any_format)
    if raw:
        click.echo(json.dumps(made))
    else:
        sizes = f"{size_text(made['db_bytes'])} of database, {size_text(made['cas_bytes'])} of archived files"
        click.echo(f"{made['path']}: {sizes}, up to event {made['head'] - 1}")


@db.command()
@click.argument("src", type=NamedPath(file_okay=False))
@click.option("--no-verify", is_flag=True, help="Do not read through what was copied.")
@_json
@with_place
def restore(place: Place, src: Path, no_verify: bool, raw: bool) -> None:
    """Make the data directory, which must be empty, of the backup SRC.

    Everything copied is read once, so that a damaged backup is refused; `indexer db check` checks more.
    """
    with bar("restoring") as tell:
        done = restore_backup(src, place.data_dir, verify=not no_verify, progress=tell)
    if raw:
        click.echo(json.dumps({**done._asdict(), "data_dir": str(place.data_dir)}))
    else:
        sizes = f"{size_text(done.db_bytes)} of database, {size_text(done.cas_bytes)} of archived files"
        click.echo(f"{place.data_dir}: {sizes}; event ids go on at {done.next}")


@db.command()
@_json
@with_place
def migrate(place: Place, raw: bool) -> None:
    """Bring the database to this program's format; make a backup before. Goes on where a kill left it."""
    with bar("migrating") as tell:
        expect_own(place.data_dir)
        done = migrate_store(place.path, memory_mib=place.settings.memory_mib, progress=tell)
    if raw:
        click.echo(json.dumps(done._asdict()))
    else:
        click.echo(f"{place.data_dir}: {_outcome(done)}")


def _outcome(done: Migrated) -> str:
    if done.after > FORMAT:
        return f"format {done.after} is newer than this program's {FORMAT}, which can read it; nothing to do"
    if done.before == done.after:
        return f"format {done.after} is this program's; nothing to do"
    return f"format {done.before} is {done.after} now ({counted(done.handled, 'row')})"
