"""Keys, hosts and names change while directories and hosts misbehave: nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from indexer.identity.resolver import INVALID_HANDLE
from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.simulator.account import Account, Write
from indexer.simulator.faults import DNS, DOCUMENT, GET_REPO, STATUS, Fault
from indexer.store.codecs import AccountStatus, RepoRow, SyncState, Work
from tests.ingest.node import Node

POST: Final = "app.bsky.feed.post"
WEB: Final = "did:web:localhost%3A2600"


class Scene:
    """A network where nothing happens by itself, and a node that follows some of its hosts."""

    def __init__(self, net: SimulatedNetwork, node: Node) -> None:
        self.net = net
        self.node = node
        self._posts = 0

    def account(self, did: str = "", **about: Any) -> Account:
        made = self.net.world.accounts[self.net.add_account(0, did=did or None, **about)]
        self.post(made, 3)
        return made

    def post(self, one: Account, commits: int = 1) -> None:
        for _ in range(commits):
            self._posts += 1
            value = {"$type": POST, "text": f"post {self._posts}", "createdAt": "2026-01-01T00:00:00Z"}
            write = Write("create", f"{POST}/3k{self._posts:011d}", value)
            self.net.publish(self.net.world.commit(one.did, [write]))

    def rotate(self, one: Account, pds: int | None = None) -> None:
        """A new signing key, and with ``pds`` a new home."""
        self.net.publish(self.net.world.change_key(one.did, pds=pds))

    def row(self, one: Account) -> RepoRow:
        row = self.node.db.repo(one.did)
        assert row is not None
        return row

    def equal(self, *accounts: Account) -> bool:
        """Whether the index is the truth about them, at rest."""
        for one in accounts:
            row = self.node.db.repo(one.did)
            if row is None or (row.state, row.rev) != (SyncState.SYNCED, one.rev):
                return False
            if row.work & ~Work.VERIFY_HANDLE:
                return False
            stored = {path: bytes(record.cid) for path, record in self.node.db.records(one.did)}
            assert stored == {path: bytes(record.cid) for path, record in one.records.items()}
            assert row.signing_key == one.key.did_key
            assert row.pds == self.net.pds_urls[one.pds]
        return True

    async def settled(self, *accounts: Account) -> None:
        """Waits for `equal`; then the log, folded, gives the same records."""
        try:
            async with asyncio.timeout(15):
                await self.node.until(lambda: self.equal(*accounts))
        except TimeoutError:
            rows = [(self.node.db.repo(one.did), one.rev) for one in accounts]
            raise AssertionError(f"not at rest: {rows}, {self.node.db.counts('')}") from None
        folded: dict[str, set[str]] = {one.did: set() for one in accounts}
        for event in self.node.events():
            if event.kind == "record" and event.did in folded:
                path = f"{event.collection}/{event.rkey}"
                (folded[event.did].discard if event.action == "delete" else folded[event.did].add)(path)
        assert folded == {one.did: set(one.records) for one in accounts}

    def statuses(self, one: Account) -> list[str]:
        events = [e for e in self.node.events() if e.kind == "account" and e.did == one.did]
        return [event.fields.get("status", "active") for event in events]

    def count(self, ending: str) -> int:
        return sum(n for name, n in self.node.db.counts("ingest/").items() if name.endswith(ending))


@asynccontextmanager
async def scene(tmp_path: Path, hosts: Iterable[str] = ("relay",), **tables: Any) -> AsyncIterator[Scene]:
    net = SimulatedNetwork(SimConfig(accounts=0, history_accounts=0, pds=3, rate=0))
    await net.start()
    urls = {"relay": net.relay_url}
    urls |= {f"pds{n}": "pds::" + url.replace("http", "ws", 1) for n, url in enumerate(net.pds_urls)}
    merged: dict[str, Any] = {
        "upstreams": [urls[host] for host in hosts],
        "plc_urls": [net.plc_url],
        "verifiers": 0,
        "filter": {"mode": "full"},
        "network": {
            "dns_server": net.dns_address,
            "timeout": "300ms",
            "connect_to": [f"localhost:2600={net.pds_urls[0].removeprefix('http://')}"],
        },
        "identity": {"error_ttl": 0.05, "dns_timeout": "200ms"},
        "plc": {"max_requests_per_s": 1000, "failover_time": 0},
        "ingest": {"refresh_interval": 0.05, "first_sight_wait": 0.05, "reconnect_max": 0.05},
        "backfill": {"retry_min": 0.05, "retry_max": 0.2, "grace": "300ms"},
    }
    for name, value in tables.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    try:
        async with Node(tmp_path, merged) as node:
            await node.until(lambda: all(entry["connected"] for entry in node.ingest.status()))
            yield Scene(net, node)
    finally:
        await net.stop()


def planned(net: SimulatedNetwork, *faults: Fault) -> None:
    for fault in faults:
        net.faults.add(fault)


#: What a directory does while it is asked for the new key; for a time or for so many questions.
DIRECTORIES = [
    "status_500", "rate_limited", "html", "invalid_json", "id_mismatch", "huge_document", "cut", "no_answer",
    "gzip_bomb", "lying_key",
]  # fmt: skip


@pytest.mark.slow
async def test_rotated_keys_are_learned_whatever_the_directory_does_meanwhile(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        accounts = {kind: at.account() for kind in DIRECTORIES}
        other = at.account()
        await at.settled(other, *accounts.values())
        for kind, one in accounts.items():
            planned(at.net, Fault("plc", kind, DOCUMENT, one.did, times=2))
            at.rotate(one)
            at.post(one, 5)
        at.post(other, 5)
        await at.settled(other)
        await at.settled(*accounts.values())
        assert at.net.faults.unfired() == []
        assert at.count("/reject/identity") == 0


async def test_a_key_is_asked_for_once_for_all_the_frames_that_wait_for_it(tmp_path: Path) -> None:
    async with scene(tmp_path, ingest={"refresh_interval": "30s"}) as at:
        one = at.account(pds=0)
        await at.settled(one)
        planned(at.net, Fault("plc", "slow", DOCUMENT, one.did, value=20_000))  # counts, and takes its time
        at.rotate(one)
        at.post(one, 60)
        await at.settled(one)
        assert at.net.faults.fired["plc", "slow"] <= 3


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [["relay"], ["pds0", "pds1", "pds2"], ["relay", "pds0", "pds1", "pds2"]])
async def test_an_account_that_moves_goes_on_without_loss(tmp_path: Path, hosts: list[str]) -> None:
    async with scene(tmp_path, hosts) as at:
        one = at.account(pds=0)
        await at.settled(one)
        for home in (1, 2, 0, 1):
            at.rotate(one, pds=home)
            at.post(one, 3)
            await at.settled(one)
            at.post(one, 2)
        await at.settled(one)
        # The old host says that it is deactivated there, perhaps before we know that it is the old one.
        assert at.row(one).status is AccountStatus.ACTIVE
        assert at.statuses(one)[-1:] in ([], ["active"])


@pytest.mark.slow
async def test_an_account_that_moves_while_the_directory_lags_is_complete_in_the_end(tmp_path: Path) -> None:
    async with scene(tmp_path, ["relay", "pds0", "pds1"]) as at:
        one = at.account(pds=0)
        await at.settled(one)
        planned(at.net, Fault("plc", "lying_pds", DOCUMENT, one.did, times=4, value=at.net.pds_urls[0]))
        at.rotate(one, pds=1)
        at.post(one, 4)
        # The directory says that it lives where it no longer does; that host says that it is deactivated.
        await at.node.until(lambda: at.row(one).status is AccountStatus.DEACTIVATED)
        for number in range(10):
            asked = at.net.faults.fired.total()
            if asked == 4:
                break
            at.net.publish(at.net.world.set_handle(one.did, f"h{number}.test"))
            await at.node.until(lambda: at.net.faults.fired.total() > asked)  # noqa: B023
        at.net.publish(at.net.world.set_handle(one.did, "at-home.test"))
        await at.node.until(lambda: at.row(one).status is AccountStatus.ACTIVE)
        await at.settled(one)
        assert at.statuses(one)[-1] == "active"


@pytest.mark.slow
async def test_a_did_web_is_followed_through_rotations_and_refusals(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        planned(at.net, Fault("names", "status_503", DOCUMENT, WEB, times=1))
        one = at.account(WEB, pds=0)
        await at.settled(one)
        planned(at.net, Fault("names", "html", DOCUMENT, WEB, times=1))
        at.rotate(one)
        at.post(one, 3)
        await at.settled(one)
        assert at.net.faults.unfired() == []


async def test_a_handle_that_changes_hands_is_told_at_once(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        one, two = at.account(pds=0, handle="first.test"), at.account(pds=1, handle="second.test")
        await at.settled(one, two)
        await at.node.until(lambda: (at.row(one).handle, at.row(two).handle) == ("first.test", "second.test"))
        at.net.publish(at.net.world.set_handle(one.did, "third.test"))
        at.net.publish(at.net.world.set_handle(two.did, "first.test"))
        await at.node.until(lambda: at.row(two).handle == "first.test" and at.row(one).handle == "third.test")


@pytest.mark.limit(10)
async def test_a_handle_asked_for_too_early_is_verified_once_its_account_has_it(tmp_path: Path) -> None:
    async with scene(tmp_path, identity={"error_ttl": 3600}) as at:
        one = at.account(pds=0, handle="first.test")
        await at.settled(one)
        resolver = at.node.backfill.tools.resolver
        with pytest.raises(Exception, match="new.test"):
            await resolver.resolve_handle("new.test")
        at.net.publish(at.net.world.set_handle(one.did, "new.test"))
        await at.node.until(lambda: at.row(one).handle == "new.test")


@pytest.mark.slow
async def test_a_handle_counts_only_while_its_name_says_so(tmp_path: Path) -> None:
    lies, silences = ("wrong_did", "several_dids", "malformed_did"), ("silent", "server_failure")
    async with scene(tmp_path) as at:
        accounts = {kind: at.account() for kind in lies + silences}
        await at.settled(*accounts.values())
        for number, (kind, one) in enumerate(accounts.items()):
            planned(at.net, Fault("names", kind, DNS, one.did, times=1))
            at.net.publish(at.net.world.set_handle(one.did, f"new{number}.test"))
        # What is no answer is asked again; a lie is the name's word until somebody hints at a change.
        told = {kind: INVALID_HANDLE if kind in lies else one.handle for kind, one in accounts.items()}
        await at.node.until(lambda: {kind: at.row(one).handle for kind, one in accounts.items()} == told)
        assert at.net.faults.unfired() == []
        one = accounts["wrong_did"]
        at.net.publish(at.net.world.set_handle(one.did, "newer.test"))
        await at.node.until(lambda: at.row(one).handle == "newer.test")


async def test_a_status_that_cannot_be_checked_now_is_checked_again(tmp_path: Path) -> None:
    kinds = ("status_500", "rate_limited", "cut", "html", "status_404")
    async with scene(tmp_path) as at:
        accounts = {kind: at.account(pds=0) for kind in kinds}

        def are(status: str) -> bool:
            return {at.row(one).status.label for one in accounts.values()} == {status}

        await at.settled(*accounts.values())
        for kind, one in accounts.items():
            planned(at.net, Fault("pds0", kind, STATUS, one.did, times=1))
        for status in ("deactivated", "active"):
            for one in accounts.values():
                at.net.publish(at.net.world.set_status(one.did, status))
            await at.node.until(lambda: are(status))  # noqa: B023 - waited for in this round
        await at.node.until(lambda: not at.net.faults.unfired())
        for one in accounts.values():
            at.post(one, 2)
        await at.settled(*accounts.values())
        assert {tuple(at.statuses(one)) for one in accounts.values()} == {("deactivated", "active")}


async def test_a_host_s_lie_about_a_deletion_purges_nothing(tmp_path: Path) -> None:
    """Nobody but the account's own host and the directory can end it, and a lone status does not."""
    async with scene(tmp_path) as at:
        one = at.account(pds=0)
        await at.settled(one)
        planned(at.net, Fault("pds0", "lying_status", STATUS, one.did, value="deleted"))
        at.net.publish(at.net.world.set_status(one.did, "deactivated"))
        await at.node.until(lambda: at.net.faults.fired.total() > 0 and at.row(one).work == 0)
        assert at.row(one).status is AccountStatus.DEACTIVATED
        assert len(at.node.db.records(one.did)) == 3
        at.net.faults.clear()
        at.net.publish(at.net.world.set_status(one.did, "active"))
        at.post(one)
        await at.settled(one)


