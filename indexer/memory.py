"""How the process takes memory and gives it back: the C library's arenas, the collector of cycles.

RocksDB's threads allocate and free what others freed and allocated; with an arena for each thread (glibc's
default) what one has free is of no use to another, and the process grows by a seventh for nothing. Elsewhere
than on glibc there is nothing to set. The collector looks at young objects every 700 allocations by default,
which frames on their way cause by themselves: a seventh of a verifier's time, for cycles that nothing makes.
No state.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Final

#: `mallopt`'s parameter in glibc's malloc.h.
_M_ARENA_MAX: Final = -8
#: Objects that come until the youngest are looked at: in a worker, and in the daemon, where what nobody
#: needs may be whole chunks of records.
IN_WORKER: Final = 50_000
IN_DAEMON: Final = 10_000


def limit_arenas(count: int) -> bool:
    """At most ``count`` arenas from now on, 0 leaves it as it is; whether that was taken.

    Threads that run already keep theirs, so this comes before the database is opened.
    """
    if not count or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, count))


def collect_rarely(after: int) -> None:
    """For a process that makes many objects and hardly any cycles: as many may be garbage meanwhile."""
    gc.set_threshold(after, 10, 10)
