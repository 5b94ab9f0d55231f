"""Handles: whether a claimed one names its account back (sync.md §6).

Owns the due work `Work.VERIFY_HANDLE`: key and PDS of an account are used as soon as they are known, its
handle is told once both ways agree. Apart from the other due work, because strangers' domains may answer
slowly or never. Leaves out how a handle is looked up (`indexer.identity`). Event loop only.
"""

from __future__ import annotations

from typing import Final

from indexer.atproto.types import Did, Handle
from indexer.errors import IdentityError, IdentityGone, IdentityUnavailable
from indexer.identity.guard import parse_connect_to
from indexer.identity.resolver import INVALID_HANDLE, Identity
from indexer.ingest.answers import Answers
from indexer.ingest.due import DueQueue, Pace
from indexer.ingest.tools import IngestTools
from indexer.store.codecs import Work

#: Tries after which a domain without an answer counts as one that does not name the account.
_MAX_TRIES: Final = 10
_DEVELOPMENT: Final = ".test"  # in no public DNS


class HandleWork:
    """Verifies handles."""

    def __init__(self, tools: IngestTools, answers: Answers) -> None:
        self._tools = tools
        self._answers = answers
        settings = tools.settings
        self._reachable = {host for host, _ in parse_connect_to(settings.network.connect_to)}
        self._pace = Pace(settings.ingest.refresh_interval, settings.ingest.work_repos)
        self.queue = DueQueue(
            tools.db, Work.VERIFY_HANDLE, self._work_off,
            limit=settings.ingest.work_repos, concurrency=settings.identity.concurrency,
        )  # fmt: skip

    async def _work_off(self, did: Did) -> float | None:
        tools = self._tools
        row = await tools.writer.run("due_work", lambda tx: tx.repo(did))
        if row is None or not row.tracked or not row.work & Work.VERIFY_HANDLE:
            return None
        if wait := self._pace.wait_s(did, Work.VERIFY_HANDLE):
            return wait
        failures = self._pace.ask(did, Work.VERIFY_HANDLE)
        try:
            identity = await tools.resolver.resolve(did)
        except IdentityGone:
            claimed, handle = "", INVALID_HANDLE
        else:
            claimed, handle = identity.handle, await self._verified(identity, failures)
        self._pace.answered(did, Work.VERIFY_HANDLE)
        done = await tools.writer.run("handle", lambda tx: self._answers.handle(tx, did, claimed, handle))
        return None if done else tools.settings.ingest.refresh_interval

    async def _verified(self, identity: Identity, failures: int) -> Handle:
        """The claimed handle if it names its account today: what it named before does not count."""
        claimed = identity.handle
        if not claimed or not self._can_be_asked(claimed):
            return INVALID_HANDLE
        try:
            named = await self._tools.resolver.resolve_handle(claimed, refresh=not failures)
        except IdentityUnavailable:
            if failures + 1 < _MAX_TRIES:
                raise
        except IdentityError:
            pass
        else:
            return claimed if named == identity.did else INVALID_HANDLE
        return INVALID_HANDLE

    def _can_be_asked(self, handle: Handle) -> bool:
        """A development handle only where a server of one's own is named for it."""
        if not handle.lower().endswith(_DEVELOPMENT) or self._tools.settings.network.dns_server:
            return True
        return handle.lower() in self._reachable
