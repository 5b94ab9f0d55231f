"""The C library's arenas are bounded by the setting."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys

import pytest

from indexer.memory import limit_arenas
from indexer.pool import Pool
from tests.paths import ROOT

#: Eight threads that hold memory at one time; prints how many arenas there are then.
_ARENAS = """
import ctypes, sys, tempfile, threading
from indexer.memory import limit_arenas
assert limit_arenas(int(sys.argv[1])) == (sys.argv[1] != "0")
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.fopen.restype = ctypes.c_void_p, ctypes.c_void_p
libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
together = threading.Barrier(8)
def hold():
    libc.malloc(10_000)
    together.wait()
threads = [threading.Thread(target=hold) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
with tempfile.NamedTemporaryFile() as file:
    out = libc.fopen(file.name.encode(), b"w")
    libc.malloc_info(0, out)
    libc.fclose(out)
    print(file.read().count(b"<heap nr="))
"""


def _arenas(limit: int) -> int:
    told = subprocess.run(
        [sys.executable, "-c", _ARENAS, str(limit)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(told.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_threads_share_the_arenas_that_there_may_be() -> None:
    assert _arenas(2) <= 2 < _arenas(0)


async def test_a_worker_does_not_collect_for_every_frame() -> None:
    pool = Pool(1)
    try:
        assert (await pool.run(gc.get_threshold))[0] >= 10_000
    finally:
        await pool.stop()


def test_none_is_no_limit() -> None:
    assert not limit_arenas(0)
