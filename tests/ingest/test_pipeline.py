"""Frames from a socket to the store: waiting for identities, breaks, statuses, filters, cursors."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from indexer.ingest import identities, service
from indexer.ingest.answers import Latest
from indexer.ingest.apply import Applier
from indexer.simulator.keys import K256, SigningKey
from indexer.simulator.replay import ReplayNetwork, ReplaySource
from indexer.simulator.wire import car, error_frame, info_frame
from indexer.store.codecs import AccountStatus, RepoRow, SyncState, Work
from indexer.store.keyspaces import QUARANTINE
from indexer.store.transaction import Transaction
from tests.ingest.forge import POST, Forge, Parts, create, delete, update
from tests.ingest.node import Node

HOME, AWAY = "http://home.test:80", "http://away.test:80"
PATH = f"{POST}/3aaaaaaaaaa22"


class Usage(NamedTuple):
    """As `shutil.disk_usage` gives it, as far as it is looked at."""

    free: int


class World:
    """One upstream, one directory, any number of accounts, and what the daemon is told of them."""

    def __init__(self) -> None:
        self.network = ReplayNetwork([ReplaySource([], HOME), ReplaySource([], AWAY)], {}, {}, accounts={})
        self.seq = 0

    @property
    def handles(self) -> list[str]:
        """Where the daemon finds the hosts of handles; the host of any other handle is nowhere."""
        place = self.network.plc_url.removeprefix("http://")
        return [f"{name}.test:{port}={place}" for name in ("someone", "new") for port in (80, 443)]

    def account(self, name: str = "a", pds: str = HOME) -> Forge:
        forge = Forge(f"did:plc:{name * 24}")
        self.publish(forge, pds)
        return forge

    def publish(self, forge: Forge, pds: str = HOME, handle: str = "someone.test") -> None:
        key = {"id": f"{forge.did}#atproto", "type": "Multikey", "controller": forge.did}
        service = {"id": "#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": pds}
        self.network.documents[forge.did] = {
            "id": forge.did,
            "alsoKnownAs": [f"at://{handle}"],
            "verificationMethod": [key | {"publicKeyMultibase": forge.account.key.multikey}],
            "service": [service],
        }

    def store(self, forge: Forge) -> None:
        """The repository as it is now becomes what getRepo answers."""
        account = forge.account
        self.network.cars[forge.did] = car(account.commit_cid, account.blocks())
        self.network.accounts[forge.did] = {"status": "active", "rev": account.rev}

    def send(self, *frames: bytes | Parts | Callable[[], bytes], source: int = 0) -> None:
        """Frames get the upstream's own numbers, in this order."""
        self.network.playbacks[source].add([self._numbered(item) for item in frames])

    def _numbered(self, item: bytes | Parts | Callable[[], bytes]) -> bytes:
        if isinstance(item, bytes):
            return item
        if isinstance(item, Parts):
            self.seq += 1
            item.seq = self.seq
            return item.encode()
        return item()

    def plain(self, make: Any, *arguments: Any) -> Callable[[], bytes]:
        """A frame that a forge numbers itself, to be made under the upstream's number."""

        def numbered() -> bytes:
            self.seq += 1
            make.__self__.seq = self.seq - 1
            made: bytes = make(*arguments)
            return made

        return numbered

    @asynccontextmanager
    async def node(self, folder: Path, **tables: Any) -> AsyncIterator[Node]:
        prefix = "pds::" if tables.pop("direct", False) else ""
        defaults: dict[str, Any] = {
            "upstreams": [prefix + self.network.stream_urls[0]],
            "plc_urls": [self.network.plc_url],
            "verifiers": 0,
            "filter": {"mode": "full"},
            "network": {"connect_to": [*self.network.connect_to, *self.handles]},
            "identity": {"error_ttl": 0.05},
            "ingest": {"refresh_interval": 0.05, "first_sight_wait": 0.05, "reconnect_max": 0.05},
            "backfill": {"retry_min": 0.05, "retry_max": 0.1},
        }
        merged = {
            name: {**defaults.get(name, {}), **value} if isinstance(value, dict) else value
            for name, value in tables.items()
        }
        async with Node(folder, {**defaults, **merged}) as node:
            yield node


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    made = World()
    async with made.network:
        yield made


