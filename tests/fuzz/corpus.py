"""What fuzzing starts from: a small network with all its lies, captured frames and real repositories.

Also makes commits that are wrong deep inside but hashed and signed: a node of the tree or an operation is
changed, and all that stands above it made anew. One thread.
"""

from __future__ import annotations

import asyncio
from functools import cache
from random import Random
from typing import Any, NamedTuple

from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.simulator.account import Account, ActionError
from indexer.simulator.cbor import Link, block_cid, encode
from indexer.simulator.chooser import choose_writes
from indexer.simulator.draft import Draft, draft_of
from indexer.simulator.lie_kinds import KINDS
from indexer.simulator.tree import Node
from indexer.simulator.wire import car
from indexer.simulator.world import Clock, World
from tests.fuzz.mutate import bytes_of, value_of
from tests.paths import DATA

_STEPS = 150
_START = 1_770_000_000_000_000
_REPOS = ("empty", "ten", "kilo")


class Made(NamedTuple):
    """A commit on a copy of an account, and the account as it was before."""

    before: Account
    after: Account
    draft: Draft


class _Network(SimulatedNetwork):
    """One whose time is its own, so that a seed gives the same bytes on any day."""

    def _world(self, seed: int, pds: int, relays: int) -> World:
        world = super()._world(seed, pds, relays)
        world.clock = Clock(_START, 1000)
        return world


class Corpus:
    """Frames, archives and accounts; all from ``seed``."""

    def __init__(self, seed: int) -> None:
        config = SimConfig(
            seed=seed, accounts=6, history_accounts=2, history_records=400, pds=2, relays=1, rate=0
        )
        self.network = _Network(config)
        for _ in range(_STEPS):
            self.network.step()
        for kind in KINDS.values():
            if kind.tell.__module__.endswith("lie_sockets"):
                continue
            try:
                self.network.lies.tell(kind.name)
            except ActionError:
                continue  # nobody fits in so small a network
        self._now = self.network.world.clock()
        lane = self.network.relay
        self.frames = [frame for at in range(lane.end) for frame in lane.read(at, 1)]
        self.frames += [path.read_bytes() for path in sorted((DATA / "frames").iterdir())]
        asyncio.run(self.network.stop())
        self.accounts = [one for one in self.network.world.accounts.values() if one.rev]
        self.archives = [(DATA / "repos" / f"{name}.car").read_bytes() for name in _REPOS]
        self.archives += [car(one.commit_cid, one.blocks()) for one in self.accounts]

    def account(self, rng: Random) -> Account:
        return rng.choice(self.accounts)

    def commit(self, rng: Random) -> Made:
        """A true commit of a few writes, which nobody hears of."""
        self.network.world.clock.last = self._now  # each input by itself
        before = self.account(rng)
        after = before.copy()
        count = rng.choice((1, 1, 1, 2, 3, 8))
        writes = choose_writes(rng, self.network.world, after, count, rng.choice((0.1, 0.8)))
        draft, _ = draft_of(after, writes, self.network.world.clock())
        return Made(before, after, draft)


@cache
def corpus(seed: int) -> Corpus:
    return Corpus(seed)


def bend_tree(rng: Random, made: Made) -> None:
    """Changes a node on the way to one of the writes, and hashes and signs what stands above it."""
    draft, tree = made.draft, made.after.tree
    key = rng.choice(draft.ops)["path"].encode()
    way = tree.path(key)
    if not way:
        return
    way = way[: rng.randrange(len(way)) + 1]
    match rng.randrange(4):
        case 0:
            _bend_links(rng, way[-1])
        case 1:
            _replace(draft, way[-1], bytes_of(rng, way[-1].block, rng.choice(list(draft.nodes.values()))))
        case _:
            _replace(draft, way[-1], encode(value_of(rng, plain(way[-1]))))
    for node in way[:-1] if way[-1].cid else way:
        node.cid = b""
    draft.data, fresh = tree.seal()
    draft.nodes |= fresh
    draft.sign()


def _replace(draft: Draft, node: Node, block: bytes) -> None:
    node.block, node.cid = block, block_cid(block)
    draft.nodes[node.cid] = block


def _bend_links(rng: Random, node: Node) -> None:
    """Keys, values or subtrees in other places; encoded as if that were right."""
    node.cid = b""
    at = rng.randrange(len(node.subs))
    match rng.randrange(6):
        case 0:
            node.subs[at] = rng.choice(node.subs)
        case 1:
            node.subs[at] = Node([], [], [node.subs[at]])
        case 2:
            node.subs[at] = None
        case 3 if node.keys:
            node.keys[at - 1] = node.keys[at - 1] + rng.choice((b"0", b"z", b"\xff", b"/"))
        case 4 if node.keys:
            node.values[at - 1] = rng.choice(node.values)
        case _:
            rng.shuffle(node.subs)


def bend_ops(rng: Random, draft: Draft) -> None:
    """Other operations than those that were done."""
    ops = draft.ops
    at = rng.randrange(len(ops))
    match rng.randrange(5):
        case 0:
            del ops[at]
        case 1:
            ops.insert(at, dict(rng.choice(ops)))
        case 2:
            rng.shuffle(ops)
        case 3:
            other = rng.choice(ops)
            ops[at] = ops[at] | {name: other.get(name) for name in rng.sample(["cid", "prev", "path"], 1)}
        case _:
            changed = value_of(rng, ops[at])
            ops[at] = changed if isinstance(changed, dict) else {}


def plain(node: Node) -> dict[str, Any]:
    """A node as the value that its block encodes."""
    entries, before = [], b""
    for at, key in enumerate(node.keys):
        shared = 0
        while shared < min(len(key), len(before)) and key[shared] == before[shared]:
            shared += 1
        sub = node.subs[at + 1]
        link = None if sub is None else Link(sub.cid)
        entries.append({"k": key[shared:], "p": shared, "t": link, "v": Link(node.values[at])})
        before = key
    left = node.subs[0]
    return {"e": entries, "l": None if left is None else Link(left.cid)}
