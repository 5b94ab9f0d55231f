from __future__ import annotations

import io
import json
import re
from collections import Counter
from random import Random
from typing import Any

import cbor2
import pytest
from multiformats import CID

from indexer.simulator.account import ActionError, Write
from indexer.simulator.cbor import cid_text, to_json
from indexer.simulator.chooser import Chooser, Rates, past
from indexer.simulator.content import COLLECTIONS
from indexer.simulator.world import Clock, Happening, World
from tests.paths import shared_data
from tests.simulator import strict

BUSY = Rates(
    account=0.02,
    handle=0.02,
    status=0.04,
    delete=0.01,
    key=0.02,
    migrate=0.02,
    sync=0.01,
    batch=0.1,
    big_batch=0.005,
)
START = 1_700_000_000_000_000


def make_world(seed: int = 3, pds: int = 2) -> World:
    return World(seed, pds, Clock(START, 1000))


def frames_of(happening: Happening, seq: int = 1) -> list[tuple[str, dict[str, Any]]]:
    return [strict.split_frame(item.halves.numbered(seq)) for item in happening.frames]


def signed(payload: dict[str, Any], did_key: str) -> tuple[dict[str, Any], dict[CID, bytes]]:
    """The commit of a frame's blocks, its signature checked."""
    root, blocks = strict.read_car(payload["blocks"])
    commit = strict.decode(blocks[root])
    assert commit["version"] == 3
    assert commit["prev"] is None
    assert commit["did"] == payload.get("repo", payload.get("did"))
    assert commit["rev"] == payload["rev"]
    assert strict.signature_valid(commit, did_key)
    return commit, blocks


