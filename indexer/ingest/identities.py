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
from indexer.errors import FetchRefused, FetchTransient, IdentityGone, IdentityUnavailable, IndexerError
from indexer.identity.domains import domain_of
from indexer.identity.http import Response
from indexer.identity.resolver import Identity
from indexer.ingest.account import status_of
from indexer.ingest.answers import Answers, Latest
from indexer.ingest.drain import Drainer, is_ready
from indexer.ingest.due import DueQueue, Pace, Waits
from indexer.ingest.hearsay import GONE, grace_left
from indexer.ingest.strangers import Strangers
from indexer.ingest.suspects import verified
from indexer.ingest.tools import IngestTools
from indexer.ingest.turns import HostTurns, Place, Postponed, host_place
from indexer.store.codecs import NEW_REPO, AccountStatus, RepoRow, Work, did_range
from indexer.store.host_rows import host_of
from indexer.store.keyspaces import RESYNC_BUFFER, STRANGERS

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
_WEB: Final = "did:web:"
_ALL_FRAMES: Final = 1 << 20  # of an account; `ingest.unproven_frames_per_repo` bounds them
#: Kinds of questions. Each has slots of its own: hosts that take their time hold up no key of an account.
_BY_PLC, _BY_WEB, _OF_HOSTS = _KINDS = ("by plc", "by web", "of hosts")
#: In the pace's table: the last time that a hint cut a wait short.
_CUT: Final = Work(0)
#: What is asked of the network, in this order, and what can be done without it.
QUESTIONS: Final = Work.RESOLVE | Work.CHECK_STATUS | Work.COMPARE_REV | Work.DRAIN | Work.PURGE


