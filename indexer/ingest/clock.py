"""Whether our clock is behind: most of what accounts sign these days then lies in our future (row 7).

Owns the judgement over the newest commits and who is told of it. One account, or a few, can sign what they
like; most of all commits cannot lie. Leaves out what becomes of the commits. Event loop only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import structlog

from indexer.atproto.types import Did

log = structlog.get_logger()

#: Commits that are judged together, and for how many seconds each of them counts.
_WINDOW: Final = 64
_COUNTS_S: Final = 600.0
#: Accounts and commits below which nothing is concluded.
_MIN_ACCOUNTS: Final = 3
_MIN_COMMITS: Final = 5


class _Seen(NamedTuple):
    at: float  # monotonic
    did: Did
    ahead: bool


class ClockWatch:
    """Told of every commit that its account signed."""

    def __init__(self, uptime: Callable[[], float] = time.monotonic) -> None:
        self._uptime = uptime
        self._seen: deque[_Seen] = deque(maxlen=_WINDOW)
        self._alarmed = False

    def note(self, did: Did, *, ahead: bool) -> None:
        """``ahead``: the commit was refused because its rev lies in our future."""
        self._seen.append(_Seen(self._uptime(), did, ahead))
        if ahead is self._alarmed:
            return
        problem = self.problem
        if (problem is not None) is self._alarmed:
            return
        self._alarmed = not self._alarmed
        if problem:
            log.error("clock_behind", problem=problem)
        else:
            log.info("clock_right_again")

    @property
    def problem(self) -> str | None:
        """What is wrong, for people; None when the clock seems right."""
        since = self._uptime() - _COUNTS_S
        seen = [item for item in self._seen if item.at >= since]
        ahead = [item.did for item in seen if item.ahead]
        few = len(ahead) < _MIN_COMMITS or len(set(ahead)) < _MIN_ACCOUNTS
        if few or len(ahead) * 2 <= len(seen):
            return None
        return (
            f"{len(ahead)} of the last {len(seen)} signed commits lie in the future and were refused:"
            " check the clock of this machine"
        )
