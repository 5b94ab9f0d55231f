"""Where one upstream's stream is to be continued, and whether what it sends is the continuation.

Owns the stored cursor's reading, the signs of a reset stream and of a loss, which servers do not tell, and
what follows from them: a renumbered stream is read from its oldest retained message in this process, while
the stored cursor stays for an operator to judge; every alarm is counted and has revs compared with the host
(`revs`), in a batch of its own before any later message of the source is taken. Event loop only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import structlog

from indexer.atproto.types import Micros, Seq
from indexer.errors import UpstreamError
from indexer.ingest import revs
from indexer.ingest.account import micros_of
from indexer.ingest.tools import IngestTools
from indexer.store.transaction import Transaction

log = structlog.get_logger()

#: A replay from our cursor may repeat this many sequence numbers at most; more means a reset stream.
OVERLAP: Final = 1
#: A jump of this much in the frames' own time across a reconnect means that frames may be lost.
LOSS_US: Final = 60 * 1_000_000
STREAM_RESET: Final = "stream_reset"
FUTURE_CURSOR: Final = "future_cursor"
OUTDATED_CURSOR: Final = "outdated_cursor"
POSSIBLE_LOSS: Final = "possible_loss"
ALARMS: Final = (STREAM_RESET, FUTURE_CURSOR, OUTDATED_CURSOR, POSSIBLE_LOSS)
_ADVICE: Final = (
    "the new numbering is followed until a restart; accept it for good with POST /firehose/cursors"
)


def cursor_name(upstream: str) -> str:
    """The row of `cursors` that holds an upstream's cursor."""
    return f"upstream/{upstream}"


def time_name(upstream: str) -> str:
    """The row of `cursors` that holds the time of the message at the cursor."""
    return f"upstream_time/{upstream}"


def batch_time(times: list[str], now_s: float) -> Micros:
    """The time to store for a batch: its messages' middle one (of two the earlier), 0 without any.

    Whoever wrote a message may lie about its time. One alone among others decides nothing, and none can
    say that the stream is ahead of us, after which no loss would be seen.
    """
    if not times:
        return 0
    told = sorted(map(micros_of, times))
    return min(told[(len(told) - 1) // 2], int(now_s * 1e6))


class Position:
    """One upstream's. ``stored`` is the durable cursor, 0 without one; ``outcomes`` are its counters."""

    def __init__(self, upstream: str, tools: IngestTools, outcomes: Counter[str]) -> None:
        self._upstream = upstream
        self._tools = tools
        self._outcomes = outcomes
        self.cursor_name, self.time_name = cursor_name(upstream), time_name(upstream)
        self.stored: Seq = 0
        self.stored_time: Micros = 0
        self._known = False
        self.renumbered = False  # our cursor belongs to a numbering that the upstream left
        self.tail: Seq = 0  # then: the newest seq of its new numbering, for this process
        self._alarms: list[str] = []
        #: Called when a comparison of revs was scheduled.
        self.told: Callable[[], None] = lambda: None
        self.load()

    def load(self) -> None:
        """Reads what is stored; nothing of the source may be on its way to the writer."""
        stored = self._tools.db.cursor(self.cursor_name)
        self._known, self.stored = stored is not None, stored or 0
        self.stored_time = self._tools.db.cursor(self.time_name) or 0
        if self.renumbered and self.tail and self.tail == self.stored:  # overtook the old numbering
            self.renumbered = False

    @property
    def durable(self) -> Seq | None:
        """The stored cursor as of now."""
        return self._tools.db.cursor(self.cursor_name)

    @property
    def resume_at(self) -> Seq | None:
        """The cursor to ask for, in the upstream's numbering of today; None for the live tail."""
        if self.renumbered:
            return self.tail
        return self.stored if self._known else None

    def accept(self) -> Seq | None:
        """The cursor of the new numbering, for the operator who takes it for good; None without one."""
        return self.tail if self.renumbered else None

    def forget(self) -> None:
        """The stored cursor was set by an operator: it counts, whatever was seen before."""
        self.renumbered, self.tail = False, 0
        self.load()

    # ---- signs

    def first(self, seq: Seq, time_us: Micros) -> None:
        """Judges a connection's first message; raises `UpstreamError` to have a reset stream read anew."""
        at = self.resume_at
        if not at:
            return
        if seq <= at - OVERLAP:
            self._renumber(STREAM_RESET, at, first=seq)
            raise UpstreamError(f"the stream begins at {seq}, below our cursor {at}", name=STREAM_RESET)
        if seq > at + 1 and self.stored_time and time_us - self.stored_time > LOSS_US:
            seconds = round((time_us - self.stored_time) / 1e6)
            log.warning(POSSIBLE_LOSS, upstream=self._upstream, seconds=seconds)
            self.alarm(POSSIBLE_LOSS)

    def future_cursor(self) -> None:
        """The host says that our cursor lies in its future."""
        self._renumber(FUTURE_CURSOR, self.resume_at)

    def _renumber(self, why: str, cursor: Seq | None, **more: Any) -> None:
        self.renumbered, self.tail = True, 0
        log.error(why, upstream=self._upstream, cursor=cursor, advice=_ADVICE, **more)
        self.alarm(why)

    # ---- alarms

    @property
    def alarmed(self) -> bool:
        """Whether `tell` has something to write."""
        return bool(self._alarms)

    def alarm(self, why: str) -> None:
        """Frames may be missing; `tell` writes it down."""
        self._alarms.append(why)
        self._outcomes[f"note/{why}"] += 1

    async def tell(self) -> None:
        """Counts the alarms and schedules the comparison of revs, durably."""
        alarms, self._alarms = self._alarms, []
        if not alarms:
            return

        def step(tx: Transaction) -> None:
            for why in alarms:
                tx.add_count(f"ingest/{self._upstream}/note/{why}", 1)
            if not self._tools.db.mode.ephemeral:  # nothing is fetched there
                revs.schedule(tx, self._upstream, alarms[-1])

        await self._tools.writer.run("upstream_alarm", step)
        self.told()
