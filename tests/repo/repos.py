"""Real repositories with what their PDS says is in them."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.paths import DATA, SHARED_DATA

NAMES = ("empty", "ten", "kilo", "big24k")


class Sample(NamedTuple):
    name: str
    car: bytes
    truth: dict[str, Any]


@cache
def sample(name: str) -> Sample:
    folder = DATA / "repos"
    truth = json.loads(gzip.decompress((folder / f"{name}.truth.json.gz").read_bytes()))
    return Sample(name, (folder / f"{name}.car").read_bytes(), truth["accounts"][0])


def session_cars() -> list[Path]:
    """The archives of the captured session; empty when the shared folder is absent."""
    return sorted((SHARED_DATA / "session" / "cars").glob("*.car"))


@cache
def session_truth() -> dict[str, dict[str, Any]]:
    path = SHARED_DATA / "session" / "truth.json"
    if not path.is_file():
        pytest.skip("the captured session (../shared/data/session) is not beside this checkout")
    return {account["did"]: account for account in json.loads(path.read_text())["accounts"]}
