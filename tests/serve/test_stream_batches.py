"""The encoded log: what was made of events is never handed out once they are gone."""

from __future__ import annotations

from pathlib import Path

from indexer.serve.stream_batches import EncodedLog
from indexer.serve.stream_rules import EventFilter
from indexer.store.codecs import AccountStatus
from tests.store.support import ALICE, BOB, LIKE, POST, opened


async def test_a_wiped_record_is_not_replayed_however_soon_it_was_swept(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(ALICE, LIKE, "e")
        await store.put(BOB, POST, "e")
        encoded = EncodedLog(
            store.writer, store.log, batch_events=100, batch_bytes=1 << 20, cache_bytes=1 << 20
        )
        assert b"feed.like" in encoded.take(1, EventFilter(), False).payload
        await store.do(lambda tx: tx.wipe_repo(ALICE, AccountStatus.DELETED))
        await store.checkpoint.run_once()
        assert (await store.retention.run_once()).wipes == 1
        payload = encoded.take(1, EventFilter(), False).payload
        assert b"feed.like" not in payload
        assert b"feed.post" in payload
