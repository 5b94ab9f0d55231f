"""Hosts of which nothing is taken: their names in memory, kept in step with the rows of `hosts`.

Owns the question whether a frame is a banned host's: it came from it, or its account lives there. Who bans,
and the rows, are elsewhere. Event loop only.
"""

from __future__ import annotations

from typing import Final

from indexer.ingest.account import PDS_PREFIX
from indexer.store.database import Database
from indexer.store.host_rows import host_of
from indexer.store.keyspaces import HOSTS

#: The reason with which their frames are dropped.
BANNED: Final = "host_banned"


class Bans:
    """``covers`` is asked for every frame; nothing is looked up while no host is banned."""

    __slots__ = ("hosts",)

    def __init__(self, db: Database) -> None:
        self.hosts: frozenset[str] = frozenset(host for host, row in db.scan(HOSTS) if row.banned)

    def set(self, host: str, banned: bool) -> None:
        """From the next frame on."""
        self.hosts = self.hosts | {host} if banned else self.hosts - {host}

    def covers(self, pds: str, source: str = "") -> bool:
        """Whether the account of a frame lives on a banned host, or the frame came from one."""
        if not self.hosts:
            return False
        direct = source.startswith(PDS_PREFIX) and _bare(source.removeprefix(PDS_PREFIX)) in self.hosts
        return direct or (pds != "" and host_of(pds) in self.hosts)


def _bare(url: str) -> str:
    return host_of(url.rstrip("/"))
