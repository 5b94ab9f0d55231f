"""The process that the migration tests kill.

``python -m tests.migrations.crash_child FOLDER POINT COUNT``: SIGKILLs itself at the COUNT-th pass of the
crash point (``before migrate 1``, ``after migrate 1``).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from indexer.store.migration import migrate
from tests.store.crash_child import crasher

if __name__ == "__main__":
    vars(importlib.import_module("indexer.migrations.s0001_references"))["_BATCH_ROWS"] = 7
    migrate(Path(sys.argv[1]), crash_point=crasher(sys.argv[2], int(sys.argv[3])))
