"""Our own bad state stops ingest: no frame is passed over, whichever repository it belongs to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from indexer.errors import StoreCorrupt
from indexer.ingest.apply import Applier
from tests.ingest.test_pipeline import holds, world


async def test_a_damaged_row_stops_ingest_and_the_frames_beside_it_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world() as net:
        bad, good = net.account("b"), net.account("g")
        frame = Applier.frame

        def damaged(applier: Applier, tx: Any, arrival: Any, verdict: Any) -> Any:
            if arrival.did == bad.did:
                raise StoreCorrupt("repos: a row does not decode")
            return frame(applier, tx, arrival, verdict)

        with monkeypatch.context() as patch:
            patch.setattr(Applier, "frame", damaged)
            async with net.node(tmp_path) as node:
                net.send(bad.parts(), good.parts(), bad.posts(2), good.posts(2))
                assert isinstance(await node.writer.wait_closed(), StoreCorrupt)
                await asyncio.sleep(0)  # the futures of the commits tell
                assert node.ingest.status()[0]["in_flight_bytes"] > 0
                assert node.seqs() == [0]
        async with net.node(tmp_path) as node:
            await node.until(lambda: holds(node, good) and holds(node, bad))
            assert node.seqs() == [net.seq]
