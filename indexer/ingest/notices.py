"""What a host says about its stream: `#info` and error frames.

Owns their counting and logging, which are bounded whatever a host makes up: known names are counted by
name, all others as one, text is cut, and lines about `#info` frames are rare; and of messages that cannot
be taken in. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

from indexer.atproto.frames import ErrorFrame, InfoFrame
from indexer.atproto.types import Seq
from indexer.errors import FrameError, UpstreamError
from indexer.ingest.source import SHOWN
from indexer.store.transaction import Transaction

log = structlog.get_logger()

_INFOS: Final = frozenset(("OutdatedCursor",))
_ERRORS: Final = frozenset(("FutureCursor", "ConsumerTooSlow"))
OTHER: Final = "other"
#: Seconds between two log lines about one upstream's `#info` frames.
INFO_LOG_S: Final = 60.0


class Notices:
    """Those of one upstream; ``outcomes`` are its counters."""

    def __init__(self, upstream: str, outcomes: Counter[str]) -> None:
        self._upstream = upstream
        self._outcomes = outcomes
        self._logged = -INFO_LOG_S  # loop time
        self._unsaid = 0

    def info(self, frame: InfoFrame) -> str:
        """Counts it; the name that we know it by."""
        name = frame.name if frame.name in _INFOS else OTHER
        self._outcomes[f"info/{name}"] += 1
        now = asyncio.get_running_loop().time()
        if now - self._logged < INFO_LOG_S:
            self._unsaid += 1
            return name
        log.warning(
            "upstream_info",
            upstream=self._upstream,
            name=frame.name[:SHOWN],
            message=(frame.message or "")[:SHOWN],
            not_logged=self._unsaid,
            advice="frames were missed; revs are compared, broken chains fetched anew"
            if name == "OutdatedCursor"
            else "",
        )
        self._unsaid, self._logged = 0, now
        return name

    def refused(self, frame: ErrorFrame) -> UpstreamError:
        """The end of the connection that an error frame means, under a name that we know."""
        name = frame.error if frame.error in _ERRORS else OTHER
        self._outcomes[f"error/{name}"] += 1
        said = (frame.message or frame.error)[:SHOWN]
        return UpstreamError(f"the host closed the stream: {said}", name=name)

    def fault(self, error: Exception) -> FrameError:
        """Our own failure at the intake of a message, as the end of a connection."""
        log.error("intake_failed", upstream=self._upstream, exc_info=error)
        return FrameError(f"{type(error).__name__}: {error}", reason="intake")


def unplaced(source: str, after: Seq, data: bytes, error: FrameError) -> Callable[[Transaction], None]:
    """The step that keeps and counts a refused message without a seq, which came behind ``after``."""

    def step(tx: Transaction) -> None:
        tx.quarantine(source, after, error.did, error.reason, str(error), data)
        tx.add_count(f"ingest/{source}/reject/{error.reason}", 1)

    return step
