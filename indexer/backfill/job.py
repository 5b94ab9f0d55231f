"""One repository from due to synced.

Owns the sequence of a backfill: identity, claim, fetch, verification in the pool, the comparison with
`min_rev`, apply, replay of what waited, and the row after a failure. Leaves out which repository comes
next. A repository whose job is cut off anywhere is still in the queue and begins again. Event loop only.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import NamedTuple

import structlog

from indexer.atproto.syntax import tid_micros
from indexer.atproto.types import Did, Micros
from indexer.backfill.apply import Bounds, Plan, apply_repo
from indexer.backfill.budget import ByteBudget, Share
from indexer.backfill.diff import WantsCollection
from indexer.backfill.fetch import Fetched, Part, Spool, fetch_repo
from indexer.backfill.holds import HoldUnit
from indexer.backfill.hops import Hops, NoRoom
from indexer.backfill.hosts import Hosts, host_of
from indexer.backfill.outcome import (
    BELOW_MIN_REV,
    DRAIN,
    HOST_BUSY,
    accepts_old,
    judge,
    wants_fresh_identity,
    worth_another_host,
)
from indexer.backfill.rows import Asked, ClaimUnit, FailUnit, asked_now, is_waiting
from indexer.backfill.sparse import Ask, Sparse, Unfit, part_of, turn
from indexer.backfill.stats import Stats
from indexer.backfill.verify import Verified, verify_car
from indexer.config import Settings
from indexer.errors import (
    BadInput,
    CommitError,
    FetchError,
    FetchTransient,
    IdentityError,
    IndexerError,
    SignatureInvalid,
    StoreError,
)
from indexer.identity.http import PROXY, HttpClient
from indexer.identity.resolver import Identity, Resolver
from indexer.ingest.account import reason_of
from indexer.ingest.filters import Filters
from indexer.pool import Pool
from indexer.store.archives import Archives
from indexer.store.codecs import RepoRow, SyncState, Work
from indexer.store.database import Database
from indexer.store.writer import Writer, clock_us

log = structlog.get_logger()

#: Failures in a row after which the identity is asked for before the next try.
REFRESH_AFTER = 3
#: Failures in a row after which the whole repository is asked for, whatever part of it is wanted.
WHOLE_AFTER = 3


@dataclass(frozen=True, slots=True)
class Tools:
    """What every job works with."""

    db: Database
    writer: Writer
    pool: Pool
    disk_pool: Pool  # for CARs above `backfill.verify_mib`
    resolver: Resolver
    http: HttpClient
    settings: Settings
    hosts: Hosts
    budget: ByteBudget  # of CARs that are being fetched
    parsed: ByteBudget  # of CARs under verification, or not yet applied
    spool: Spool
    stats: Stats
    relay: str  # origin of the relay, "" when only PDSes are followed
    drain: Callable[[Did], Awaitable[object]]
    woken: Callable[[Did], None]  # called when a row got work that is not the backfill's
    filters: Callable[[], Filters]
    jitter: Callable[[], float]
    archives: Archives | None  # None: no CAR is kept
    sparse: Sparse


class Obtained(NamedTuple):
    """A repository that passed every check, with the identity that vouches for it."""

    verified: Verified
    identity: Identity
    asked: Asked | None  # of its own PDS; None when another host served it
    mark: str
    car: FilePath | bytes
    part: Part | None  # None: the whole repository


class Job:
    """The backfill of one repository, once."""

    def __init__(self, tools: Tools, did: Did) -> None:
        self._tools = tools
        self._did = did
        self._car = tools.spool.new()
        self._epoch: int | None = None  # from the claim on
        self._spooled = False  # there may be files
        self._held = ""  # the host whose slot was taken ahead of the fetch
        self._behind = ""  # and the PDS to which that one, a relay, redirects
        self._parsed: Share

    async def run(self) -> str | None:
        """Does what the repository waits for. A host's name: it has no free slot, nothing was done."""
        row = self._tools.db.repo(self._did)
        if row is None or not is_waiting(row):
            return None
        try:
            if row.state is SyncState.BACKFILLING and row.work & Work.DRAIN:
                await self._drain()
                return None
            return await self._backfill(row)
        except StoreError:
            raise
        except IndexerError as error:
            await self._fail(error)
        except Exception:
            log.exception("backfill_broke", did=self._did)
            await self._fail(IndexerError("the backfill broke; the log tells why", reason="internal"))
        finally:
            if self._spooled:
                self._tools.spool.remove(self._car)
        return None

    async def _backfill(self, row: RepoRow) -> str | None:
        tools = self._tools
        # A host that fails again and again may be one that the account has left.
        stale = reason_of(row.error).startswith("identity") or row.attempt >= REFRESH_AFTER
        identity = await tools.resolver.resolve(self._did, refresh=stale)
        host, pds = host_of(self._origins(identity)[0]), host_of(identity.pds)
        if held := tools.hosts.held(pds):
            unit = HoldUnit([self._did], pds, held, self._recheck(), {self._did: identity})
            await tools.writer.run("backfill_hold", unit)
            return None
        with tools.budget.share() as share, tools.parsed.share() as self._parsed:
            await share.room()
            for needed in (host, pds):  # a relay redirects to the PDS
                if not tools.hosts.free(needed):
                    return needed
            async with AsyncExitStack() as slot:
                self._hold(host, pds, slot)
                claimed = await tools.writer.run("backfill_claim", ClaimUnit(self._did, identity))
                if claimed is None:
                    return None
                self._epoch = claimed.epoch
                try:
                    obtained = await self._obtain(identity, share)
                except NoRoom as busy:
                    return busy.host
            await self._apply(claimed.epoch, obtained)
        return None

    def _recheck(self) -> Micros:
        return clock_us() + int(self._tools.settings.hosts.recheck * 1e6)

    def _hold(self, host: str, pds: str, slot: AsyncExitStack) -> None:
        self._tools.hosts.take(host)
        self._held = host
        if pds != host and self._tools.hosts.join(pds):
            self._behind = pds
        slot.callback(self._unhold)

    def _unhold(self) -> None:
        for host in (self._held, self._behind):
            if host:
                self._tools.hosts.release(host)
        self._held = self._behind = ""

    def _origins(self, identity: Identity) -> list[str]:
        """Where the repository is asked for, in order. The PDS has the last word, a banned relay none."""
        relay = self._tools.relay
        if not relay or self._tools.hosts.held(host_of(relay)):
            return [identity.pds]
        relay_first = self._tools.settings.backfill.source == "relay"
        return [relay, identity.pds] if relay_first else [identity.pds, relay]

    async def _obtain(self, identity: Identity, share: Share) -> Obtained:
        """A verified repository; once more under a fresh identity where a stale one may be at fault."""
        try:
            return await self._obtain_from_any(identity, share)
        except IndexerError as error:
            if not wants_fresh_identity(error):
                raise
            fresh = await self._tools.resolver.resolve(self._did, refresh=True)
            if (fresh.signing_key, fresh.pds) == (identity.signing_key, identity.pds):
                raise
        return await self._obtain_from_any(fresh, share)

    async def _obtain_from_any(self, identity: Identity, share: Share) -> Obtained:
        first, *others = self._origins(identity)
        try:
            return await self._obtain_from(first, identity, share)
        except IndexerError as error:
            if not others or (first == identity.pds and not worth_another_host(error)):
                raise
            refusal = error
        try:
            return await self._obtain_from(others[0], identity, share)
        except IndexerError as error:
            busy = error.reason == HOST_BUSY  # it was not asked
            raise (refusal if busy or first == identity.pds else error) from error

    async def _obtain_from(self, origin: str, identity: Identity, share: Share) -> Obtained:
        tools = self._tools
        share.shrink()
        self._parsed.shrink()
        asked = asked_now(tools.db, self._did) if origin == identity.pds else None
        fetched = await self._fetch(origin, identity, share)
        tools.stats.fetched(fetched.size)
        await self._parsed.take(fetched.size)
        share.shrink()
        verified = await self._verified(fetched, identity)
        newest = time.time() + tools.settings.ingest.max_future
        if tid_micros(verified.rev) > newest * 1e6:
            raise CommitError(f"rev {verified.rev} lies in the future", reason="future_rev")
        return Obtained(verified, identity, asked, self._check_rev(verified), fetched.car, fetched.part)

    async def _verified(self, fetched: Fetched, identity: Identity) -> Verified:
        """What is in the CAR. A host that serves one wrong repository after the other is left alone."""
        tools, limits = self._tools, self._tools.settings.backfill
        host, part = host_of(fetched.url), fetched.part
        pool = tools.disk_pool if fetched.size > limits.verify_mib << 20 else tools.pool
        try:
            verified = await pool.run(
                verify_car, fetched.car, Spool.index_path(self._car), self._did, identity.signing_key,
                limits.max_nodes, limits.verify_mib, part.ranges if part else (),
            )  # fmt: skip
        except IndexerError as error:
            if judge(error).of_content:
                tools.hosts.lied(host, jitter=tools.jitter(), error=str(error))
            raise
        tools.hosts.proved(host)
        return verified

    def _check_rev(self, verified: Verified) -> str:
        """The mark of a repository below `min_rev` that is taken all the same, "" for a newer one."""
        row = self._tools.db.repo(self._did)
        if row is None or verified.rev >= max(row.min_rev, row.rev):
            return ""
        message = f"rev {verified.rev} is older than {max(row.min_rev, row.rev)}"
        if not accepts_old(row, verified.rev, self._tools.settings.backfill.min_rev_tries):
            raise FetchTransient(message, reason=BELOW_MIN_REV)
        return f"accepted_{BELOW_MIN_REV}: {message}"

    async def _fetch(self, origin: str, identity: Identity, share: Share) -> Fetched:
        """What ``origin`` serves. Where it redirects to the account's PDS, the PDS answers for itself."""
        hosts, host, pds = self._tools.hosts, host_of(origin), identity.pds
        if host == self._held:
            self._held = ""  # its slot is given back below, before the CAR is verified
        elif host == self._behind and not hosts.wait_s(host):
            self._behind = ""
            hosts.pay(host)
        elif hosts.free(host):
            hosts.take(host)
        else:
            raise FetchTransient(f"{host} is busy", reason=HOST_BUSY)
        try:
            fetched = await self._part(origin, identity, share) or await self._whole(origin, share)
        except IndexerError as error:
            url = error.url if isinstance(error, FetchError) else ""
            behind = host_of(url) == host_of(pds) or judge(error).rate_limited
            self._blame((behind and host_of(url)) or host, error)
            raise
        finally:
            hosts.release(host)
        self._unhold()
        served = host_of(fetched.url)
        hosts.success(served, allowance=fetched.allowance)
        if served != host:
            hosts.success(host)
        return fetched

    def _archived(self) -> bool:
        archives = self._tools.archives
        return archives is not None and archives.keeps

    async def _whole(self, origin: str, share: Share) -> Fetched:
        settings = self._tools.settings.backfill
        spooled, self._spooled = self._spooled, True  # it may end half-way
        fetched = await fetch_repo(
            self._tools.http, origin, self._did, self._car, share, settings,
            Hops(self._tools.hosts, (host_of(origin), self._behind)),
            in_memory=0 if self._archived() else settings.memory_kib << 10,
        )  # fmt: skip
        self._spooled = spooled or not isinstance(fetched.car, bytes)
        return fetched

    async def _part(self, origin: str, identity: Identity, share: Share) -> Fetched | None:
        """What is wanted, where the account's PDS gives that alone; None when the whole is to be fetched."""
        tools, row, host = self._tools, self._tools.db.repo(self._did), host_of(origin)
        if origin != identity.pds or self._archived() or not tools.settings.backfill.sparse:
            return None
        if row is None or row.attempt >= WHOLE_AFTER:
            return None
        part = part_of(tools.db, self._did, tools.filters())
        if part is None:
            return None
        self._spooled = True
        try:
            ask = Ask(origin, self._did, identity.signing_key, part, self._car, share)
            fetched = await tools.sparse.fetch(ask)
        except Unfit as unfit:
            tools.stats.whole[unfit.reason] += 1
            if unfit.host:
                tools.hosts.gives_whole_only(host)
            if not unfit.asked:
                return None
        except SignatureInvalid:
            raise  # nothing else that is under this commit could be taken
        except BadInput as error:
            tools.stats.whole["content"] += 1
            tools.hosts.gives_whole_only(host)
            tools.hosts.lied(host, jitter=tools.jitter(), error=str(error))
        else:
            tools.stats.parts += 1
            return fetched
        share.shrink()
        await turn(tools.hosts, host)  # the whole is one more request
        return None

    def _blame(self, host: str, error: IndexerError) -> None:
        failure, hosts, jitter = judge(error), self._tools.hosts, self._tools.jitter()
        if failure.of_host:
            hosts.fault(
                host, jitter=jitter, retry_after=failure.retry_after, limited=failure.rate_limited,
                error=f"{failure.reason}: {failure.message}",
            )  # fmt: skip
        elif failure.of_content:
            hosts.lied(host, jitter=jitter, error=f"{failure.reason}: {failure.message}")
        elif failure.reason not in (PROXY, HOST_BUSY):  # it answered
            hosts.success(host)

    async def _apply(self, epoch: int, obtained: Obtained) -> None:
        tools, verified = self._tools, obtained.verified
        archives = tools.archives
        async with archives.keeping(self._did, self._car) if archives else nullcontext() as archived:
            part = obtained.part
            index = verified.held_index if isinstance(obtained.car, bytes) else Spool.index_path(self._car)
            plan = Plan(
                self._did, epoch, verified, obtained.car, index, self._wants(part), obtained.identity,
                obtained.asked, obtained.mark, archived, part.ranges if part else (),
            )  # fmt: skip
            limits = tools.settings.backfill
            bounds = Bounds(limits.chunk_records, limits.chunk_kib << 10)
            applied = await apply_repo(tools.db, tools.writer, plan, bounds)
        if applied.row is None:
            log.info("backfill_obsolete", did=self._did, changes=applied.changes)
            return
        tools.stats.applied(verified.records, applied.changes)
        if applied.row.work & ~Work.DRAIN:
            tools.woken(self._did)
        if applied.row.work & Work.DRAIN and applied.row.state is SyncState.BACKFILLING:
            await self._drain()

    def _wants(self, part: Part | None) -> WantsCollection | None:
        """What to keep of what was fetched; None: all of it."""
        if part is not None:
            return part.wants
        filters = self._tools.filters()
        return filters.wants_collection if filters.collections else None

    async def _drain(self) -> None:
        """Replays the frames that waited; a repository that is not synced after it tries again later."""
        try:
            await self._tools.drain(self._did)
        except IdentityError as error:
            raise FetchTransient(f"waiting frames cannot be checked: {error}", reason=DRAIN) from error
        row = self._tools.db.repo(self._did)
        if row is not None and row.state is SyncState.BACKFILLING and row.work & Work.DRAIN:
            raise FetchTransient("waiting frames could not be replayed yet", reason=DRAIN)

    async def _fail(self, error: IndexerError) -> None:
        tools = self._tools
        failure = judge(error)
        tools.stats.failed[f"{failure.outcome}/{failure.reason}"] += 1
        log.info("backfill_failed", did=self._did, reason=failure.reason, message=failure.message)
        grace_s = tools.settings.ingest.unknown_grace
        unit = FailUnit(self._did, self._epoch, failure, tools.settings.backfill, tools.jitter(), grace_s)
        await tools.writer.run("backfill_fail", unit)
