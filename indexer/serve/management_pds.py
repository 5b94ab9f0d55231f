"""`/pds` of the management API: the hosts that are asked, their tiers, limits and bans.

Owns the form of these requests, which is that of hydrant where it has them. What changes is `HostBook`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from indexer.backfill.host_book import HostBook, HostInfo, host_name
from indexer.backfill.tiers import Tier
from indexer.errors import RequestError
from indexer.serve.http_errors import json_response, ready
from indexer.serve.management_ingest import read_object
from indexer.serve.xrpc.params import Params

if TYPE_CHECKING:
    from indexer.serve.services import Services

_MAX_PAGE: Final = 1000
_MAX_NOTE: Final = 500
#: Hosts that one page with a filter may look at.
_SCANNED: Final = 20_000
_STATES: Final = ("active", "idle", "offline", "throttled", "banned")
#: An override: its kind and its least value.
_LIMITS: Final[Mapping[str, tuple[type, float]]] = {
    "fetches": (int, 1),
    "requests_per_s": (float, 0),
    "account_limit": (int, 0),
}


class PdsRoutes:
    """Handlers of `/pds`."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def add_to(self, app: web.Application) -> None:
        router = app.router
        router.add_get("/pds", self.list_hosts)
        router.add_get("/pds/tiers", self.tiers)
        router.add_put("/pds/tiers", self.set_tier)
        router.add_delete("/pds/tiers", self.remove_tier)
        router.add_get("/pds/rate-tiers", self.rate_tiers)
        router.add_put("/pds/limits", self.set_limits)
        router.add_delete("/pds/limits", self.remove_limits)
        router.add_get("/pds/banned", self.banned)
        router.add_put("/pds/banned", self.ban)
        router.add_delete("/pds/banned", self.unban)

    @property
    def _book(self) -> HostBook:
        return ready(self._services.hosts, "nothing is fetched here")

    # ---- what is known

    async def list_hosts(self, request: web.Request) -> web.StreamResponse:
        """`host`: that one; else a page of all, of those in a `status` where that is given."""
        params, book = Params(request.query), self._book
        if params.optional("host") is not None:
            host = host_name(params.required("host"))
            if not book.known(host):
                raise RequestError(f"nothing is known of {host}", status=404, name="HostNotFound")
            return json_response({"hosts": [shown(book.info(host), book)]})
        status, after = params.optional("status"), params.optional("cursor") or ""
        if status not in (None, *_STATES):
            raise RequestError(f"status must be one of {', '.join(_STATES)}")
        limit = params.integer("limit", 100, 1, _MAX_PAGE)
        found: list[HostInfo] = []
        looked = 0
        while len(found) < limit and looked < _SCANNED:
            page = book.page(after, limit)
            looked += len(page)
            fitting = [info for info in page if status in (None, info.status)][: limit - len(found)]
            found += fitting
            if len(page) < limit:
                return json_response({"hosts": [shown(info, book) for info in found]})
            after = found[-1].host if len(found) == limit else page[-1].host
        return json_response({"hosts": [shown(info, book) for info in found], "cursor": after})

    async def rate_tiers(self, _request: web.Request) -> web.StreamResponse:
        """The tiers of the settings, by name."""
        return json_response({name: _tier(tier) for name, tier in self._book.hosts.tiers.all.items()})

    # ---- tiers and limits

    async def tiers(self, _request: web.Request) -> web.StreamResponse:
        """What was assigned by name, and what there is to assign."""
        book = self._book
        given = [{"host": host, "tier": tier} for host, tier in book.assignments().items()]
        tiers = {name: _tier(tier) for name, tier in book.hosts.tiers.all.items()}
        return json_response({"assignments": given, "rate_tiers": tiers})

    async def set_tier(self, request: web.Request) -> web.StreamResponse:
        """`{"host", "tier"}`: stands before every rule, also after a restart."""
        body = await read_object(request, ("host", "tier"))
        tier = body.get("tier")
        if not isinstance(tier, str) or not tier:
            raise RequestError("tier: the name of a tier is wanted")
        return self._told(await self._book.set_tier(_host(body), tier))

    async def remove_tier(self, request: web.Request) -> web.StreamResponse:
        """`host`, as a parameter or in the body: the rules decide again."""
        return self._told(await self._book.set_tier(await _named(request), ""))

    async def set_limits(self, request: web.Request) -> web.StreamResponse:
        """`{"host", "fetches"?, "requests_per_s"?, "account_limit"?}`; null leaves one to the tier again."""
        body = await read_object(request, ("host", *_LIMITS))
        limits = {name: _limit(name, body[name]) for name in _LIMITS if name in body}
        if not limits:
            raise RequestError(f"at least one of {', '.join(_LIMITS)} is wanted")
        if "account_limit" in limits:
            limits["accounts"] = limits.pop("account_limit")
        return self._told(await self._book.set_limits(_host(body), limits))

    async def remove_limits(self, request: web.Request) -> web.StreamResponse:
        """`host`: its tier's limits count again."""
        none = {"fetches": None, "requests_per_s": None, "accounts": None}
        return self._told(await self._book.set_limits(await _named(request), none))

    # ---- bans

    async def banned(self, _request: web.Request) -> web.StreamResponse:
        return json_response(self._book.banned())

    async def ban(self, request: web.Request) -> web.StreamResponse:
        """`{"host", "note"?}`: nothing is fetched from it, and nothing taken of its accounts."""
        body = await read_object(request, ("host", "note"))
        note = body.get("note", "")
        if not isinstance(note, str) or len(note) > _MAX_NOTE:
            raise RequestError(f"note must be a text of at most {_MAX_NOTE} characters")
        return self._told(await self._book.ban(_host(body), note))

    async def unban(self, request: web.Request) -> web.StreamResponse:
        """`host`, as a parameter or in the body."""
        return self._told(await self._book.unban(await _named(request)))

    def _told(self, info: HostInfo) -> web.StreamResponse:
        return json_response(shown(info, self._book))


def shown(info: HostInfo, book: HostBook) -> dict[str, Any]:
    """A host for people."""
    row, limits = info.row, book.hosts.tiers.of(info.host, info.row)
    return {
        "host": info.host,
        "status": info.status,
        "accounts": info.accounts,
        "tier": info.tier,
        "assigned": bool(row.tier),
        **_tier(limits),
        "note": row.note,
        "first_asked_us": row.first_us or None,
        "last_ok_us": row.ok_us or None,
        "last_failed_us": row.failed_us or None,
        "faults": row.faults,
        "left_alone_until_us": row.until_us or None,
        "error": row.error,
    }


def _tier(tier: Tier) -> dict[str, Any]:
    return {
        "fetches": tier.fetches,
        "requests_per_s": tier.requests_per_s,
        "account_limit": tier.accounts,
    }


def _limit(name: str, value: Any) -> float | int | None:
    kind, least = _LIMITS[name]
    if value is None:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))) or not least <= value <= 1e9:
        what = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name} must be {what} from {least:g} on, or null")
    return kind(value)  # type: ignore[no-any-return]


def _host(body: Mapping[str, Any]) -> str:
    host = body.get("host")
    if not isinstance(host, str) or not host:
        raise RequestError("host: the name of a host is wanted, as pds.example.com")
    return host


async def _named(request: web.Request) -> str:
    """The host of a request that may name it as a parameter."""
    host = Params(request.query).optional("host")
    return host if host else _host(await read_object(request, ("host",)))
