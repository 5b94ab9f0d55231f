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
#: Containers that come until the youngest are looked at, and how many such looks until older ones are.
_COLLECT_AFTER: Final = (50_000, 20, 50)


def limit_arenas(count: int) -> bool:
    """At most ``count`` arenas from now on, 0 leaves it as it is; whether that was taken.

    Threads that run already keep theirs, so this comes before the database is opened.
    """
    if not count or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, count))


def collect_rarely() -> None:
    """For a process that makes many objects and hardly any cycles: some megabytes may be garbage."""
    gc.set_threshold(*_COLLECT_AFTER)