class Reader:
    """Folds frames into records, verifying each completely from its own bytes."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.data: dict[str, CID] = {}
        self.revs: dict[str, str] = {}
        self.records: dict[str, dict[str, str]] = {}

    def take(self, kind: str, payload: dict[str, Any], did_key: str) -> None:
        self.kinds[kind] += 1
        if kind == "#account" and payload.get("status") == "deleted":
            self.records.pop(payload["did"], None)
        if kind == "#sync":
            commit, _ = signed(payload, did_key)
            assert self.data[payload["did"]] == commit["data"]
            self.revs[payload["did"]] = payload["rev"]
        if kind == "#commit":
            self._commit(payload, did_key)

    def _commit(self, payload: dict[str, Any], did_key: str) -> None:
        did = payload["repo"]
        commit, blocks = signed(payload, did_key)
        root, _ = strict.read_car(payload["blocks"])
        assert root == payload["commit"]
        assert len(payload["blocks"]) <= 2_000_000
        assert len(payload["ops"]) <= 200
        assert payload["since"] == self.revs.get(did)
        assert payload["rev"] > self.revs.get(did, "")
        self.kinds.update(op["action"] for op in payload["ops"])
        before = strict.invert(commit["data"].set(base="base32"), blocks, payload["ops"])
        assert before == payload.get("prevData", before)
        assert ("prevData" in payload) == (did in self.data)
        assert before == self.data.get(did, before)
        records = self.records.setdefault(did, {})
        for op in payload["ops"]:
            assert str(op["prev"].set(base="base32") if "prev" in op else None) == str(
                records.get(op["path"])
            )
            if op["cid"] is None:
                del records[op["path"]]
            else:
                assert op["cid"].set(base="base32") in blocks
                records[op["path"]] = str(op["cid"].set(base="base32"))
        self.data[did], self.revs[did] = commit["data"], payload["rev"]


def test_every_frame_verifies_alone_and_the_log_folds_to_the_ledger() -> None:
    world, reader = make_world(), Reader()
    chooser = Chooser(world, BUSY)
    for happening in [world.create() for _ in range(8)]:
        for kind, payload in frames_of(happening):
            reader.take(kind, payload, world.accounts[happening.row["did"]].key.did_key)
    for _ in range(140):
        happening = chooser.step()
        key = world.accounts[happening.row["did"]].key.did_key
        for kind, payload in frames_of(happening):
            reader.take(kind, payload, key)
    assert (
        min(
            reader.kinds[kind]
            for kind in ("#commit", "#sync", "#identity", "#account", "create", "update", "delete")
        )
        > 5
    )
    for did, account in world.accounts.items():
        entry = account.ledger("", values=False)
        assert reader.records.get(did, {}) == entry["records"]
        if account.rev:
            assert (reader.revs[did], str(reader.data[did].set(base="base32"))) == (
                entry["rev"],
                entry["data"],
            )


def test_same_seed_same_story() -> None:
    def story(seed: int) -> list[bytes]:
        world = make_world(seed)
        made = [world.create() for _ in range(5)]
        chooser = Chooser(world, BUSY)
        made += [chooser.step() for _ in range(60)]
        return [item.row["ops"] if "ops" in item.row else item.row["kind"] for item in made]

    assert story(1) == story(1)
    assert story(1) != story(2)


def test_a_restored_world_is_the_same_and_goes_on() -> None:
    world = make_world()
    rows = [world.create(past=lambda did: past(Random(1), world, did, 30)).row]
    rows += [world.create().row for _ in range(6)]
    chooser = Chooser(world, BUSY)
    happenings = [chooser.step() for _ in range(150)]
    rows += [item.row for item in happenings]
    twin = make_world()
    for row in rows:
        twin.restore(row | {"us": world.clock.last, "emits": row["kind"] != "account"})
    twin.settle()
    assert {did: a.ledger("", values=True) for did, a in twin.accounts.items()} == {
        did: a.ledger("", values=True) for did, a in world.accounts.items()
    }
    assert (twin.steps, twin.clock.last) == (world.steps, world.clock.last)
    following = [Chooser(item, BUSY).step() for item in (world, twin)]
    assert [item.row["did"] for item in following] == [following[0].row["did"]] * 2
    assert following[0].frames[0].halves.after != b""


def test_a_new_account_announces_itself_like_a_real_pds() -> None:
    frames = frames_of(make_world().create())
    assert [kind for kind, _ in frames] == ["#identity", "#account", "#commit", "#sync"]
    commit = frames[2][1]
    assert commit["ops"] == []
    assert commit["since"] is None
    assert "prevData" not in commit
    _, blocks = strict.read_car(commit["blocks"])
    assert len(blocks) == 2


def test_frames_have_the_fields_of_captured_ones() -> None:
    captured = captured_shapes()
    world = make_world()
    did = world.create().row["did"]
    happenings = [world.create(), world.commit(did, [Write("create", "a.b.c/1", {"$type": "a.b.c"})])]
    happenings += [world.commit(did, [Write("update", "a.b.c/1", {"$type": "a.b.c", "x": 1})])]
    happenings += [world.commit(did, [Write("delete", "a.b.c/1", None)])]
    happenings += [world.set_status(did, status) for status in ("deactivated", "active")]
    assert {shape(*item) for happening in happenings for item in frames_of(happening)} <= captured


def shape(kind: str, payload: dict[str, Any]) -> tuple[Any, ...]:
    ops = tuple(sorted({(op["action"], tuple(sorted(op))) for op in payload.get("ops", ())}))
    return kind, tuple(payload), ops


def captured_shapes() -> set[tuple[Any, ...]]:
    data = shared_data("session/pds0.frames").read_bytes()
    found, at = set(), 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        frame = io.BytesIO(data[at + 4 : at + 4 + size])
        found.add(shape(cbor2.load(frame)["t"], cbor2.load(frame)))
        at += 4 + size
    return found


def test_a_past_makes_no_frames_but_a_whole_repository() -> None:
    world = make_world()
    world.create()
    made = world.create(past=lambda did: past(Random(5), world, did, 120))
    account = world.accounts[made.row["did"]]
    assert made.frames == []
    assert not account.seen
    assert len(account.records) == 120
    assert world.unseen == [account]
    (commit,) = frames_of(world.commit(account.did, [Write("create", "a.b.c/1", {"$type": "a.b.c"})]))
    assert account.seen
    assert world.unseen == []
    assert commit[1]["prevData"] is not None


def test_content_covers_the_common_collections_and_every_kind_of_value() -> None:
    world = make_world()
    chooser = Chooser(world, Rates(batch=0.5, big_batch=0.2, account=0, handle=0, status=0, delete=0, sync=0))
    for _ in range(4):
        world.create()
    for _ in range(60):
        chooser.step()
    values = [record.value for account in world.accounts.values() for record in account.records.values()]
    assert {value["$type"] for value in values} == set(COLLECTIONS)
    text = json.dumps([to_json(value) for value in values], ensure_ascii=False)
    for sign in (
        "$link",
        "$bytes",
        "facet#mention",
        "facet#link",
        "facet#tag",
        '"reply"',
        "embed.images",
        "embed.external",
        "embed.record",
        '"avatar"',
        '"banner"',
        "猫",
        "صباح",
        "👩‍💻",
        "9007199254740991",
    ):
        assert sign in text, sign
    for value in values:
        for facet in value.get("facets", ()):
            span = value["text"].encode()[facet["index"]["byteStart"] : facet["index"]["byteEnd"]]
            assert re.match(r"[@#]|\w", span.decode())


def test_both_curves_are_in_use_and_migration_changes_host_and_key() -> None:
    world = make_world()
    accounts = [world.accounts[world.create().row["did"]] for _ in range(12)]
    assert {account.key.curve for account in accounts} == {"k256", "p256"}
    account = accounts[0]
    key, data, home = account.key.did_key, account.data, account.pds
    moved = world.change_key(account.did, pds=1 - home)
    assert (account.pds, account.data) == (1 - home, data)
    assert account.key.did_key != key
    assert [(item.pds, item.kind, item.relayed) for item in moved.frames] == [
        (1 - home, "#account", True),
        (1 - home, "#identity", True),
        (1 - home, "#sync", True),
        (home, "#account", False),
    ]


def test_growth_ends_at_the_limits() -> None:
    world = make_world()
    chooser = Chooser(world, Rates(account=0.2, batch=0.3, max_accounts=6, max_records=150))
    for _ in range(4):
        world.create()
    sizes = []
    for _ in range(600):
        chooser.step()
        sizes.append(world.records)
    assert len(world.accounts) == 6
    assert min(sizes[300:]) > 100
    assert max(sizes) < 500
    assert world.records == sum(len(account.records) for account in world.accounts.values())


def test_a_deleted_account_keeps_nothing() -> None:
    world = make_world()
    did = world.create().row["did"]
    world.commit(did, [Write("create", "a.b.c/1", {"$type": "a.b.c"})])
    world.set_status(did, "deleted", tombstone=True)
    entry = world.accounts[did].ledger("", values=True)
    assert (entry["records"], entry["rev"], entry["status"], entry["active"]) == ({}, None, "deleted", False)
    with pytest.raises(ActionError):
        world.set_status(did, "active")


@pytest.mark.parametrize(
    "writes",
    [
        [],
        [Write("delete", "a.b.c/none", None)],
        [Write("update", "a.b.c/none", {})],
        [Write("create", "a.b.c/1", {})],
        [Write("create", "a.b.c/2", {}), Write("create", "a.b.c/2", {})],
        [Write("create", "a.b.c/2", None)],
        [Write("create", f"a.b.c/n{n}", {}) for n in range(201)],
    ],
)
def test_impossible_writes_are_refused_whole(writes: list[Write]) -> None:
    world = make_world()
    did = world.create().row["did"]
    world.commit(did, [Write("create", "a.b.c/1", {"$type": "a.b.c"})])
    before = world.accounts[did].ledger("", values=True)
    with pytest.raises(ActionError):
        world.commit(did, writes)
    assert world.accounts[did].ledger("", values=True) == before


def test_getrepo_blocks_and_proofs_lead_from_the_commit_to_the_record() -> None:
    world = make_world()
    did = world.create(past=lambda did: past(Random(5), world, did, 80)).row["did"]
    account = world.accounts[did]
    blocks = dict(account.blocks())
    assert next(iter(blocks)) == account.commit_cid
    nodes = {CID.decode(bytes(cid)).set(base="base32"): block for cid, block in blocks.items()}
    leaves = strict.flatten(CID.decode(account.data).set(base="base32"), nodes)
    assert len(leaves) == 80
    assert all(isinstance(leaf, strict.Leaf) and leaf.value.set(base="base32") in nodes for leaf in leaves)
    path = next(iter(account.records))
    proof = {cid_text(cid) for cid, _ in account.proof(path)}
    assert cid_text(account.records[path].cid) in proof
    assert cid_text(account.data) in proof


def test_an_account_is_announced_as_it_is_whatever_that_is() -> None:
    world = World(1, 1, Clock(1_700_000_000_000_000))
    did = str(world.create().row["did"])
    kinds = {}
    for status in ("active", "deactivated", "deleted"):
        if status != "active":
            world.set_status(did, status)
        before = world.account(did).rev
        kinds[status] = [frame.kind for frame in world.announce(did).frames]
        assert world.account(did).rev == before
    assert kinds == {
        "active": ["#account", "#identity", "#sync"],
        "deactivated": ["#account", "#identity"],
        "deleted": ["#account"],
    }
