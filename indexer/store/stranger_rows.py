"""Rows of `strangers`: accounts that a PDS named, until a directory tells where they are. Pure."""

from __future__ import annotations

from typing import NamedTuple

from indexer.atproto.types import Micros
from indexer.store.codecs import unpack


class StrangerRow(NamedTuple):
    """Since when the PDS's frames of it are known, and its last word on the account, if any."""

    time_us: Micros
    word: tuple[int, bool, int, Micros] | None = None  # status, active, seq, time


def decode_stranger(data: bytes) -> StrangerRow:
    return StrangerRow._make(unpack(data))
