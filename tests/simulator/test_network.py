from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.simulator.cbor import cid_text
from indexer.simulator.chooser import Rates
from tests.simulator import strict

SMALL = SimConfig(accounts=4, history_accounts=2, history_records=12, rate=0)
LIVELY = Rates(
    account=0.02, handle=0.03, status=0.06, delete=0.02, key=0.02, migrate=0.02, sync=0.02, batch=0.1
)


@asynccontextmanager
async def running(config: SimConfig = SMALL) -> AsyncIterator[tuple[SimulatedNetwork, aiohttp.ClientSession]]:
    network = SimulatedNetwork(config)
    await network.start()
    async with aiohttp.ClientSession() as session:
        try:
            yield network, session
        finally:
            await network.stop()


async def get(session: aiohttp.ClientSession, url: str, **query: str) -> tuple[int, Any]:
    async with session.get(url, params=query) as response:
        return response.status, await response.json(content_type=None)


async def act(session: aiohttp.ClientSession, network: SimulatedNetwork, action: str, **body: Any) -> Any:
    async with session.post(f"{network.control_url}/act", json={"action": action, **body}) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return answer


async def take(
    session: aiohttp.ClientSession, url: str, count: int, cursor: int | None = 0
) -> list[tuple[str, Any]]:
    """The first ``count`` messages of a stream; fewer when it closes."""
    query = "" if cursor is None else f"?cursor={cursor}"
    frames: list[tuple[str, Any]] = []
    async with session.ws_connect(
        f"{url}/xrpc/com.atproto.sync.subscribeRepos{query}", max_msg_size=0
    ) as socket:
        while len(frames) < count:
            message = await socket.receive()
            if message.type is not aiohttp.WSMsgType.BINARY:
                break
            frames.append(strict.split_frame(message.data))
    return frames


async def test_the_relay_replays_everything_under_rising_seqs() -> None:
    async with running() as (network, session):
        await act(session, network, "steps", count=40)
        frames = await take(session, network.relay_url, network.relay.end)
        assert [payload["seq"] for _, payload in frames] == list(range(1, network.relay.seq + 1))
        assert sum(kind == "#commit" for kind, _ in frames) == network.commits
        middle = await take(session, network.relay_url, 3, cursor=20)
        assert middle == frames[20:23]


async def test_pds_streams_have_their_own_seqs_and_together_make_the_relays() -> None:
    async with running() as (network, session):
        await act(session, network, "steps", count=30)
        parts = [
            await take(session, url.replace("http", "ws"), lane.end)
            for url, lane in zip(network.pds_urls, network.pds_lanes, strict=True)
        ]
        for part in parts:
            assert [payload.pop("seq") for _, payload in part] == list(range(1, len(part) + 1))
        merged = await take(session, network.relay_url, network.relay.end)
        for _, payload in merged:
            del payload["seq"]
        assert len(merged) == sum(map(len, parts))
        assert all(frame in merged for part in parts for frame in part)


async def test_a_tail_begins_with_what_comes_next() -> None:
    async with running() as (network, session):
        tail = asyncio.create_task(take(session, network.relay_url, 2, cursor=None))
        before = network.relay.seq
        while not tail.done():  # the subscription may begin after some of these
            await act(session, network, "steps", count=1)
        assert (await tail)[0][1]["seq"] > before


async def test_cursor_in_the_future_is_refused_and_at_the_head_waits() -> None:
    async with running() as (network, session):
        future = await take(session, network.relay_url, 5, cursor=network.relay.seq + 1)
        assert [(kind, payload["error"]) for kind, payload in future] == [("error", "FutureCursor")]
        waiting = asyncio.create_task(take(session, network.relay_url, 1, cursor=network.relay.seq))
        seq = network.relay.seq
        await act(session, network, "steps", count=1)
        assert (await waiting)[0][1]["seq"] == seq + 1
        async with session.get(
            f"{network.pds_urls[0]}/xrpc/com.atproto.sync.subscribeRepos?cursor=x"
        ) as answer:
            assert answer.status == 400


async def test_a_cursor_below_the_window_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as (network, session):
        await act(session, network, "steps", count=10)
        monkeypatch.setattr(network.relay, "floor", lambda: 8)
        frames = await take(session, network.relay_url, 2, cursor=3)
        assert (frames[0][0], frames[0][1]["name"]) == ("#info", "OutdatedCursor")
        assert frames[1][1]["seq"] == 9
        (first,) = await take(session, network.relay_url, 1, cursor=0)
        assert first[1]["seq"] == 9


