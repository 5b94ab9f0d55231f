"""Rows of `hosts`: what an operator decided about a host, and what was last seen of it.

Owns the row, its bytes, the name under which a host is kept, and the totals of accounts by host. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgpack

from indexer.atproto.types import Micros
from indexer.store.codecs import RepoRow

#: Totals of followed accounts: this and the host's name.
ACCOUNTS: Final = "hosts/"
#: In `cursors`: accounts up to this DID are counted; `ALL_COUNTED` once every one is.
COUNTED: Final = "accounts by host"
ALL_COUNTED: Final = "\x7f"  # above every DID

_DEFAULT_PORTS: Final = {"https": ":443", "http": ":80", "wss": ":443", "ws": ":80"}
_pack: Final[Callable[[Any], bytes]] = msgpack.Packer().pack


class HostRow(NamedTuple):
    """The first six are an operator's word, the others what was seen."""

    tier: str = ""  # "": by the rules
    banned: bool = False
    note: str = ""
    fetches: int | None = None  # None: as the tier says, as the next two
    requests_per_s: float | None = None
    accounts: int | None = None
    first_us: Micros = 0  # when it was first asked
    ok_us: Micros = 0  # when it last answered
    failed_us: Micros = 0
    faults: int = 0  # in a row
    limits: int = 0  # refusals by rate limits in a row
    until_us: Micros = 0  # left alone until then
    error: str = ""  # of the last failure

    @property
    def decided(self) -> bool:
        """Whether an operator said anything about the host."""
        return tuple(self[:6]) != tuple(NO_HOST[:6])


NO_HOST: Final = HostRow()


def encode_host(row: HostRow) -> bytes:
    return _pack(tuple(row))


def decode_host(data: bytes) -> HostRow:
    return HostRow._make(msgpack.unpackb(data))


@lru_cache(maxsize=8192)
def host_of(url: str) -> str:
    """``host`` or ``host:port`` of an origin, lower case, without a default port; "" for an unknown one."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    name = parts.netloc.rpartition("@")[2].lower()
    return name.removesuffix(_DEFAULT_PORTS.get(parts.scheme, "\0"))


def home_of(row: RepoRow | None) -> str:
    """The host on which a repository counts as an account; "" for one that is not followed."""
    return host_of(row.pds) if row is not None and row.tracked and row.pds else ""
