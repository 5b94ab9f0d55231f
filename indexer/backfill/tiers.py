"""Which limits a host has: an operator's word first, then the first rule that fits, then `default`.

Owns the tiers of the settings and their order. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Final, NamedTuple

from indexer.config import Settings, parse_host_rule, parse_tier
from indexer.store.host_rows import HostRow

DEFAULT: Final = "default"


class Tier(NamedTuple):
    """What one host may be asked for; 0 requests or accounts is no limit."""

    name: str
    fetches: int
    requests_per_s: float
    accounts: int


class Tiers:
    """The tiers and rules of the settings."""

    def __init__(self, settings: Settings) -> None:
        hosts = settings.hosts
        default = Tier(DEFAULT, settings.backfill.per_host, hosts.requests_per_s, hosts.account_limit)
        self.all: Mapping[str, Tier] = {
            DEFAULT: default,
            **{tier.name: tier for tier in (Tier(*parse_tier(text)) for text in hosts.tiers)},
        }
        self._rules = [parse_host_rule(rule) for rule in hosts.rules]

    def of(self, host: str, row: HostRow) -> Tier:
        """The limits of ``host``, whose row says what an operator decided. A tier that has left the
        settings counts as none."""
        tier = self.all.get(row.tier) or self.all[self._by_rule(host)]
        return Tier(
            tier.name,
            tier.fetches if row.fetches is None else row.fetches,
            tier.requests_per_s if row.requests_per_s is None else row.requests_per_s,
            tier.accounts if row.accounts is None else row.accounts,
        )

    def _by_rule(self, host: str) -> str:
        bare = host.rpartition(":")[0] or host
        for pattern, tier in self._rules:
            if fnmatchcase(host, pattern) or fnmatchcase(bare, pattern):
                return tier
        return DEFAULT
