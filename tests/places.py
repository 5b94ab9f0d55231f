"""Where the tests' files and the bytecode of their child processes are.

The files of the short tests are in memory where there is room: to open or close a store is to wait for the
disk many times. Where Python is told not to write bytecode beside the sources, it goes to pytest's cache:
dozens of child processes would compile everything anew.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

import pytest

_MEMORY = "/dev/shm"
_ROOM = 8 << 30  # far above what the short tests hold at one time, and above `disk.soft_floor_mib`


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "not slow" and "TMPDIR" not in os.environ and has_room(_MEMORY):
        os.environ["TMPDIR"] = tempfile.tempdir = _MEMORY
    cache = config.pluginmanager.hasplugin("cacheprovider") and config.cache
    if cache and os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        sys.dont_write_bytecode = False
        sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(cache.mkdir("bytecode"))


def has_room(folder: str) -> bool:
    """Whether much can be written there, and programs be run."""
    try:
        return shutil.disk_usage(folder).free >= _ROOM and not os.statvfs(folder).f_flag & os.ST_NOEXEC
    except (OSError, AttributeError):  # not on Linux
        return False
