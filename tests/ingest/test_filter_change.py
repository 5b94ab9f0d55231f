"""A filter changed while frames come in: what was left out is fetched, the chain stays provable."""

from __future__ import annotations

from pathlib import Path

from indexer.ingest.filters import Filters
from indexer.ingest.revisit import Revisit
from indexer.store.transaction import Transaction
from tests.ingest.forge import POST, create, update
from tests.ingest.node import Node
from tests.ingest.test_pipeline import count, holds, row_of, world

LIKE = "app.bsky.feed.like"
EVERYTHING, POSTS = Filters(mode="full"), Filters(mode="full", collections=(POST,))


async def change(node: Node, old: Filters, new: Filters, *, purge: bool = False) -> None:
    """As the management API does it, and the round to its end."""
    revisit = Revisit(node.db, node.writer, node.settings)

    def store(tx: Transaction) -> None:
        for item in set(old.rows()) - set(new.rows()):
            tx.drop_filter(*item)
        for item in new.rows():
            tx.set_filter(*item)
        revisit.plan(tx, old, new, purge=purge)

    async with revisit.changing():
        await node.writer.run("filter_patch", store)
        node.ingest.set_filters(new)
    await revisit.run_once()


async def test_wider_then_narrower_then_purged(tmp_path: Path) -> None:
    tables = {"filter": {"mode": "full", "collections": [POST]}}
    async with world() as net, net.node(tmp_path, **tables) as node:
        forge = net.account()
        net.send(forge.parts(create(f"{POST}/a", "kept"), create(f"{LIKE}/a", "left out")))
        await node.until(lambda: node.db.repo(forge.did) is not None and row_of(node, forge).rev != "")
        assert [path for path, _ in node.db.records(forge.did)] == [f"{POST}/a"]
        net.store(forge)
        await change(node, POSTS, EVERYTHING)
        await node.until(lambda: holds(node, forge) and row_of(node, forge).complete)
        assert node.db.count("backfill/done/ok") == 1

        await change(node, EVERYTHING, POSTS)
        assert not row_of(node, forge).complete
        net.send(forge.parts(create(f"{LIKE}/b", "left out again")), forge.parts(update(f"{POST}/a", "new")))
        await node.until(lambda: row_of(node, forge).rev == forge.account.rev)
        assert [path for path, _ in node.db.records(forge.did)] == [f"{LIKE}/a", f"{POST}/a"]
        assert count(node, "desync/prev_data") == 0

        await change(node, POSTS, POSTS, purge=True)
        assert [path for path, _ in node.db.records(forge.did)] == [f"{POST}/a"]
        assert [event.action for event in node.events() if event.kind == "record"] == [
            "create", "create", "update", "delete",
        ]  # fmt: skip


async def test_who_is_excluded_is_left_alone_and_fetched_when_included_again(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(1))
        await node.until(lambda: holds(node, forge))
        without = Filters(mode="full", excludes=frozenset({forge.did}))
        await change(node, EVERYTHING, without)
        rev = row_of(node, forge).rev
        net.send(forge.posts(1))
        await node.until(lambda: count(node, "drop/unwanted") == 1)
        assert (row_of(node, forge).rev, row_of(node, forge).due) == (rev, 0)
        net.store(forge)
        await change(node, without, EVERYTHING)
        await node.until(lambda: holds(node, forge))
