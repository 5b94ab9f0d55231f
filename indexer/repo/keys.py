"""Checks of many keys or CIDs at once. Hot; pure functions, any thread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice, pairwise
from operator import lt

from indexer.atproto.cid import CID_LENGTH
from indexer.atproto.mst import check_path
from indexer.atproto.node import shown
from indexer.atproto.syntax import MAX_RKEY
from indexer.errors import MstError


def are_cids(joined: bytes) -> bool:
    """Whether the CIDs that were joined, of 36 bytes each, are of the two kinds that blocks may have."""
    total = len(joined) // CID_LENGTH
    codecs = joined[1::CID_LENGTH]
    return (
        len(joined) == total * CID_LENGTH
        and joined[0::CID_LENGTH] == b"\x01" * total
        and codecs.count(0x71) + codecs.count(0x55) == total
        and joined[2::CID_LENGTH] == b"\x12" * total
        and joined[3::CID_LENGTH] == b"\x20" * total
    )


def check_keys(keys: Sequence[bytes]) -> str:
    """Keys that were read from nodes, as paths with newlines between them; `MstError` when they do not ascend
    or are not all valid. At least one.

    Reading a node checks that its keys have no other characters than keys may have.
    """
    if not all(map(lt, keys, islice(keys, 1, None))):
        last, key = next(pair for pair in pairwise(keys) if pair[0] >= pair[1])
        raise MstError(f"key {shown(key)} does not come after {shown(last)}", rule="order")
    joined = b"\n".join(keys)
    paths = joined.decode("ascii")
    if joined.count(b"/") != len(keys):  # what lies together below begins with one name and a slash
        for path in paths.split("\n"):
            check_path(path, "")
    # Keys are sorted, so those of a collection lie together: one look at its name is enough, and the record
    # keys that are not allowed ("", ".", "..") have one place where they would be.
    first = 0
    while first < len(keys):
        collection = check_path(keys[first].decode("ascii"), "")
        name = collection.encode("ascii")
        behind = bisect_left(keys, name + b"0", first)  # "0" is the character after "/"
        for barred in (name + b"/.", name + b"/.."):
            place = bisect_left(keys, barred, first, behind)
            if place < behind and keys[place] == barred:
                check_path(barred.decode("ascii"), collection)
        first = behind
    if max(map(len, keys)) > MAX_RKEY:
        for path in paths.split("\n"):
            if len(path) > MAX_RKEY:
                check_path(path, "")
    return paths