async def test_getrepo_through_the_relay_is_the_ledgers_repository() -> None:
    async with running() as (network, session):
        await act(session, network, "steps", count=60)
        ledger = (await get(session, f"{network.control_url}/ledger"))[1]
        relay = network.relay_url.replace("ws", "http", 1)
        checked = 0
        for did, entry in ledger["accounts"].items():
            if not (entry["active"] and entry["seen"]):
                continue
            async with session.get(f"{relay}/xrpc/com.atproto.sync.getRepo?did={did}") as response:
                assert response.status == 200
                root, blocks = strict.read_car(await response.read())
            commit = strict.decode(blocks[root])
            assert strict.signature_valid(commit, entry["signing_key"])
            data = commit["data"].set(base="base32")
            leaves = [item for item in strict.flatten(data, blocks) if isinstance(item, strict.Leaf)]
            found = {leaf.key.decode(): str(leaf.value.set(base="base32")) for leaf in leaves}
            assert found == entry["records"]
            assert (str(root), str(data), commit["rev"]) == (entry["commit"], entry["data"], entry["rev"])
            assert all(leaf.value.set(base="base32") in blocks for leaf in leaves)
            checked += 1
        assert checked >= 4


async def test_blocks_are_served_by_their_cids_all_or_none() -> None:
    async with running() as (network, session):
        account = next(iter(network.world.accounts.values()))
        url = f"{network.pds_urls[account.pds]}/xrpc/com.atproto.sync.getBlocks"
        truth = {cid_text(cid): block for cid, block in account.blocks()}
        chosen = list(truth)[1::3]
        query = [("did", account.did), *(("cids", cid) for cid in chosen)]
        async with session.get(url, params=query) as response:
            roots, blocks = strict.read_blocks(await response.read())
            assert (response.status, roots) == (200, [])
            assert {str(cid): block for cid, block in blocks.items()} == {cid: truth[cid] for cid in chosen}
        absent = cid_text(b"\x01\x71\x12\x20" + bytes(32))
        for wrong, name in ((absent, "BlockNotFound"), ("b!!", "InvalidRequest")):
            async with session.get(url, params=[*query, ("cids", wrong)]) as response:
                assert (response.status, (await response.json())["error"]) == (400, name)


async def test_values_of_the_ledger_are_what_getrecord_shows() -> None:
    async with running() as (network, session):
        await act(session, network, "steps", count=20)
        ledger = (await get(session, f"{network.control_url}/ledger", values="1"))[1]
        did, entry = next(
            (did, e) for did, e in ledger["accounts"].items() if e["active"] and len(e["records"]) > 10
        )
        for path, value in entry["values"].items():
            collection, _, rkey = path.partition("/")
            query = {"repo": did, "collection": collection, "rkey": rkey}
            status, answer = await get(session, f"{entry['pds']}/xrpc/com.atproto.repo.getRecord", **query)
            assert (status, answer) == (
                200,
                {"uri": f"at://{did}/{path}", "cid": entry["records"][path], "value": value},
            )


async def test_listrecords_pages_without_loss() -> None:
    async with running() as (network, session):
        did = (await act(session, network, "create_account", records=60))["did"]
        account = network.world.accounts[did]
        url = f"{network.pds_urls[account.pds]}/xrpc/com.atproto.repo.listRecords"
        for reverse in ("false", "true"):
            found: list[str] = []
            cursor: dict[str, str] = {}
            while True:
                query = {
                    "repo": did,
                    "collection": "app.bsky.feed.like",
                    "limit": "7",
                    "reverse": reverse,
                    **cursor,
                }
                page = (await get(session, url, **query))[1]
                found += [item["uri"].rpartition("/")[2] for item in page["records"]]
                if "cursor" not in page:
                    break
                cursor = {"cursor": page["cursor"]}
            stored = [
                path.partition("/")[2] for path in account.records if path.startswith("app.bsky.feed.like/")
            ]
            assert found == sorted(stored, reverse=reverse == "false")


