"""Every kind of lie, from the simulator's socket to the index: counted under its reason, and no harm done.

One network and one node serve all kinds of a module, since each scenario leaves them at rest again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from indexer.ingest import due
from indexer.simulator.account import ACTIVE
from indexer.simulator.lie_kinds import KINDS, Kind
from indexer.simulator.lie_sockets import SILENT_S
from tests.paths import ROOT
from tests.scenarios.scene import Scene, scene

#: Kinds that only time can tell.
SLOW = frozenset({"quiet", "stalled"})
#: Kinds after which a stream is not what it was.
ALONE = frozenset({"reset_told", "reset_silent"})
#: Refused, but not for what is in the frame: nothing of it is kept for people to look at.
UNKEPT = frozenset({"frame_stuck", "unregistered", "account_foreign"})
#: Kinds that end a connection on their way to what is expected of them.
CUTTING = frozenset({"frame_stuck", "word_repeated", "reset_told", "reset_silent"})


class Stage:
    """A scene and the loop that it lives on, for one module."""

    def __init__(self, folder: Path, *lanes: str) -> None:
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.scene: Scene = self.run(self._stack.enter_async_context(scene(folder, lanes)))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    def close(self) -> None:
        self.run(self._stack.aclose())
        self._runner.close()


@pytest.fixture(scope="module")
def _short_waits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(due.Waits, "of", lambda _: due.Waits(0.02, 0.05, 0.1))
        yield


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory, _short_waits: None) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("relay"), "relay0")
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, _short_waits: None) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("host"), "relay0", "pds0")
    yield stage
    stage.close()


def _is_slow(kind: Kind) -> bool:
    """One kind for each row and each thing that becomes of it is quick; the others say it in other ways."""
    first = next(other for other in KINDS.values() if (other.row, other.expect) == (kind.row, kind.expect))
    return kind.name in SLOW or first is not kind


def _parameters(group: str) -> list[Any]:
    return [
        pytest.param(kind, id=kind.name, marks=[pytest.mark.slow] if _is_slow(kind) else [])
        for kind in KINDS.values()
        if group == ("alone" if kind.name in ALONE else "foreign" if kind.needs == "foreign" else "shared")
    ]


@pytest.mark.parametrize("kind", _parameters("shared"))
def test_a_lie_of_a_relay_is_counted_under_its_reason_and_does_no_harm(kind: Kind, relay: Stage) -> None:
    relay.run(_scenario(relay.scene, kind, "relay0"))


@pytest.mark.parametrize("kind", _parameters("foreign"))
def test_a_lie_of_a_pds_about_others_is_refused(kind: Kind, host: Stage) -> None:
    host.run(_scenario(host.scene, kind, "pds0"))


def test_every_row_that_refuses_or_desynchronizes_has_its_lie() -> None:
    expected = {name for kind in KINDS.values() for name in kind.expect}
    rows = 0
    for line in (ROOT / "docs" / "sync.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if len(cells) < 4 or not re.match(r"\d|`#", cells[0]):
            continue
        for outcome in re.findall(r"reject|desync", cells[2]):
            for reason in re.findall(r"`(\w+)`", cells[3]):
                rows += 1
                assert f"{outcome}/{reason}" in expected, line
    assert rows > 20


@pytest.mark.parametrize("kind", _parameters("alone"))
@pytest.mark.usefixtures("_short_waits")
async def test_a_stream_that_begins_anew_is_noticed(kind: Kind, tmp_path: Path) -> None:
    async with scene(tmp_path) as alone:
        await _scenario(alone, kind, "relay0")


async def _scenario(scene: Scene, kind: Kind, lane: str) -> None:
    world = scene.network.world
    did = None if kind.needs in ("nobody", "foreign") else _somebody(scene, kind)
    await scene.ready(lane, did)
    if kind.needs == "inactive":
        assert did is not None
        scene.act(world.set_status(did, "deactivated"))
        await scene.settled()
    told = scene.network.lies.told[kind.name]
    before, refused = scene.counts(lane), len(scene.refused())

    lines = list(scene.network.lanes[lane].lines)
    lie = scene.network.lies.tell(kind.name, did=did, lanes=[lane])
    if kind.name in ALONE:
        await scene.reconnected(lane, lines)
    await scene.counted(lane, before, kind.expect)

    assert scene.network.lies.told[kind.name] == told + 1
    if kind.name == "quiet":  # what is said meanwhile comes late, on the same connection
        await scene.node.until(lambda: not any(line.turns for line in scene.network.lanes[lane].lines))
        started = asyncio.get_running_loop().time()
        await scene.ready(lane, did)
        assert asyncio.get_running_loop().time() - started > SILENT_S / 2
    if kind.needs == "inactive":
        assert did is not None
        scene.act(world.set_status(did, ACTIVE))
    await scene.settled()
    found = scene.counts(lane) - before
    assert {name: found[name] for name in kind.expect} == dict.fromkeys(kind.expect, 1), found
    if kind.name not in CUTTING:
        connections = {name for name in found if name.startswith("connection/")}
        assert connections == {name for name in kind.expect if name.startswith("connection/")}
    rejects = {name: n for name, n in found.items() if name.startswith("reject/")}
    assert rejects == {name: 1 for name in kind.expect if name.startswith("reject/")}
    seq = lie["lanes"][lane]
    if seq and rejects and kind.name not in UNKEPT:
        source = scene.sources[lane]
        assert scene.refused()[refused:] == [(source, seq, next(iter(rejects)).partition("/")[2])]
    scene.check_log()


def _somebody(scene: Scene, kind: Kind) -> str:
    """The account with the most records, whose tree has room for every fault."""
    accounts = [account for account in scene.network.world.active if account.seen]
    return max(accounts, key=lambda account: len(account.records)).did
