"""An AT Protocol indexer: follows the firehose, verifies everything, serves what it knows.

As a library it walks repository archives: see docs/library.md. The names are imported when they are first
used, so that importing the package costs nothing.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from indexer.atproto.commit import Commit, check_signature
    from indexer.errors import DiskError, DriveError, IndexerError, MissingBlock, MstError, OrderLost
    from indexer.repo.blocks import BlockStore, MemoryBlocks, Output, noop
    from indexer.repo.driver import Driver, DriverBuilder, WalkLimits
    from indexer.repo.loading import NeedDisk
    from indexer.repo.slices import Proven, RepoSlice
    from indexer.repo.walks import RecordWalk
    from indexer.store.spill import DiskBuilder, SpillStore

__version__ = "0.1.0"

#: name → the module that has it
_HOMES = {
    **dict.fromkeys(("Commit", "check_signature"), "indexer.atproto.commit"),
    **dict.fromkeys(
        ("DiskError", "DriveError", "IndexerError", "MissingBlock", "MstError", "OrderLost"), "indexer.errors"
    ),
    **dict.fromkeys(("BlockStore", "MemoryBlocks", "Output", "noop"), "indexer.repo.blocks"),
    **dict.fromkeys(("Driver", "DriverBuilder", "WalkLimits"), "indexer.repo.driver"),
    "NeedDisk": "indexer.repo.loading",
    **dict.fromkeys(("Proven", "RepoSlice"), "indexer.repo.slices"),
    "RecordWalk": "indexer.repo.walks",
    **dict.fromkeys(("DiskBuilder", "SpillStore"), "indexer.store.spill"),
}

__all__ = [
    "BlockStore", "Commit", "DiskBuilder", "DiskError", "DriveError", "Driver", "DriverBuilder",
    "IndexerError", "MemoryBlocks", "MissingBlock", "MstError", "NeedDisk", "OrderLost", "Output",
    "Proven", "RecordWalk", "RepoSlice", "SpillStore", "WalkLimits", "check_signature", "noop",
]  # fmt: skip


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(_import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


# In a checkout the migrations are the folder beside this one; an installed package has them inside.
_checkout = _Path(__file__).resolve().parents[1]
if not _Path(__file__).with_name("migrations").exists() and (_checkout / "migrations/__init__.py").is_file():
    __path__.append(str(_checkout))
