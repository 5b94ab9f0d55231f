"""Commits to a repository of which a part was fetched: the tree before them is nobody's word for anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from indexer.atproto.node import key_layer
from indexer.ingest import pipeline
from indexer.ingest.suspects import verified
from indexer.ingest.tools import IngestTools
from indexer.ingest.verify import Item, Outcome, Verdict, VerifyLimits, verify_batch
from indexer.store.transaction import Transaction
from tests.ingest.forge import FAR_FUTURE, Forge
from tests.ingest.test_pipeline import count, followed, holds, row_of

#: A key that stands on another layer than its own, where nobody looked.
#: Behind all posts: one that belongs on the lowest layer, one that does not, one that is no key.
LOW = next(key for n in range(9) if key_layer(key := f"zz.elsewhere.thing/{n}".encode()) == 0)
HIGH = next(key for n in range(99) if key_layer(key := f"app.bsky.feed.post/z{n}".encode()) > 0)
NO_KEY = next(key for n in range(9) if key_layer(key := f"app.bsky.feed.post/z{n}/".encode()) == 0)


@pytest.mark.parametrize(("key", "layer"), [(LOW, None), (HIGH, 0), (NO_KEY, 0)])
def test_nodes_that_were_never_verified_are_looked_at_with_the_first_commit_that_touches_them(
    key: bytes, layer: int | None
) -> None:
    forge = Forge()
    forge.posts(30)
    tree = forge.account.tree
    assert tree.layer > 0
    cid = next(iter(forge.account.records.values())).cid
    tree.set(key, cid, layer=tree.layer if layer is None else layer)
    forge.parts()
    data = forge.posts(1).encode()
    items: list[Item] = [(data, forge.key, True), (data, forge.key, False)]
    believed, looked_at = verify_batch(items, VerifyLimits(FAR_FUTURE))
    assert believed.outcome is Outcome.OK  # the tree before is taken for a valid one
    assert (looked_at.outcome, looked_at.row, looked_at.reason) == (Outcome.REJECT, 16, "tree")


async def test_a_commit_is_verified_anew_when_the_tree_before_it_was_taken_for_a_verified_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    async def noted(tools: IngestTools, items: Sequence[Item]) -> list[Verdict]:
        asked.extend(whole for _, _, whole in items)
        return await verified(tools, items)

    async with followed(tmp_path) as (net, node, forge):
        monkeypatch.setattr(pipeline, "verified", noted)

        def sparse(tx: Transaction) -> None:
            row = tx.repo(forge.did)
            assert row is not None
            tx.set_repo(forge.did, row._replace(sparse=True, complete=False))

        await node.writer.run("sparse", sparse)
        before = count(node, "buffer/identity")
        for _ in range(2):
            net.send(forge.posts(1))
            await node.until(lambda: holds(node, forge) and not row_of(node, forge).work)
        assert asked == [True, False]
        assert (count(node, "buffer/identity") - before, count(node, "ok/commit")) == (1, 3)
        assert (row_of(node, forge).sparse, row_of(node, forge).complete) == (True, False)