async def test_accounts_that_left_are_refused_by_name_until_they_return() -> None:
    async with running() as (network, session):
        did = next(did for did, account in network.world.accounts.items() if account.seen)
        entry = network.ledger(values=False)["accounts"][did]
        fetch = f"{entry['pds']}/xrpc/com.atproto.sync.getRepo"
        status_url = f"{entry['pds']}/xrpc/com.atproto.sync.getRepoStatus"
        for status, error in (
            ("takendown", "RepoTakendown"),
            ("suspended", "RepoSuspended"),
            ("deactivated", "RepoDeactivated"),
        ):
            await act(session, network, "set_status", did=did, status=status)
            code, body = await get(session, fetch, did=did)
            assert (code, body["error"]) == (400, error)
            assert (await get(session, status_url, did=did))[1] == {
                "did": did,
                "active": False,
                "status": status,
            }
            await act(session, network, "set_status", did=did, status="active")
        assert (await get(session, status_url, did=did))[1] == {
            "did": did,
            "active": True,
            "rev": entry["rev"],
        }
        await act(session, network, "set_status", did=did, status="deleted", tombstone=True)
        assert (await get(session, fetch, did=did))[1]["error"] == "RepoNotFound"
        assert (await get(session, f"{network.plc_url}/{did}"))[0] == 410


async def test_the_directory_follows_handles_keys_and_hosts() -> None:
    async with running() as (network, session):
        did = (await act(session, network, "create_account", handle="new.person.test", pds=0))["did"]
        old = (await get(session, f"{network.plc_url}/{did}"))[1]
        await act(session, network, "set_handle", did=did, handle="other.person.test")
        await act(session, network, "migrate", did=did, pds=1)
        new = (await get(session, f"{network.plc_url}/{did}"))[1]
        assert (old["alsoKnownAs"], new["alsoKnownAs"]) == (
            ["at://new.person.test"],
            ["at://other.person.test"],
        )
        assert [doc["service"][0]["serviceEndpoint"] for doc in (old, new)] == network.pds_urls
        keys = [doc["verificationMethod"][0]["publicKeyMultibase"] for doc in (old, new)]
        assert keys[0] != keys[1]
        assert "did:key:" + keys[1] == network.ledger(values=False)["accounts"][did]["signing_key"]
        well_known = f"{network.pds_urls[0]}/.well-known/atproto-did"
        async with session.get(well_known, headers={"Host": "other.person.test"}) as response:
            assert await response.text() == did
        assert (await get(session, f"{network.plc_url}/did:plc:{'a' * 24}"))[0] == 404


async def test_history_accounts_are_unseen_until_their_first_commit() -> None:
    async with running() as (network, session):
        ledger = network.ledger(values=False)["accounts"]
        assert sorted(entry["seen"] for entry in ledger.values()) == [False, False, True, True, True, True]
        assert {len(entry["records"]) for entry in ledger.values() if not entry["seen"]} == {12}
        relay = network.relay_url.replace("ws", "http", 1)
        assert len((await get(session, f"{relay}/xrpc/com.atproto.sync.listRepos"))[1]["repos"]) == 4
        await act(session, network, "steps", count=120)
        assert all(entry["seen"] for entry in network.ledger(values=False)["accounts"].values())


async def test_listrepos_of_all_pdses_pages_through_everyone() -> None:
    async with running() as (network, session):
        found: list[str] = []
        for url in network.pds_urls:
            cursor: dict[str, str] = {}
            while True:
                page = (await get(session, f"{url}/xrpc/com.atproto.sync.listRepos", limit="2", **cursor))[1]
                found += [repo["did"] for repo in page["repos"]]
                if "cursor" not in page:
                    break
                cursor = {"cursor": page["cursor"]}
        assert sorted(found) == sorted(network.world.accounts)


async def test_the_relay_lists_by_collection_and_its_hosts_and_a_pds_describes() -> None:
    async with running() as (network, session):
        relay = network.relay_url.replace("ws", "http", 1) + "/xrpc/com.atproto.sync"
        did = next(iter(network.world.active)).did
        op = {"action": "create", "collection": "a.b.rare", "rkey": "k", "value": {"n": 1}}
        await act(session, network, "ops", did=did, ops=[op])
        found = await get(session, f"{relay}.listReposByCollection", collection="a.b.rare")
        assert found == (200, {"repos": [{"did": did}]})
        assert (await get(session, f"{relay}.listReposByCollection"))[0] == 400
        hosts: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            page = (await get(session, f"{relay}.listHosts", limit="1", **cursor))[1]
            hosts += [f"http://{host['hostname']}" for host in page["hosts"]]
            if "cursor" not in page:
                break
            cursor = {"cursor": page["cursor"]}
        assert hosts == network.pds_urls
        pds = network.pds_urls[network.world.accounts[did].pds]
        status, told = await get(session, f"{pds}/xrpc/com.atproto.repo.describeRepo", repo=did)
        assert (status, told["did"], "a.b.rare" in told["collections"]) == (200, did, True)


