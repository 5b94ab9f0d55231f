"""Where tests find their data: the project's own, and the shared folder beside a checkout, if any."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared"
INTEROP = SHARED / "interop"
SHARED_DATA = SHARED / "data"


def interop(name: str) -> Path:
    """A vector file of the protocol's public test suite; skips the test when the folder is absent."""
    if not INTEROP.is_dir():
        pytest.skip("the interop vectors (../shared/interop) are not beside this checkout")
    return INTEROP / name


def shared_data(name: str) -> Path:
    """A file of the captured network data; skips the test when the folder is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the captured data (../shared/data) is not beside this checkout")
    return SHARED_DATA / name
