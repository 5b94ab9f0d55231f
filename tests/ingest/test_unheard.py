"""What a removed upstream said of accounts counts no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.ingest import unheard
from indexer.store.codecs import AccountStatus
from indexer.store.keyspaces import ACCOUNT_STATUS, CURSORS
from indexer.store.transaction import Transaction
from tests.ingest.node import Node
from tests.ingest.test_pipeline import HOME, holds, row_of, world

RELAY, OTHER = "ws://relay.test", f"pds::{HOME}"


def done(node: Node) -> bool:
    return node.db.get(CURSORS, unheard.ROWS + RELAY) is None


async def test_an_account_that_only_a_removed_relay_took_down_is_served_again(tmp_path: Path) -> None:
    async with world() as net:
        name = net.network.stream_urls[0]
        async with net.node(tmp_path) as node:
            forge = net.account()
            net.send(forge.parts())
            await node.until(lambda: holds(node, forge))
            net.send(net.plain(forge.status, False, "takendown"))
            await node.until(lambda: row_of(node, forge).status is AccountStatus.TAKENDOWN)
            await node.until(lambda: not row_of(node, forge).work)
            await node.ingest.sources.remove(name)
            await node.until(lambda: row_of(node, forge).status is AccountStatus.ACTIVE)
            assert [word.source for word in node.db.account_words(forge.did) if word.source == name] == []


@pytest.mark.parametrize("step", [1, 2, 3, 500])
async def test_steps_of_any_size_drop_its_words_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(unheard, "_STEP", step)
    monkeypatch.setattr(unheard, "_REST_S", 0)

    def speak(tx: Transaction) -> None:
        for number in range(5):
            for source in (RELAY, OTHER):
                tx.set_account_word(f"did:web:{number}.test", source, AccountStatus.ACTIVE, True, 1, 1)
        unheard.plan(tx, RELAY)

    async with world() as net, net.node(tmp_path, upstreams=[]) as node:
        await node.writer.run("t", speak)  # as a kill behind the removal leaves it
    async with world() as net, net.node(tmp_path, upstreams=[]) as node:
        await node.until(lambda: done(node))
        assert {key[1] for key, _ in node.db.scan(ACCOUNT_STATUS)} == {OTHER}
        assert len(list(node.db.scan(ACCOUNT_STATUS))) == 5
