"""The path of one upstream's messages: decode, sort, verify in order-preserving batches, hand to the writer.

Owns the intake (what is dropped unverified, which key a frame gets), the bounds on what is under way, and
the order: steps reach the writer in the order in which the source sent their messages, each with the
source's cursor. Leaves out sockets (`source`), what steps do (`apply`) and every wait for the network.
Event loop only; verification runs in the pool.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import structlog

from indexer.atproto.frames import (
    AccountFrame,
    CommitFrame,
    ErrorFrame,
    IdentityFrame,
    InfoFrame,
    SyncFrame,
    UnknownFrame,
    decode_frame,
)
from indexer.atproto.types import Did, DidKey, Seq
from indexer.errors import FrameError, IndexerError, UpstreamError, WorkerDied
from indexer.identity.resolver import Identity
from indexer.ingest.account import micros_of
from indexer.ingest.apply import Applier, Arrival, label
from indexer.ingest.machine import Act
from indexer.ingest.newcomers import Result
from indexer.ingest.notices import Notices, unplaced
from indexer.ingest.position import OUTDATED_CURSOR, Position, batch_time
from indexer.ingest.source import SHOWN, Upstream, lag_s
from indexer.ingest.suspects import WORKER_DIED, verified
from indexer.ingest.tools import IngestTools
from indexer.ingest.unreadable import Unreadable
from indexer.ingest.verify import Item, Verdict
from indexer.store.transaction import Transaction

log = structlog.get_logger()


class Message(NamedTuple):
    """One message on its way. ``run`` does its work on the writer; ``item`` is what is verified for it."""

    seq: Seq
    did: Did
    data: bytes
    time: str
    run: Callable[[Transaction, Verdict | None], Result]
    arrival: Arrival | None = None
    item: Item | None = None
    valid: bool = True  # an event, well-formed as far as it was looked at


class Batch:
    """Messages in order, and the verdicts on those that are verified."""

    __slots__ = ("messages", "size", "verdicts")

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.size = 0
        self.verdicts: asyncio.Task[list[Verdict]] | None = None


class Pipeline:
    """One upstream's path, from socket to writer."""

    def __init__(self, upstream: Upstream, tools: IngestTools, applier: Applier) -> None:
        self.upstream = upstream
        self._tools = tools
        self._applier = applier
        self._settings = tools.settings.ingest
        self._last_seq: Seq = 0  # of this connection
        self._unreadable = Unreadable()
        self._unread: tuple[bytes, FrameError] | None = None
        self._open = Batch()
        self._queue: deque[Batch] = deque()
        self._verifying = 0
        self._bytes = 0
        self._flush_planned = False
        self._changed = asyncio.Event()  # something left the path
        self._ready = asyncio.Event()
        self._connected = False
        self._frames = 0
        self._received = 0  # bytes
        self._outcomes: Counter[str] = Counter()
        self.position = Position(upstream.name, tools, self._outcomes)
        self._last_time = ""
        self._error = ""
        self._notices = Notices(upstream.name, self._outcomes)

    # ---- the source's side

    async def settled(self) -> Seq | None:
        """Waits until everything received is committed and the disk has room; the cursor to continue from."""
        await self._tools.space.wait()
        await self.drained()
        await self.position.tell()
        return self.position.resume_at

    async def drained(self) -> None:
        """Waits until everything received is committed."""
        self._flush()
        while self._bytes:
            await self._change()
        self.position.load()

    def opened(self) -> None:
        self._connected, self._error, self._last_seq = True, "", 0
        self._unreadable.connected()

    def closed(self, reason: str, message: str) -> None:
        self._connected, self._error = False, f"{reason}: {message[:SHOWN]}"
        self._outcomes[f"connection/{reason}"] += 1

    def parted(self) -> None:
        """The connection was ended by us, because we were told to."""
        self._connected, self._error = False, ""

    async def receive(self, data: bytes) -> bool:
        """One binary message; true for a valid event.

        Raises `UpstreamError` or a fatal `FrameError` to end the connection.
        """
        if not self._tools.space.is_set():
            raise UpstreamError("the disk is nearly full; free some space to go on", name="disk_floor")
        self._frames += 1
        self._received += len(data)
        try:
            message = self._message(data)
        except IndexerError:
            raise
        except Exception as error:  # a fault of ours, which must not hold this upstream up for ever
            message = self._malformed(data, self._notices.fault(error))
        if message is None:
            await self._set_aside()
            return False
        if message.seq <= self._last_seq:
            raise UpstreamError(f"seq {message.seq} after {self._last_seq}", name="seq_order")
        if not self._last_seq:
            self.position.first(message.seq, micros_of(message.time) if message.time else 0)
        if self.position.alarmed:
            await self.position.tell()
        self._last_seq = message.seq
        if self.position.renumbered:
            self.position.tail = message.seq
        self._last_time = message.time or self._last_time
        await self._take(message)
        return message.valid

    def status(self) -> dict[str, Any]:
        """Figures for people: where the source stands and what became of its messages since the start."""
        return {
            "name": self.upstream.name,
            "url": self.upstream.url,
            "is_pds": self.upstream.is_pds,
            "connected": self._connected,
            "cursor": self.position.durable,
            "seq": self._last_seq or self.position.stored,
            "renumbered": self.position.renumbered,
            "lag_s": round(lag_s(micros_of(self._last_time) if self._last_time else 0), 3),
            "frames": self._frames,
            "bytes": self._received,
            "in_flight_bytes": self._bytes,
            "error": self._error,
            "outcomes": dict(self._outcomes),
        }

    # ---- intake

    def _message(self, data: bytes) -> Message | None:
        """The message in ``data``, sorted; None for one that carries no work."""
        try:
            frame = decode_frame(data, max_bytes=self._settings.max_frame_bytes)
        except FrameError as error:
            return self._malformed(data, error)
        if isinstance(frame, CommitFrame):
            return self._sort(frame.repo, frame, data)
        if isinstance(frame, SyncFrame):
            return self._sort(frame.did, frame, data)
        if isinstance(frame, IdentityFrame):
            return Message(
                frame.seq, frame.did, data, frame.time,
                lambda tx, _: self._applier.identity(tx, self.upstream.name, frame),
            )  # fmt: skip
        if isinstance(frame, AccountFrame):
            return Message(
                frame.seq, frame.did, data, frame.time,
                lambda tx, _: self._applier.account(tx, self.upstream.name, frame),
            )  # fmt: skip
        if isinstance(frame, UnknownFrame):
            if frame.seq is None:
                self._outcomes["drop/unknown_type"] += 1
                return None
            return _dropped(frame.seq, "", data, "", "unknown_type")._replace(valid=False)
        if isinstance(frame, InfoFrame):
            if self._notices.info(frame) == "OutdatedCursor":
                self.position.alarm(OUTDATED_CURSOR)
            return None
        raise self._refused(frame)

    def _sort(self, did: Did, frame: CommitFrame | SyncFrame, data: bytes) -> Message:
        """A commit or sync: dropped here, or with the key that it is to be verified under."""
        if self._applier.filters.is_excluded(did):
            return _dropped(frame.seq, did, data, frame.time, "unwanted")
        route = self._tools.routes.get(did)
        identity: Identity | None = None
        key: DidKey = ""
        whole = True
        if route is not None:
            if frame.rev <= route.rev:
                return _dropped(frame.seq, did, data, frame.time, "stale_rev")
            key, whole = route.key, route.whole
        else:
            row = self._tools.db.repo(did)
            if row is not None:
                if not row.tracked:
                    return _dropped(frame.seq, did, data, frame.time, "unwanted")
                key, whole = row.signing_key, not row.sparse
                if key:
                    self._tools.routes.put(did, row)
            elif not self._applier.wants_unknown(did, frame):
                return _dropped(frame.seq, did, data, frame.time, "unwanted")
            else:
                identity = self._tools.resolver.cached(did)
                key = identity.signing_key if identity is not None else ""
        arrival = Arrival(self.upstream.name, frame.seq, did, frame, data, key, identity, whole)
        return Message(
            frame.seq, did, data, frame.time,
            lambda tx, verdict: self._applier.frame(tx, arrival, verdict),
            arrival, (data, key, whole) if key else None,
        )  # fmt: skip

    def _malformed(self, data: bytes, error: FrameError) -> Message | None:
        """Rows 0–2: the end of the connection, or of this message alone."""
        seq, did = error.seq, error.did or ""
        if error.fatal:
            at = self._last_seq or self.position.resume_at or 0
            if not self._unreadable.passes(at, data):
                raise error
            log.error("unreadable_frame_skipped", upstream=self.upstream.name, after=at, error=str(error))
        if seq is None:
            self._unread = (data, error)
            return None

        def run(tx: Transaction, _: Verdict | None) -> Result:
            tx.quarantine(self.upstream.name, seq, did, error.reason, str(error), data)
            return Result(Act.REJECT, error.reason)

        return Message(seq, did, data, "", run, valid=False)

    async def _set_aside(self) -> None:
        """Keeps a message that has no place among the others, for nobody can tell its seq."""
        if self._unread is not None:
            (data, error), self._unread = self._unread, None
            self._outcomes[f"reject/{error.reason}"] += 1
            step = unplaced(self.upstream.name, self._last_seq, data, error)
            await self._tools.writer.run("quarantine", step)

    def _refused(self, frame: ErrorFrame) -> UpstreamError:
        error = self._notices.refused(frame)
        if error.name == "FutureCursor":
            self.position.future_cursor()
        return error

    # ---- batches

    async def _take(self, message: Message) -> None:
        batch = self._open
        batch.messages.append(message)
        batch.size += len(message.data)
        self._bytes += len(message.data)
        if len(batch.messages) >= self._settings.batch_frames:
            self._flush()
        elif not self._flush_planned:
            # What else is in the socket already comes into the same batch.
            self._flush_planned = True
            asyncio.get_running_loop().call_soon(self._flush_if_idle)
        while self._full():
            await self._change()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _full(self) -> bool:
        return (
            len(self._queue) >= self._settings.inflight_batches
            or self._bytes >= self._settings.inflight_mib << 20
        )

    def _flush_if_idle(self) -> None:
        """Sends what is there to an idle verifier; while all have work the batch may grow.

        Handing over costs as much as a dozen frames: only half a batch or more waits behind a busy one.
        """
        self._flush_planned = False
        busy = self._verifying - max(1, self._tools.pool.workers)
        half = len(self._open.messages) * 2 >= self._settings.batch_frames
        if busy < 0 or (busy == 0 and half):
            self._flush()

    def _flush(self) -> None:
        batch = self._open
        if not batch.messages:
            return
        self._open = Batch()
        items = [message.item for message in batch.messages if message.item is not None]
        if items:
            self._verifying += 1
            batch.verdicts = asyncio.create_task(verified(self._tools, items))
            batch.verdicts.add_done_callback(self._verified_one)
        self._queue.append(batch)
        self._ready.set()

    def _verified_one(self, _task: asyncio.Task[list[Verdict]]) -> None:
        self._verifying -= 1
        self._flush_if_idle()

    # ---- the writer's side

    async def run(self) -> None:
        """Hands verified batches to the writer, in order, until cancelled."""
        while True:
            self._ready.clear()
            while self._queue:
                batch = self._queue[0]
                verdicts = await batch.verdicts if batch.verdicts is not None else []
                await self._submit(batch, verdicts)
                self._queue.popleft()
                self._changed.set()
            await self._ready.wait()

    async def _submit(self, batch: Batch, verdicts: list[Verdict]) -> None:
        left = iter(verdicts)
        steps = [
            self._step(message, next(left) if message.item is not None else None)
            for message in batch.messages
        ]
        messages = batch.messages
        last_time = batch_time([message.time for message in messages if message.time], self._tools.clock())
        if last_time:
            steps.append(lambda tx: tx.set_cursor(self.position.time_name, last_time))

        def rescue(index: int, error: Exception) -> Callable[[Transaction], None]:
            return self._rescue(messages[index], error)

        future = await self._tools.writer.submit_ordered("ingest", steps, rescue)
        future.add_done_callback(lambda done: self._committed(batch, done))

    def _committed(self, batch: Batch, done: asyncio.Future[None]) -> None:
        if done.cancelled() or done.exception() is not None:
            return  # nobody may go on from here: the writer is closed for good, these will come again
        self._bytes -= batch.size
        self._changed.set()

    def _step(self, message: Message, verdict: Verdict | None) -> Callable[[Transaction], None]:
        def step(tx: Transaction) -> None:
            if message.arrival is not None and verdict is not None and verdict.reason == WORKER_DIED:
                self._applier.failed(tx, message.arrival, WorkerDied(verdict.message))
                self._count(tx, message, Result(Act.DESYNC, WORKER_DIED))
            else:
                self._count(tx, message, message.run(tx, verdict))

        return step

    def _rescue(self, message: Message, error: Exception) -> Callable[[Transaction], None]:
        log.error(
            "frame_failed", upstream=self.upstream.name, seq=message.seq, did=message.did, exc_info=error
        )

        def step(tx: Transaction) -> None:
            if message.arrival is not None:
                self._applier.failed(tx, message.arrival, error)
            else:
                name = getattr(error, "reason", type(error).__name__)
                tx.quarantine(self.upstream.name, message.seq, message.did, name, str(error), message.data)
            self._count(tx, message, Result(Act.REJECT, "failed"))

        return step

    def _count(self, tx: Transaction, message: Message, result: Result) -> None:
        name = label(result)
        self._outcomes[name] += 1
        tx.add_count(f"ingest/{self.upstream.name}/{name}", 1)
        if message.seq > self.position.stored:
            tx.set_cursor(self.position.cursor_name, message.seq)


def _dropped(seq: Seq, did: Did, data: bytes, time: str, reason: str) -> Message:
    result = Result(Act.DROP, reason)
    return Message(seq, did, data, time, lambda _tx, _verdict: result)
