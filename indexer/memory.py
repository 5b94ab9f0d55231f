"""How the process takes memory from the system: the C library's arenas.

RocksDB's threads allocate and free what others freed and allocated; with an arena for each thread (glibc's
default) what one has free is of no use to another, and the process grows by a seventh for nothing. Elsewhere
than on glibc there is nothing to set. No state.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

#: `mallopt`'s parameter in glibc's malloc.h.
_M_ARENA_MAX: Final = -8


def limit_arenas(count: int) -> bool:
    """At most ``count`` arenas from now on, 0 leaves it as it is; whether that was taken.

    Threads that run already keep theirs, so this comes before the database is opened.
    """
    if not count or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, count))
