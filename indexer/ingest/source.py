"""One upstream's connection: dial, read, drop, dial again.

Owns the WebSocket, the cursor parameter, the wait between attempts and the judgement of upgrade answers
and closures. Leaves out what frames mean: each binary message goes to the sink, which raises
`UpstreamError` or a fatal `FrameError` to have the connection dropped. Event loop only.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException
from yarl import URL

from indexer.atproto.types import Seq
from indexer.config import IngestSettings, NetworkSettings
from indexer.errors import FrameError, UpstreamError, UrlRefused
from indexer.identity.guard import check_url
from indexer.identity.http import retry_after
from indexer.ingest.account import PDS_PREFIX

log = structlog.get_logger()

SUBSCRIBE = "/xrpc/com.atproto.sync.subscribeRepos"
#: Wait before the first new attempt, in seconds; it doubles up to `ingest.reconnect_max`.
FIRST_WAIT_S = 0.5
#: Messages that the socket may hold for us before the peer is slowed down.
SOCKET_QUEUE = 64
#: The upgrade answer that means: this host has no firehose.
NOT_IMPLEMENTED = 501


class Upstream(NamedTuple):
    """Where frames come from. ``name`` is the setting's text and names counters and the cursor."""

    name: str
    url: str

    @classmethod
    def parse(cls, name: str) -> Upstream:
        return cls(name, name.removeprefix(PDS_PREFIX).rstrip("/"))

    @property
    def is_pds(self) -> bool:
        return self.name.startswith(PDS_PREFIX)


class Sink(Protocol):
    """Who takes the messages of one upstream."""

    async def settled(self) -> Seq | None:
        """Waits until everything received is durable; the cursor to ask for, None for the live tail."""

    async def receive(self, data: bytes) -> None: ...

    def opened(self) -> None: ...

    def closed(self, reason: str, message: str) -> None: ...


class Dial(Protocol):
    """Addresses to dial for a host and port (`indexer.identity.guard.GuardedResolver.addresses`)."""

    def __call__(self, host: str, port: int) -> Awaitable[list[tuple[str, int]]]: ...


@dataclass(slots=True)
class Backoff:
    """Exponential waits with jitter: half the wait is certain, half is chance."""

    longest_s: float
    attempt: int = 0
    chance: Callable[[], float] = random.random

    def next_wait(self, asked: float | None = None) -> float:
        """Seconds to wait now; at least what the host asked for."""
        wait = min(self.longest_s, FIRST_WAIT_S * 2.0 ** min(self.attempt, 20))
        self.attempt += 1
        return max(asked or 0.0, wait * (0.5 + self.chance() / 2))

    def reset(self) -> None:
        self.attempt = 0


class _Dropped(Exception):
    """A connection that ended; ``retry`` is false when the host will never serve us."""

    def __init__(self, reason: str, message: str, *, wait: float | None = None, retry: bool = True) -> None:
        super().__init__(message)
        self.reason, self.wait, self.retry = reason, wait, retry


class Source:
    """Keeps one upstream connected until cancelled."""

    def __init__(
        self, upstream: Upstream, sink: Sink, dial: Dial, settings: IngestSettings, network: NetworkSettings
    ) -> None:
        self.upstream = upstream
        self._sink = sink
        self._dial = dial
        self._settings = settings
        self._network = network
        self._backoff = Backoff(settings.reconnect_max)

    async def run(self) -> None:
        """Reads frames for ever; returns only where the host says that it has no firehose."""
        while True:
            dropped = await self._session()
            self._sink.closed(dropped.reason, str(dropped))
            if not dropped.retry:
                log.error("upstream_refused", upstream=self.upstream.name, reason=str(dropped))
                return
            wait = self._backoff.next_wait(dropped.wait)
            log.warning(
                "upstream_dropped",
                upstream=self.upstream.name,
                reason=dropped.reason,
                message=str(dropped),
                retry_in_s=round(wait, 1),
            )
            await asyncio.sleep(wait)

    async def _session(self) -> _Dropped:
        """One connection from dial to end."""
        cursor = await self._sink.settled()
        try:
            async with await self._connect(cursor) as socket:
                log.info("upstream_connected", upstream=self.upstream.name, cursor=cursor)
                self._sink.opened()
                await self._read(socket)
        except UrlRefused as error:
            return _Dropped("refused", str(error))
        except InvalidStatus as error:
            return _judge_status(error)
        except (UpstreamError, FrameError) as error:
            return _Dropped(getattr(error, "name", "") or error.reason, str(error))
        except ConnectionClosed as error:
            return _Dropped("closed", str(error) or "the connection was closed")
        except (InvalidHandshake, WebSocketException) as error:
            return _Dropped("handshake", str(error) or type(error).__name__)
        except (OSError, TimeoutError) as error:
            return _Dropped("unreachable", str(error) or type(error).__name__)
        return _Dropped("closed", "the host closed the connection")

    async def _connect(self, cursor: Seq | None) -> connect:
        url = check_url(self.upstream.url, self._network, kind="ws")
        target = subscribe_url(url, cursor)
        host, port = (await self._dial(url.raw_host or "", url.port or 443))[0]
        silence = self._settings.receive_timeout
        return connect(
            str(target),
            host=host,
            port=port,
            proxy=None,
            compression=None,
            max_size=self._settings.max_frame_bytes,
            max_queue=SOCKET_QUEUE,
            open_timeout=self._network.connect_timeout,
            ping_interval=silence / 3,
            ping_timeout=silence * 2 / 3,
            close_timeout=1,
            user_agent_header="atproto-indexer",
        )

    async def _read(self, socket: ClientConnection) -> None:
        receive = self._sink.receive
        first = True
        async for message in socket:
            if isinstance(message, str):
                raise UpstreamError("a text frame, where only binary ones belong", name="text_frame")
            await receive(message)
            if first:
                self._backoff.reset()
                first = False


def subscribe_url(base: URL, cursor: Seq | None) -> URL:
    """The address of the firehose under ``base``, after ``cursor``."""
    target = base if base.path.endswith(SUBSCRIBE) else base.with_path(base.path.rstrip("/") + SUBSCRIBE)
    return target if cursor is None else target.with_query(cursor=str(cursor))


def _judge_status(error: InvalidStatus) -> _Dropped:
    status = error.response.status_code
    wait = retry_after({name.lower(): value for name, value in error.response.headers.raw_items()})
    message = f"the host answered {status} to the upgrade"
    return _Dropped(f"http_{status}", message, wait=wait, retry=status != NOT_IMPLEMENTED)


def lag_s(event_us: int) -> float:
    """Seconds between a frame's own time and now; 0 when none was seen."""
    return max(0.0, time.time() - event_us / 1e6) if event_us else 0.0
