"""One archive as the repository of any number of accounts: its tree under commits of theirs.

A signature each makes as many large repositories as are wanted out of one that was made slowly. Pure but for
reading the file; any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from indexer.simulator.cbor import block_cid, cid_bytes, cid_text, encode
from indexer.simulator.corpus import CarInfo
from indexer.simulator.keys import K256, SigningKey
from indexer.simulator.wire import car_header, car_section, commit_block


class StampedCar(NamedTuple):
    """``head``, which ends with a commit of its own, and then what follows the commit in ``file``."""

    info: CarInfo
    head: bytes
    file: Path

    def pieces(self, size: int = 1 << 20) -> Iterator[bytes]:
        """All of it, in order."""
        yield self.head
        with self.file.open("rb") as file:
            file.seek(len(self.head))
            while piece := file.read(size):
                yield piece


def stamp_car(file: Path, info: CarInfo, number: int) -> StampedCar:
    """The repository in ``file``, which `corpus.write_car` made, as that of the account ``number``."""
    key = SigningKey.derive(K256, f"stamp/{number}")
    did = "did:plc:" + cid_text(block_cid(encode(["stamp", number])))[-24:]
    commit = commit_block(did, info.rev, cid_bytes(info.data), key)
    cid = block_cid(commit)
    # DIDs, revs, signatures and CIDs have one length each, so this head is as long as the file's own.
    head = car_header(cid) + car_section(cid, commit)
    made = CarInfo(did, info.rev, cid_text(cid), info.data, key.did_key, info.records, info.bytes)
    return StampedCar(made, head, file)
