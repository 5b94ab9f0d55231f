"""The captured session over several upstreams at once: whatever the order, the repeats and the reconnects,
the index is the same.

Relays send merged streams under numbers of their own and repeat themselves; PDSes send their own accounts'
frames. Chunks of the streams are let go in a random order, the daemon is restarted in the middle, and its
cursors are set back a little, as by a host that repeats what it sent.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from libipld import decode_dag_cbor_multi

from indexer.atproto.frames import encode_frame
from indexer.config import Settings
from indexer.simulator.replay import ReplayNetwork, ReplaySource
from indexer.store.database import Database
from indexer.store.transaction import Transaction
from indexer.store.writer import Writer
from tests.ingest.node import Node
from tests.test_session_replay import SESSION, check_account, check_log, handles, known

#: Frames that an upstream may repeat under a new number. A host's repeated word on an account is a new word.
REPEATED = ("#commit", "#sync", "#identity")


class Network:
    """The session's answers, and upstreams of which the test says when they send what."""

    def __init__(self, chance: random.Random, kinds: str) -> None:
        """``kinds``: a letter for each upstream, ``r`` a relay, ``0`` or ``1`` a PDS."""
        session = ReplayNetwork.from_session(SESSION)
        hosts = [playback.read(0, 1 << 40) for playback in session.playbacks]
        ends = [source.endpoint for source in session.sources]
        self.sources = [ReplaySource([], end) for end in ends] + [ReplaySource([])] * kinds.count("r")
        # In memory: a fetch that the daemon's end cuts off leaves no file open.
        cars = {did: car.read_bytes() for did, car in session.cars.items() if isinstance(car, Path)}
        self.network = ReplayNetwork(self.sources, session.documents, cars, accounts=session.accounts)
        relays = iter(range(len(ends), len(self.sources)))
        self.at = [next(relays) if kind == "r" else int(kind) for kind in kinds]
        self.streams = [
            list(numbered(merged(chance, hosts))) if kind == "r" else hosts[int(kind)] for kind in kinds
        ]
        self.prefixes = ["" if kind == "r" else "pds::" for kind in kinds]

    def names(self) -> list[str]:
        urls = self.network.stream_urls
        return [prefix + urls[at] for prefix, at in zip(self.prefixes, self.at, strict=True)]

    def ends(self) -> list[int]:
        return [self.network.playbacks[at].seq for at in self.at]


def merged(chance: random.Random, hosts: list[list[bytes]]) -> Iterator[bytes]:
    """The hosts' frames in a random order that keeps each host's own, some of them twice."""
    left = [list(reversed(frames)) for frames in hosts]
    sent: list[bytes] = []
    while any(left):
        frame = chance.choices(left, [len(frames) for frames in left])[0].pop()
        sent.append(frame)
        yield frame
        if chance.random() < 0.05:
            again = chance.choice(sent[-50:])
            if decode_dag_cbor_multi(again)[0]["t"] in REPEATED:
                yield again


def numbered(frames: Iterator[bytes]) -> Iterator[bytes]:
    """The frames under a relay's own numbers."""
    for seq, data in enumerate(frames, 1000):
        header, payload = decode_dag_cbor_multi(data)
        yield encode_frame(header["t"], {**payload, "seq": seq})


def chunks(chance: random.Random, streams: list[list[bytes]]) -> Iterator[tuple[int, list[bytes]]]:
    """(upstream, its next frames), in a random order, until all are sent."""
    at = [0] * len(streams)
    while open_ := [index for index, stream in enumerate(streams) if at[index] < len(stream)]:
        index = chance.choice(open_)
        size = chance.choice((1, 5, 40, 200))
        yield index, streams[index][at[index] : at[index] + size]
        at[index] += size


async def play(folder: Path, seed: int, kinds: str) -> None:
    chance = random.Random(seed)
    net = Network(chance, kinds)
    async with net.network:
        tables: dict[str, Any] = {
            "upstreams": net.names(),
            "plc_urls": [net.network.plc_url],
            "verifiers": 0,
            "filter": {"mode": "full"},
            "network": {"connect_to": [*net.network.connect_to, *handles(net.network)]},
            "ingest": {
                "refresh_interval": 0.05,
                "first_sight_wait": chance.choice((0.0, 0.2)),
                "unknown_grace": 0.2,
            },
            "backfill": {"retry_min": 0.05, "retry_max": 0.5, "memory_workers": 0},
        }
        plan = list(chunks(chance, net.streams))
        cut = chance.randrange(len(plan))
        async with Node(folder, tables) as node:
            await send(node, net, chance, plan[:cut])
        await set_back(folder, net, chance)
        async with Node(folder, tables) as node:
            await send(node, net, chance, plan[cut:])
            await node.until(lambda: node.seqs() == net.ends() and settled(node))
            check(node)
            check_log(node)


def settled(node: Node) -> bool:
    """Nothing waits or is owed, but for repositories that their host does not give out any more."""
    rows = [row for _, row in node.db.repos()]
    return (
        all(row.work == 0 and (row.due == 0 or not row.status.active) for row in rows)
        and node.ingest.due == 0
        and node.db.count("buffer/frames") == 0
        and all(source["in_flight_bytes"] == 0 for source in node.ingest.status())
    )


def check(node: Node) -> None:
    """The index is the truth. The hosts answer as at the session's end: who is hidden then may have been
    found so before all of the frames came, and is hidden all the same, and known to lack something."""
    rows = dict(node.db.repos())
    accounts = known(rows)
    assert rows.keys() == accounts.keys()
    for did, account in accounts.items():
        row = rows[did]
        if account["status"] == "active" or row.rev == account["rev"]:
            check_account(node, did, row, account)
        else:
            assert not row.status.active, did
            assert not row.rev or row.min_rev > row.rev, did


async def send(node: Node, net: Network, chance: random.Random, plan: list[tuple[int, list[bytes]]]) -> None:
    """Lets the chunks go, now and then waiting until one is dealt with."""
    for index, frames in plan:
        net.network.playbacks[net.at[index]].add(frames)
        if chance.random() < 0.3:
            await until_at(node, index, net.ends()[index])


async def until_at(node: Node, index: int, end: int) -> None:
    await node.until(lambda: node.seqs()[index] == end)


async def set_back(folder: Path, net: Network, chance: random.Random) -> None:
    """The cursors as of some frames earlier, so that what they stand for comes again."""
    with Database.open(folder / "db", memory_mib=32) as db:
        writer = Writer(db, Settings(data_dir=folder))
        await writer.start()
        for name in net.names():
            cursor = db.cursor(f"upstream/{name}")
            if cursor is not None:
                earlier = max(1, cursor - chance.randrange(60))
                await writer.run(
                    "rewind", partial(Transaction.set_cursor, name=f"upstream/{name}", value=earlier)
                )
        await writer.stop()


#: Two PDSes; two relays; a relay beside a PDS; two relays beside a PDS.
KINDS = ("01", "rr", "r0", "rr1")


@pytest.mark.parametrize("kinds", KINDS[2:3])
async def test_any_interleaving_gives_the_same_index(tmp_path: Path, kinds: str) -> None:
    await play(tmp_path, 1, kinds)


@pytest.mark.slow
@pytest.mark.limit(90)
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("kinds", KINDS)
async def test_any_interleaving_gives_the_same_index_at_length(tmp_path: Path, kinds: str, seed: int) -> None:
    await play(tmp_path, seed, kinds)
