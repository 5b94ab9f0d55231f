"""An AT Protocol indexer: follows the firehose, verifies everything, serves what it knows."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout the migrations are the folder beside this one; an installed package has them inside.
_checkout = _Path(__file__).resolve().parents[1]
if not _Path(__file__).with_name("migrations").exists() and (_checkout / "migrations/__init__.py").is_file():
    __path__.append(str(_checkout))
