"""Archives of made repositories in any order of their blocks; the slow twin of the tree code makes them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import NamedTuple

from indexer.atproto.car import car_block, car_header
from indexer.atproto.cid import dag_cbor_cid
from indexer.atproto.commit import Commit, encode_commit
from indexer.atproto.node import parse_node
from tests.atproto.slow_tree import slow_build

DID = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"
REV = "3jzfcijpj2z2a"


def commit_of(data: bytes) -> bytes:
    return encode_commit(Commit(DID, 3, data, REV, None, bytes(64)))


class Made(NamedTuple):
    """A repository and its truth: path → block. ``blocks`` are in streaming order, the commit first."""

    records: dict[str, bytes]
    root: bytes
    blocks: list[bytes]

    @property
    def rows(self) -> list[tuple[str, bytes, bytes]]:
        return [(path, dag_cbor_cid(block), block) for path, block in sorted(self.records.items())]

    def car(self, blocks: list[bytes] | None = None) -> bytes:
        """The archive with these blocks, or all in streaming order."""
        chosen = self.blocks if blocks is None else blocks
        sections = [car_block(dag_cbor_cid(block), block) for block in chosen]
        return car_header([dag_cbor_cid(self.blocks[0])]) + b"".join(sections)

    def shuffled(self, seed: int = 1) -> bytes:
        return self.car(random.Random(seed).sample(self.blocks, k=len(self.blocks)))


def repository(records: dict[str, bytes]) -> Made:
    root, nodes = slow_build({path: dag_cbor_cid(block) for path, block in records.items()})
    known = {**nodes, **{dag_cbor_cid(block): block for block in records.values()}}
    order: list[bytes] = []

    def below(cid: bytes) -> None:
        order.append(nodes[cid])
        node = parse_node(nodes[cid])
        for index, kid in enumerate(node.kids):
            if kid is not None:
                below(kid)
            if index < len(node.keys):
                order.append(known[node.values[index]])

    below(root)
    return Made(records, root, [commit_of(root), *order])


def bodies(count: int, seed: int = 1, size: int = 60) -> dict[str, bytes]:
    """Records of three collections; blocks of about ``size`` bytes, all different."""
    source = random.Random(seed)
    out = {}
    for number in range(count):
        path = f"com.example.{source.choice('abc')}/{source.randrange(10**9):x}"
        text = f"{number}:{'x' * source.randrange(size)}".encode()
        out[path] = b"\xa1atx" + bytes((len(text),)) + text if len(text) < 256 else b"\xa1aay" + text
    return out


async def pieces(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]
