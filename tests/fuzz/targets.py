"""The entry points under fuzz, and what must hold of whatever they are given.

A target makes an input from a generator and tries it. Our errors are answers; anything else that is raised
is a fault, as is an answer that contradicts another one (`Contradiction`). One thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from indexer.atproto.car import CarSplitter, iter_blocks, read_car
from indexer.atproto.dagcbor import MAX_RECORD_BYTES, check_record, record_to_json
from indexer.atproto.frames import CommitFrame, SyncFrame, decode_frame
from indexer.atproto.invert import invert
from indexer.atproto.mst import find, prove, walk
from indexer.atproto.ops import Op, check_ops
from indexer.atproto.shortcut import proves
from indexer.errors import BadInput, CarError, DriveError, FrameError, MstError, RecordInvalid
from indexer.ingest.verify import Outcome, VerifyLimits, verify_frame
from indexer.repo.blocks import MemoryBlocks
from indexer.repo.driver import Driver, DriverBuilder
from indexer.repo.ranges import RangePlan, ranges_of
from indexer.repo.tree_walk import TreeWalk
from indexer.repo.walker import load_repo, walk_records
from indexer.repo.walks import RecordWalk
from indexer.simulator.cbor import encode
from indexer.simulator.wire import car, frame
from tests.fuzz.corpus import Made, bend_ops, bend_tree, corpus
from tests.fuzz.mutate import bytes_of, value_of

_LIMITS = VerifyLimits("7777777777777")
_KEYS = 8
_RANGES = ranges_of(["app.bsky.feed.like", "app.bsky.graph.*"])


class Contradiction(Exception):
    """Two answers that cannot both be right."""


Try = Callable[[], str]


# -- frames


def frames(seed: int, rng: Random) -> tuple[bytes, Try]:
    """A message of a firehose, and the records in it."""
    source = corpus(seed)
    account = source.account(rng)
    draw = rng.random()
    if draw < 0.45:
        data = bytes_of(rng, rng.choice(source.frames), rng.choice(source.frames))
    elif draw < 0.6:
        record = rng.choice(list(account.records.values())) if account.records else None
        block = encode(value_of(rng, record.value if record else {"$type": "a.b.c"}))
        block = bytes_of(rng, block, block) if rng.random() < 0.5 else block
        return block, lambda: _record(block)
    else:
        made = source.commit(rng)
        account = made.after
        data = _bent_frame(rng, made)
    return data, lambda: _frame(data, account.key.did_key)


def _bent_frame(rng: Random, made: Made) -> bytes:
    draft = made.draft
    draw = rng.random()
    if draw < 0.4:
        bend_tree(rng, made)
    elif draw < 0.6:
        bend_ops(rng, draft)
    elif draw < 0.75:
        body = value_of(rng, draft.body())
        draft.sign(body if isinstance(body, dict) else None)
    message = draft.message()
    if draw > 0.9:
        message = value_of(rng, message)
    elif draw > 0.75:
        message["blocks"] = bytes_of(rng, message["blocks"], message["blocks"])
    if not isinstance(message, dict):
        return encode({"op": 1, "t": "#commit"}) + encode(message)
    return frame("#commit", message).numbered(rng.randrange(1, 1 << 40))


def _frame(data: bytes, key: str) -> str:
    verdict = verify_frame(data, key, _LIMITS)
    try:
        decoded = decode_frame(data)
    except FrameError as error:
        if verdict.outcome is not Outcome.REJECT:
            raise Contradiction(f"a frame that is none has the verdict {verdict.outcome}") from error
        return f"frame/{error.reason}"
    if not isinstance(decoded, (CommitFrame, SyncFrame)):
        return type(decoded).__name__
    for _, path, cid, start, end, flags in verdict.ops:
        if cid is not None and not flags:
            check_record(decoded.blocks[start:end])
            record_to_json(decoded.blocks[start:end])
        if not path:
            raise Contradiction("an operation without a path was verified")
    return f"{verdict.kind}/{verdict.outcome.name}/{verdict.reason}"


def _record(block: bytes) -> str:
    try:
        check_record(block)
    except RecordInvalid:
        try:
            record_to_json(block)
        except BadInput:
            return "record/neither"
        return "record/invalid"
    record_to_json(block)
    return "record/valid"


# -- archives


def archives(seed: int, rng: Random) -> tuple[bytes, Try]:
    """An archive of a repository, read in every way that there is."""
    source = corpus(seed)
    draw = rng.random()
    if draw < 0.6:
        data = bytes_of(rng, rng.choice(source.archives), rng.choice(source.archives))
    else:
        made = source.commit(rng)
        bend_tree(rng, made)
        blocks = dict(made.draft.sections)
        blocks |= {cid: block for cid, block in made.before.blocks() if cid not in blocks}
        sections = list(blocks.items())
        if draw > 0.9:
            rng.shuffle(sections)
        data = car(made.draft.commit_cid, sections)
    sizes = rng.choice(((1, 7), (100, 5000), (1 << 20, 1 << 20)))
    if len(data) > 20_000 and sizes[1] < 100:
        sizes = (100, 5000)
    cuts = [rng.randint(*sizes) for _ in range(64)]
    memory, streaming = rng.choice((0.0, 0.001, 0.02, 16.0)), rng.random() < 0.7
    return data, lambda: _archive(data, cuts, memory, streaming)


def _archive(data: bytes, cuts: list[int], memory: float, streaming: bool) -> str:
    whole = _answer(lambda: dict(read_car(data).blocks))
    spans = _answer(lambda: {cid: data[start:end] for cid, start, end in iter_blocks(data)})
    pieces = _answer(lambda: _split(data, cuts))
    if not whole == spans == pieces:
        raise Contradiction("the readers of archives do not agree")
    repo = _answer(lambda: [(path, cid, _given(block)) for path, cid, block in walk_records(load_repo(data))])
    driven = asyncio.run(_drive(data, memory, streaming))
    if repo is not None and driven != repo:
        raise Contradiction("the driver does not give the records of the repository")
    if driven is not None and repo is None:
        # It may give out records before it meets what is behind the last one; then it must say so.
        raise Contradiction("the driver walked to its end what is no repository")
    return (
        f"archive/{'read' if whole is not None else 'refused'}/{'whole' if repo is not None else 'refused'}"
    )


def _given(block: bytes) -> bytes | None:
    """A record as the driver gives it: one that is too large for a record stays behind."""
    return None if len(block) > MAX_RECORD_BYTES else block


def _answer(ask: Callable[[], Any]) -> Any:
    """What it gives, None where it refuses."""
    try:
        return ask()
    except BadInput:
        return None


def _split(data: bytes, cuts: list[int]) -> dict[bytes, bytes]:
    splitter = CarSplitter()
    blocks: dict[bytes, bytes] = {}
    at = turn = 0
    while at < len(data):
        size = cuts[turn % len(cuts)]
        blocks.update(splitter.feed(data[at : at + size]))
        at, turn = at + size, turn + 1
    splitter.close()
    return blocks


async def _drive(data: bytes, memory: float, streaming: bool) -> list[tuple[str, bytes, bytes | None]] | None:
    """(path, CID, block) of every record, None where the driver refuses."""
    records: list[tuple[str, bytes, bytes | None]] = []
    store = MemoryBlocks()
    try:
        loaded = await DriverBuilder(memory, streaming=streaming).load_car(data)
        if isinstance(loaded, Driver.Disk):
            driver: RecordWalk = (await loaded.need_disk.finish_loading(store))[1]
        else:
            driver = loaded.driver
        async for chunk in driver.chunks(100):
            records += [(one.path, one.cid, one.data) for one in chunk]
    except DriveError as error:
        if error.__cause__ is not None and not isinstance(error.__cause__, (BadInput, CarError)):
            raise Contradiction(f"{error} came of {error.__cause__!r}") from error
        return None
    return records


# -- trees


def trees(seed: int, rng: Random) -> tuple[bytes, Try]:
    """A tree with operations that are said to have led to it."""
    made = corpus(seed).commit(rng)
    draw = rng.random()
    if draw < 0.75:
        bend_tree(rng, made)
    if draw > 0.6:
        bend_ops(rng, made.draft)
    draft = made.draft
    nodes = dict(draft.nodes)
    if nodes and rng.random() < 0.15:
        del nodes[rng.choice(list(nodes))]
    if nodes and rng.random() < 0.05:  # under a CID that is not its own
        cid = rng.choice(list(nodes))
        nodes[cid] = bytes_of(rng, nodes[cid], rng.choice(list(nodes.values())))
        return draft.data, lambda: _walked(draft.data, nodes, draft.ops)
    return draft.data, lambda: _tree(made, nodes)


def _tree(made: Made, nodes: Mapping[bytes, bytes]) -> str:
    draft = made.draft
    _walked(draft.data, nodes, draft.ops)
    try:
        ops = [Op(op["action"], op["path"], op.get("cid"), op.get("prev")) for op in draft.ops]
        check_ops(ops)
    except (BadInput, KeyError, TypeError, AttributeError):
        return "tree/ops"  # such operations are refused before any tree is looked at
    expected = made.before.data
    short = proves(draft.data, nodes, ops, expected)
    try:
        invert(draft.data, nodes, ops, expected)
    except MstError as error:
        if short:
            raise Contradiction(f"proven the short way, but {error}") from error
        return f"tree/{error.reason}"
    _sound(made, nodes, ops)
    return f"tree/{'short' if short else 'full'}"


def _walked(root: bytes, nodes: Mapping[bytes, bytes], ops: list[dict[str, Any]]) -> str:
    """The walk, and single questions, of a tree of which some nodes are missing or are none."""
    try:
        list(walk(root, nodes.get))
    except MstError:
        pass
    for op in ops[:_KEYS]:
        path = op.get("path") if isinstance(op, dict) else None
        if isinstance(path, str):
            try:
                find(root, path, nodes.get)
                prove(root, path, nodes.get)
            except MstError:
                continue
    _ranged(root, nodes)
    return "tree/walked"


class _Said(dict[bytes, bytes]):
    """Blocks of which all are said to be there."""

    def __contains__(self, cid: object) -> bool:
        return True


def _ranged(root: bytes, nodes: Mapping[bytes, bytes]) -> None:
    """A plan finds all nodes of its ranges exactly where walks of them do."""
    try:
        plan = RangePlan(root, _RANGES, _Said(nodes))
        plan.advance([root])
        planned = plan.done
    except MstError:
        planned = False
    try:
        for start, stop in _RANGES:
            tree = TreeWalk(root, start=start, stop=stop)
            while tree.want is not None:
                tree.take(nodes.get(tree.want, b""))
        walked = True
    except MstError:
        walked = False
    if planned is not walked:
        raise Contradiction(f"a plan finds {planned} where walks find {walked}")


def _sound(made: Made, nodes: Mapping[bytes, bytes], ops: list[Op]) -> None:
    """What inverts to a valid tree is a valid one, and differs from it by the operations alone."""
    old = {cid: block for cid, block in made.before.tree.walk() if block}
    records = {path: bytes(record.cid) for path, record in made.before.records.items()}
    for op in ops:
        if op.cid is None:
            records.pop(op.path, None)
        else:
            records[op.path] = bytes(op.cid)
    try:
        found = {
            path: bytes(cid)
            for path, cid in walk(made.draft.data, lambda cid: nodes.get(cid) or old.get(cid))
        }
    except MstError as error:
        raise Contradiction(f"inverted, but the tree is none: {error}") from error
    if found != records:
        raise Contradiction("inverted, but the tree holds other records than the operations say")


TARGETS: Mapping[str, Callable[[int, Random], tuple[bytes, Try]]] = {
    "frames": frames, "car": archives, "tree": trees,
}  # fmt: skip
