"""What an operator says of hosts, and what he is told of them: tiers, limits, bans, lists.

Owns the rows of `hosts` and the order in which a change reaches the store, the hosts in memory and ingest.
A change is durable before its answer. Leaves out the form of requests (`indexer.serve`). Event loop only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NamedTuple

import structlog

from indexer.backfill.hosts import Hosts, Status
from indexer.errors import RequestError
from indexer.ingest.account import PDS_PREFIX
from indexer.ingest.bans import Bans
from indexer.ingest.position import cursor_name
from indexer.store.codecs import after_prefix
from indexer.store.database import Database
from indexer.store.host_rows import ACCOUNTS, NO_HOST, HostRow, host_of
from indexer.store.keyspaces import COUNTS, HOSTS
from indexer.store.transaction import Transaction
from indexer.store.writer import Writer

log = structlog.get_logger()

#: Tally of the hosts that an operator said something about.
DECIDED: Final = "decided hosts"
_HOST = re.compile(
    r"(?=.{1,260}$)(\[[0-9a-f:.]+\]|[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*)(:\d{1,5})?"
)


class HostInfo(NamedTuple):
    """One host, for people and for `listHosts`."""

    host: str
    status: Status
    accounts: int
    tier: str
    row: HostRow
    seq: int | None  # of its firehose, where we follow it


def host_name(text: str) -> str:
    """A host as its row is kept, from a name or a URL; raises `RequestError`."""
    name = (host_of(text) if "://" in text else text).lower().removesuffix(":443")
    if not _HOST.fullmatch(name):
        raise RequestError(f"host: {text[:120]!r} is no host; write it as pds.example.com or 127.0.0.1:2583")
    return name


@dataclass(frozen=True, slots=True)
class SaveUnit:
    """What was seen of hosts; an operator's word on them stays."""

    rows: Mapping[str, HostRow]

    def __call__(self, tx: Transaction) -> None:
        for host, seen in self.rows.items():
            tx.set_host(host, HostRow._make((*tx.host(host)[:6], *seen[6:])))


@dataclass(frozen=True, slots=True)
class DecideUnit:
    """An operator's word on a host: some of the first six fields. Gives the row."""

    host: str
    word: Mapping[str, Any]
    most: int

    def __call__(self, tx: Transaction) -> HostRow:
        old = tx.host(self.host)
        row = old._replace(**self.word)
        more = row.decided - old.decided
        if more > 0 and tx.count(DECIDED) >= self.most:
            raise RequestError(
                f"{self.most} hosts have limits of their own already (hosts.max_decided)", status=409
            )
        tx.add_count(DECIDED, more)
        tx.set_host(self.host, row)
        return row


class HostBook:
    """``released`` is called with a host that may be fetched from again."""

    def __init__(
        self, db: Database, writer: Writer, hosts: Hosts, bans: Bans, released: Callable[[str], None]
    ) -> None:
        self._db = db
        self._writer = writer
        self._bans = bans
        self._released = released
        self.hosts = hosts

    # ---- changes

    async def set_tier(self, host: str, tier: str) -> HostInfo:
        """Gives a host a tier; "" leaves it to the rules again."""
        if tier and tier not in self.hosts.tiers.all:
            known = ", ".join(sorted(self.hosts.tiers.all))
            raise RequestError(f"tier: there is no {tier!r}, only {known}")
        return await self._decide(host, {"tier": tier})

    async def set_limits(self, host: str, limits: Mapping[str, Any]) -> HostInfo:
        """Overrides of its tier: ``fetches``, ``requests_per_s``, ``accounts``; None: as the tier says."""
        return await self._decide(host, limits)

    async def ban(self, host: str, note: str = "") -> HostInfo:
        """Nothing is fetched from the host, and nothing taken of the accounts that live there."""
        return await self._decide(host, {"banned": True, "note": note})

    async def unban(self, host: str) -> HostInfo:
        return await self._decide(host, {"banned": False, "note": ""})

    async def _decide(self, text: str, word: Mapping[str, Any]) -> HostInfo:
        host = host_name(text)
        unit = DecideUnit(host, word, self.hosts.settings.hosts.max_decided)
        row = await self._writer.run("host_decide", unit)
        self.hosts.decided(host, row)
        self._bans.set(host, row.banned)
        log.warning("host_decided", host=host, **word)
        if not self.hosts.held(host):
            self._released(host)
        return self.info(host)

    async def save(self) -> None:
        """Stores what was seen of hosts since the last time."""
        changed = self.hosts.changed()
        if changed:
            await self._writer.run("host_save", SaveUnit(changed))

    # ---- what is told

    def info(self, host: str) -> HostInfo:
        """What is known of one host, whether or not it was ever asked."""
        row = self.hosts.row(host)
        tier = self.hosts.tiers.of(host, row).name
        seqs = (self._db.cursor(cursor_name(f"{PDS_PREFIX}{scheme}://{host}")) for scheme in ("wss", "ws"))
        return HostInfo(
            host, self.hosts.state_of(host, row), self._db.count(ACCOUNTS + host), tier, row,
            next((seq for seq in seqs if seq is not None), None),
        )  # fmt: skip

    def known(self, host: str) -> bool:
        """Whether the host has a row, or accounts."""
        return self.hosts.row(host) != NO_HOST or self._db.count(ACCOUNTS + host) > 0

    def page(self, after: str, limit: int) -> list[HostInfo]:
        """Up to ``limit`` known hosts behind ``after``, by name."""
        start = f"{after}\0".encode() if after else None
        rows = {host for host, _ in self._db.scan(HOSTS, start, limit=limit)}
        prefix = f"{ACCOUNTS}{after}\0" if after else ACCOUNTS
        counted = self._db.scan(COUNTS, prefix.encode(), after_prefix(ACCOUNTS.encode()))
        rows.update(name.removeprefix(ACCOUNTS) for name, _ in islice(counted, limit))
        return [self.info(host) for host in sorted(rows)[:limit]]

    def assignments(self) -> dict[str, str]:
        """Hosts to which an operator gave a tier."""
        return {host: row.tier for host, row in self._db.scan(HOSTS) if row.tier}

    def banned(self) -> list[str]:
        return sorted(self._bans.hosts)
