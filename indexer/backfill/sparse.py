"""A part of a repository into a file: signed commit, nodes that lead to some collections, their records.

Owns the rounds: `getRecord` for the signed root and a way into the tree, then `getBlocks` for what the plan
(`repo.ranges`) misses, until nothing is. What comes is hashed and checked in its place; the file is proven
once more, as a whole CAR is, before anything of it counts. A repository that moves on meanwhile is gone on
with from its newer root, and what was fetched is kept. Where a part is not to be had, or not worth it,
`Unfit` says so and the whole is fetched. However large the repository, the event loop is never held up for
longer than a step, and memory is bounded by what the rounds can fetch. Leaves out whom to ask and what a
failure means. Event loop only.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from errno import ENOSPC
from itertools import chain
from pathlib import Path as FilePath
from typing import Final, NamedTuple
from urllib.parse import quote

from indexer.atproto.car import CarSplitter, Limits, car_block, car_header
from indexer.atproto.cid import format_cid
from indexer.atproto.mst import EMPTY_ROOT, TreeLimits
from indexer.atproto.node import MAX_LAYER
from indexer.atproto.types import Cid, Did, DidKey
from indexer.backfill.budget import Share
from indexer.backfill.fetch import Fetched, Part, refuse
from indexer.backfill.hops import Hops
from indexer.backfill.hosts import Hosts, host_of
from indexer.backfill.outcome import HOST_BUSY
from indexer.backfill.waits import allowance_of
from indexer.config import BackfillSettings
from indexer.errors import CarError, FetchError, FetchRefused, FetchTransient
from indexer.identity.http import HttpClient
from indexer.ingest.account import ACCOUNT_ANSWERS
from indexer.ingest.filters import Filters
from indexer.repo.ranges import Estimate, Range, RangePlan, probe_of, ranges_of
from indexer.repo.walker import checked_commit
from indexer.store.database import Database

GET_RECORD: Final = "/xrpc/com.atproto.sync.getRecord?did="
GET_BLOCKS: Final = "/xrpc/com.atproto.sync.getBlocks?did="
#: The status that may be about the blocks that were asked for: the repository may have moved on.
_NOT_THERE: Final = 400
#: Most blocks of a proof: commit, record, the way to it and the ways to its neighbours on both sides. A host
#: that sends more does not prove single records.
_PROOF_BLOCKS: Final = 2 + 3 * (MAX_LAYER + 1)
#: As the client names a body beyond its limit.
TOO_LARGE: Final = "TooLarge"


#: Reasons that lie in the repository, and hold for a while.
_OF_THE_REPO: Final = frozenset({"small", "share", "rounds", "bytes"})


class Unfit(Exception):
    """The whole repository is to be fetched. ``host``: this host's others as well. ``asked``: that took
    requests, and was not known before."""

    def __init__(self, reason: str, *, host: bool = False, asked: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.host = host
        self.asked = asked


class Ask(NamedTuple):
    """What is asked for, of whom, and who must have signed it."""

    origin: str
    did: Did
    key: DidKey
    part: Part
    car: FilePath
    share: Share


def part_of(db: Database, did: Did, filters: Filters) -> Part | None:
    """The part of a repository that is enough: what is wanted, unless other records are stored, of which
    only the whole repository tells what became of them."""
    ranges = ranges_of(filters.collections)
    if not ranges or holds_more(db, did, ranges):
        return None
    return Part(ranges, filters.wants_collection)


def holds_more(db: Database, did: Did, ranges: Sequence[Range]) -> bool:
    """Whether a record is stored outside of ``ranges``."""
    start: str | None = None
    for wanted in ranges:
        if db.records(did, start=start, stop=wanted.start, limit=1):
            return True
        start = wanted.stop
    return bool(db.records(did, start=start, limit=1))


def unfit(estimate: Estimate, settings: BackfillSettings, *, first: bool) -> str:
    """Why the whole repository is the better choice, "" while it is not."""
    if first and estimate.total < settings.sparse_min_records:
        return "small"
    if not estimate.sure:
        return ""
    if estimate.share > settings.sparse_share:
        return "share"
    if estimate.wanted > settings.sparse_rounds * settings.sparse_parallel * settings.sparse_blocks:
        return "rounds"
    return ""


async def turn(hosts: Hosts, host: str) -> None:
    """Waits until the host's rate allows a fetch under way one more request, and pays for it. A host that is
    to rest is left alone."""
    while True:
        if hosts.penalty_s(host):
            raise FetchTransient(f"{host} is to be left alone", reason=HOST_BUSY)
        wait = hosts.wait_s(host)
        if not wait:
            return hosts.pay(host)
        await asyncio.sleep(wait)


async def go_through(
    plan: RangePlan,
    steps: Iterable[None],
    settings: BackfillSettings,
    rounds: int,
    now: Callable[[], float],
) -> None:
    """Takes the steps of a plan, and lets others go on in between. `Unfit` as soon as the plan misses more
    than the ``rounds`` that are left can bring, or has found more records than all of them could."""
    portion = settings.sparse_parallel * settings.sparse_blocks
    begun = now()
    for _ in chain(steps, (None,)):
        if plan.pending > rounds * portion or plan.found > settings.sparse_rounds * portion:
            raise Unfit("rounds")
        if now() - begun >= settings.sparse_step:
            await asyncio.sleep(0)
            begun = now()


class SpooledBlocks:
    """Blocks in a file that is a CAR once its root is set; memory holds where they lie. A context manager."""

    def __init__(self, path: FilePath) -> None:
        self._file = path.open("wb+", buffering=0)
        self._spans: dict[Cid, int] = {}  # start, shifted by 32 bits, and length
        self.size = self.set_root(EMPTY_ROOT)

    def __enter__(self) -> SpooledBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, cid: Cid) -> bool:
        return cid in self._spans

    def get(self, cid: Cid) -> bytes | None:
        span = self._spans.get(cid)
        if span is None:
            return None
        return os.pread(self._file.fileno(), span & 0xFFFFFFFF, span >> 32)

    def set_root(self, cid: Cid) -> int:
        """Writes the header; its length, which is the same for every root."""
        return os.pwrite(self._file.fileno(), car_header([cid]), 0)

    def add(self, blocks: Iterable[tuple[Cid, bytes]]) -> None:
        sections: list[bytes] = []
        end = self.size
        for cid, block in blocks:
            if cid not in self._spans:
                sections.append(car_block(cid, block))
                end += len(sections[-1])
                self._spans[cid] = (end - len(block)) << 32 | len(block)
        if sections:
            written = os.pwrite(self._file.fileno(), b"".join(sections), self.size)
            if self.size + written != end:
                raise OSError(ENOSPC, "the disk took a part of what was written")
            self.size = end


@dataclass(slots=True)
class Sparse:
    """Fetches parts of repositories, within the limits of the settings."""

    http: HttpClient
    hosts: Hosts
    settings: BackfillSettings
    #: Why the whole is the better choice, of which part, and until when that holds.
    _wholes: dict[Did, tuple[str, int, float]] = field(init=False, default_factory=dict)

    async def fetch(self, ask: Ask) -> Fetched:
        """Raises `Unfit`, what is wrong with the content (`BadInput`), and what a fetch raises."""
        if not self.hosts.gives_parts(host_of(ask.origin)):
            raise Unfit("host", asked=False)
        ranges = hash(ask.part.ranges)
        reason, of, until = self._wholes.pop(ask.did, ("", 0, 0.0))
        if of == ranges and self.hosts.clock() < until:
            self._wholes[ask.did] = reason, of, until
            raise Unfit(reason, asked=False)
        try:
            return await self._fetch(ask)
        except Unfit as unfit:
            if unfit.reason in _OF_THE_REPO:
                self._remember(ask.did, unfit.reason, ranges)
            raise

    def _remember(self, did: Did, reason: str, ranges: int) -> None:
        """So that the next fetch does not ask first."""
        self._wholes[did] = reason, ranges, self.hosts.clock() + self.settings.sparse_recheck
        if len(self._wholes) > self.settings.sparse_remembered:
            del self._wholes[next(iter(self._wholes))]

    async def _fetch(self, ask: Ask) -> Fetched:
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(self.settings.timeout) as limit:
                with SpooledBlocks(ask.car) as blocks:
                    return await _Fetch(self, ask, blocks, now, limit).run()
        except TimeoutError as error:
            if not limit.expired():
                raise
            message = f"{ask.origin} gave no whole part within {self.settings.timeout:g} s"
            raise FetchTransient(message, reason="timeout").met_at(ask.origin) from error
        except OSError as error:
            raise FetchError(f"cannot spool a part of a repository: {error}", reason="spool") from error
        finally:
            ask.share.waits(None)


class _Fetch:
    """One part, once."""

    def __init__(
        self,
        tools: Sparse,
        ask: Ask,
        blocks: SpooledBlocks,
        now: Callable[[], float],
        limit: asyncio.Timeout,
    ) -> None:
        self._tools = tools
        self._settings = tools.settings
        self._ask = ask
        self._host = host_of(ask.origin)
        self._blocks = blocks
        self._now = now
        self._limit = limit
        self._begun = now()
        self._received = 0
        self._root: Cid = b""
        self._rev = ""
        self._restarts = 0
        self._rounds = tools.settings.sparse_rounds  # that are left
        self._url = ask.origin
        self._plan: RangePlan

    async def run(self) -> Fetched:
        settings, ask = self._settings, self._ask
        await self._begin()
        while wanted := self._plan.missing(settings.sparse_blocks * settings.sparse_parallel):
            first = self._rounds == settings.sparse_rounds
            if reason := unfit(self._plan.estimate(), settings, first=first):
                raise Unfit(reason)
            self._rounds -= 1
            if not await self._round(wanted):
                await self._begin_anew()
        return Fetched(ask.car, self._blocks.size, None, self._url, ask.part)

    async def _begin(self) -> None:
        """The signed root, and what lies on the way to the first range."""
        ask = self._ask
        collection, rkey = probe_of(ask.part.ranges[0])
        try:
            roots = await self._answer(f"{self._base(GET_RECORD)}&collection={collection}&rkey={rkey}", None)
        except FetchRefused as error:
            if error.name in ACCOUNT_ANSWERS:
                raise
            if error.name == TOO_LARGE:  # our bound, and this account's nodes
                raise Unfit("bytes") from error
            raise Unfit("no_proofs", host=True) from error
        block = self._blocks.get(roots[0]) if roots else None
        if block is None:
            raise CarError("a proof without its commit", reason="car")
        commit = checked_commit(roots[0], block, ask.did, ask.key)
        if commit.rev < self._rev:
            raise Unfit("moving")  # servers behind one name that do not agree
        self._root, self._rev = roots[0], commit.rev
        self._blocks.set_root(self._root)
        limits = TreeLimits(self._settings.max_nodes)
        self._plan = RangePlan(commit.data, ask.part.ranges, self._blocks, limits)
        await self._go_through(self._plan.begin())

    async def _go_through(self, steps: Iterable[None]) -> None:
        self._ask.share.waits(None)  # that takes our own time, not the host's
        await go_through(self._plan, steps, self._settings, self._rounds, self._now)

    def _base(self, path: str) -> str:
        return f"{self._ask.origin.rstrip('/')}{path}{quote(self._ask.did, safe=':')}"

    async def _begin_anew(self) -> None:
        """Blocks are not there: goes on from a newer root, if that is why."""
        before = self._root
        await self._turn()
        await self._begin()
        if self._root == before:
            raise Unfit("missing", host=True)
        self._restarts += 1
        if self._restarts > self._settings.sparse_restarts:
            raise Unfit("moving")

    async def _round(self, wanted: Sequence[Cid]) -> bool:
        """Asks for blocks, in portions and for several at once; whether all of them came."""
        size, hosts = self._settings.sparse_blocks, self._tools.hosts
        portions = deque(wanted[at : at + size] for at in range(0, len(wanted), size))
        more = 0
        while more < len(portions) - 1 and hosts.join(self._host):
            more += 1
        workers = [asyncio.create_task(self._ask_for(portions)) for _ in range(1 + more)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            for _ in range(more):
                hosts.release(self._host)
        await self._go_through(self._plan.steps(wanted))
        return all(cid in self._blocks for cid in wanted)

    async def _ask_for(self, portions: deque[Sequence[Cid]]) -> None:
        while portions:
            portion = portions.popleft()
            await self._turn()
            url = self._base(GET_BLOCKS) + "".join(f"&cids={format_cid(cid)}" for cid in portion)
            try:
                await self._answer(url, set(portion))
            except FetchRefused as error:
                if error.name in ACCOUNT_ANSWERS:
                    raise
                if error.name == TOO_LARGE:
                    raise Unfit("bytes") from error
                if error.status != _NOT_THERE:
                    raise Unfit("no_blocks", host=True) from error

    async def _turn(self) -> None:
        """Waits until there is room for more, as fast as is set, and the host's rate allows one more request.
        A host that is to rest is left alone."""
        fastest = self._settings.max_mib_per_s * (1 << 20)
        before = self._now()
        await self._ask.share.room()
        if (end := self._limit.when()) is not None:  # our own need, not the host's
            self._limit.reschedule(end + self._now() - before)
        await asyncio.sleep(max(0.0, self._received / fastest - (self._now() - self._begun)))
        await turn(self._tools.hosts, self._host)

    async def _answer(self, url: str, asked: set[Cid] | None) -> tuple[Cid, ...]:
        """The roots of a CAR, whose blocks (those ``asked`` for; None: all those of a proof) are kept."""
        settings, share = self._settings, self._ask.share
        left = (settings.sparse_mib << 20) - self._received
        if left <= 0:
            raise Unfit("bytes")
        if asked is None:
            left = min(left, settings.sparse_proof_kib << 10)
        hops = Hops(self._tools.hosts, (self._host,))
        request = self._tools.http.stream(url, max_bytes=left, gzip=settings.gzip, proxied=True, before=hops)
        share.waits(self._now())  # answers are small: what they bring is counted, and waits before the next
        splitter = CarSplitter(Limits(max_bytes=left))
        async with hops, request as response:
            self._url = response.url
            if response.status != 200:
                await refuse(response, self._ask.origin)
            async for chunk in response.chunks:
                blocks = splitter.feed(chunk)
                if asked is None and splitter.blocks > _PROOF_BLOCKS:
                    raise Unfit("no_proofs", host=True)
                self._blocks.add(blocks if asked is None else [item for item in blocks if item[0] in asked])
                self._received += len(chunk)
                share.add(len(chunk))
                share.waits(self._now())
            allowance = allowance_of(response.headers, time.time())
        self._tools.hosts.success(host_of(self._url), allowance=allowance)
        try:
            splitter.close()
        except CarError as error:
            raise Unfit("cut", host=True) from error
        return splitter.roots or ()
