"""Who may be read: from an `at-identifier` to a repository that is served.

Owns the rules of account status, of modes that keep no records, and of queries that cost much. The
status is read from the store for every query, so a takedown holds from the commit that records it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from indexer.atproto.syntax import check_at_identifier, check_did
from indexer.atproto.types import Did
from indexer.errors import RequestError
from indexer.serve.xrpc.params import Params
from indexer.store.codecs import AccountStatus, RepoRow

if TYPE_CHECKING:
    from indexer.serve.services import Services
    from indexer.serve.xrpc.trees import Trees

_REFUSALS = {
    AccountStatus.TAKENDOWN: "RepoTakendown",
    AccountStatus.SUSPENDED: "RepoSuspended",
    AccountStatus.DEACTIVATED: "RepoDeactivated",
    AccountStatus.DELETED: "RepoNotFound",
}


class Slots:
    """A bound on queries that cost much; the one too many is told to come back."""

    def __init__(self, most: int) -> None:
        self._free = asyncio.Semaphore(most)

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        if self._free.locked():
            raise RequestError("too many expensive queries at once", status=503, name="ServerBusy")
        async with self._free:
            yield


@dataclass(frozen=True, slots=True)
class Context:
    """What every query gets."""

    services: Services
    trees: Trees
    expensive: Slots


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
    return await services.resolver.resolve_handle(identifier)


def known_repo(row: RepoRow | None, did: Did) -> RepoRow:
    """The row of a repository that we follow or have followed, whatever its status."""
    if row is None or (not row.tracked and not row.rev):
        raise RequestError(f"repository {did} is not indexed here", name="RepoNotFound")
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
