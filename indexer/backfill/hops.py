"""The hosts behind one request: where a host redirects to another, that one's limits hold too.

Owns what a request takes of each host on its way, beyond the first, for which the caller has paid: a slot, a
token, the patience for them. So no host can make us ask another more than that one is to be asked. And which
host stands before all PDSes: the relay.
Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container, Sequence
from math import isinf
from typing import Final, Self

from yarl import URL

from indexer.backfill.hosts import Hosts, host_of
from indexer.backfill.outcome import HOST_BUSY
from indexer.errors import FetchTransient
from indexer.ingest.account import PDS_PREFIX

#: Between two looks for a free slot.
_LOOK_S: Final = 0.05


class NoRoom(FetchTransient):
    """``host``, behind a redirect, has no free slot; nothing is wrong with anybody."""

    def __init__(self, host: str) -> None:
        super().__init__(f"{host} is busy", reason=HOST_BUSY)
        self.host = host


class Hops:
    """Called by the client before each request (`identity.http.Dial`); a context manager around them all.

    Of the hosts ``held`` the caller has a slot.
    """

    def __init__(self, hosts: Hosts, held: Container[str]) -> None:
        self._hosts = hosts
        self._held = held
        self._first = True
        self._taken = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    async def __call__(self, url: URL) -> None:
        """Waits for the host's turn; raises `NoRoom`, or `FetchTransient` where it is to be left alone."""
        if self._first:
            self._first = False
            return
        self._leave()
        host = host_of(str(url))
        await self._turn(host)
        self._hosts.pay(host)

    async def _turn(self, host: str) -> None:
        hosts, limits = self._hosts, self._hosts.settings.backfill
        now = asyncio.get_running_loop().time
        until = now() + min(limits.stalled_after, limits.grace / 2)
        while True:
            if rest := hosts.penalty_s(host):
                wait = None if isinf(rest) else rest
                message = f"{host}, behind a redirect, is to be left alone"
                raise FetchTransient(message, retry_after=wait, reason=HOST_BUSY)
            wait_s = hosts.wait_s(host)
            if not wait_s and (host in self._held or self._join(host)):
                return
            if now() + wait_s > until:
                raise NoRoom(host)
            await asyncio.sleep(max(wait_s, _LOOK_S))

    def _join(self, host: str) -> bool:
        if not self._hosts.join(host):
            return False
        self._taken = host
        return True

    def _leave(self) -> None:
        if self._taken:
            self._hosts.release(self._taken)
            self._taken = ""


def relay_origin(upstreams: Sequence[str]) -> str:
    """The HTTP origin of the first upstream that is a relay, "" when there is none."""
    for url in upstreams:
        if not url.startswith(PDS_PREFIX):
            return url.replace("ws", "http", 1).rstrip("/") if url.startswith("ws") else url.rstrip("/")
    return ""
