"""`/pds`, `getHostStatus` and `listHosts`: what is said of hosts, and what of that stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from indexer.store.codecs import NEW_REPO
from indexer.store.transaction import Transaction
from tests.serve.node import Node, running

PDS = "pds.example.com"
TIERS = {"tiers": ["trusted=16/200/0"], "rules": ["*.big.example=trusted"], "account_limit": 2}


async def live_at(node: Node, host: str, accounts: int) -> None:
    """Followed accounts on a host, counted."""

    def insert(tx: Transaction) -> None:
        for number in range(accounts):
            did = f"did:web:{host.replace(':', '-')}-{number}"
            tx.set_repo(did, NEW_REPO._replace(tracked=True, pds=f"https://{host}"))

    while not await node.writer.run("count", lambda tx: tx.count_homes(100)):
        pass
    await node.writer.run("insert", insert)


async def test_a_tier_is_assigned_before_every_rule_and_taken_back(tmp_path: Path) -> None:
    async with running(tmp_path, hosts=TIERS) as node:
        status, told = await node.manage("PUT", "/pds/tiers", json={"host": PDS, "tier": "trusted"})
        assert (status, told["host"], told["tier"], told["fetches"]) == (200, PDS, "trusted", 16)
        assert told["assigned"]
        _, listed = await node.manage("GET", "/pds/tiers")
        assert listed["assignments"] == [{"host": PDS, "tier": "trusted"}]
        assert listed["rate_tiers"] == (await node.manage("GET", "/pds/rate-tiers"))[1]
        assert listed["rate_tiers"]["trusted"] == {"fetches": 16, "requests_per_s": 200.0, "account_limit": 0}
        _, told = await node.manage("DELETE", f"/pds/tiers?host={PDS}")
        assert (told["tier"], told["assigned"]) == ("default", False)
        await node.manage("PUT", "/pds/tiers", json={"host": "a.big.example", "tier": "default"})
        _, told = await node.manage("DELETE", "/pds/tiers", json={"host": "a.big.example"})
        assert told["tier"] == "trusted"
        assert (await node.manage("GET", "/pds/tiers"))[1]["assignments"] == []


async def test_limits_of_a_host_stand_over_those_of_its_tier(tmp_path: Path) -> None:
    async with running(tmp_path, hosts=TIERS) as node:
        limits = {"fetches": 1, "requests_per_s": 0.5, "account_limit": 7}
        _, told = await node.manage("PUT", "/pds/limits", json={"host": PDS, **limits})
        assert {name: told[name] for name in limits} == limits
        _, told = await node.manage("PUT", "/pds/limits", json={"host": PDS, "fetches": None})
        assert (told["fetches"], told["requests_per_s"]) == (4, 0.5)
        _, told = await node.manage("DELETE", f"/pds/limits?host={PDS}")
        assert (told["requests_per_s"], told["account_limit"]) == (50.0, 2)


async def test_a_ban_is_listed_and_survives_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        assert (await node.manage("GET", "/pds/banned"))[1] == []
        status, told = await node.manage("PUT", "/pds/banned", json={"host": PDS.upper(), "note": "spam"})
        assert (status, told["status"], told["note"]) == (200, "banned", "spam")
        await node.manage("PUT", "/pds/tiers", json={"host": PDS, "tier": "trusted"})
    async with running(tmp_path) as node:
        assert (await node.manage("GET", "/pds/banned"))[1] == [PDS]
        assert (await node.xrpc("com.atproto.sync.getHostStatus", hostname=PDS)) == (
            200,
            {"hostname": PDS, "accountCount": 0, "status": "banned"},
        )
        _, told = await node.manage("DELETE", "/pds/banned", json={"host": PDS})
        assert (told["status"], told["tier"], told["note"]) == ("idle", "trusted", "")
        assert (await node.manage("GET", "/pds/banned"))[1] == []


@pytest.mark.parametrize(
    ("method", "path", "body", "named"),
    [
        ("PUT", "/pds/tiers", {"host": PDS, "tier": "gold"}, "no 'gold', only default, trusted"),
        ("PUT", "/pds/tiers", {"host": PDS}, "tier"),
        ("PUT", "/pds/tiers", {"tier": "trusted"}, "host"),
        ("PUT", "/pds/tiers", {"host": "not a host", "tier": "trusted"}, "is no host"),
        ("PUT", "/pds/tiers", {"host": PDS, "tier": "trusted", "x": 1}, "unknown field: x"),
        ("PUT", "/pds/limits", {"host": PDS}, "at least one of"),
        ("PUT", "/pds/limits", {"host": PDS, "fetches": 0}, "fetches must be a whole number from 1"),
        ("PUT", "/pds/limits", {"host": PDS, "fetches": 1.5}, "fetches must be a whole number"),
        ("PUT", "/pds/limits", {"host": PDS, "requests_per_s": "1"}, "requests_per_s must be a number"),
        ("PUT", "/pds/limits", {"host": PDS, "account_limit": True}, "account_limit must be"),
        ("PUT", "/pds/banned", {"host": PDS, "note": 7}, "note"),
        ("PUT", "/pds/banned", {"host": "a/b"}, "is no host"),
        ("DELETE", "/pds/banned", {}, "host"),
        ("GET", "/pds?status=tired", None, "status must be one of"),
        ("GET", "/pds?limit=0", None, "limit"),
    ],
)
async def test_what_is_wrong_is_named(tmp_path: Path, method: str, path: str, body: Any, named: str) -> None:
    async with running(tmp_path) as node:
        status, answer = await node.manage(method, path, **({} if body is None else {"json": body}))
        assert status == 400
        assert named in answer["message"]


async def test_words_on_hosts_are_bounded(tmp_path: Path) -> None:
    async with running(tmp_path, hosts={"max_decided": 2}) as node:
        for name in ("a.test", "b.test"):
            assert (await node.manage("PUT", "/pds/banned", json={"host": name}))[0] == 200
        status, answer = await node.manage("PUT", "/pds/banned", json={"host": "c.test"})
        assert (status, "hosts.max_decided" in answer["message"]) == (409, True)
        assert (await node.manage("PUT", "/pds/tiers", json={"host": "a.test", "tier": "trusted"}))[0] == 200
        await node.manage("DELETE", "/pds/banned", json={"host": "b.test"})
        assert (await node.manage("PUT", "/pds/banned", json={"host": "c.test"}))[0] == 200


async def test_hosts_are_listed_by_name_in_pages_with_their_accounts(tmp_path: Path) -> None:
    async with running(tmp_path, hosts=TIERS) as node:
        await live_at(node, "b.test", 3)
        await live_at(node, "d.test:8443", 1)
        for name in ("a.test", "c.test", "b.test"):
            await node.manage("PUT", "/pds/limits", json={"host": name, "fetches": 3})
        names, cursor = [], ""
        while True:
            _, page = await node.manage("GET", f"/pds?limit=2&cursor={cursor}")
            names += [(item["host"], item["accounts"], item["status"]) for item in page["hosts"]]
            if "cursor" not in page:
                break
            cursor = page["cursor"]
        assert names == [
            ("a.test", 0, "idle"), ("b.test", 3, "throttled"), ("c.test", 0, "idle"),
            ("d.test:8443", 1, "idle"),
        ]  # fmt: skip
        _, page = await node.manage("GET", "/pds?status=throttled&limit=1")
        assert [item["host"] for item in page["hosts"]] == ["b.test"]
        _, page = await node.manage("GET", "/pds?host=https://b.test/")
        assert [item["host"] for item in page["hosts"]] == ["b.test"]
        assert (await node.manage("GET", "/pds?host=z.test"))[0] == 404


async def test_the_protocols_lists_of_hosts(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await live_at(node, "b.test", 3)
        await node.writer.run("cursor", lambda tx: tx.set_cursor("upstream/pds::wss://b.test", 17))
        await node.manage("PUT", "/pds/banned", json={"host": "a.test"})
        status, page = await node.xrpc("com.atproto.sync.listHosts", limit=1)
        assert (status, page) == (
            200,
            {"hosts": [{"hostname": "a.test", "accountCount": 0, "status": "banned"}], "cursor": "a.test"},
        )
        _, page = await node.xrpc("com.atproto.sync.listHosts", cursor="a.test")
        assert page == {"hosts": [{"hostname": "b.test", "seq": 17, "accountCount": 3, "status": "idle"}]}
        status, answer = await node.xrpc("com.atproto.sync.getHostStatus", hostname="nobody.test")
        assert (status, answer["error"]) == (400, "HostNotFound")
        assert (await node.xrpc("com.atproto.sync.getHostStatus"))[0] == 400
        assert (await node.xrpc("com.atproto.sync.listHosts", limit=1001))[0] == 400
