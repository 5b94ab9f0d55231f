"""One `getRepo` into memory or a file, within limits.

Owns the spool folder, the meaning of a host's answers, and the limits of a download: bytes as sent and as
unpacked, total time, mean throughput, the shared budget. Leaves out which host to ask and when to ask
again. Event loop only; the small file writes go to the page cache.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

import orjson

from indexer.atproto.types import Did
from indexer.backfill.budget import Share
from indexer.backfill.diff import WantsCollection
from indexer.backfill.hops import Hops
from indexer.backfill.verify import table_path
from indexer.backfill.waits import Allowance, allowance_of
from indexer.config import BackfillSettings
from indexer.errors import FetchError, FetchRefused, FetchTransient
from indexer.identity.http import HttpClient, StreamResponse, asked_wait
from indexer.repo.ranges import Range

#: Most of an error answer that is read for its name.
MAX_ERROR_BODY = 16_384
#: The client's own time limit, out of the way: a download is judged by its `Deadline`.
OWN_TIMER_S = 86_400.0
#: A fetch that is ahead of its fastest rate by less goes on.
_LEAST_PAUSE_S = 0.02
GET_REPO = "/xrpc/com.atproto.sync.getRepo?did="


class Part(NamedTuple):
    """What is fetched of a repository of which not all is wanted: ranges that hold what ``wants`` takes."""

    ranges: tuple[Range, ...]
    wants: WantsCollection


class Fetched(NamedTuple):
    """A CAR: its bytes, or where it was spooled. ``allowance`` is what the host of ``url``, where redirects
    ended, says of its limits; ``part`` is None where the CAR is to hold the whole repository."""

    car: Path | bytes
    size: int
    allowance: Allowance | None
    url: str
    part: Part | None = None


class Spool:
    """The folder of CARs that are being fetched or applied; nothing in it outlives the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count(1)

    def prepare(self) -> None:
        """Makes the folder and removes what a killed process left there."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def new(self) -> Path:
        """The name of a CAR that does not exist yet."""
        return self._folder / f"{next(self._numbers)}.car"

    @staticmethod
    def index_path(car: Path) -> Path:
        """Where the index that verification makes of a CAR is kept."""
        return car.with_suffix(".index")

    def remove(self, car: Path) -> None:
        car.unlink(missing_ok=True)
        self.index_path(car).unlink(missing_ok=True)
        shutil.rmtree(table_path(car), ignore_errors=True)  # of a verifier that died


class Deadline:
    """When a download is too slow: at ``total`` seconds, or when its mean rate falls below ``rate`` bytes/s.

    The first ``grace`` seconds are not counted for the rate: a host needs time to build a large CAR. Time
    spent waiting for room in the budget is ours, not the host's, and does not count at all.
    """

    def __init__(self, total: float, rate: float, grace: float, started: float) -> None:
        self._total = total
        self._rate = rate
        self._grace = grace
        self.started = started

    def at(self, received: int) -> float:
        """The moment by which more must have come."""
        if self._rate <= 0:
            return self.started + self._total
        return self.started + min(self._total, self._grace + received / self._rate)

    def over_total(self, now: float) -> bool:
        return now - self.started >= self._total


async def fetch_repo(
    http: HttpClient,
    origin: str,
    did: Did,
    path: Path,
    share: Share,
    settings: BackfillSettings,
    hops: Hops,
    *,
    in_memory: int = 0,
) -> Fetched:
    """The repository that ``origin`` serves; one of more than ``in_memory`` bytes goes to ``path``.

    Raises `FetchRefused` for the host's word about the account, `FetchTransient` for everything that a
    later try may cure. The caller removes the file, also after an error.
    """
    url = origin.rstrip("/") + GET_REPO + quote(did, safe=":")
    now = asyncio.get_running_loop().time
    deadline = Deadline(settings.timeout, settings.min_kib_per_s * 1024, settings.grace, now())
    served = url
    wire = settings.max_wire_mib << 20
    request = http.stream(
        url, max_bytes=settings.max_car_mib << 20, timeout=OWN_TIMER_S, wire_bytes=wire,
        gzip=settings.gzip, proxied=True, before=hops,
    )  # fmt: skip
    share.waits(now())
    try:
        async with asyncio.timeout_at(deadline.at(0)) as timer, hops, request as response:
            served = response.url
            if response.status != 200:
                await refuse(response, origin)
            fastest = settings.max_mib_per_s * (1 << 20)
            with Intake(path, in_memory) as intake:
                await _take(response.chunks, intake, share, deadline, timer, fastest)
            allowance = allowance_of(response.headers, time.time())
    except TimeoutError as error:
        reason = "timeout" if deadline.over_total(now()) else "slow"
        message = f"{origin} sent {share.size} bytes, too slowly"
        raise FetchTransient(message, reason=reason).met_at(served) from error
    except OSError as error:
        raise FetchError(f"cannot spool a repository: {error}", reason="spool") from error
    finally:
        share.waits(None)
    return Fetched(intake.car(), share.size, allowance, served)


class Intake:
    """A CAR as it comes: kept up to ``most`` bytes, from there on spooled to ``path``. A context manager."""

    def __init__(self, path: Path, most: int) -> None:
        self._path = path
        self._most = most
        self._held: list[bytes] = []
        self._size = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> Intake:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._file is None:
            self._held.append(chunk)
            if self._size <= self._most:
                return
            self._file = self._path.open("wb")
            chunk, self._held = b"".join(self._held), []
        self._file.write(chunk)

    def car(self) -> Path | bytes:
        """All that came."""
        return b"".join(self._held) if self._file is None else self._path


async def _take(
    chunks: AsyncIterator[bytes],
    intake: Intake,
    share: Share,
    deadline: Deadline,
    timer: asyncio.Timeout,
    fastest: float,
) -> None:
    """``fastest``: bytes a second, so that a host that sends all it can leaves the loop to the others."""
    now = asyncio.get_running_loop().time
    begun = now()
    async for chunk in chunks:
        intake.write(chunk)
        grows = share.add(len(chunk))
        early = share.size / fastest - (now() - begun)
        if not grows or early > _LEAST_PAUSE_S:
            timer.reschedule(None)
            paused = now()
            share.waits(None)
            await share.room()
            await asyncio.sleep(max(0.0, early))
            deadline.started += now() - paused
        share.waits(now())
        timer.reschedule(deadline.at(share.size))


def unable(who: str, status: int, wait: float | None) -> FetchTransient | None:
    """Why a host, called ``who``, cannot answer now, None where it can; ``wait`` is what it asked for."""
    if status == 429:
        return FetchTransient(f"{who} asks for fewer requests", retry_after=wait, reason="rate_limited")
    if status >= 500 and status != 501:
        return FetchTransient(f"{who} answered {status}", retry_after=wait, reason="http_5xx")
    return None


async def refuse(response: StreamResponse, origin: str) -> None:
    """Raises what an answer other than 200 means."""
    status, url = response.status, response.url
    if problem := unable(origin, status, asked_wait(response.headers)):
        raise problem.met_at(url)
    body = b""
    async for chunk in response.chunks:
        body += chunk
        if len(body) > MAX_ERROR_BODY:
            break
    name = error_name(body)
    message = f"{origin} answered {status} {name or 'without a reason'}"
    raise FetchRefused(message, status=status, name=name).met_at(url)


def error_name(body: bytes) -> str:
    """The ``error`` of an XRPC error body; "" when it is not one."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    name = answer.get("error") if isinstance(answer, dict) else None
    return name if isinstance(name, str) and len(name) <= 100 else ""