@pytest.mark.slow
async def test_resyncs_from_lying_hosts_are_done_once_they_tell_the_truth(tmp_path: Path) -> None:
    kinds = [
        "bad_signature",
        "truncated_at_block",
        "other_account",
        "old_rev",
        "missing_record",
        "wrong_tree",
    ]
    async with scene(tmp_path) as at:
        accounts = {kind: at.account() for kind in kinds}
        await at.settled(*accounts.values())
        for kind, one in accounts.items():
            planned(at.net, Fault("pds*", kind, GET_REPO, one.did, times=3))
            lost = Write("create", f"{POST}/3lost", {"$type": POST, "text": "its frame is never sent"})
            at.net.world.commit(one.did, [lost])
            at.post(one, 2)
        await at.settled(*accounts.values())
        assert {kind: at.net.faults.fired[f"pds{one.pds}", kind] for kind, one in accounts.items()} == (
            dict.fromkeys(kinds, 3)
        )


@pytest.mark.slow
async def test_a_host_that_is_no_more_is_looked_up_again(tmp_path: Path) -> None:
    """Without a relay to ask, after a lie of the directory, and with no frame that tells."""
    async with scene(tmp_path, ["pds0"]) as at:
        one = at.account(pds=0)
        planned(at.net, Fault("plc", "lying_pds", DOCUMENT, one.did, times=1))
        await at.node.backfill.add([one.did])
        await at.node.until(lambda: at.equal(one))
        assert at.net.faults.unfired() == []


@pytest.mark.parametrize("long", [True, False])
async def test_what_a_wrong_no_of_the_directory_refused_is_fetched(tmp_path: Path, long: bool) -> None:
    """With the next hint, or else when the directory is asked again."""
    kinds = ("status_404", "no_key", "malformed_key", "no_pds")
    async with scene(tmp_path, backfill={"retry_min": 0.05, "retry_max": 3600 if long else 0.2}) as at:
        accounts = {kind: at.account() for kind in kinds}
        await at.settled(*accounts.values())
        for kind, one in accounts.items():
            planned(at.net, Fault("plc", kind, DOCUMENT, one.did, times=2))
            at.rotate(one)
            at.post(one, 3)
        await at.node.until(lambda: not at.net.faults.unfired())
        await at.node.until(lambda: all(not at.row(one).work for one in accounts.values()))
        assert at.count("/reject/identity") > 0
        for number, one in enumerate(accounts.values() if long else ()):
            while not at.row(one).signing_key:
                at.net.publish(at.net.world.set_handle(one.did, f"h{at.net.relay.seq}-{number}.test"))
                await at.node.until(lambda: not at.row(one).work & Work.RESOLVE)  # noqa: B023
                await asyncio.sleep(0)
        await at.settled(*accounts.values())
