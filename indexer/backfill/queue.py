"""The order in which repositories are fetched.

The durable queue is the `pending` keyspace: every row whose ``due`` is set stands there, ordered by due
time. Owns the lanes of that order, a bounded window of it in memory sorted by host (so that a busy host
holds up nobody else's repositories), and where to read on. Leaves out the fetching. Event loop only.

Lanes, lowest first: `CLAIMED_DUE` for a repository being worked on (a kill leaves it in front), explicit
requests as of `explicit_due`, then everything else at the time at which it is due. What is due at one time
is fetched in the order of its DIDs.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final, NamedTuple

from indexer.atproto.types import Did, Micros

#: Due time of a repository while it is worked on.
CLAIMED_DUE: Micros = 1
#: How far explicit requests go back in the queue: before everything that became due by itself.
EXPLICIT_LEAD: Micros = 20 * 365 * 86400 * 1_000_000


def explicit_due(now_us: Micros) -> Micros:
    """The due time of what somebody asked for: ahead of the rest, first come first served."""
    return max(CLAIMED_DUE + 1, now_us - EXPLICIT_LEAD)


#: Repositories that are found within such a time are due together, and so fetched in the order of their keys:
#: what is written then lies together on disk, and compaction has little to merge. Shorter than the overlap
#: of two readings of the queue.
FOUND_SPAN: Micros = 30 * 1_000_000


def found_due(now_us: Micros) -> Micros:
    """The due time of what was found and nobody asked for."""
    return now_us - now_us % FOUND_SPAN


#: Entries that any host may have, however small the window.
_LEAST_OF_A_HOST: Final = 8


class Entry(NamedTuple):
    due: Micros
    did: Did
    host: str  # "" when not known yet


class ReadyQueue:
    """Repositories that are due, at most ``limit`` of them and of one host an eighth, by host and due time.

    Of a host with more than its eighth it remembers only where the first one stands that had no room.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._per_host = max(_LEAST_OF_A_HOST, limit // 8)
        self._left_out: dict[str, tuple[Micros, Did]] = {}
        self._hosts: dict[str, list[Entry]] = {}
        self._known: set[Did] = set()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, did: Did) -> bool:
        return did in self._known

    @property
    def room(self) -> int:
        return max(0, self.limit - len(self._known))

    def add(self, entry: Entry, *, always: bool = False) -> None:
        """Takes an entry in, unless its repository is in already, or its host has its eighth."""
        if entry.did in self._known:
            return
        entries = self._hosts.setdefault(entry.host, [])
        if len(entries) >= self._per_host and not always:
            place = entry.due, entry.did
            self._left_out[entry.host] = min(self._left_out.get(entry.host, place), place)
            return
        self._known.add(entry.did)
        heapq.heappush(entries, entry)

    def startable(self, allowed: Callable[[str], bool], enough: int) -> bool:
        """Whether ``enough`` entries are of hosts that are ``allowed`` now."""
        found = 0
        for host, entries in self._hosts.items():
            if allowed(host):
                found += len(entries)
                if found >= enough:
                    return True
        return False

    def crowded(self) -> list[str]:
        """Hosts of which entries had no room."""
        return list(self._left_out)

    def left_out(self, host: str) -> tuple[Micros, Did] | None:
        """Where to read again for a host that has room again, once: its first entry that had none."""
        if host not in self._left_out or len(self._hosts.get(host, ())) > self._per_host // 4:
            return None
        return self._left_out.pop(host)

    def pop(self, allowed: Callable[[str], bool]) -> Entry | None:
        """The earliest entry of any host that is ``allowed`` now."""
        heads = [(entries[0], host) for host, entries in self._hosts.items() if allowed(host)]
        if not heads:
            return None
        _, host = min(heads)
        entry = heapq.heappop(self._hosts[host])
        self._forget(host, entry.did)
        return entry

    def pop_host(self, host: str, limit: int) -> list[Entry]:
        """Up to ``limit`` entries of one host, which is to be left alone for a while."""
        taken: list[Entry] = []
        while len(taken) < limit and self._hosts.get(host):
            entry = heapq.heappop(self._hosts[host])
            self._forget(host, entry.did)
            taken.append(entry)
        return taken

    def clear(self) -> None:
        """Forgets all entries; they are still in the durable queue."""
        self._hosts.clear()
        self._known.clear()
        self._left_out.clear()

    def hosts(self) -> list[str]:
        return list(self._hosts)

    def _forget(self, host: str, did: Did) -> None:
        self._known.discard(did)
        if not self._hosts[host]:
            del self._hosts[host]


class ReadPosition:
    """Where in `pending` to read on.

    Dead rows collect in front of a queue, so reading always from its front gets slow. A pass goes on
    from page to page until the end of what is due; the next one begins a little before that end (rows
    appear with a due time slightly in the past), and at the front every ``rewind_us`` or when asked to.
    """

    def __init__(self, *, overlap_us: Micros, rewind_us: Micros) -> None:
        self._overlap_us = overlap_us
        self._rewind_us = rewind_us
        self._next: tuple[Micros, Did] = (0, "")
        self._rewound_at: Micros = 0

    def start(self, now_us: Micros) -> tuple[Micros, Did]:
        """The lowest key of the next page."""
        if now_us - self._rewound_at >= self._rewind_us:
            self.rewind()
        if self._next == (0, ""):
            self._rewound_at = now_us
        return self._next

    def page_end(self, last: tuple[Micros, Did]) -> None:
        """A full page was read, up to and including ``last``."""
        due, did = last
        self._next = (due, did + "\0")

    def pass_end(self, now_us: Micros) -> None:
        """Everything due by ``now_us`` was read."""
        self._next = (max(0, now_us - self._overlap_us), "")

    def rewind(self) -> None:
        """The next page begins at the front."""
        self._next = (0, "")

    def back_to(self, place: tuple[Micros, Did]) -> None:
        """The next page begins no later than at ``place``."""
        self._next = min(self._next, place)
