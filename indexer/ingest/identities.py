"""Due work: what the ordered pass left to be asked outside of it.

Owns the order, the pace and the repetition of that work: resolve an identity and replay what waited for
it, check a status, compare a rev. Each piece is a `Work` flag in a repository's row, so that a kill loses
none; the queue in memory is bounded and refilled from the rows. Leaves out what the answers change
(`answers`). Event loop only.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from itertools import count
from typing import NamedTuple
from urllib.parse import quote

import orjson
import structlog

from indexer.atproto.syntax import is_tid
from indexer.atproto.types import Did
from indexer.errors import FetchError, FetchRefused, FetchTransient, IdentityGone, IdentityUnavailable
from indexer.identity.http import Response
from indexer.identity.resolver import Identity
from indexer.ingest.account import status_of
from indexer.ingest.answers import Answers, Latest
from indexer.ingest.drain import Drainer, is_ready
from indexer.ingest.tools import Tools
from indexer.store.codecs import AccountStatus, RepoRow, Work

log = structlog.get_logger()

GET_STATUS = "/xrpc/com.atproto.sync.getRepoStatus?did="
GET_REPO = "/xrpc/com.atproto.sync.getRepo?did="
_MAX_STATUS_BYTES = 16_384
_SCAN_ROWS = 500
#: Waits between tries, in seconds: the first, and the longest.
_RETRY_S = (1.0, 300.0)
#: Tries after which a host that gives no usable answer is not asked again for the same reason.
_MAX_TRIES = 10
_REFUSALS = {
    "RepoDeactivated": AccountStatus.DEACTIVATED,
    "RepoTakendown": AccountStatus.TAKENDOWN,
    "RepoSuspended": AccountStatus.SUSPENDED,
    "RepoNotFound": AccountStatus.DELETED,
}


class _Due(NamedTuple):
    at: float  # loop time
    number: int
    did: Did
    attempt: int


class DueWork:
    """The queue and the tasks that work it off."""

    def __init__(self, tools: Tools, answers: Answers, drainer: Drainer) -> None:
        self._tools = tools
        self._answers = answers
        self._drainer = drainer
        self._queue: list[_Due] = []
        self._known: set[Did] = set()
        self._again: set[Did] = set()  # woken while worked on
        self._numbers = count()
        self._woken = asyncio.Event()
        self._overflow = True  # rows may have work that the queue does not know of
        self._permits = asyncio.Semaphore(tools.settings.identity.concurrency)
        self._asked: OrderedDict[tuple[Did, Work], float] = OrderedDict()
        self._running: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, did: Did) -> None:
        """The repository's row has due work, committed by now."""
        if did in self._known:
            self._again.add(did)
            return
        if len(self._known) >= self._tools.settings.ingest.work_repos:
            self._overflow = True
            return
        self._put(did, 0.0, 0)

    async def run(self) -> None:
        """Works until cancelled; begins with what the rows hold from before."""
        try:
            while True:
                if self._overflow and len(self._known) * 2 <= self._tools.settings.ingest.work_repos:
                    await self._scan()
                await self._dispatch()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _scan(self) -> None:
        """Fills the queue from the rows."""
        self._overflow = False
        after = ""
        while rows := self._tools.db.repos(after=after, limit=_SCAN_ROWS):
            for did, row in rows:
                if row.work and row.tracked:
                    self.add(did)
            after = rows[-1][0]
            if self._overflow:
                return
            await asyncio.sleep(0)

    async def _dispatch(self) -> None:
        """Starts what is due; waits until something becomes due or is added."""
        self._woken.clear()
        loop = asyncio.get_running_loop()
        while self._queue and self._queue[0].at <= loop.time():
            await self._permits.acquire()
            due = heapq.heappop(self._queue)
            task = asyncio.create_task(self._work(due))
            self._running.add(task)
            task.add_done_callback(self._ended)
        wait = self._queue[0].at - loop.time() if self._queue else 60.0
        try:
            async with asyncio.timeout(max(0.0, wait)):
                await self._woken.wait()
        except TimeoutError:
            pass

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._permits.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("due_work_failed", error=str(error), exc_info=error)

    def _put(self, did: Did, wait: float, attempt: int) -> None:
        self._known.add(did)
        at = asyncio.get_running_loop().time() + wait
        heapq.heappush(self._queue, _Due(at, next(self._numbers), did, attempt))
        self._woken.set()

    async def _work(self, due: _Due) -> None:
        did = due.did
        self._again.discard(did)
        wait: float | None = None
        try:
            wait = await self._work_off(did, last=due.attempt + 1 >= _MAX_TRIES)
        except (IdentityUnavailable, FetchTransient) as error:
            first, longest = _RETRY_S
            wait = max(
                getattr(error, "retry_after", None) or 0.0, min(longest, first * 2 ** min(due.attempt, 16))
            )
            log.info("due_work_postponed", did=did, reason=str(error), retry_in_s=wait)
        finally:
            self._known.discard(did)
        if wait is not None:
            self._put(did, wait, due.attempt + 1)
        elif did in self._again or did in self._tools.hints:
            self._again.discard(did)
            self.add(did)

    async def _work_off(self, did: Did, *, last: bool) -> float | None:
        """Does what the row asks for, one flag at a time; seconds to wait where it is too soon."""
        # Asked of the writer, because the step that woke us may not be committed yet.
        row = await self._tools.writer.run("due_work", lambda tx: tx.repo(did))
        if row is None or not row.work or not row.tracked:
            self._tools.hints.discard(did)
            return None
        for flag, work in (
            (Work.RESOLVE, self._resolve),
            (Work.CHECK_STATUS, self._check_status),
            (Work.COMPARE_REV, self._compare_rev),
        ):
            if row.work & flag:
                if flag is not Work.CHECK_STATUS and (wait := self._too_soon(did, flag)) > 0:
                    return wait
                await work(did, row, last)
                row = self._tools.db.repo(did)
                if row is None:
                    return None
        if row.work & Work.DRAIN and is_ready(row):
            await self._drainer.drain(did)
        if row.work & Work.PURGE:
            await self._tools.writer.run("purge", lambda tx: self._answers.purge(tx, did))
        return None

    def _too_soon(self, did: Did, flag: Work) -> float:
        """Seconds until this question about this account may be asked again; 0 marks it as asked now.

        A hint by `#identity` is answered at once: a changed identity is what it announces.
        """
        now = asyncio.get_running_loop().time()
        key = (did, flag)
        before = self._asked.get(key)
        interval = self._tools.settings.ingest.refresh_interval
        if before is not None and now - before < interval and did not in self._tools.hints:
            return before + interval - now
        self._asked[key] = now
        self._asked.move_to_end(key)
        while len(self._asked) > self._tools.settings.ingest.work_repos:
            self._asked.popitem(last=False)
        return 0.0

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
        except (FetchError, IdentityUnavailable):
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
        except (FetchError, IdentityUnavailable):
            if not last:
                raise
        await self._tools.writer.run("compare_rev", lambda tx: self._answers.compared(tx, did, rev))

    async def _latest(self, identity: Identity) -> Latest:
        """`getRepoStatus` of the account's own PDS."""
        url = identity.pds.rstrip("/") + GET_STATUS + quote(identity.did, safe=":")
        response = await self._tools.http.get(url, max_bytes=_MAX_STATUS_BYTES)
        if response.status == 429 or (response.status >= 500 and response.status != 501):
            raise FetchTransient(
                f"{identity.pds} answered {response.status}", retry_after=response.retry_after
            )
        return read_latest(response)

    async def _repo_status(self, identity: Identity) -> AccountStatus | None:
        """What a refused `getRepo` says, for hosts that do not answer `getRepoStatus`."""
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
