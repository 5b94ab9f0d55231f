"""One upstream's connection: dial, read, drop, dial again.

Owns the WebSocket, the cursor parameter, the wait between attempts and the judgement of upgrade answers
and closures. Leaves out what frames mean: each binary message goes to the sink, which raises
`UpstreamError` or a fatal `FrameError` to have the connection dropped. Event loop only.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from yarl import URL

from indexer.atproto.types import Seq
from indexer.config import SUBSCRIBE as SUBSCRIBE
from indexer.config import IngestSettings, NetworkSettings, upstream_address
from indexer.errors import FrameError, UpstreamError, UrlRefused
from indexer.identity.guard import check_url
from indexer.identity.http import retry_after
from indexer.ingest.account import PDS_PREFIX

log = structlog.get_logger()


#: Wait before the first new attempt, in seconds; it doubles up to `ingest.reconnect_max`.
FIRST_WAIT_S = 0.5
#: The upgrade answer that means: this host has no firehose.
NOT_IMPLEMENTED = 501
#: Addresses of one host that are dialled before the attempt counts as failed.
MAX_ADDRESSES = 8
#: Characters of a stranger's text that are logged and shown.
SHOWN = 300


class Upstream(NamedTuple):
    """Where frames come from. ``name`` is the setting's text and names counters and the cursor."""

    name: str
    url: str

    @classmethod
    def of(cls, url: str, *, is_pds: bool) -> Upstream:
        return cls.parse((PDS_PREFIX if is_pds else "") + _one_spelling(url))

    @classmethod
    def parse(cls, name: str) -> Upstream:
        return cls(name, _one_spelling(name.removeprefix(PDS_PREFIX)))

    @property
    def is_pds(self) -> bool:
        return self.name.startswith(PDS_PREFIX)


def _one_spelling(url: str) -> str:
    """The address as it is dialled and compared; one that was stored and is none stays as it is."""
    try:
        return upstream_address(url)
    except ValueError:
        return url.rstrip("/")


class Sink(Protocol):
    """Who takes the messages of one upstream."""

    async def settled(self) -> Seq | None:
        """Waits until everything received is durable; the cursor to ask for, None for the live tail."""

    async def receive(self, data: bytes) -> bool:
        """Takes one message; true for a valid event."""

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


class Failure(NamedTuple):
    """Why a connection, or an attempt at one, ended."""

    at: float  # Unix time
    kind: str
    detail: str


@dataclass(slots=True)
class Link:
    """What became of the attempts to be connected, for people."""

    attempts: int = 0
    connections: int = 0
    failures: int = 0  # in a row, since the last valid event
    connected_at: float = 0.0  # Unix time, as the others
    retry_at: float = 0.0
    last: Failure | None = None
    refused: bool = False  # the host has no firehose

    def status(self) -> dict[str, Any]:
        last = self.last
        return {
            "failing": self.failures > 0,
            "throttled": self.retry_at > time.time(),
            "consecutive_failures": self.failures,
            "retry_in_s": round(max(0.0, self.retry_at - time.time()), 1),
            "attempts": self.attempts,
            "connections": self.connections,
            "last_connected_at": self.connected_at or None,
            "last_failure": last._asdict() if last is not None else None,
            "no_firehose": self.refused,
        }


class _Dropped(Exception):
    """A connection that ended; ``retry`` is false when the host will never serve us."""

    def __init__(self, reason: str, message: str, *, wait: float | None = None, retry: bool = True) -> None:
        super().__init__(message[:SHOWN])
        self.reason, self.wait, self.retry = reason, wait, retry


