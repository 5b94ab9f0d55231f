"""Questions to hosts that list repositories or hosts, and what is made of their answers.

Owns the URLs and the reading of listRepos, listReposByCollection, listHosts and describeRepo. An answer that
is none is a ValueError; entries that make no sense are counted and passed over. Pure.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

import orjson

from indexer.atproto.syntax import is_did, is_nsid, is_tid
from indexer.atproto.types import Did, Nsid, Rev

LIST_REPOS, BY_COLLECTION, HOSTS = "list_repos", "by_collection", "hosts"
_METHODS: Final = {
    LIST_REPOS: ("listRepos", 1000),
    BY_COLLECTION: ("listReposByCollection", 2000),
    HOSTS: ("listHosts", 1000),
}
_MAX_CURSOR: Final = 2048
#: A page may be larger than what was asked for, but not by much.
_MAX_ENTRIES: Final = 4000
_MAX_COLLECTIONS: Final = 10_000
#: Hosts that a relay does not take from, or cannot reach, are not crawled.
_UNUSED_HOSTS: Final = frozenset(("banned", "offline"))


class Listed(NamedTuple):
    """One repository of a list; rev "" where it is not told."""

    did: Did
    rev: Rev = ""
    active: bool = True
    status: str | None = None


class RepoPage(NamedTuple):
    """``garbage``: entries that made no sense. ``cursor`` is "" at the end."""

    repos: list[Listed]
    cursor: str
    garbage: int


class HostPage(NamedTuple):
    hosts: list[str]
    cursor: str
    garbage: int


def page_url(origin: str, mode: str, cursor: str, collection: Nsid, size: int) -> str:
    """Where the page behind ``cursor`` is asked for."""
    method, most = _METHODS[mode]
    query = {"limit": str(min(size, most))}
    if mode == BY_COLLECTION:
        query["collection"] = collection
    if cursor:
        query["cursor"] = cursor
    return f"{origin}/xrpc/com.atproto.sync.{method}?{urlencode(query)}"


def describe_url(origin: str, did: Did) -> str:
    return f"{origin.rstrip('/')}/xrpc/com.atproto.repo.describeRepo?{urlencode({'repo': did})}"


def read_repos(body: bytes) -> RepoPage:
    """A page of listRepos or of listReposByCollection."""
    items, cursor = _list(body, "repos")
    found: dict[Did, Listed] = {}
    garbage = 0
    for item in items:
        listed = _listed(item)
        if listed is None:
            garbage += 1
        else:
            found[listed.did] = listed
    return RepoPage(list(found.values()), cursor, garbage)


def read_hosts(body: bytes) -> HostPage:
    """A page of listHosts; hosts that are banned or offline there are left out."""
    items, cursor = _list(body, "hosts")
    found: dict[str, None] = {}
    garbage = 0
    for item in items:
        name = item.get("hostname") if isinstance(item, dict) else None
        if not isinstance(name, str) or not 0 < len(name) <= 260:
            garbage += 1
        elif item.get("status") not in _UNUSED_HOSTS:
            found[name.lower()] = None
    return HostPage(list(found), cursor, garbage)


def read_collections(body: bytes, did: Did) -> list[Nsid]:
    """The collections that describeRepo tells of ``did``."""
    answer = _object(body)
    if answer.get("did") != did:
        raise ValueError("it describes another account")
    collections = answer.get("collections")
    if not isinstance(collections, list) or len(collections) > _MAX_COLLECTIONS:
        raise ValueError("no list of collections")
    return [item for item in collections if isinstance(item, str) and is_nsid(item)]


def _object(body: bytes) -> dict[str, Any]:
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(answer, dict):
        raise ValueError("not a JSON object")
    return answer


def _list(body: bytes, name: str) -> tuple[list[Any], str]:
    answer = _object(body)
    items, cursor = answer.get(name), answer.get("cursor") or ""
    if not isinstance(items, list) or len(items) > _MAX_ENTRIES:
        raise ValueError(f"no list of {name}")
    if not isinstance(cursor, str) or len(cursor) > _MAX_CURSOR:
        raise ValueError("a cursor that is none")
    return items, cursor


def _listed(item: Any) -> Listed | None:
    if not isinstance(item, dict):
        return None
    did, rev, active, status = (item.get(name) for name in ("did", "rev", "active", "status"))
    if not isinstance(did, str) or not is_did(did):
        return None
    known = rev if isinstance(rev, str) and is_tid(rev) else ""
    said = status if isinstance(status, str) and len(status) <= 100 else None
    return Listed(did, known, active is not False, said)
