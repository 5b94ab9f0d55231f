"""Prometheus metrics: persistent counts and live figures, read when they are asked for.

Owns the names. Nothing is counted here; labels come from closed sets and configured sources only, so that
strangers cannot make new time series. Runs on the event loop; a scrape costs a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from indexer.ingest import revs
from indexer.serve import health

if TYPE_CHECKING:
    from indexer.serve.services import Services
    from indexer.serve.stream import StreamHub
    from indexer.serve.xrpc.dispatch import Xrpc

#: Figures of an upstream's status → what they are. Labels: at most `ingest.max_sources`.
_SOURCE_FIGURES: Mapping[str, str] = {
    "connected": "connected",
    "enabled": "not switched off",
    "seq": "newest seq",
    "cursor": "stored cursor",
    "lag_s": "seconds behind",
    "frames": "messages since the start",
    "bytes": "bytes since the start",
    "renumbered": "1 while its numbering is not that of our cursor",
    "consecutive_failures": "failed connections in a row",
    "attempts": "connection attempts since the start",
    "restarts": "restarts of its failed task since the start",
}

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """Renders the metrics of one daemon."""

    def __init__(self, services: Services, streams: StreamHub | None, xrpc: Xrpc | None) -> None:
        self._services = services
        self._streams = streams
        self._xrpc = xrpc
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._log()
        yield from self._repos()
        yield from self._ingest()
        yield from self._parts()
        yield from self._store()
        yield from self._serving()

    def _log(self) -> Iterator[Metric]:
        writer = self._services.writer
        yield _gauge("up", "1 while the writer lives", int(not writer.poisoned))
        yield _gauge("events_head", "Id that the next event will get", writer.head)
        yield _gauge("events_floor", "Id of the oldest event kept", self._services.log.floor)

    def _repos(self) -> Iterator[Metric]:
        db = self._services.db
        yield _gauge("records", "Records held", db.count("records"))
        states = health.by_state(self._services)
        yield _by_label("repos_by_state", "Repositories by sync state", "state", states)
        yield _by_label(
            "repos_by_status", "Repositories by account status", "status", db.counts("repos/status/")
        )
        yield _gauge(
            "pending_repos",
            "Repositories that wait for work (estimate)",
            health.pending(self._services),
        )

    def _ingest(self) -> Iterator[Metric]:
        frames = CounterMetricFamily(
            "indexer_frames", "What became of upstream frames", labels=["source", "outcome", "reason"]
        )
        for row in health.outcomes(self._services):
            frames.add_metric([row["source"], row["outcome"], row["reason"]], row["count"])
        yield frames
        sources = health.sources_of(self._services)
        for name, text in _SOURCE_FIGURES.items():
            family = GaugeMetricFamily(f"indexer_source_{name}", f"Upstream: {text}", labels=["source"])
            for source in sources:
                if _is_number(source.get(name)):
                    family.add_metric([str(source["name"])], float(source[name]))
            yield family
        counts = self._services.db.counts(revs.ROWS)
        yield _by_label("compare_revs", "Comparisons of revs after a possible loss", "outcome", counts)
        restarts = {name: pool.restarts for name, pool in self._services.pools.items()}
        yield _by_label("pool_restarts", "Times that a pool's processes were replaced", "pool", restarts)

    def _parts(self) -> Iterator[Metric]:
        backfill = self._services.backfill
        yield _numbers("backfill", "Fetching of repositories", backfill.status() if backfill else {})
        crawler = self._services.crawler
        found = crawler.status() if crawler else {}
        yield _numbers("crawler", "Looking for accounts", found)
        yield _by_label(
            "crawler_total", "What the crawler read and found", "outcome", found.get("totals", {})
        )
        family = GaugeMetricFamily(
            "indexer_worker", "Figures of the store's workers", labels=["worker", "figure"]
        )
        for worker, figures in health.workers(self._services).items():
            for figure, value in figures.items():
                if _is_number(value):
                    family.add_metric([worker, figure], float(value))
        yield family

    def _store(self) -> Iterator[Metric]:
        keyspaces = self._services.db.stats()
        for figure in ("rows", "sst_bytes", "live_bytes", "memtable_bytes", "pending_compaction_bytes"):
            family = GaugeMetricFamily(f"indexer_store_{figure}", f"Store: {figure}", labels=["keyspace"])
            for keyspace, row in keyspaces.items():
                family.add_metric([keyspace], row.get(figure, 0))
            yield family
        yield _numbers("store_memory", "Memory of the store", self._services.db.memory())

    def _serving(self) -> Iterator[Metric]:
        if self._streams is not None:
            status = self._streams.status()
            yield _numbers("stream", "Stream readers", status)
            dropped = CounterMetricFamily(
                "indexer_stream_dropped", "Streams that we ended", labels=["reason"]
            )
            for reason, count in status["dropped"].items():
                dropped.add_metric([reason], count)
            yield dropped
        if self._xrpc is not None:
            answers = CounterMetricFamily("indexer_xrpc_answers", "Answers", labels=["method", "status"])
            for (method, code), count in self._xrpc.answers.items():
                answers.add_metric([method, str(code)], count)
            yield answers


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"indexer_{name}", text, value=value)


def _by_label(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(f"indexer_{name}", text, labels=[label])
    for key, count in counts.items():
        family.add_metric([key.rpartition("/")[2]], count)
    return family


def _numbers(name: str, text: str, values: Mapping[str, Any]) -> Metric:
    family = GaugeMetricFamily(f"indexer_{name}", text, labels=["figure"])
    for figure, value in values.items():
        if _is_number(value):
            family.add_metric([figure], float(value))
    return family


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))