class _Connect(connect):
    """Follows no redirect: where it leads was never judged by the guard."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class Source:
    """Keeps one upstream connected until cancelled."""

    def __init__(
        self,
        upstream: Upstream,
        sink: Sink,
        dial: Dial,
        settings: IngestSettings,
        network: NetworkSettings,
        link: Link | None = None,
    ) -> None:
        self.upstream = upstream
        self.link = link or Link()
        self._sink = sink
        self._dial = dial
        self._settings = settings
        self._network = network
        self._backoff = Backoff(settings.reconnect_max)

    async def run(self) -> None:
        """Reads frames for ever; returns only where the host says that it has no firehose."""
        self.link.refused = False
        while True:
            dropped = await self._session()
            self._sink.closed(dropped.reason, str(dropped))
            link = self.link
            link.failures += 1
            link.last = Failure(time.time(), dropped.reason, str(dropped))
            if not dropped.retry:
                link.refused = True
                log.error("upstream_refused", upstream=self.upstream.name, reason=str(dropped))
                return
            wait = self._backoff.next_wait(self._asked(dropped))
            link.retry_at = link.last.at + wait
            log.warning(
                "upstream_dropped",
                upstream=self.upstream.name,
                reason=dropped.reason,
                message=str(dropped),
                retry_in_s=round(wait, 1),
            )
            await asyncio.sleep(wait)

    def _asked(self, dropped: _Dropped) -> float | None:
        """How long the host asked to be left alone, as far as we go along with it."""
        return None if dropped.wait is None else min(dropped.wait, self._settings.retry_after_max)

    async def _session(self) -> _Dropped:
        """One connection from dial to end."""
        cursor = await self._sink.settled()
        self.link.attempts += 1
        try:
            async with _held(await self._connected(cursor)) as socket:
                log.info("upstream_connected", upstream=self.upstream.name, cursor=cursor)
                self.link.connections += 1
                self.link.connected_at = time.time()
                self._sink.opened()
                await self._read(socket)
        except _Dropped as dropped:
            return dropped
        except (UpstreamError, FrameError) as error:
            return _Dropped(getattr(error, "name", "") or error.reason, str(error))
        except ConnectionClosed as error:
            return _Dropped("closed", str(error) or "the connection was closed")
        except (OSError, TimeoutError) as error:
            return _Dropped("unreachable", str(error) or type(error).__name__)
        return _Dropped("closed", "the host closed the connection")

    async def _connected(self, cursor: Seq | None) -> ClientConnection:
        """An open connection, or `_Dropped`: whatever a host answers to the dial ends this attempt alone."""
        try:
            url = check_url(self.upstream.url, self._network, kind="ws")
            return await self._dialled(url, subscribe_url(url, cursor))
        except UrlRefused as error:
            raise _Dropped("refused", str(error)) from error
        except InvalidStatus as error:
            raise _judge_status(error) from error
        except (OSError, TimeoutError) as error:
            raise _Dropped("unreachable", str(error) or type(error).__name__) from error
        except (WebSocketException, ValueError) as error:  # a name that cannot be one is a UnicodeError
            raise _Dropped("handshake", str(error) or type(error).__name__) from error

    async def _dialled(self, url: URL, target: URL) -> ClientConnection:
        """A connection to the first of the host's addresses that takes one."""
        *others, last = (await self._dial(url.raw_host or "", url.port or 443))[:MAX_ADDRESSES]
        for address in others:
            try:
                return await self._connect(target, *address)
            except (OSError, TimeoutError) as error:
                log.info(
                    "address_unreachable", upstream=self.upstream.name, host=address[0], reason=str(error)
                )
        return await self._connect(target, *last)

    def _connect(self, target: URL, host: str, port: int) -> connect:
        silence = self._settings.receive_timeout
        return _Connect(
            str(target),
            host=host,
            port=port,
            proxy=None,
            compression=None,
            max_size=self._settings.max_frame_bytes,
            max_queue=self._settings.socket_frames,
            open_timeout=self._network.connect_timeout,
            ping_interval=silence / 3,
            ping_timeout=silence * 2 / 3,
            close_timeout=1,
            user_agent_header="atproto-indexer",
        )

    async def _read(self, socket: ClientConnection) -> None:
        receive = self._sink.receive
        proven = False  # a host that only sends what is no event is asked ever less often
        async for message in socket:
            if isinstance(message, str):
                raise UpstreamError("a text frame, where only binary ones belong", name="text_frame")
            valid = await receive(message)
            if valid and not proven:
                self._backoff.reset()
                self.link.failures = 0
                proven = True


@asynccontextmanager
async def _held(socket: ClientConnection) -> AsyncIterator[ClientConnection]:
    """Closes it in good order. A closing that is itself cancelled would leave the socket open."""
    try:
        async with socket:
            yield socket
    finally:
        socket.transport.abort()


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
