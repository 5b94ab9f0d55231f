"""A network that plays back given frames and answers with given documents and CARs.

Owns the servers of a captured session or a corpus: one listener for each source of frames and one for
the directory; every listener answers every question. Nothing is made up here. One event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import mmap
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from indexer.simulator.frames import frame_seq
from indexer.simulator.listener import Listener
from indexer.simulator.servers import CAR_TYPE, refuse, reply
from indexer.simulator.stamped import StampedCar
from indexer.simulator.stream import subscribe

_ERRORS = {"takendown": "RepoTakendown", "suspended": "RepoSuspended", "deactivated": "RepoDeactivated"}
_TICK_S = 0.002
_PAGE = 500


class ReplaySource(NamedTuple):
    """Frames of one sender: a length-prefixed file or the frames themselves.

    ``endpoint`` is how DID documents name that sender (``http://localhost:2583``); documents are then
    served with the replay's own address in its place, and the sender lists only its own accounts.
    Every answer but the stream's takes ``latency_s``; with ``busy_every`` one of so many is a 429.
    """

    frames: Path | Sequence[bytes]
    endpoint: str = ""
    latency_s: float = 0.0
    busy_every: int = 0


class Playback:
    """The frames of one source by index; seqs are read out of them when first asked for."""

    def __init__(self, source: Path | Sequence[bytes]) -> None:
        self._frames: list[bytes] = [] if isinstance(source, Path) else list(source)
        self._file: mmap.mmap | None = None
        self._starts = array("Q")
        self._seqs = array("Q")
        self._changed = asyncio.Event()
        if isinstance(source, Path) and source.stat().st_size:
            with source.open("rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._index(self._file)

    def _index(self, data: mmap.mmap) -> None:
        at, size = 0, len(data)
        while at + 4 <= size:
            self._starts.append(at + 4)
            at += 4 + int.from_bytes(data[at : at + 4], "big")

    def _filed(self, index: int) -> bytes:
        assert self._file is not None
        start = self._starts[index]
        return self._file[start : start + int.from_bytes(self._file[start - 4 : start], "big")]

    def _frame(self, index: int) -> bytes:
        filed = len(self._starts)
        return self._filed(index) if index < filed else self._frames[index - filed]

    def add(self, frames: Iterable[bytes]) -> None:
        """More frames, sent to whoever is connected."""
        self._frames += frames
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def end(self) -> int:
        return len(self._starts) + len(self._frames)

    @property
    def seq(self) -> int:
        """The newest seq; 0 without frames."""
        return next((found for at in range(self.end - 1, -1, -1) if (found := frame_seq(self._frame(at)))), 0)

    @property
    def head(self) -> int:
        return self.seq

    def floor(self) -> int:
        return 0

    def start(self, cursor: int) -> int:
        return self.after(cursor)

    def after(self, seq: int) -> int:
        """Index of the first frame above ``seq``; a frame without one counts with the frame before it."""
        while len(self._seqs) < self.end:
            found = frame_seq(self._frame(len(self._seqs)))
            self._seqs.append(found or (self._seqs[-1] if self._seqs else 0))
        return bisect_right(self._seqs, seq)

    def outdated(self, cursor: int) -> bool:
        return bool(cursor > 0 and self.after(cursor) == 0 and self._seqs and self._seqs[0] > cursor + 1)

    def read(self, index: int, budget: int) -> list[bytes]:
        frames: list[bytes] = []
        while index < self.end and budget > 0:
            frame = self._frame(index)
            frames.append(frame)
            budget -= len(frame)
            index += 1
        return frames

    async def wait(self, index: int) -> None:
        while index >= self.end:
            await self._changed.wait()


def _manners(source: ReplaySource) -> Middleware:
    """How a source answers beside what it answers."""
    answers = itertools.count(1)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.endswith("subscribeRepos"):
            return await handler(request)
        await asyncio.sleep(source.latency_s)
        if source.busy_every and next(answers) % source.busy_every == 0:
            raise web.HTTPTooManyRequests(headers={"Retry-After": "1"})
        return await handler(request)

    return middleware


class _Pace:
    """So many frames a second since the first, to one subscriber."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._begun: float | None = None
        self._sent = 0

    async def __call__(self, ready: int) -> int:
        loop = asyncio.get_running_loop()
        if self._begun is None:
            self._begun = loop.time()
        while (due := int((loop.time() - self._begun) * self._rate) - self._sent) < 1:
            await asyncio.sleep(_TICK_S)
        count = min(due, ready)
        self._sent += count
        return count


class ReplayNetwork:
    """Plays ``sources``; answers identities from ``documents`` and getRepo from ``cars``.

    ``documents`` maps a DID to {"status", "doc"} or to the document itself; did:web ones are found by Host
    header. ``accounts`` may tell {"status", "rev"} of a DID; without a CAR it decides the error. Without a
    cursor a subscriber gets everything, at ``rate`` frames a second or as fast as it reads.
    """

    def __init__(
        self,
        sources: Sequence[ReplaySource | Path | Sequence[bytes]],
        documents: Mapping[str, Any],
        cars: Mapping[str, bytes | Path | StampedCar],
        *,
        accounts: Mapping[str, Mapping[str, Any]] | None = None,
        rate: float | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.sources = [item if isinstance(item, ReplaySource) else ReplaySource(item) for item in sources]
        self.playbacks = [Playback(item.frames) for item in self.sources]
        self.documents = dict(documents)
        self.cars = dict(cars)
        self.accounts = dict(accounts or {})
        self.rate = rate
        self._host = host
        self._listeners: list[Listener] = []
        self._lists: dict[str, tuple[int, list[str]]] = {}  # by endpoint: how many there were, and its own

    @classmethod
    def from_session(cls, folder: Path, *, rate: float | None = None) -> ReplayNetwork:
        """A captured session: ``pds<n>.frames``, ``diddocs.json``, ``truth.json``, ``cars/``."""
        truth = json.loads((folder / "truth.json").read_bytes())
        accounts = {account["did"]: account for account in truth["accounts"]}
        endpoints = sorted({account["pds"] for account in accounts.values()})
        frames = sorted(folder.glob("pds*.frames"))
        sources = [ReplaySource(path, endpoint) for path, endpoint in zip(frames, endpoints, strict=True)]
        cars = {path.stem.replace("_", ":"): path for path in (folder / "cars").glob("*.car")}
        return cls(
            sources, json.loads((folder / "diddocs.json").read_bytes()), cars, accounts=accounts, rate=rate
        )

    # -- addresses

    @property
    def plc_url(self) -> str:
        return self._listeners[-1].url

    @property
    def urls(self) -> list[str]:
        """The sources' HTTP addresses, in their order."""
        return [listener.url for listener in self._listeners[:-1]]

    @property
    def stream_urls(self) -> list[str]:
        """The sources' addresses for `subscribeRepos`."""
        return [url.replace("http", "ws", 1) for url in self.urls]

    @property
    def connect_to(self) -> list[str]:
        """``host:port=address:port`` for every did:web host and named endpoint, as settings take it."""
        directory = f"{self._host}:{self._listeners[-1].port}"
        names = {unquote(did[8:]): directory for did in self.documents if did.startswith("did:web:")}
        for source, listener in zip(self.sources, self._listeners, strict=False):
            if source.endpoint:
                names[urlsplit(source.endpoint).netloc] = f"{self._host}:{listener.port}"
        return [f"{name if ':' in name else name + ':443'}={place}" for name, place in names.items()]

    # -- life

    async def start(self) -> None:
        for playback, source in zip([*self.playbacks, None], [*self.sources, ReplaySource(())], strict=True):
            self._listeners.append(await Listener.open(self._app(playback, source), self._host, 0))

    async def stop(self) -> None:
        await asyncio.gather(*(listener.close() for listener in self._listeners))

    async def __aenter__(self) -> ReplayNetwork:
        await self.start()
        return self

    async def __aexit__(self, *problem: object) -> None:
        await self.stop()

    # -- answers

    def _app(self, playback: Playback | None, source: ReplaySource) -> web.Application:
        app = web.Application(middlewares=[_manners(source)] if source.latency_s or source.busy_every else ())
        if playback is not None:

            async def stream(request: web.Request) -> web.StreamResponse:
                pace = _Pace(self.rate) if self.rate else None
                return await subscribe(request, playback, pace=pace, from_start=True)

            app.router.add_get("/xrpc/com.atproto.sync.subscribeRepos", stream)
        app.router.add_get("/xrpc/com.atproto.sync.getRepo", self._get_repo)
        app.router.add_get("/xrpc/com.atproto.sync.getRepoStatus", self._repo_status)
        app.router.add_get("/xrpc/com.atproto.sync.listRepos", partial(self._list_repos, source))
        app.router.add_get("/xrpc/com.atproto.sync.listHosts", self._list_hosts)
        app.router.add_get("/.well-known/did.json", self._did_web)
        app.router.add_get("/.well-known/atproto-did", self._handle)
        app.router.add_get("/{did}", self._directory)
        return app

    async def _get_repo(self, request: web.Request) -> web.StreamResponse:
        did = request.query.get("did", "")
        car = self.cars.get(did)
        if car is None:
            return self._absent(did)
        if isinstance(car, Path):
            return web.FileResponse(car, headers={"Content-Type": CAR_TYPE})
        if isinstance(car, StampedCar):
            response = web.StreamResponse(headers={"Content-Type": CAR_TYPE})
            response.content_length = car.info.bytes
            await response.prepare(request)
            for piece in car.pieces():
                await response.write(piece)
            return response
        return web.Response(body=car, content_type=CAR_TYPE)

    async def _repo_status(self, request: web.Request) -> web.StreamResponse:
        did = request.query.get("did", "")
        status = self._status(did)
        if status in ("", "deleted"):
            return self._absent(did)
        answer = {"did": did, "active": status == "active"}
        return reply(answer | ({"rev": self._rev(did)} if status == "active" else {"status": status}))

    async def _list_repos(self, source: ReplaySource, request: web.Request) -> web.StreamResponse:
        dids = self._dids_of(source)
        start = bisect_right(dids, request.query.get("cursor", ""))
        page = dids[start : start + int(request.query.get("limit", _PAGE))]
        known = [(did, status) for did in page if (status := self._status(did)) not in ("", "deleted")]
        repos = [{"did": did, "active": status == "active", "rev": self._rev(did)} for did, status in known]
        more = start + len(page) < len(dids)
        return reply({"repos": repos} | ({"cursor": page[-1]} if more else {}))

    async def _list_hosts(self, request: web.Request) -> web.StreamResponse:
        own = zip(self.sources, self.urls, strict=True)
        hosts = [
            {"hostname": urlsplit(url).netloc, "status": "active"} for source, url in own if source.endpoint
        ]
        return reply({"hosts": hosts})

    def _dids_of(self, source: ReplaySource) -> list[str]:
        """The accounts that a source lists, sorted; looked up anew when there are others."""
        known = len(self.cars) + len(self.accounts)
        if source.endpoint not in self._lists or self._lists[source.endpoint][0] != known:
            dids = sorted({*self.cars, *self.accounts})
            own = [did for did in dids if not source.endpoint or source.endpoint in self._endpoints(did)]
            self._lists[source.endpoint] = (known, own)
        return self._lists[source.endpoint][1]

    def _endpoints(self, did: str) -> list[str]:
        entry = self.documents.get(did, {})
        return [service["serviceEndpoint"] for service in entry.get("doc", entry).get("service", ())]

    def _status(self, did: str) -> str:
        if did in self.accounts:
            return str(self.accounts[did].get("status", "active"))
        return "active" if did in self.cars else ""

    def _rev(self, did: str) -> str:
        return str(self.accounts.get(did, {}).get("rev") or "")

    def _absent(self, did: str) -> web.Response:
        error = _ERRORS.get(self._status(did), "RepoNotFound")
        return refuse(error, f"no repository of {did} can be had")

    async def _directory(self, request: web.Request) -> web.StreamResponse:
        did = request.match_info["did"]
        return (
            self._document(did)
            if did in self.documents
            else reply({"message": f"DID not registered: {did}"}, 404)
        )

    async def _did_web(self, request: web.Request) -> web.StreamResponse:
        did = "did:web:" + request.host.replace(":", "%3A")
        return self._document(did) if did in self.documents else reply({"message": "no document"}, 404)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        wanted = f"at://{request.host.partition(':')[0]}"
        for did, entry in self.documents.items():
            if wanted in entry.get("doc", entry).get("alsoKnownAs", ()):
                return web.Response(text=did)
        raise web.HTTPNotFound(text="User not found")

    def _document(self, did: str) -> web.Response:
        entry = self.documents[did]
        body, status = (entry["doc"], entry["status"]) if "doc" in entry else (entry, 200)
        own = {
            source.endpoint: url
            for source, url in zip(self.sources, self.urls, strict=True)
            if source.endpoint
        }
        services = [
            service | {"serviceEndpoint": own.get(service["serviceEndpoint"], service["serviceEndpoint"])}
            for service in body.get("service", ())
        ]
        return reply(body | ({"service": services} if services else {}), status)
