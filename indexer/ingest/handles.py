"""Handles: whether a claimed one names its account back (sync.md §6).

Owns the due work `Work.VERIFY_HANDLE`: key and PDS of an account are used as soon as they are known, its
handle is told once both ways agree. Apart from the other due work, because strangers' domains may answer
slowly or never. Leaves out how a handle is looked up (`indexer.identity`). Event loop only.
"""

from __future__ import annotations

from typing import Final

from indexer.atproto.types import Did, Handle
from indexer.errors import IdentityError, IdentityGone, IdentityUnavailable
from indexer.identity.domains import domain_of
from indexer.identity.guard import parse_connect_to
from indexer.identity.paces import PACED
from indexer.identity.resolver import INVALID_HANDLE, Identity
from indexer.ingest.answers import Answers
from indexer.ingest.due import DueQueue, Pace, Waits
from indexer.ingest.tools import IngestTools
from indexer.ingest.turns import Place, Postponed, Turns
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
        self._shared = frozenset(domain.lower() for domain in settings.identity.shared_domains)
        self.queue = DueQueue(
            tools.db, Work.VERIFY_HANDLE, self._work_off,
            limit=settings.ingest.work_repos, concurrency=settings.identity.concurrency,
            waits=Waits.of(settings.ingest),
        )  # fmt: skip
        waits = settings.ingest.work_retry_min, settings.ingest.work_retry_max
        self._turns = Turns(self.queue.add, waits, settings.ingest.work_repos)

    async def _work_off(self, did: Did) -> float | None:
        tools = self._tools
        row = await tools.writer.run("due_work", lambda tx: tx.repo(did))
        if row is None or not row.tracked or not row.work & Work.VERIFY_HANDLE:
            return None
        if wait := self._pace.wait_s(did, Work.VERIFY_HANDLE):
            return wait
        try:
            identity = await tools.resolver.resolve(did)
        except IdentityGone:
            claimed, handle = "", INVALID_HANDLE
        else:
            if wait := self._wait_s(identity):
                return wait
            failures = self._pace.ask(did, Work.VERIFY_HANDLE)
            claimed, handle = identity.handle, await self._verified(identity, failures)
        self._pace.answered(did, Work.VERIFY_HANDLE)
        done = await tools.writer.run("handle", lambda tx: self._answers.handle(tx, did, claimed, handle))
        return None if done else tools.settings.ingest.refresh_interval

    async def _verified(self, identity: Identity, failures: int) -> Handle:
        """The claimed handle if it names its account today: what it named before does not count."""
        claimed = identity.handle
        if not claimed or not self._can_be_asked(claimed):
            return INVALID_HANDLE
        places = self._places(claimed)
        try:
            with self._turns.taken(places):
                named = await self._tools.resolver.resolve_handle(claimed, refresh=not failures)
        except IdentityUnavailable as error:
            if error.reason == PACED:
                raise Postponed(self._tools.settings.ingest.refresh_interval) from error
            for place in places:
                self._turns.failed(place.name)
            if failures + 1 < _MAX_TRIES:
                raise
        except IdentityError:
            pass
        else:
            for place in places:
                self._turns.answered(place.name)
            return claimed if named == identity.did else INVALID_HANDLE
        return INVALID_HANDLE

    def _wait_s(self, identity: Identity) -> float:
        """Seconds until the handle may be asked for, and with an answer from after the claim was made.

        Anybody can claim any handle: its domain is asked once for all who do, and few at one time.
        """
        claimed = identity.handle
        if not claimed or not self._can_be_asked(claimed):
            return 0.0
        newer = self._tools.resolver.handle_wait_s(claimed, identity.fetched_at)
        return newer or self._turns.wait_s(identity.did, self._places(claimed))

    def _places(self, handle: Handle) -> list[Place]:
        domain = domain_of(handle)
        name = handle.lower() if domain in self._shared else domain
        return [Place(name, self._tools.settings.ingest.host_questions)]

    def _can_be_asked(self, handle: Handle) -> bool:
        """A development handle only where a server of one's own is named for it."""
        if not handle.lower().endswith(_DEVELOPMENT) or self._tools.settings.network.dns_server:
            return True
        return handle.lower() in self._reachable
