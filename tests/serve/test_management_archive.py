"""Archived CARs over the management API and with `indexer repo archive`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest

from indexer.cas import FsBlobStore, digest_of
from indexer.cli import main
from indexer.serve.management import ManagementServer
from indexer.store.archives import Archives
from tests.serve.node import ALICE, BOB, Node, running, settings

REVS = ["3kbbbbbbbbb2b", "3kbbbbbbbbb3b"]
CARS = [b"first car" * 50_000, os.urandom(3 << 20)]


class Archiving(NamedTuple):
    node: Node
    server: ManagementServer
    blobs: FsBlobStore

    def where(self) -> list[str]:
        return ["--url", self.node.public.url, "--management-url", self.server.url]

    async def command(self, *arguments: str) -> int:
        return await asyncio.to_thread(_exit_code, ["repo", "archive", *arguments, *self.where()])


def _exit_code(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


@asynccontextmanager
async def archiving(tmp_path: Path) -> AsyncIterator[Archiving]:
    """A server over an archive that holds two CARs of Alice."""
    async with running(tmp_path) as node:
        blobs = FsBlobStore(tmp_path / "cas", level=3)
        config = settings(tmp_path, archive={"cars": True, "keep_per_repo": 2})
        archives = Archives(node.services.db, node.writer, blobs, config)
        for rev, data in zip(REVS, CARS, strict=True):
            car = tmp_path / "fetched.car"
            car.write_bytes(data)
            async with archives.keeping(ALICE, car) as archived:
                assert archived is not None
                await node.writer.run("hold", partial(archived.hold, did=ALICE, rev=rev))
        services = dataclasses.replace(node.services, archives=archives, settings=config)
        server = ManagementServer(services, node.public)
        await server.start()
        try:
            yield Archiving(node, server, blobs)
        finally:
            await server.stop()


async def test_the_newest_archive_is_streamed_and_others_by_rev(tmp_path: Path) -> None:
    async with archiving(tmp_path) as it:
        url = f"{it.server.url}/repos/{ALICE}/archive"
        async with it.node.http.get(url) as response:
            assert (response.status, response.content_type) == (200, "application/vnd.ipld.car")
            assert response.content_length == len(CARS[1])
            assert response.headers["ETag"] == f'"{digest_of(CARS[1]).hex()}"'
            assert await response.read() == CARS[1]
        async with it.node.http.get(url, params={"rev": REVS[0]}) as response:
            assert await response.read() == CARS[0]


async def test_the_list_is_newest_first(tmp_path: Path) -> None:
    async with archiving(tmp_path) as it:
        async with it.node.http.get(f"{it.server.url}/repos/{ALICE}/archives") as response:
            answer = await response.json()
        assert answer["did"] == ALICE
        assert [row["rev"] for row in answer["archives"]] == REVS[::-1]
        assert [row["bytes"] for row in answer["archives"]] == [len(CARS[1]), len(CARS[0])]
        assert answer["archives"][1]["sha256"] == digest_of(CARS[0]).hex()
        async with it.node.http.get(f"{it.server.url}/repos/{BOB}/archives") as response:
            assert await response.json() == {"did": BOB, "archives": []}


@pytest.mark.parametrize(
    ("path", "status", "name"),
    [
        (f"/repos/{BOB}/archive", 404, "ArchiveNotFound"),
        (f"/repos/{ALICE}/archive?rev=3kbbbbbbbbb7b", 404, "ArchiveNotFound"),
        (f"/repos/{ALICE}/archive?rev=nonsense", 400, "InvalidRequest"),
        ("/repos/nobody/archive", 400, "InvalidRequest"),
        ("/repos/nobody/archives", 400, "InvalidRequest"),
    ],
)
async def test_what_is_not_there_is_named(tmp_path: Path, path: str, status: int, name: str) -> None:
    async with archiving(tmp_path) as it, it.node.http.get(it.server.url + path) as response:
        assert (response.status, (await response.json())["error"]) == (status, name)


async def test_a_damaged_archive_is_broken_off(tmp_path: Path) -> None:
    async with archiving(tmp_path) as it:
        path = next(blob.path for blob in it.blobs.files() if blob.digest == digest_of(CARS[1]))
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        async with it.node.http.get(f"{it.server.url}/repos/{ALICE}/archive") as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        path.unlink()
        async with it.node.http.get(f"{it.server.url}/repos/{ALICE}/archive") as response:
            assert (response.status, (await response.json())["error"]) == (500, "InternalServerError")


# --- indexer repo archive

Output = pytest.CaptureFixture[str]


async def test_the_command_writes_a_car(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    async with archiving(tmp_path) as it:
        target = tmp_path / "out" / "alice.car"
        target.parent.mkdir()
        assert await it.command(ALICE, "-o", str(target)) == 0
        assert target.read_bytes() == CARS[1]
        assert list(target.parent.iterdir()) == [target]
        capfdbinary.readouterr()
        assert await it.command(ALICE, "--rev", REVS[0]) == 0
        assert capfdbinary.readouterr().out == CARS[0]


async def test_the_command_lists(tmp_path: Path, capsys: Output) -> None:
    async with archiving(tmp_path) as it:
        assert await it.command(ALICE, "--list") == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith(REVS[1])
        assert second.endswith(f"{len(CARS[0])} sha256:{digest_of(CARS[0]).hex()}")
        assert await it.command(ALICE, "--list", "--json") == 0
        assert [json.loads(line)["rev"] for line in capsys.readouterr().out.splitlines()] == REVS[::-1]


async def test_a_broken_off_archive_leaves_no_file(tmp_path: Path, capsys: Output) -> None:
    async with archiving(tmp_path) as it:
        path = next(blob.path for blob in it.blobs.files() if blob.digest == digest_of(CARS[1]))
        path.write_bytes(path.read_bytes()[:-1000])
        target = tmp_path / "out" / "alice.car"
        target.parent.mkdir()
        assert await it.command(ALICE, "-o", str(target)) == 1
        assert "broke its answer off" in capsys.readouterr().err
        assert list(target.parent.iterdir()) == []
        assert await it.command(BOB, "-o", str(target)) == 1
        assert "ArchiveNotFound: no CAR of" in capsys.readouterr().err
        assert await it.command(ALICE, "-o", str(tmp_path / "nowhere" / "alice.car")) == 1
        assert "cannot write" in capsys.readouterr().err


def test_without_a_daemon_it_says_so(tmp_path: Path, capsys: Output) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # bound, never listening
        url = f"http://127.0.0.1:{holder.getsockname()[1]}"
        assert _exit_code(["repo", "archive", ALICE, "-o", str(tmp_path / "x"), "--management-url", url]) == 1
    assert capsys.readouterr().err.startswith(f"error: no daemon answers at {url} ")
    assert list(tmp_path.iterdir()) == []


async def test_an_empty_list_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with archiving(tmp_path) as here:
        assert await here.command(BOB, "--list") == 0
        said = capsys.readouterr()
        assert (said.out, said.err.startswith(f"no CAR of {BOB} is archived")) == ("", True)
        assert await here.command(BOB, "--list", "--json") == 0
        assert capsys.readouterr() == ("", "")
