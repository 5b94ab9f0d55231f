"""Replays the frames that wait for a repository, through the same checks as those from the socket.

Owns the loop from buffer to verdicts to one unit on the writer, and the end of waiting: the repository is
synced in the unit that finds its buffer empty. One drain a repository at a time. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

import structlog

from indexer.atproto.frames import CommitFrame, SyncFrame
from indexer.atproto.types import Did, DidKey
from indexer.errors import StoreError, WorkerDied
from indexer.ingest.answers import Answers, read_waiting
from indexer.ingest.apply import Applier, Arrival, label
from indexer.ingest.machine import Act, Situation, desynchronized
from indexer.ingest.suspects import WORKER_DIED, verified
from indexer.ingest.tools import IngestTools
from indexer.ingest.verify import Verdict
from indexer.store.codecs import BufferedFrame, RepoRow, SyncState, Work
from indexer.store.transaction import Transaction

log = structlog.get_logger()

#: Frames of a portion, where batches are small.
_LEAST_PORTION: Final = 64
#: Rounds through a buffer to which frames keep coming, until somebody else has his turn.
_ROUNDS: Final = 16


class Progress(Enum):
    """How one unit of a drain ended."""

    EMPTY = auto()  # nothing waits any more but what a newer identity may prove
    MORE = auto()  # go on behind what was looked at
    AGAIN = auto()  # begin anew: another key, or frames that came in meanwhile
    NOT_NOW = auto()  # the repository is being fetched, or gone


class Portion(NamedTuple):
    """Frames of a buffer in their order, verified under ``key``. ``last``: none stood behind them; ``whole``:
    the tree before them was taken for one that was verified as a whole."""

    key: DidKey
    frames: Sequence[BufferedFrame]
    decoded: Sequence[CommitFrame | SyncFrame | None]
    verdicts: Sequence[Verdict]
    last: bool = True
    whole: bool = False


class Round:
    """One way through a buffer: how far it is, and how many frames it left there."""

    __slots__ = ("after", "fresh", "left")

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh
        self.after: BufferedFrame | None = None
        self.left = 0


class Drainer:
    """Drains buffers, each by one task at a time."""

    def __init__(self, tools: IngestTools, applier: Applier, answers: Answers) -> None:
        self._tools = tools
        self._applier = applier
        self._answers = answers
        self._locks: WeakValueDictionary[Did, asyncio.Lock] = WeakValueDictionary()

    async def drain(self, did: Did, *, fresh: bool = False) -> bool:
        """Replays what waits; true when nothing does any more but what its identity does not prove so far.

        That stays, with `Work.RESOLVE`, until the identity was asked for after it came in. False also where
        frames come in as fast as they are replayed: `Work.DRAIN` has the rest replayed later. ``fresh``:
        the identity in the row was asked for just now.
        """
        lock = self._locks.setdefault(did, asyncio.Lock())
        async with lock:
            for _ in range(_ROUNDS):
                now = Round(fresh)
                while True:
                    portion = await self._portion(did, now.after)
                    progress = await self._replay(did, portion, now)
                    if progress is not Progress.MORE:
                        break
                if progress is not Progress.AGAIN:
                    return progress is Progress.EMPTY
        return False

    async def _portion(self, did: Did, after: BufferedFrame | None) -> Portion:
        tools = self._tools
        row = tools.db.repo(did)
        if row is None:
            return Portion("", (), (), ())
        limit = max(_LEAST_PORTION, tools.settings.ingest.batch_frames)
        frames = tools.db.buffered(did, row.epoch, limit=limit, after=after)
        if not frames or not row.signing_key:
            return Portion(row.signing_key, (), (), ())
        whole = not row.sparse
        verdicts = await verified(tools, [(frame.data, row.signing_key, whole) for frame in frames])
        decoded = [read_waiting(frame.data) for frame in frames]
        return Portion(row.signing_key, frames, decoded, verdicts, len(frames) < limit, whole)

    async def _replay(self, did: Did, portion: Portion, now: Round) -> Progress:
        try:
            return await self._tools.writer.run("drain", lambda tx: self._unit(tx, did, portion, now))
        except StoreError:
            raise
        except Exception as error:
            log.exception("drain_failed", did=did)
            message = f"drain: {error}"
            await self._tools.writer.run("drain_failed", lambda tx: self._give_up(tx, did, message))
            return Progress.EMPTY

    def _unit(self, tx: Transaction, did: Did, portion: Portion, now: Round) -> Progress:
        row = tx.repo(did)
        if row is None or (row.state is SyncState.BACKFILLING and not row.work & Work.DRAIN):
            return Progress.NOT_NOW
        if row.signing_key != portion.key or (portion.whole and row.sparse):
            return Progress.AGAIN
        if not portion.key:
            now.left = tx.buffer_size(did)[0]
        elif not self._replay_known(tx, did, portion, now) or not portion.last:
            return Progress.MORE
        return self._finish(tx, did, now)

    def _replay_known(self, tx: Transaction, did: Did, portion: Portion, now: Round) -> bool:
        """Replays the frames as far as they are what was verified; false where another one stands between.

        One by one, so that a frame whose outcome is counted is never met again. What only a newer identity
        can prove stays, and holds up nobody.
        """
        known = {frame[:3]: index for index, frame in enumerate(portion.frames)}
        for waiting in tx.buffered(did, limit=len(portion.frames), after=now.after):
            index = known.get(waiting[:3])
            if index is None or portion.frames[index].data != waiting.data:
                return False
            if self._replay_one(tx, did, portion, index):
                tx.drop_buffered_frame(did, waiting)
            else:
                now.left += 1
            now.after = waiting
        return True

    def _replay_one(self, tx: Transaction, did: Did, portion: Portion, index: int) -> bool:
        """One frame; false when it needs an identity that is asked for after it came in."""
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
        # A time in our future is from before our clock was set back.
        arrived = waiting.arrived if waiting.arrived <= tx.now_us else 0
        fresh = row.identity_at > arrived and did not in self._tools.hints
        result = self._applier.replay(tx, arrival, row, verdict, fresh=fresh)
        if result.act is Act.BUFFER:
            return False
        tx.add_count(f"ingest/{waiting.source}/{label(result)}", 1)
        return True

    def _finish(self, tx: Transaction, did: Did, now: Round) -> Progress:
        """The round is over. What it left stays until the identity is known; other frames came in since."""
        row = tx.repo(did)
        if row is None:
            return Progress.NOT_NOW
        waiting = tx.buffer_size(did)[0]
        if row.signing_key or not waiting:
            new = self._answers.at_rest(tx, did, row, resolved=now.fresh and not now.left)
        else:
            new = row._replace(work=row.work & ~Work.DRAIN)
        if now.left and waiting:
            new = new._replace(work=new.work | Work.RESOLVE)
        if waiting > now.left:
            new = new._replace(work=new.work | Work.DRAIN)
        self._applier.store(tx, did, row, new)
        if now.left or waiting > now.left:
            self._applier.wake(did, new.work, Work.RESOLVE | Work.DRAIN)
        return Progress.AGAIN if waiting > now.left else Progress.EMPTY

    def _give_up(self, tx: Transaction, did: Did, message: str) -> None:
        """Something of ours failed on a frame: the buffer goes, the repository is fetched anew."""
        tx.drop_buffered(did)
        self._tools.routes.forget(did)
        row = tx.repo(did)
        if row is not None:
            broken = desynchronized(row, message[:500], Situation(tx.now_us, self._applier.ephemeral))
            tx.set_repo(did, broken._replace(work=row.work & ~(Work.DRAIN | Work.RESOLVE)))


def is_ready(row: RepoRow) -> bool:
    """Whether a drain can do something: a fetch that is under way comes first."""
    return row.state is not SyncState.BACKFILLING or bool(row.work & Work.DRAIN)