async def test_ops_by_request_and_what_cannot_be_done() -> None:
    async with running() as (network, session):
        did = next(iter(network.world.active)).did
        value = {"bytes": {"$bytes": "AAEC"}, "n": 7}
        ops = [{"action": "create", "collection": "a.b.c", "rkey": "k", "value": value}]
        made = await act(session, network, "ops", did=did, ops=ops)
        assert made["paths"] == ["a.b.c/k"]
        entry = network.ledger(values=True)["accounts"][did]
        assert entry["values"]["a.b.c/k"] == {"$type": "a.b.c", **value}
        assert (entry["rev"], entry["commit"]) == (made["rev"], made["commit"])
        refused: list[Any] = [
            {"action": "ops", "did": did, "ops": ops},
            {"action": "dance"},
            {"action": "ops"},
            [],
            {"action": "sync", "did": "x"},
        ]
        for body in refused:
            async with session.post(f"{network.control_url}/act", json=body) as response:
                assert (response.status, (await response.json())["error"]) == (400, "InvalidRequest")


async def test_pause_is_quiet_and_the_generator_stops_at_its_number() -> None:
    config = SimConfig(accounts=3, history_accounts=0, rate=5000, commits=400)
    async with running(config) as (network, session):
        await take(session, network.relay_url, 30)
        async with session.post(f"{network.control_url}/pause") as response:
            seq = (await response.json())["seq"]
        for _ in range(20):
            await asyncio.sleep(0)
        assert (await get(session, f"{network.control_url}/state"))[1]["seq"] == seq
        async with session.post(f"{network.control_url}/resume") as response:
            assert response.status == 200
        commits = 0
        async with session.ws_connect(
            f"{network.relay_url}/xrpc/com.atproto.sync.subscribeRepos?cursor=0"
        ) as socket:
            while commits < 400:
                commits += strict.split_frame((await socket.receive()).data)[0] == "#commit"
        assert (network.finished(), network.commits, network.failure()) == (True, 400, None)


async def test_a_restart_on_its_state_goes_on_where_it_was(tmp_path: Path) -> None:
    config = SimConfig(
        accounts=4, history_accounts=2, history_records=12, rate=0, state=tmp_path, rates=LIVELY
    )
    async with running(config) as (network, session):
        await act(session, network, "steps", count=120)
        before = network.ledger(values=True)
        frames = await take(session, network.relay_url, network.relay.end)
        ports = (network.plc_url, network.relay_url, network.pds_urls, network.control_url)
    with (tmp_path / "journal.000000").open("ab") as file:
        file.write(b"\x00\x00\x01\x00torn")
    async with running(config) as (network, session):
        assert (network.plc_url, network.relay_url, network.pds_urls, network.control_url) == ports
        assert network.ledger(values=True) == before
        assert await take(session, network.relay_url, network.relay.end) == frames
        assert [lane.seq for lane in network.pds_lanes] == [lane.end for lane in network.pds_lanes]
        await act(session, network, "steps", count=30)
        (following,) = await take(session, network.relay_url, 1, cursor=len(frames))
        assert following[1]["seq"] == len(frames) + 1
        assert network.commits > before["commits"]


async def test_a_start_that_was_killed_half_way_makes_the_missing_accounts(tmp_path: Path) -> None:
    config = SimConfig(accounts=4, history_accounts=2, history_records=12, rate=0, state=tmp_path)
    whole = SimulatedNetwork(config)
    await whole.stop()  # never started: as if killed before its servers stood
    file = tmp_path / "journal.000000"
    file.write_bytes(file.read_bytes()[:-2000])
    async with running(config) as (network, _):
        assert sorted(network.world.accounts) == sorted(whole.world.accounts)
