"""Many sections of an archive at once: where their blocks lie, and whether they hash to their CIDs. Hot.

Decides only what every good archive passes; of any other it says None or False, and the careful readers in
`indexer.atproto.car` say what is wrong. Pure functions, any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from mmap import mmap
from typing import Final, NamedTuple

from indexer.atproto.car import read_varint
from indexer.atproto.cid import CID_LENGTH, DAG_CBOR_PREFIX
from indexer.atproto.types import Cid
from indexer.errors import CarError
from indexer.repo.keys import are_cids

#: A section whose length takes two bytes needs no comparison with limits above this; nearly all are such.
TWO_BYTES: Final = 1 << 14


class Sections(NamedTuple):
    """Where the last section ends, and of each its CID and its block's start and end."""

    end: int
    cids: list[Cid]
    starts: list[int]
    ends: list[int]


def whole_sections(data: bytes | mmap, at: int, stop: int, largest: int) -> Sections | None:
    """The whole sections that begin in [at, stop); None when a length cannot be.

    ``largest``: bytes that a section may have, at least `TWO_BYTES`.
    """
    cids: list[Cid] = []
    starts: list[int] = []
    ends: list[int] = []
    add_cid, add_start, add_end = cids.append, starts.append, ends.append
    size, shortest = len(data), CID_LENGTH
    begin = at
    try:
        while at < stop:
            begin = at
            length = data[at]
            start = at + 1
            if length > 0x7F:
                high = data[start]
                if 0 < high < 0x80:
                    length += (high << 7) - 0x80
                    start += 1
                else:
                    length, start = read_varint(data, at)
                    if length > largest:
                        return None
            if length < shortest:
                return None
            at = start + length
            body = start + shortest
            add_cid(data[start:body])
            add_start(body)
            add_end(at)
    except IndexError:  # the data end inside a length
        pass
    except CarError as error:
        if error.reason != "car_truncated":
            return None
    if at > size:  # inside a section
        at = begin
        del cids[-1], starts[-1], ends[-1]
    return Sections(at, cids, starts, ends)


def all_match(cids: Sequence[Cid], blocks: Sequence[bytes]) -> bool:
    """Whether every block hashes to its CID, and all CIDs are of the two kinds that blocks may have."""
    digest = sha256
    digests = [digest(block).digest() for block in blocks]
    joined = b"".join(cids)
    if not digests or DAG_CBOR_PREFIX + DAG_CBOR_PREFIX.join(digests) == joined:
        return True
    return are_cids(joined) and all(map(bytes.endswith, cids, digests))
