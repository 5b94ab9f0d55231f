"""Due work: what the ordered pass left to be asked outside of it.

Owns the questions and their pace: resolve an identity and replay what waited for it, check a status,
compare a rev. Each is a `Work` flag in a repository's row; which repository comes when is `due`'s, what
the answers change `answers`'. Event loop only.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import quote

import orjson

from indexer.atproto.syntax import is_tid
from indexer.atproto.types import Did
from indexer.errors import FetchRefused, FetchTransient, IdentityGone, IndexerError
from indexer.identity.http import Response
from indexer.identity.resolver import Identity
from indexer.ingest.account import status_of
from indexer.ingest.answers import Answers, Latest
from indexer.ingest.drain import Drainer, is_ready
from indexer.ingest.due import DueQueue, Pace
from indexer.ingest.tools import IngestTools
from indexer.store.codecs import AccountStatus, RepoRow, Work

GET_STATUS = "/xrpc/com.atproto.sync.getRepoStatus?did="
GET_REPO = "/xrpc/com.atproto.sync.getRepo?did="
_MAX_STATUS_BYTES = 16_384
#: Tries after which a host that gives no usable answer is not asked again for the same reason.
_MAX_TRIES = 10
_REFUSALS = {
    "RepoDeactivated": AccountStatus.DEACTIVATED,
    "RepoTakendown": AccountStatus.TAKENDOWN,
    "RepoSuspended": AccountStatus.SUSPENDED,
    "RepoNotFound": AccountStatus.DELETED,
}
#: What is asked of the network, in this order, and what can be done without it.
QUESTIONS: Final = Work.RESOLVE | Work.CHECK_STATUS | Work.COMPARE_REV | Work.DRAIN | Work.PURGE


class DueWork:
    """What the work is, one repository at a time; `queue` says which."""

    def __init__(self, tools: IngestTools, answers: Answers, drainer: Drainer) -> None:
        self._tools = tools
        self._answers = answers
        self._drainer = drainer
        settings = tools.settings
        self._pace = Pace(settings.ingest.refresh_interval, settings.ingest.work_repos)
        self.queue = DueQueue(
            tools.db, QUESTIONS, self._work_off,
            limit=settings.ingest.work_repos, concurrency=settings.identity.concurrency,
        )  # fmt: skip

    async def _work_off(self, did: Did) -> float | None:
        """Does what the row asks for, one flag at a time; seconds to wait where it is too soon for one."""
        tools = self._tools
        # Asked of the writer, because the step that woke us may not be committed yet.
        row = await tools.writer.run("due_work", lambda tx: tx.repo(did))
        if row is None or not row.work & QUESTIONS or not row.tracked:
            tools.hints.discard(did)
            return None
        waits: list[float] = []
        for flag, ask in (
            (Work.RESOLVE, self._resolve),
            (Work.CHECK_STATUS, self._check_status),
            (Work.COMPARE_REV, self._compare_rev),
        ):
            if not row.work & flag:
                continue
            if wait := self._too_soon(did, flag):
                waits.append(wait)
                continue
            last = self._pace.ask(did, flag) + 1 >= _MAX_TRIES
            await ask(did, row, last)
            self._pace.answered(did, flag)
            row = tools.db.repo(did)
            if row is None:
                return None
        if row.work & Work.DRAIN and is_ready(row):
            await self._drainer.drain(did)
        if row.work & Work.PURGE:
            await tools.writer.run("purge", lambda tx: self._answers.purge(tx, did))
        if did in tools.hints and row.work & Work.RESOLVE:  # came in while this was under way
            return 0.0
        return min(waits, default=None)

    def _too_soon(self, did: Did, flag: Work) -> float:
        """Seconds until this question about this account may be asked again.

        A hint by `#identity` is answered at once: a changed identity is what it announces.
        """
        if flag is Work.RESOLVE and did in self._tools.hints:
            return 0.0
        return self._pace.wait_s(did, flag)

    async def _resolve(self, did: Did, row: RepoRow, last: bool) -> None:
        """The identity anew, then whatever waited for it."""
        tools = self._tools
        tools.hints.discard(did)
        try:
            identity = await tools.resolver.resolve(did, refresh=bool(row.signing_key))
        except IdentityGone as error:
            gone = error
            await tools.writer.run("identity_gone", lambda tx: self._answers.gone(tx, did, gone))
            return
        await tools.writer.run("identity", lambda tx: self._answers.learned(tx, did, identity))
        now = tools.db.repo(did)
        if now is not None and now.work & Work.RESOLVE and is_ready(now):
            await self._drainer.drain(did, fresh=True)

    async def _check_status(self, did: Did, row: RepoRow, last: bool) -> None:
        """Asks the PDS that the directory names today."""
        tools = self._tools
        try:
            identity = await tools.resolver.resolve(did, refresh=True)
            status = (await self._latest(identity)).status
            if status is None and row.status is AccountStatus.DELETED:
                status = await self._repo_status(identity)
        except IdentityGone as error:
            gone = error
            await tools.writer.run("identity_gone", lambda tx: self._answers.gone(tx, did, gone))
            return
        except (IndexerError, ValueError):
            if not last:
                raise
            identity, status = _known(did, row), None
        await tools.writer.run("status", lambda tx: self._answers.checked(tx, did, identity, status))

    async def _compare_rev(self, did: Did, row: RepoRow, last: bool) -> None:
        rev = None
        try:
            rev = (await self._latest(await self._tools.resolver.resolve(did))).rev
        except IdentityGone:
            pass
        except (IndexerError, ValueError):
            if not last:
                raise
        await self._tools.writer.run("compare_rev", lambda tx: self._answers.compared(tx, did, rev))

    async def _latest(self, identity: Identity) -> Latest:
        """`getRepoStatus` of the account's own PDS; a banned one is not asked."""
        if self._tools.bans.covers(identity.pds):
            return Latest(None, None)
        url = identity.pds.rstrip("/") + GET_STATUS + quote(identity.did, safe=":")
        response = await self._tools.http.get(url, max_bytes=_MAX_STATUS_BYTES)
        if response.status == 429 or (response.status >= 500 and response.status != 501):
            raise FetchTransient(
                f"{identity.pds} answered {response.status}", retry_after=response.retry_after
            )
        return read_latest(response)

    async def _repo_status(self, identity: Identity) -> AccountStatus | None:
        """What a refused `getRepo` says, for hosts that do not answer `getRepoStatus`."""
        if self._tools.bans.covers(identity.pds):
            return None
        url = identity.pds.rstrip("/") + GET_REPO + quote(identity.did, safe=":")
        try:
            response = await self._tools.http.get(url, max_bytes=_MAX_STATUS_BYTES)
        except FetchRefused:  # larger than an error: the repository is there
            return None
        return _REFUSALS.get(response.xrpc_error()[0]) if response.status != 200 else None


def read_latest(response: Response) -> Latest:
    """What an answer to `getRepoStatus` says."""
    if response.status != 200:
        name, _ = response.xrpc_error()
        return Latest(_REFUSALS.get(name), None)
    try:
        body = orjson.loads(response.body)
    except orjson.JSONDecodeError:
        return Latest(None, None)
    if not isinstance(body, dict) or not isinstance(body.get("active"), bool):
        return Latest(None, None)
    status, rev = body.get("status"), body.get("rev")
    return Latest(
        status_of(body["active"], status if isinstance(status, str) else None),
        rev if isinstance(rev, str) and is_tid(rev) else None,
    )


def _known(did: Did, row: RepoRow) -> Identity:
    """The identity that the row holds, for a host that never answered."""
    return Identity(did, row.handle, row.signing_key, row.pds, 0)