@asynccontextmanager
async def followed(folder: Path, **tables: Any) -> AsyncIterator[tuple[World, Node, Forge]]:
    """A node that holds the first commit of the world's one account."""
    async with world() as net, net.node(folder, **tables) as node:
        forge = net.account()
        net.send(forge.parts())
        await node.until(lambda: holds(node, forge))
        yield net, node, forge


def row_of(node: Node, forge: Forge) -> RepoRow:
    row = node.db.repo(forge.did)
    assert row is not None
    return row


def holds(node: Node, forge: Forge) -> bool:
    """The index equals the account's own records, synced and at rest."""
    row = node.db.repo(forge.did)
    if row is None or row.state is not SyncState.SYNCED or row.rev != forge.account.rev or row.work:
        return False
    stored = {path: record.cid for path, record in node.db.records(forge.did)}
    assert stored == {path: record.cid for path, record in forge.account.records.items()}
    return True


def count(node: Node, name: str) -> int:
    return sum(n for key, n in node.db.counts("ingest/").items() if key.endswith(f"/{name}"))


async def test_a_new_account_is_followed_from_its_first_commit_without_a_fetch(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(net.plain(forge.identity), net.plain(forge.status, True), forge.parts(), forge.sync())
        net.send(forge.posts(3), forge.parts(create(PATH, "x")), forge.parts(update(PATH, "y")))
        net.send(forge.parts(delete(PATH)))
        await node.until(lambda: holds(node, forge))
        assert node.db.count("backfill/done/ok") == 0
        assert row_of(node, forge).complete
        events = [(event.kind, event.action) for event in node.events()]
        assert events.pop(events.index(("identity", ""), 1))  # its handle, at any moment
        assert events == [
            ("identity", ""),
            *[("record", "create")] * 4,
            ("record", "update"),
            ("record", "delete"),
        ]
        assert node.seqs() == [net.seq]


async def test_an_account_seen_in_the_middle_is_fetched(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        forge.posts(5)
        parts = forge.posts(2)
        net.store(forge)
        net.send(parts)
        await node.until(lambda: holds(node, forge))
        assert node.db.count("backfill/done/ok") == 1
        net.send(forge.posts(2))
        await node.until(lambda: holds(node, forge))


async def test_an_account_only_heard_of_is_fetched(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        forge.posts(5)
        net.store(forge)
        net.send(net.plain(forge.identity))
        await node.until(lambda: holds(node, forge))


async def test_a_missed_commit_is_made_up_for_by_a_fetch(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(3))
        await node.until(lambda: holds(node, forge))
        forge.parts(create(PATH, "never sent"))
        forge.parts(delete(sorted(forge.account.records)[1]))
        parts = forge.posts(1)
        net.store(forge)
        net.send(parts)
        await node.until(lambda: holds(node, forge))
        assert count(node, "desync/prev_data") == 1


async def test_frames_wait_for_an_identity_and_the_cursor_does_not(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge, other = net.account("a"), net.account("b")
        known = net.network.documents.pop(forge.did)
        net.network.documents[forge.did] = {"status": 503, "doc": {}}
        net.send(forge.parts(), forge.posts(2), other.parts(), other.posts(1))
        await node.until(lambda: holds(node, other) and node.seqs() == [net.seq])
        assert row_of(node, forge).work == Work.RESOLVE
        assert node.db.count("buffer/frames") == 2
        net.network.documents[forge.did] = known
        await node.until(lambda: holds(node, forge))
        assert node.db.count("buffer/frames") == 0


async def test_waiting_work_is_taken_up_again_after_a_restart(tmp_path: Path) -> None:
    async with world() as net:
        forge = net.account()
        known = net.network.documents.pop(forge.did)
        net.network.documents[forge.did] = {"status": 503, "doc": {}}
        net.send(forge.parts(), forge.posts(2))
        async with net.node(tmp_path) as node:
            await node.until(lambda: node.seqs() == [net.seq])
        net.network.documents[forge.did] = known
        async with net.node(tmp_path) as node:
            await node.until(lambda: holds(node, forge))


async def test_an_unknown_identity_refuses_what_waited(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        del net.network.documents[forge.did]
        net.send(forge.parts(), forge.posts(2))
        await node.until(lambda: count(node, "reject/identity") >= 2)
        assert node.db.count("buffer/frames") == 0
        kept = [row for _, row in node.db.scan(QUARANTINE)]
        assert kept
        assert {(row.reason, row.did) for row in kept} == {("identity", forge.did)}
        assert all(row.seq for row in kept)
        assert not node.db.records(forge.did)


async def test_a_new_signing_key_is_learned_from_a_bad_signature(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(2))
        await node.until(lambda: holds(node, forge))
        forge.account.key = SigningKey.derive(K256, "rotated")
        net.publish(forge)
        net.send(forge.posts(1), forge.posts(1))
        await node.until(lambda: holds(node, forge))
        assert row_of(node, forge).signing_key == forge.key
        assert count(node, "reject/signature") == 0
        told = [event.fields["handle"] for event in node.events() if event.kind == "identity"]
        assert sorted(told, key=str) == [None, "someone.test", "someone.test"]


async def test_a_forged_commit_is_refused_and_the_host_s_rev_compared(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(2))
        await node.until(lambda: holds(node, forge))
        net.store(forge)
        rev = forge.account.rev
        forged = forge.parts(create(PATH, "forged"))
        forged.key = SigningKey.derive(K256, "somebody else")
        net.send(forged)
        await node.until(lambda: count(node, "reject/signature") == 1 and row_of(node, forge).work == 0)
        assert (row_of(node, forge).rev, row_of(node, forge).state) == (rev, SyncState.SYNCED)
        assert next(iter(node.db.scan(QUARANTINE)))[1].reason == "signature"
        # The host has moved on, and only a forged frame told us so.
        net.store(forge)
        forged = forge.posts(1)
        forged.key = SigningKey.derive(K256, "somebody else")
        net.store(forge)
        net.send(forged)
        await node.until(lambda: holds(node, forge))


async def test_an_identity_frame_has_the_identity_asked_for_again(tmp_path: Path) -> None:
    async with followed(tmp_path) as (net, node, forge):
        net.send(net.plain(forge.identity, "liar.test"))
        await node.until(lambda: node.seqs() == [net.seq] and holds(node, forge))
        net.publish(forge, handle="new.test")
        net.send(net.plain(forge.identity))
        await node.until(lambda: row_of(node, forge).handle == "new.test")
        handles = [event.fields["handle"] for event in node.events() if event.kind == "identity"]
        assert handles == [None, "someone.test", "new.test"]


async def test_a_deactivated_account_is_hidden_and_comes_back(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(2))
        await node.until(lambda: holds(node, forge))
        net.network.accounts[forge.did] = {"status": "deactivated"}
        net.send(net.plain(forge.status, False, "deactivated"), net.plain(forge.status, False, "deactivated"))
        await node.until(
            lambda: row_of(node, forge)[2:3] == (AccountStatus.DEACTIVATED,) and not node.ingest.due
        )
        net.send(forge.posts(1))  # missed: the account is inactive
        await node.until(lambda: count(node, "drop/inactive") == 1)
        net.store(forge)
        net.send(net.plain(forge.status, True))
        await node.until(lambda: holds(node, forge))
        active = [event.fields["active"] for event in node.events() if event.kind == "account"]
        assert active == [False, True]


async def test_a_relay_s_stale_word_is_refuted_by_the_pds(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(2))
        await node.until(lambda: holds(node, forge))
        net.store(forge)
        net.send(net.plain(forge.status, False, "deactivated"))
        await node.until(lambda: node.seqs() == [net.seq] and holds(node, forge))
        await node.until(lambda: row_of(node, forge).status is AccountStatus.ACTIVE)


@pytest.mark.parametrize("confirmed", [True, False])
async def test_a_deleted_account_is_hidden_and_purged_once_confirmed(tmp_path: Path, confirmed: bool) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(2))
        await node.until(lambda: holds(node, forge))
        net.network.accounts[forge.did] = {"status": "deleted" if confirmed else "takendown"}
        net.send(net.plain(forge.status, False, "deleted"))
        await node.until(lambda: node.seqs() == [net.seq] and row_of(node, forge).work == 0)
        assert len(node.db.records(forge.did)) == (0 if confirmed else 2)
        assert not row_of(node, forge).status.active
        assert row_of(node, forge).tracked


async def test_the_pds_s_own_word_confirms_a_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identities, "read_latest", lambda _response: Latest(None, None))
    monkeypatch.setattr(identities, "_REFUSALS", {})
    async with world() as net, net.node(tmp_path, direct=True) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(2))
        await node.until(lambda: holds(node, forge))
        net.send(net.plain(forge.status, False, "deleted"))
        await node.until(lambda: row_of(node, forge).epoch == 1 and row_of(node, forge).work == 0)
        assert row_of(node, forge).status is AccountStatus.DELETED
        assert node.db.records(forge.did) == []


async def test_a_tombstone_in_the_directory_purges(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(2))
        await node.until(lambda: holds(node, forge))
        net.network.documents[forge.did] = {"status": 410, "doc": {}}
        net.send(net.plain(forge.identity))
        await node.until(lambda: row_of(node, forge).status is AccountStatus.DELETED)
        assert node.db.records(forge.did) == []
        assert node.events()[-1].fields == {"active": False, "status": "deleted"}


async def test_a_pds_speaks_for_its_own_accounts_only(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path, direct=True) as node:
        mine, foreign = net.account("a"), net.account("b", pds=AWAY)
        net.send(foreign.parts(), foreign.posts(1), net.plain(foreign.status, False, "deleted"))
        net.store(foreign)
        net.send(mine.parts(), mine.posts(1))
        await node.until(lambda: holds(node, mine) and count(node, "reject/authority") == 3)
        await node.until(lambda: not node.db.counts("strangers/"))
        assert node.db.repo(foreign.did) is None
        assert node.db.count("backfill/done/ok") == 0


async def test_filter_mode_follows_tracked_and_signalled_accounts_only(tmp_path: Path) -> None:
    like = "app.bsky.feed.like"
    tables = {"filter": {"mode": "filter", "signals": [like], "excludes": ["did:plc:" + "d" * 24]}}
    async with world() as net, net.node(tmp_path, **tables) as node:
        ignored, tracked, signalled, excluded = (net.account(name) for name in "abcd")
        await node.writer.run("track", lambda tx: tx.set_repo(tracked.did, _tracked()))
        for forge in (ignored, tracked, excluded):
            net.send(forge.parts(), forge.posts(1))
        net.send(excluded.parts(create(f"{like}/x", "x")))
        net.send(signalled.parts(create(f"{like}/x", "x")), net.plain(ignored.identity), ignored.posts(1))
        await node.until(lambda: holds(node, tracked) and holds(node, signalled) and node.seqs() == [net.seq])
        assert node.db.repo(ignored.did) is None
        assert node.db.repo(excluded.did) is None


def _tracked() -> RepoRow:
    from indexer.store.codecs import NEW_REPO

    return NEW_REPO._replace(tracked=True)


async def test_unwanted_collections_are_proven_but_not_kept(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path, filter={"mode": "full", "collections": [POST]}) as node:
        forge = net.account()
        net.send(forge.parts(create(PATH, "kept")), forge.parts(create("app.bsky.feed.like/x", "left out")))
        net.send(forge.parts(update(PATH, "kept, too")))
        await node.until(
            lambda: (row := node.db.repo(forge.did)) is not None and row.rev == forge.account.rev
        )
        assert [path for path, _ in node.db.records(forge.did)] == [PATH]
        assert not row_of(node, forge).complete


async def test_an_oversize_record_makes_its_repository_incomplete(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.parts(create(PATH, "x" * 1_000_001)))
        await node.until(lambda: holds(node, forge))
        assert not row_of(node, forge).complete


async def test_bad_frames_are_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    async with followed(tmp_path) as (net, node, forge):
        bad = forge.sync()
        bad.payload["rev"] = "not a tid"
        net.send(bad, info_frame("OutdatedCursor", "older frames are gone"), forge.posts(1))
        await node.until(lambda: holds(node, forge))
        assert count(node, "reject/fields") == 1
        assert node.ingest.status()[0]["outcomes"]["info/OutdatedCursor"] == 1


async def test_a_seq_that_does_not_rise_ends_the_connection(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        net.send(forge.parts(), forge.posts(1))
        await node.until(lambda: holds(node, forge))
        again = forge.posts(1)
        net.send(again)
        await node.until(lambda: holds(node, forge))
        net.network.playbacks[0].add([again.encode()])
        await node.until(lambda: node.ingest.status()[0]["outcomes"].get("connection/seq_order", 0) >= 1)
        net.send(forge.posts(1))
        await node.until(lambda: holds(node, forge))


async def test_an_error_frame_ends_the_connection_and_a_future_cursor_goes_to_the_live_tail(
    tmp_path: Path,
) -> None:
    async with world() as net:
        forge = net.account()
        net.send(forge.parts())
        async with net.node(tmp_path) as node:
            await node.until(lambda: holds(node, forge))
            net.send(error_frame("FutureCursor", "that has not happened yet"))
            outcomes = node.ingest.status()[0]["outcomes"]
            await node.until(lambda: "error/FutureCursor" in node.ingest.status()[0]["outcomes"])
            assert node.seqs() == [net.seq], outcomes


async def test_an_unreadable_frame_is_skipped_when_it_comes_again_and_again(tmp_path: Path) -> None:
    async with followed(tmp_path) as (net, node, forge):
        net.send(forge.posts(1).encode() + b"\x00", forge.posts(1))
        net.store(forge)
        await node.until(lambda: holds(node, forge))
        assert node.ingest.status()[0]["outcomes"]["connection/frame"] == 2


async def test_an_upstream_that_is_not_there_is_tried_again(tmp_path: Path) -> None:
    async with world() as net:
        server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        async with net.node(tmp_path, upstreams=[f"ws://127.0.0.1:{port}"]) as node:
            outcomes = node.ingest.status()[0]
            await node.until(lambda: node.ingest.status()[0]["outcomes"].get("connection/unreachable", 0) > 2)
            assert not outcomes["connected"]


async def test_a_step_that_fails_costs_its_frame_and_a_fetch_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge, other = net.account("a"), net.account("b")
        net.send(forge.parts(), other.parts())
        await node.until(lambda: holds(node, forge) and holds(node, other))
        write = Applier._write
        failing = forge.account.did

        def broken(self: Applier, tx: Transaction, arrival: Any, *rest: Any) -> RepoRow:
            if arrival.did == failing:
                raise ZeroDivisionError("a fault of our own")
            return write(self, tx, arrival, *rest)

        monkeypatch.setattr(Applier, "_write", broken)
        net.send(forge.posts(1), other.posts(1))
        net.store(forge)
        await node.until(lambda: holds(node, forge) and holds(node, other) and node.seqs() == [net.seq])
        assert next(iter(node.db.scan(QUARANTINE)))[1].reason == "ZeroDivisionError"
        assert node.db.count("backfill/done/ok") == 1


async def test_what_a_full_buffer_of_unproven_frames_had_no_room_for_is_fetched(tmp_path: Path) -> None:
    limits = {"unproven_frames_per_repo": 3}
    async with world() as net, net.node(tmp_path, ingest=limits) as node:
        forge = net.account()
        known = net.network.documents.pop(forge.did)
        net.network.documents[forge.did] = {"status": 503, "doc": {}}
        net.send(forge.parts(), *(forge.posts(1) for _ in range(6)))
        await node.until(lambda: node.seqs() == [net.seq])
        assert count(node, "drop/unproven_full") >= 1
        net.store(forge)
        net.network.documents[forge.did] = known
        await node.until(lambda: holds(node, forge))


async def test_a_full_disk_stops_the_intake_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "DISK_CHECK_S", 0.01)
    free = 100 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(free))
    async with followed(tmp_path, disk={"hard_floor_mib": 50}) as (net, node, forge):
        free = 10 << 20
        await node.until(lambda: not node.ingest._space.is_set())
        net.send(forge.posts(1))
        await node.until(lambda: "connection/disk_floor" in node.ingest.status()[0]["outcomes"])
        assert len(node.db.records(forge.did)) == 0
        free = 100 << 20
        await node.until(lambda: holds(node, forge))


async def test_ephemeral_mode_keeps_the_log_alone_and_tells_of_gaps(tmp_path: Path) -> None:
    tables = {"ephemeral": {"enabled": True}, "events": {"retention": "60m"}}
    async with world() as net, net.node(tmp_path, **tables) as node:
        forge = net.account()
        forge.posts(3)
        net.send(forge.parts(create(PATH, "x")), forge.parts(update(PATH, "y")))
        await node.until(
            lambda: (row := node.db.repo(forge.did)) is not None and row.rev == forge.account.rev
        )
        forge.posts(1)  # lost on the way
        net.send(forge.parts(delete(PATH)))
        await node.until(lambda: row_of(node, forge).rev == forge.account.rev)
        await node.until(lambda: not row_of(node, forge).work)
        kinds = [(event.kind, event.action) for event in node.events()]
        assert kinds.pop(kinds.index(("identity", ""), 1))  # its handle, at any moment
        assert kinds == [
            ("identity", ""), ("record", "create"), ("record", "update"), ("sync", ""), ("record", "delete"),
        ]  # fmt: skip
        assert node.db.records(forge.did) == []
        assert row_of(node, forge).due == 0
