"""The daemon under measurement: `python -m indexer run` in its own process, on loopback, in a fresh folder.

Owns its start, its addresses, sampling of its memory (workers included) and its end. Linux only where it
reads /proc; elsewhere memory is reported as 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from bench.options import append_profile
from indexer.config import ENV_PREFIX, env_name

_START_S = 60.0
_STOP_S = 15.0
_SAMPLE_S = 0.5
_LOOPBACK = "127.0.0.1"


class DaemonFailed(Exception):
    """The daemon did not start, or ended while it was measured."""


class BenchDaemon:
    """A running daemon; made by `running_daemon`."""

    def __init__(self, process: asyncio.subprocess.Process, public: str, management: str, log: Path) -> None:
        self._process = process
        self.public = public
        self.management = management
        self._log = log
        #: Largest memory seen so far, of the daemon and its workers together, in MiB.
        self.peak_mib = 0.0

    def check(self) -> None:
        """Raises `DaemonFailed` when the process is gone."""
        if self._process.returncode is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise DaemonFailed(f"the daemon ended with exit code {self._process.returncode}:\n{tail}")

    async def get(self, http: aiohttp.ClientSession, path: str) -> Any:
        """JSON of a public path."""
        self.check()
        async with http.get(self.public + path) as answer:
            return await answer.json()

    def cpu_seconds(self) -> float:
        """Processor time that the daemon and its workers have used."""
        return sum(_cpu_seconds(pid) for pid in _family(self._process.pid))

    async def sample_memory(self) -> None:
        """Keeps ``peak_mib`` until cancelled."""
        while True:
            self.peak_mib = max(self.peak_mib, sum(map(_memory_mib, _family(self._process.pid))))
            await asyncio.sleep(_SAMPLE_S)

    async def wait_until_healthy(self) -> None:
        """Returns when `/health` answers 200, and so does the management listener, which is opened later."""
        deadline = time.monotonic() + _START_S
        async with aiohttp.ClientSession() as http:
            while time.monotonic() < deadline:
                self.check()
                with contextlib.suppress(aiohttp.ClientError):
                    async with (
                        http.get(f"{self.management}/readyz"),
                        http.get(f"{self.public}/health") as answer,
                    ):
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.05)
        raise DaemonFailed(f"the daemon was not healthy within {_START_S:g} s")

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL when that takes too long."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


@contextlib.asynccontextmanager
async def running_daemon(
    settings: Mapping[str, object], folder: Path, *, profile: Path | None = None
) -> AsyncIterator[BenchDaemon]:
    """A healthy daemon with ``settings`` (dotted names) over those that every benchmark needs.

    With ``profile`` its main process runs under cProfile, slower, and what it cost is appended there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="data-") as data:
        public, management = free_port(), free_port()
        chosen = {
            "data_dir": data,
            "public.bind": f"{_LOOPBACK}:{public}",
            "management.bind": f"{_LOOPBACK}:{management}",
            "network.allow_private": True,
            "log.level": "warning",
            "hosts.requests_per_s": 0,
            **settings,
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        environment = kept | {env_name(name): str(value) for name, value in chosen.items()}
        log = Path(data) / "daemon.log"
        raw = Path(data) / "daemon.profile"
        under = ("-m", "cProfile", "-o", str(raw)) if profile else ()
        with log.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *under, "-m", "indexer", "run"), env=environment, stdout=out, stderr=out
            )
        daemon = BenchDaemon(process, f"http://{_LOOPBACK}:{public}", f"http://{_LOOPBACK}:{management}", log)
        sampler = asyncio.create_task(daemon.sample_memory())
        try:
            await daemon.wait_until_healthy()
            yield daemon
        finally:
            sampler.cancel()
            await daemon.stop()
            if profile and raw.exists():
                append_profile(str(raw), profile, "the daemon's main process")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _family(pid: int) -> list[int]:
    """The process and everything that it started."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _memory_mib(pid: int) -> float:
    """Proportional set size: what is shared between processes counts once."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _cpu_seconds(pid: int) -> float:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0
