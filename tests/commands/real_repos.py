"""Repositories that a real PDS made, and what that PDS says is in them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import orjson

from tests.paths import DATA, shared_data


def repo_file(name: str) -> Path:
    """The project's own copy, else the shared one (the test is skipped where neither is)."""
    own = DATA / "repos" / name
    return own if own.exists() else shared_data(f"repos/{name}")


def truth_of(name: str) -> dict[str, Any]:
    """`did`, `rev`, `commit`, `data`, `signingKey`, `records` path → CID, `values` path → JSON."""
    packed = repo_file(f"{name}.truth.json.gz").read_bytes()
    truth: dict[str, Any] = orjson.loads(gzip.decompress(packed))["accounts"][0]
    return truth