class DueWork:
    """What the work is, one repository at a time; `queue` says which."""

    def __init__(self, tools: IngestTools, answers: Answers, drainer: Drainer, strangers: Strangers) -> None:
        self._tools = tools
        self._answers = answers
        self._drainer = drainer
        self._strangers = strangers
        settings = tools.settings
        self._pace = Pace(settings.ingest.refresh_interval, settings.ingest.work_repos)
        self._concurrency = settings.identity.concurrency
        #: Enough for every kind of question at its most, so that no kind waits for another.
        self.queue = DueQueue(
            tools.db, QUESTIONS, self._work_off,
            limit=settings.ingest.work_repos, concurrency=len(_KINDS) * self._concurrency,
            waits=Waits.of(settings.ingest), without_row=self._without_row,
        )  # fmt: skip
        waits = settings.ingest.work_retry_min, settings.ingest.work_retry_max
        self.turns = HostTurns(self.queue.add, waits, settings.ingest.work_repos)

    async def _work_off(self, did: Did) -> float | None:
        """Does what the row asks for, one flag at a time; seconds to wait where it is too soon for one."""
        tools = self._tools
        # Asked of the writer, because the step that woke us may not be committed yet.
        row = await tools.writer.run("due_work", lambda tx: tx.repo(did))
        if row is None:
            return await self._stranger(did)
        if not row.work & QUESTIONS or not row.tracked:
            tools.unhint(did)
            return None
        waits: list[float] = []
        for flag, ask in (
            (Work.RESOLVE, self._resolve),
            (Work.CHECK_STATUS, self._check_status),
            (Work.COMPARE_REV, self._compare_rev),
        ):
            if not row.work & flag:
                continue
            places = self._places(did, flag, self._presumed(did, row))
            wait = self._too_soon(did, flag) or (flag is Work.RESOLVE and self._grace(did, row))
            if wait := wait or self.turns.wait_s(did, places):
                waits.append(wait)
                if flag is Work.RESOLVE:
                    await self._expire(did)
                    if not row.pds:  # the host that the others ask, and which may take its time
                        break
                continue
            tries = self._asks(did, flag) + 1
            with self.turns.taken(places):
                if later := await ask(did, row, tries):
                    waits.append(later)
            self._pace.answered(did, flag)
            row = tools.db.repo(did)
            if row is None:
                return None
        if row.work & Work.DRAIN and is_ready(row):
            places = self._places(did, Work.DRAIN, "")  # it may have to ask for the identity
            if wait := self.turns.wait_s(did, places):
                return wait
            with self.turns.taken(places):
                await self._drainer.drain(did)
        if row.work & Work.PURGE:
            await tools.writer.run("purge", lambda tx: self._answers.purge(tx, did))
        if did in tools.hints and row.work & Work.RESOLVE:  # came in while this was under way
            return self._too_soon(did, Work.RESOLVE)
        return min(waits, default=None)

    def _too_soon(self, did: Did, flag: Work) -> float:
        """Seconds until this question about this account may be asked again.

        An `#identity` by somebody with authority cuts the wait, once in each interval: a changed identity is
        what it announces. Later ones are answered together when the interval is over.
        """
        wait = self._pace.wait_s(did, flag)
        if wait and flag is Work.RESOLVE and did in self._tools.urgent:
            return self._pace.wait_s(did, _CUT)
        return wait

    def _asks(self, did: Did, flag: Work) -> int:
        """The question is asked now; how often in a row it failed before."""
        if flag is Work.RESOLVE and self._pace.wait_s(did, flag):
            self._pace.ask(did, _CUT)
        return self._pace.ask(did, flag)

    def _grace(self, did: Did, row: RepoRow) -> float:
        """Seconds until the directory is asked anew about an account that was only heard of and that it does
        not know; none when more was heard meanwhile."""
        if not row.hearsay or did in self._tools.hints or self._tools.db.count(f"buffer/{did}/frames"):
            return 0.0
        return grace_left(row, self._now_us(), self._tools.settings.ingest.unknown_grace)

    async def _expire(self, did: Did, *, stranger: bool = False) -> None:
        """What waited too long for an identity goes."""
        tools, bounds = self._tools, did_range(did)
        before = self._now_us() - int(tools.settings.ingest.unproven_age * 1_000_000)
        old = stranger and any(row.time_us < before for _, row in tools.db.scan(STRANGERS, *bounds))
        if not old and tools.db.count(f"buffer/{did}/unproven_frames"):
            frames = tools.db.scan(RESYNC_BUFFER, *bounds)
            old = any(not row.vouched and row.arrived < before for _, row in frames)
        if old:
            await tools.writer.run("unproven_old", lambda tx: self._strangers.expired(tx, did, before))

    def _now_us(self) -> int:
        return int(self._tools.clock() * 1_000_000)

    # ---- accounts without a row

    def _without_row(self, after: Did, limit: int) -> list[Did]:
        """Strangers' DIDs behind ``after``."""
        start = did_range(after)[1] if after else None
        keys = self._tools.db.scan(STRANGERS, start, limit=limit)
        return list(dict.fromkeys(did for (did, _), _ in keys))

    async def _stranger(self, did: Did) -> float | None:
        """Asks where an account lives that only a PDS has named so far, as long as it stands noted."""
        self._tools.unhint(did)
        if next(self._tools.db.scan(STRANGERS, *did_range(did), limit=1), None) is None:
            return None
        places = self._places(did, Work.RESOLVE, "")
        wait = self._too_soon(did, Work.RESOLVE) or self.turns.wait_s(did, places)
        if not wait:
            tries = self._asks(did, Work.RESOLVE) + 1
            with self.turns.taken(places):
                wait = await self._ask_of_stranger(did, tries)
            self._pace.answered(did, Work.RESOLVE)
        else:
            await self._expire(did, stranger=True)
        return wait or None

    async def _ask_of_stranger(self, did: Did, tries: int) -> float:
        tools, known = self._tools, self._tools.resolver.cached(did)
        try:
            identity = await self._identity(did, NEW_REPO, tries, refresh=known is not None)
        except IdentityGone as error:
            gone = error
            return await tools.writer.run("stranger", lambda tx: self._strangers.gone(tx, did, gone)) or 0.0
        except IdentityUnavailable:
            await self._expire(did, stranger=True)
            raise
        if await tools.writer.run("stranger", lambda tx: self._strangers.at_home(tx, did, identity)):
            await self._replay(did)
            return 0.0
        frames = tools.db.buffered(did, NEW_REPO.epoch, limit=_ALL_FRAMES)
        checked = await verified(tools, [(frame.data, identity.signing_key, True) for frame in frames])
        verdicts = dict(zip(frames, checked, strict=True))
        done = await tools.writer.run(
            "stranger", lambda tx: self._strangers.refused(tx, did, identity, verdicts)
        )
        return 0.0 if done else tools.settings.ingest.refresh_interval

    async def _replay(self, did: Did) -> None:
        """What waited for an identity that was asked for just now."""
        now = self._tools.db.repo(did)
        if now is not None and now.work & Work.RESOLVE and is_ready(now):
            await self._drainer.drain(did, fresh=True)

    # ---- whose turn

    def _presumed(self, did: Did, row: RepoRow) -> str:
        """The account's PDS as far as is known without asking."""
        known = self._tools.resolver.cached(did)
        return row.pds if known is None else known.pds

    def _places(self, did: Did, flag: Work, pds: str) -> list[Place]:
        """What a question needs a slot of: its kind and, for one to the account's host, that host."""
        web = did.startswith(_WEB)
        if flag in (Work.RESOLVE, Work.DRAIN):
            kind = _BY_WEB if web else _BY_PLC
            own = [self._domain(did.removeprefix(_WEB))] if web else []
            return [Place(kind, self._concurrency), *own]
        kind = _BY_WEB if web else _OF_HOSTS
        host = host_of(pds)
        most = self._tools.settings.ingest.host_questions
        at_host = [host_place(host, most), self._domain(host)] if host else []
        return [Place(kind, self._concurrency), *at_host]

    def _domain(self, host: str) -> Place:
        return Place(f"domain {domain_of(host)}", 2 * self._tools.settings.ingest.host_questions)

    # ---- the questions

    async def _resolve(self, did: Did, row: RepoRow, tries: int) -> float | None:
        """The identity anew, then whatever waited for it; seconds until it is to be asked for again."""
        tools = self._tools
        said_no = row.hearsay and row.error.startswith(GONE)
        refresh = bool(row.signing_key) or did in tools.hints or (said_no and not self._grace(did, row))
        tools.unhint(did)
        try:
            identity = await self._identity(did, row, tries, refresh=refresh)
        except IdentityGone as error:
            gone = error
            return await tools.writer.run("identity_gone", lambda tx: self._answers.gone(tx, did, gone))
        except IdentityUnavailable:
            await self._expire(did)
            raise
        await tools.writer.run("identity", lambda tx: self._answers.learned(tx, did, identity))
        await self._replay(did)
        return None

    async def _identity(self, did: Did, row: RepoRow, tries: int, *, refresh: bool) -> Identity:
        """A did:web that never was seen to exist is not asked for without end."""
        try:
            return await self._tools.resolver.resolve(did, refresh=refresh)
        except IdentityUnavailable as error:
            known = row.signing_key or row.rev or not did.startswith(_WEB)
            if known or tries < self._tools.settings.identity.web_tries:
                raise
            raise IdentityGone(f"no answer in {tries} tries: {error}") from error

    async def _check_status(self, did: Did, row: RepoRow, tries: int) -> None:
        """Asks the PDS that the directory names today."""
        tools, presumed = self._tools, self._presumed(did, row)
        try:
            identity = await tools.resolver.resolve(did, refresh=True)
            status = (await self._latest(identity, presumed)).status
            if status is None and row.status is AccountStatus.DELETED:
                status = await self._repo_status(identity)
        except IdentityGone as error:
            gone = error
            await tools.writer.run("identity_gone", lambda tx: self._answers.gone(tx, did, gone))
            return
        except (IndexerError, ValueError):
            if tries < _MAX_TRIES:
                raise
            identity, status = _known(did, row), None
        await tools.writer.run("status", lambda tx: self._answers.checked(tx, did, identity, status))

    async def _compare_rev(self, did: Did, row: RepoRow, tries: int) -> None:
        rev, presumed = None, self._presumed(did, row)
        try:
            rev = (await self._latest(await self._tools.resolver.resolve(did), presumed)).rev
        except IdentityGone:
            pass
        except (IndexerError, ValueError):
            if tries < _MAX_TRIES:
                raise
        await self._tools.writer.run("compare_rev", lambda tx: self._answers.compared(tx, did, rev))

    async def _latest(self, identity: Identity, presumed: str) -> Latest:
        """`getRepoStatus` of the account's own PDS; a banned one is not asked.

        A slot is held at the PDS ``presumed``; where the account turns out to live elsewhere, one there is
        taken or waited for.
        """
        if self._tools.bans.covers(identity.pds):
            return Latest(None, None)
        host = host_of(identity.pds)
        if host == host_of(presumed):
            return await self._ask_latest(identity, host)
        places = self._places(identity.did, Work.CHECK_STATUS, identity.pds)[1:]
        if wait := self.turns.wait_s(identity.did, places):
            raise Postponed(wait)
        with self.turns.taken(places):
            return await self._ask_latest(identity, host)

    async def _ask_latest(self, identity: Identity, host: str) -> Latest:
        url = identity.pds.rstrip("/") + GET_STATUS + quote(identity.did, safe=":")
        try:
            response = await self._tools.http.get(url, max_bytes=_MAX_STATUS_BYTES)
            if response.status == 429 or (response.status >= 500 and response.status != 501):
                raise FetchTransient(
                    f"{identity.pds} answered {response.status}", retry_after=response.retry_after,
                    reason="rate_limited" if response.status == 429 else None,
                )  # fmt: skip
        except FetchTransient as error:
            self.turns.told(host, error)
            raise
        self.turns.told(host, None)
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
