"""Who may be read: from an `at-identifier` to a repository that is served.

Owns the rules of account status, of modes that keep no records, and of queries that cost much. The
status is read from the store for every query, so a takedown holds from the commit that records it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from indexer.atproto.syntax import check_at_identifier, check_did
from indexer.atproto.types import Did
from indexer.errors import IdentityGone, IdentityUnavailable, RequestError
from indexer.serve.listener import client_address
from indexer.serve.xrpc.params import Params
from indexer.store.codecs import AccountStatus, RepoRow

if TYPE_CHECKING:
    from indexer.serve.services import Services
    from indexer.serve.xrpc.trees import Trees

log = structlog.get_logger(__name__)

_REFUSALS = {
    AccountStatus.TAKENDOWN: "RepoTakendown",
    AccountStatus.SUSPENDED: "RepoSuspended",
    AccountStatus.DEACTIVATED: "RepoDeactivated",
    AccountStatus.DELETED: "RepoNotFound",
}


class Slots:
    """A bound on queries that cost much, in total and for one address; the one too many is told to come
    back."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self._most = most
        self._share = most_per_address
        self._taken: Counter[str] = Counter()

    @contextmanager
    def take(self, address: str) -> Iterator[None]:
        if self._taken[address] >= self._share:
            raise RequestError(
                "too many expensive queries from this address", status=429, name="TooManyRequests"
            )
        if self._taken.total() >= self._most:
            raise RequestError("too many expensive queries at once", status=503, name="ServerBusy")
        self._taken[address] += 1
        try:
            yield
        finally:
            self._taken[address] -= 1
            self._taken += Counter()  # only what is taken is kept


@dataclass(frozen=True, slots=True)
class Context:
    """What every query gets."""

    services: Services
    trees: Trees
    expensive: Slots

    def slot(self, request: web.Request) -> AbstractContextManager[None]:
        """A place for an expensive query, held while it runs; `RequestError` when there is none."""
        proxies = self.services.settings.public.trusted_proxies
        return self.expensive.take(client_address(request, proxies))


def require_records(services: Services) -> None:
    """Ephemeral mode keeps no records to be asked for."""
    if services.db.mode.ephemeral:
        raise RequestError(
            "this server keeps no records (ephemeral mode)", status=501, name="MethodNotImplemented"
        )


def require_blocks(services: Services) -> None:
    """Index-only mode keeps records without their content."""
    require_records(services)
    if not services.db.mode.blocks:
        raise RequestError(
            "this server keeps no record content (index-only mode)", status=501, name="MethodNotImplemented"
        )


async def named_did(services: Services, params: Params, name: str = "repo") -> Did:
    """The DID that a DID or handle parameter means."""
    identifier = params.required(name, check_at_identifier)
    if identifier.startswith("did:"):
        return identifier
    try:
        return await services.resolver.resolve_handle(identifier)
    except (IdentityGone, IdentityUnavailable) as error:
        log.debug("handle_unresolved", handle=identifier, error=str(error))
        if error.reason == "dns":  # our own server: nothing was learnt about the handle
            log.warning("name_server_silent", error=str(error))
            raise RequestError("no name server answers", status=502, name="UpstreamFailure") from error
        raise RequestError(f"handle {identifier} could not be resolved", name="HandleNotFound") from error


def is_resolved(row: RepoRow) -> bool:
    """Whether the account's identity was ever known: of others nobody can say that they are active."""
    return bool(row.signing_key or row.rev or row.epoch)


def known_repo(row: RepoRow | None, did: Did) -> RepoRow:
    """The row of a repository that we follow or have followed, whatever its status. One that was only heard
    of, and of which no directory ever told, may not exist: it is not found."""
    if row is None or (not row.tracked and not row.rev):
        raise RequestError(f"repository {did} is not indexed here", name="RepoNotFound")
    if row.status.active and not is_resolved(row):
        raise RequestError(f"the identity of {did} is not known so far", name="RepoNotFound")
    return row


def served_repo(row: RepoRow | None, did: Did) -> RepoRow:
    """The row of a repository whose content may be shown now."""
    row = known_repo(row, did)
    if row.status is not AccountStatus.ACTIVE:
        name = _REFUSALS.get(row.status, "RepoDeactivated")
        raise RequestError(f"account {did} is not active ({row.status.label})", name=name)
    return row


def did_param(params: Params) -> Did:
    """The required ``did`` parameter."""
    return params.required("did", check_did)
