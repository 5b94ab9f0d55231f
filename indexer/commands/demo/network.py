"""The simulated network of the demo: a child process, spoken to over its public URLs only.

The child keeps its state in a journal, so a demo that is killed and started again on the same folder
meets the same network. It ends when the demo ends, however that happens.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from indexer.errors import IndexerError


class SimulatedNetwork:
    """``async with`` starts the child and waits for its URLs; the exit ends it."""

    plc_url: str
    relay_url: str
    control_url: str
    dns_address: str

    def __init__(self, state: Path, options: dict[str, str]) -> None:
        self._arguments = ["--state", str(state), "--exit-with-parent", "--json"]
        for name, value in options.items():
            self._arguments += [f"--{name}", value]
        self._process: asyncio.subprocess.Process | None = None
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "indexer", "simulate", *self._arguments,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise IndexerError(
                f"the simulated network did not start (exit code {await self._process.wait()})"
            )
        urls = json.loads(line)
        self.plc_url, self.relay_url, self.control_url = urls["plc"], urls["relay"], urls["control"]
        self.dns_address = urls["dns"]
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60))

    async def _end(self) -> None:
        if self._http is not None:
            await self._http.close()
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()  # the child's sign that we are gone
            try:
                await asyncio.wait_for(self._process.wait(), 10)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def ledger(self, *, values: bool = False) -> dict[str, Any]:
        """The ground truth: accounts with their records, revs, roots and states."""
        return await self._call("GET", "/ledger?values=1" if values else "/ledger")

    async def pause(self) -> dict[str, Any]:
        """Stops the generator; what comes back is final."""
        return await self._call("POST", "/pause")

    async def resume(self) -> None:
        await self._call("POST", "/resume")

    async def _call(self, method: str, path: str) -> dict[str, Any]:
        assert self._http is not None
        async with self._http.request(method, self.control_url + path) as response:
            response.raise_for_status()
            answer: dict[str, Any] = await response.json()
            return answer
