"""A CAR cut at any block: through the whole backfill, never accepted, and no record is deleted for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.atproto.car import read_header, sections
from indexer.store.codecs import SyncState
from tests.backfill.world import Host, World, account, answer_car, car_of, cids_of, edit

POST = "app.bsky.feed.post/"


def cuts_of(data: bytes) -> list[int]:
    """Where the header ends, and every block but the last."""
    _roots, start = read_header(data)
    return [start, *(end for _cid, _begin, end in sections(data, start))][:-1]


@pytest.mark.slow
@pytest.mark.limit(120)
@pytest.mark.parametrize("verify_mib", [16, 1])
async def test_no_cut_is_accepted_and_none_deletes_a_record(
    tmp_path: Path, verify_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if verify_mib == 1:  # what does not fit into memory, as far as the verifier is told
        monkeypatch.setattr("indexer.backfill.verify.MIB", 1)
    one = account("one", {f"{POST}3k{number:011d}": f"text {number}" for number in range(300)})
    backfill = {"verify_mib": verify_mib, "retry_min": 0.001, "retry_max": 0.001}
    patient = {"faults": 10_000, "requests_per_s": 0}  # one cut after the other makes it look like a liar
    async with Host() as host, World(tmp_path, host, backfill=backfill, hosts=patient) as world:
        host.serve(one)
        await world.fetch(one)
        kept = cids_of(one)
        told = world.log()
        edit(one, 2, {f"{POST}3k{0:011d}": "other", f"{POST}3k{1:011d}": None})
        data = car_of(one)
        cuts = cuts_of(data)
        assert len(cuts) > 300
        if verify_mib == 1:  # a table each takes its time
            cuts = cuts[::25] + cuts[-1:]
        for cut in cuts:
            host.answers[one.did] = answer_car(one, body=data[:cut])
            await world.change(one, error="", attempt=0)
            row = await world.fetch(one)
            assert (row.state, row.complete, row.attempt) == (SyncState.DESYNCHRONIZED, True, 1), cut
            assert row.error.startswith("incomplete"), cut
            assert world.records(one) == kept, cut
        assert world.log() == told
        assert world.spooled() == []
        del host.answers[one.did]
        host.serve(one)
        assert (await world.fetch(one)).state is SyncState.SYNCED
        assert world.records(one) == cids_of(one)
