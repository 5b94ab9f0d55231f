"""Replays the frames that wait for a repository, through the same checks as those from the socket.

Owns the loop from buffer to verdicts to one unit on the writer, and the end of waiting: the repository is
synced in the unit that finds its buffer empty. One drain a repository at a time. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple
from weakref import WeakValueDictionary

import structlog

from indexer.atproto.frames import CommitFrame, SyncFrame, decode_frame
from indexer.atproto.types import Did, DidKey
from indexer.errors import FrameError, IdentityGone, StoreError, WorkerDied
from indexer.ingest.answers import Answers
from indexer.ingest.apply import Applier, Arrival, label
from indexer.ingest.machine import Act, Situation, desynchronized
from indexer.ingest.suspects import WORKER_DIED, verified
from indexer.ingest.tools import IngestTools
from indexer.ingest.verify import Verdict, verify_batch
from indexer.store.codecs import BufferedFrame, RepoRow, SyncState, Work, did_range
from indexer.store.keyspaces import RESYNC_BUFFER
from indexer.store.transaction import Transaction

log = structlog.get_logger()

#: Frames of a portion, where batches are small.
_LEAST_PORTION = 64
#: Frames that came in while a portion was verified, up to so many, are verified in the writer's turn.
_LATE_FRAMES = 32


class Progress(Enum):
    """How one unit of a drain ended."""

    EMPTY = auto()  # nothing waits any more
    MORE = auto()  # go on
    STALE_KEY = auto()  # a frame fails under an identity that may be out of date
    NOT_NOW = auto()  # the repository is being fetched, or gone


class Portion(NamedTuple):
    """Some frames from the front of a buffer, verified under ``key``."""

    key: DidKey
    frames: Sequence[BufferedFrame]
    decoded: Sequence[CommitFrame | SyncFrame | None]
    verdicts: Sequence[Verdict]


class Drainer:
    """Drains buffers, each by one task at a time."""

    def __init__(self, tools: IngestTools, applier: Applier, answers: Answers) -> None:
        self._tools = tools
        self._applier = applier
        self._answers = answers
        self._locks: WeakValueDictionary[Did, asyncio.Lock] = WeakValueDictionary()

    async def drain(self, did: Did, *, fresh: bool = False) -> bool:
        """Replays what waits; true when nothing does any more.

        ``fresh``: the identity in the row was asked for after the frames came in. Otherwise a bad
        signature has it refreshed first. Raises `IdentityUnavailable` where that cannot be done now.
        """
        lock = self._locks.setdefault(did, asyncio.Lock())
        async with lock:
            while True:
                portion = await self._portion(did)
                progress = await self._replay(did, portion, fresh)
                if progress is Progress.STALE_KEY:
                    await self._refresh(did)
                    fresh = True
                elif progress is not Progress.MORE:
                    return progress is Progress.EMPTY

    async def _portion(self, did: Did) -> Portion:
        tools = self._tools
        row = tools.db.repo(did)
        if row is None:
            return Portion("", (), (), ())
        limit = max(_LEAST_PORTION, tools.settings.ingest.batch_frames)
        frames = [
            BufferedFrame(rev, kind, source, data)
            for (_, rev, kind, source), (epoch, data) in tools.db.scan(
                RESYNC_BUFFER, *did_range(did), limit=limit
            )
            if epoch == row.epoch
        ]
        if not frames or not row.signing_key:
            return Portion(row.signing_key, (), (), ())
        items = [(frame.data, row.signing_key) for frame in frames]
        verdicts = await verified(tools, items)
        return Portion(row.signing_key, frames, [_decoded(frame.data) for frame in frames], verdicts)

    async def _replay(self, did: Did, portion: Portion, fresh: bool) -> Progress:
        try:
            return await self._tools.writer.run("drain", lambda tx: self._unit(tx, did, portion, fresh))
        except StoreError:
            raise
        except Exception as error:
            log.exception("drain_failed", did=did)
            message = f"drain: {error}"
            await self._tools.writer.run("drain_failed", lambda tx: self._give_up(tx, did, message))
            return Progress.EMPTY

    def _unit(self, tx: Transaction, did: Did, portion: Portion, fresh: bool) -> Progress:
        row = tx.repo(did)
        if row is None or (row.state is SyncState.BACKFILLING and not row.work & Work.DRAIN):
            return Progress.NOT_NOW
        if row.signing_key != portion.key:
            return Progress.MORE
        progress = self._replay_known(tx, did, portion, fresh)
        if progress is not Progress.MORE:
            return progress
        late = tx.buffered(did, limit=_LATE_FRAMES + 1)
        if late and not row.signing_key:
            return Progress.STALE_KEY
        if len(late) > _LATE_FRAMES:
            return Progress.MORE
        if late:
            # Verified here, or a busy repository would never be found with an empty buffer.
            items = [(frame.data, portion.key) for frame in late]
            verdicts = verify_batch(items, self._tools.limits())
            rest = Portion(portion.key, late, [_decoded(frame.data) for frame in late], verdicts)
            progress = self._replay_known(tx, did, rest, fresh)
            if progress is not Progress.MORE:
                return progress
        self._finish(tx, did, resolved=fresh)
        return Progress.EMPTY

    def _replay_known(self, tx: Transaction, did: Did, portion: Portion, fresh: bool) -> Progress:
        """Replays the buffer's front as far as it is what was verified; what is replayed is dropped.

        One by one, so that a frame whose outcome is counted is never met again: another frame of its rev may
        have come in meanwhile, or need a fresh identity first.
        """
        known = {frame[:3]: index for index, frame in enumerate(portion.frames)}
        for waiting in tx.buffered(did, limit=len(portion.frames) + 1):
            index = known.get(waiting[:3])
            if index is None or portion.frames[index].data != waiting.data:
                break
            if not self._replay_one(tx, did, portion, index, fresh):
                return Progress.STALE_KEY
            tx.drop_buffered_frame(did, waiting)
        return Progress.MORE

    def _replay_one(self, tx: Transaction, did: Did, portion: Portion, index: int, fresh: bool) -> bool:
        """One frame; false when it needs a fresh identity."""
        row = tx.repo(did)
        frame, waiting = portion.decoded[index], portion.frames[index]
        if row is None or frame is None:
            return True
        arrival = Arrival(waiting.source, frame.seq, did, frame, waiting.data, portion.key)
        verdict = portion.verdicts[index]
        if verdict.reason == WORKER_DIED:
            self._applier.failed(tx, arrival, WorkerDied(verdict.message))
            tx.add_count(f"ingest/{waiting.source}/desync/{WORKER_DIED}", 1)
            return True
        result = self._applier.replay(tx, arrival, row, verdict, fresh=fresh)
        if result.act is Act.BUFFER:
            return fresh
        tx.add_count(f"ingest/{waiting.source}/{label(result)}", 1)
        return True

    def _finish(self, tx: Transaction, did: Did, *, resolved: bool) -> None:
        row = tx.repo(did)
        if row is None:
            return
        new = self._answers.at_rest(tx, did, row, resolved=resolved)
        if new != row:
            tx.set_repo(did, new)

    def _give_up(self, tx: Transaction, did: Did, message: str) -> None:
        """Something of ours failed on a frame: the buffer goes, the repository is fetched anew."""
        tx.drop_buffered(did)
        self._tools.routes.forget(did)
        row = tx.repo(did)
        if row is not None:
            broken = desynchronized(row, message[:500], Situation(tx.now_us, self._applier.ephemeral))
            tx.set_repo(did, broken._replace(work=row.work & ~(Work.DRAIN | Work.RESOLVE)))

    async def _refresh(self, did: Did) -> None:
        """The identity once more; one that is gone leaves the row without a key."""
        try:
            identity = await self._tools.resolver.resolve(did, refresh=True)
        except IdentityGone as error:
            gone = error
            await self._tools.writer.run("identity_gone", lambda tx: self._answers.gone(tx, did, gone))
        else:
            await self._tools.writer.run("identity", lambda tx: self._answers.learned(tx, did, identity))


def _decoded(data: bytes) -> CommitFrame | SyncFrame | None:
    try:
        frame = decode_frame(data)
    except FrameError:
        return None
    return frame if isinstance(frame, (CommitFrame, SyncFrame)) else None


def is_ready(row: RepoRow) -> bool:
    """Whether a drain can do something: a fetch that is under way comes first."""
    return row.state is not SyncState.BACKFILLING or bool(row.work & Work.DRAIN)
