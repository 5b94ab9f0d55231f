"""Keys that are checked many at once: refused where one of them alone would be."""

from __future__ import annotations

import pytest

from indexer.atproto.mst import check_path
from indexer.errors import MstError
from indexer.repo.keys import check_keys

BESIDE = ["com.example.a/-", "com.example.a/.a", "com.example.b/...", "com.example.b/1"]


def test_valid_keys_come_back_as_paths() -> None:
    assert check_keys([path.encode() for path in BESIDE]) == "\n".join(BESIDE)


@pytest.mark.parametrize(
    "bad",
    [
        "com.example.a/.",
        "com.example.a/..",
        "com.example.b/.",
        "com.example.b/..",
        "com.example.a/",
        "com.example.b/1/2",
        "com.example.b",
        "com.example./a",
        "nodots/a",
        "/com.example.a",
        "com.example.b/" + "x" * 513,
    ],
)
def test_a_key_that_no_record_may_have_is_found_among_others(bad: str) -> None:
    with pytest.raises(MstError):
        check_path(bad, "")
    with pytest.raises(MstError):
        check_keys([path.encode() for path in sorted([*BESIDE, bad])])


def test_keys_ascend() -> None:
    with pytest.raises(MstError, match="does not come after"):
        check_keys([b"com.example.a/2", b"com.example.a/1"])
    with pytest.raises(MstError, match="does not come after"):
        check_keys([b"com.example.a/1", b"com.example.a/1"])
