from __future__ import annotations

import gzip
import json
from random import Random

import pytest
from multiformats import CID

from indexer.simulator.cbor import block_cid, cid_bytes, cid_text
from indexer.simulator.tree import Tree, key_layer
from tests.paths import interop, shared_data
from tests.simulator import strict

EMPTY = "bafyreie5737gdxlw5i64vzichcalba3z2v5n6icifvx5xytvske7mr3hpm"


def leaves(tree: Tree) -> tuple[CID, dict[CID, bytes]]:
    """The tree's root and nodes as the strict reader has them."""
    root, _ = tree.seal()
    blocks = {CID.decode(bytes(cid)).set(base="base32"): block for cid, block in tree.walk() if block}
    return CID.decode(bytes(root)).set(base="base32"), blocks


def test_empty_tree_has_the_known_root() -> None:
    assert cid_text(Tree().seal()[0]) == EMPTY


def test_key_heights_are_those_of_the_vectors() -> None:
    for vector in json.loads(interop("mst/key_heights.json").read_text()):
        assert key_layer(vector["key"].encode()) == vector["height"]


def test_example_keys_lie_on_their_layers() -> None:
    keys = interop("mst/example_keys.txt").read_text().split()
    assert len(keys) == 156
    assert all(key_layer(key.encode()) == int(key[1]) for key in keys)


def test_commit_proof_vectors_give_roots_and_proofs() -> None:
    for vector in json.loads(interop("firehose/commit-proof-fixtures.json").read_text()):
        leaf = cid_bytes(vector["leafValue"])
        tree = Tree.of((key.encode(), leaf) for key in vector["keys"])
        assert cid_text(tree.seal()[0]) == vector["rootBeforeCommit"], vector["comment"]
        for key in vector["adds"]:
            tree.set(key.encode(), leaf)
        for key in vector["dels"]:
            tree.remove(key.encode())
        assert cid_text(tree.seal()[0]) == vector["rootAfterCommit"], vector["comment"]
        proof: dict[bytes, bytes] = {}
        for key in vector["adds"] + vector["dels"]:
            tree.cover(key.encode(), proof)
        assert {cid_text(cid) for cid in proof} == set(vector["blocksInProof"]), vector["comment"]


@pytest.mark.parametrize("name", ["empty", "ten", "kilo", "big24k"])
def test_rebuilds_the_tree_of_a_real_repository(name: str) -> None:
    truth = json.loads(gzip.decompress(shared_data(f"repos/{name}.truth.json.gz").read_bytes()))["accounts"][
        0
    ]
    items = [(path.encode(), cid_bytes(cid)) for path, cid in truth["records"].items()]
    Random(7).shuffle(items)
    assert cid_text(Tree.of(items).seal()[0]) == truth["data"]


@pytest.mark.parametrize("seed", range(6))
def test_history_does_not_show_in_the_root(seed: int) -> None:
    """After random inserts, replacements and removals the root is that of a tree built from nothing."""
    rng, tree, twin = Random(seed), Tree(), dict[bytes, bytes]()
    for round_ in range(60):
        for _ in range(rng.randrange(1, 12)):
            key = f"c.o.l/{rng.randrange(150 + 100 * seed)}".encode()
            if key in twin and rng.random() < 0.6:
                del twin[key]
                tree.remove(key)
            else:
                twin[key] = block_cid(rng.randbytes(4))
                tree.set(key, twin[key])
        if round_ % 3 == 0:
            tree.seal()
    root, blocks = leaves(tree)
    items = strict.flatten(root, blocks)
    assert [(item.key, bytes(item.value)) for item in items if isinstance(item, strict.Leaf)] == sorted(
        twin.items()
    )
    assert strict.root_of(items) == root


def test_removing_what_is_not_there_is_an_error_and_changes_nothing() -> None:
    tree = Tree.of((f"a/{n}".encode(), block_cid(b"v")) for n in range(40))
    before, _ = tree.seal()
    with pytest.raises(KeyError):
        tree.remove(b"a/x")
    assert Tree.of((f"a/{n}".encode(), block_cid(b"v")) for n in range(40)).seal()[0] == before
    assert tree.seal()[0] == before


def test_seal_gives_only_what_changed() -> None:
    tree = Tree.of((f"a/{n}".encode(), block_cid(b"v")) for n in range(500))
    _, everything = tree.seal()
    tree.set(b"a/7", block_cid(b"w"))
    _, changed = tree.seal()
    assert 1 <= len(changed) < 12 < len(everything)
