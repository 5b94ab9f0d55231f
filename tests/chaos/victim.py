"""The daemon under test: started as a process, killed at any moment, asked over its management API.

Owns its settings, its processes and how much memory they take. Only processes that were started here are
ever ended. One event loop, that of the run.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from tests.chaos.network import ChaosNetwork
from tests.paths import ROOT

_START_S = 60.0
_END_S = 30.0
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024


class Sample(NamedTuple):
    """Resident memory of the daemon's processes at one moment."""

    at: float  # seconds since the run began
    life: int
    age_s: float  # since this life began
    mib: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def settings(network: ChaosNetwork, lanes: list[str], folder: Path, ports: tuple[int, int]) -> str:
    """The daemon's settings as TOML: patient as usual, but with short waits."""
    upstreams = json.dumps([network.url_of(lane) for lane in lanes])
    return f"""
data_dir = "{folder}"
upstreams = {upstreams}
plc_urls = ["{network.plc_url}"]
memory_mib = 64
verifiers = 1
filter = {{ mode = "full" }}
public = {{ bind = "127.0.0.1:{ports[0]}" }}
management = {{ bind = "127.0.0.1:{ports[1]}" }}
identity = {{ error_ttl = "200ms", dns_timeout = "500ms", web_requests_per_s = 50 }}
plc = {{ max_requests_per_s = 500, failover_time = "1s" }}
disk = {{ soft_floor_mib = 0, hard_floor_mib = 0 }}
store = {{ quarantine_entries = 1000000 }}
gc = {{ checkpoint_interval = "2s", ttl_interval = "2s", blocks_interval = "2s" }}
audit = {{ repos_per_minute = 120, rev_pages_per_s = 20, rev_delay = "200ms", rev_max_pages = 30 }}
log = {{ level = "warning" }}

[network]
allow_private = true
dns_server = "{network.dns_address}"
timeout = "1s"
connect_timeout = "1s"

[ingest]
receive_timeout = "1500ms"
reconnect_max = "300ms"
retry_after_max = "1s"
first_sight_wait = "300ms"
refresh_interval = "100ms"
unknown_grace = "500ms"

[backfill]
retry_min = "100ms"
retry_max = "1s"
timeout = "3s"
grace = "1s"
max_car_mib = 32
concurrency = 16
per_host = 8
"""


class Victim:
    """One data directory and the lives that a daemon has on it."""

    def __init__(self, network: ChaosNetwork, lanes: list[str], folder: Path) -> None:
        self.folder = folder
        self.data = folder / "index"
        self.ports = (free_port(), free_port())
        self.samples: list[Sample] = []
        self.kills = self.lives = 0
        self.faults: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._born = 0.0
        self._config = folder / "chaos.toml"
        self._config.write_text(settings(network, lanes, self.data, self.ports))
        self._http: aiohttp.ClientSession | None = None

    @property
    def stream_url(self) -> str:
        return f"ws://127.0.0.1:{self.ports[0]}/stream"

    @property
    def errors(self) -> Path:
        return self.folder / "daemon.log"

    # -- life and death

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("INDEXER_")}
        command = [sys.executable, "-m", "indexer", "run", "--config", str(self._config)]
        with self.errors.open("ab") as errors:
            self._process = subprocess.Popen(
                command, stdout=errors, stderr=errors, cwd=ROOT, env=environment, start_new_session=True
            )
        self.lives += 1
        self._born = time.monotonic()

    async def ready(self) -> None:
        """Waits until the management API answers."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            self.alive()
            # The client asserts things of connections whose other end is killed at that moment.
            with suppress(aiohttp.ClientError, TimeoutError, AssertionError):
                await self.get("/firehose/cursors")
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"the daemon did not start within {_START_S} s: {self.tail()}")

    def alive(self) -> None:
        """Raises when the daemon ended though nobody ended it."""
        process = self._process
        assert process is not None
        if process.poll() is not None:
            raise AssertionError(f"the daemon ended by itself with {process.returncode}: {self.tail()}")

    async def kill(self) -> None:
        """SIGKILL to the daemon alone; its workers have to notice."""
        self.alive()
        process = self._process
        assert process is not None
        self.sample()
        process.kill()
        process.wait()
        self.kills += 1
        await self._gone(process.pid)

    async def stop(self) -> None:
        """SIGTERM, after which it has to end well."""
        self.alive()
        process = self._process
        assert process is not None
        self.sample()
        process.send_signal(signal.SIGTERM)
        try:
            code = await asyncio.to_thread(process.wait, _END_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon did not end within {_END_S} s: {self.tail()}") from None
        if code != 0:
            self.faults.append(f"the daemon ended with {code}: {self.tail()}")
        await self._gone(process.pid)

    async def close(self) -> None:
        """Ends whatever is left, however the run went."""
        if self._http is not None:
            await self._http.close()
        process = self._process
        if process is not None:
            for pid in _members(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    async def _gone(self, group: int) -> None:
        """Waits until no process of a life is left."""
        self._process = None
        deadline = time.monotonic() + _END_S
        while members := _members(group):
            if time.monotonic() > deadline:
                self.faults.append(f"processes {members} outlived their daemon")
                for pid in members:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.02)

    def tail(self) -> str:
        return self.errors.read_text(errors="replace")[-3000:]

    # -- what it says

    async def get(self, path: str) -> Any:
        async with self._session().get(self._url(path)) as response:
            response.raise_for_status()
            return await response.json()

    async def post(self, path: str, body: Any) -> Any:
        async with self._session().post(self._url(path), json=body) as response:
            answer = await response.json()
            if response.status >= 400:
                raise AssertionError(f"POST {path}: {answer}")
            return answer

    async def head(self) -> int:
        """The id that the next event gets."""
        async with self._session().get(f"http://127.0.0.1:{self.ports[0]}/stats") as response:
            response.raise_for_status()
            head: int = (await response.json())["events"]["head"]
            return head

    async def repos(self) -> dict[str, dict[str, Any]]:
        rows = (await self.get("/repos?limit=10000"))["repos"]
        return {row["did"]: row for row in rows}

    async def source(self, name: str) -> dict[str, Any]:
        """What it says of one upstream."""
        return next(row for row in await self.get("/firehose/sources") if row["name"] == name)

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.ports[1]}{path}"

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10))
        return self._http

    # -- memory

    def sample(self) -> None:
        """Takes down the resident memory of all processes of this life."""
        if self._process is not None:
            kib = sum(_resident_kib(pid) for pid in _members(self._process.pid))
            now = time.monotonic()
            self.samples.append(Sample(now - self._began, self.lives, now - self._born, kib / 1024))

    async def watch(self) -> None:
        """Samples until cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(0.5)


def _members(group: int) -> list[int]:
    """The processes of a process group that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


def _resident_kib(pid: int) -> int:
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_KIB
    return 0
