"""`bench live [COMMITS]`: relay on loopback → verified, stored, streamed, with one verifier process.

Repositories of a thousand records are fetched first. Then the relay sends all commits as fast as the daemon
takes them (throughput: until a `/stream` reader has every event), then a last part at 1,000 a second
(latency: from the frame's sending to the commit's last event at the reader). Relay and reader run in this
process and share the cores with the daemon.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import aiohttp

from bench.daemon import BenchDaemon, running_daemon
from bench.options import Options, machine
from bench.report import Report, Target
from bench.subscriber import Subscriber
from indexer.atproto.frames import CommitFrame, decode_frame
from indexer.simulator.corpus import Corpus, pregenerate
from indexer.simulator.replay import ReplayNetwork, ReplaySource

REDUCED = (20_000,)
FULL = (20_000, 60_000, 200_000)
_ACCOUNTS = 100
_RECORDS = 1_000
_PACED = 5_000
_RATE = 1_000
_FILL_S, _DRAIN_S = 300.0, 600.0
#: Records a second that any machine must index, or the fill is given up.
_FILL_LEAST = 2_000
#: A look at how far it is comes after a hundredth of the time so far: it costs the daemon something.
_LOOKED_AT = 0.01
_ENDPOINT = "http://pds0.simnet.test"
_THROUGHPUT, _LATENCY = Target(4_500), Target(100, at_most=True)


class Frame(NamedTuple):
    """A commit to send, and what the reader will see of it."""

    data: bytes
    key: tuple[bytes, bytes]
    ops: int


class Figures(NamedTuple):
    """One run."""

    commits_per_s: float
    p50_ms: float
    p99_ms: float
    daemon_cpu_ms: float


def run(options: Options) -> Report:
    """Throughput and latency for each number of commits."""
    report = Report(
        "live", notes=[machine(), f"{_ACCOUNTS} repositories of {_RECORDS:,} records, verifiers = 1"]
    )
    for commits in options.chosen(REDUCED, FULL):
        corpus = pregenerate(options.cache, accounts=_ACCOUNTS, records=_RECORDS, commits=commits + _PACED)
        frames = list(_frames(corpus))
        runs = [
            asyncio.run(measure(corpus, frames[:commits], frames[commits:], options.cache))
            for _ in range(options.runs)
        ]
        if options.profile is not None:
            asyncio.run(
                measure(corpus, frames[:commits], frames[commits:], options.cache, profile=options.profile)
            )
        for name, unit, target in (
            ("commits_per_s", "commits/s", _THROUGHPUT),
            ("p50_ms", "ms", None),
            ("p99_ms", "ms", _LATENCY),
            ("daemon_cpu_ms", "ms/commit", None),
        ):
            values = [getattr(each, name) for each in runs]
            report.add(f"{name}_{commits}", unit, values, target, series=name, size=commits)
    return report


def _frames(corpus: Corpus) -> list[Frame]:
    frames = []
    for data in corpus.frames():
        frame = decode_frame(data)
        if isinstance(frame, CommitFrame):
            frames.append(Frame(data, (frame.repo.encode(), frame.rev.encode()), len(frame.ops)))
    return frames


async def measure(
    corpus: Corpus,
    burst: Sequence[Frame],
    paced: Sequence[Frame],
    folder: Path,
    *,
    profile: Path | None = None,
) -> Figures:
    """One daemon, filled, then driven."""
    source = ReplaySource([], _ENDPOINT)
    async with ReplayNetwork([source], corpus.documents(), corpus.cars()) as network:
        settings = {
            "upstreams": network.stream_urls[0],
            "plc_urls": network.plc_url,
            "plc.max_requests_per_s": 10_000,
            "verifiers": 1,
        }
        async with running_daemon(settings, folder, profile=profile) as daemon:
            await fill(daemon, list(corpus.documents()), _ACCOUNTS * _RECORDS)
            subscriber = Subscriber(daemon.public, note_revs=True)
            await subscriber.connect()
            reading = asyncio.create_task(subscriber.read())
            try:
                rate, cpu = await _throughput(daemon, network, subscriber, reading, burst)
                latencies = await _latencies(daemon, network, subscriber, reading, paced)
            finally:
                reading.cancel()
                subscriber.close()
    cuts = quantiles(latencies, n=100)
    return Figures(rate, cuts[49] * 1000, cuts[98] * 1000, cpu / len(burst) * 1000)


async def fill(daemon: BenchDaemon, dids: Sequence[str], records: int) -> None:
    """Has the daemon fetch the repositories; returns when it holds all of their records."""
    begun = time.monotonic()
    deadline = begun + max(_FILL_S, records / _FILL_LEAST)
    async with aiohttp.ClientSession() as http:
        await follow(http, daemon, dids)
        while time.monotonic() < deadline:
            stats = await daemon.get(http, "/stats")
            if stats["records"]["total"] >= records and stats["repos"]["by_state"]["synced"] >= len(dids):
                return
            await asyncio.sleep(max(0.1, _LOOKED_AT * (time.monotonic() - begun)))
    raise TimeoutError(f"the repositories were not indexed in time: {stats['repos']}")


async def follow(http: aiohttp.ClientSession, daemon: BenchDaemon, dids: Sequence[str]) -> None:
    """PUT /repos."""
    async with http.put(f"{daemon.management}/repos", json=[{"did": did} for did in dids]) as answer:
        answer.raise_for_status()


async def _throughput(
    daemon: BenchDaemon,
    network: ReplayNetwork,
    subscriber: Subscriber,
    reading: asyncio.Task[None],
    burst: Sequence[Frame],
) -> tuple[float, float]:
    """(commits a second, seconds of processor time that the daemon used)."""
    cpu = daemon.cpu_seconds()
    start = time.perf_counter()
    network.playbacks[0].add(frame.data for frame in burst)
    await _until(daemon, subscriber, reading, sum(frame.ops for frame in burst))
    return len(burst) / (subscriber.last_at - start), daemon.cpu_seconds() - cpu


async def _latencies(
    daemon: BenchDaemon,
    network: ReplayNetwork,
    subscriber: Subscriber,
    reading: asyncio.Task[None],
    paced: Sequence[Frame],
) -> list[float]:
    """Seconds from sending to the last event, a commit each."""
    expected = subscriber.events + sum(frame.ops for frame in paced)
    begun = time.perf_counter()
    sent_at = []
    for index, frame in enumerate(paced):
        if (ahead := begun + index / _RATE - time.perf_counter()) > 0:
            await asyncio.sleep(ahead)
        sent_at.append(time.perf_counter())
        network.playbacks[0].add([frame.data])
    await _until(daemon, subscriber, reading, expected)
    return [subscriber.seen_at[frame.key] - at for frame, at in zip(paced, sent_at, strict=True)]


async def _until(
    daemon: BenchDaemon, subscriber: Subscriber, reading: asyncio.Task[None], events: int
) -> None:
    deadline = time.monotonic() + _DRAIN_S
    while subscriber.events < events:
        daemon.check()
        if reading.done():
            await reading
        if time.monotonic() > deadline:
            raise TimeoutError(f"{subscriber.events:,} of {events:,} events came within {_DRAIN_S:g} s")
        await asyncio.sleep(0.02)
