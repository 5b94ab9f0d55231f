"""com.atproto.sync.*: CARs that verify, proofs, revs, statuses, lists."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import atproto  # type: ignore[import-untyped]
import pytest

from indexer.atproto import mst
from indexer.atproto.car import read_car
from indexer.atproto.cid import dag_cbor_cid, format_cid, parse_cid
from indexer.repo.walker import load_repo
from indexer.store.codecs import NEW_REPO, AccountStatus
from tests.serve.node import (
    ALICE,
    BOB,
    LIKE,
    POST,
    REV,
    fill,
    load_car,
    put,
    record_block,
    running,
    set_status,
)

GET_REPO = "com.atproto.sync.getRepo"
LIST_REPOS = "com.atproto.sync.listRepos"


@pytest.mark.parametrize("name", ["empty", "ten", "kilo"])
async def test_a_served_repository_equals_the_original(tmp_path: Path, name: str) -> None:
    async with running(tmp_path) as node:
        truth = await load_car(node, name)
        body = await node.car(GET_REPO, did=truth["did"])
        repo = load_repo(body, did=truth["did"], key=truth["signingKey"])
        assert format_cid(repo.commit_cid) == truth["commit"]
        assert format_cid(repo.commit.data) == truth["data"]
        assert {path: format_cid(cid) for path, cid, _ in repo.records} == truth["records"]


async def test_the_blocks_come_in_streamable_order(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        truth = await load_car(node, "ten")
        car = read_car(await node.car(GET_REPO, did=truth["did"]))
        order = list(car.blocks)
        assert order[0] == car.roots[0] == parse_cid(truth["commit"])
        records = [parse_cid(cid) for _, cid in sorted(truth["records"].items())]
        assert [cid for cid in order if cid in records] == list(dict.fromkeys(records))


async def test_the_sdk_reads_records_and_the_car(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        truth = await load_car(node, "kilo")
        did = truth["did"]
        path, cid = next(iter(truth["records"].items()))
        collection, _, rkey = path.partition("/")
        client = atproto.AsyncClient(node.public.url)
        record = await client.com.atproto.repo.get_record(
            {"repo": did, "collection": collection, "rkey": rkey}
        )
        assert record.cid == cid
        seen: set[str] = set()
        cursor = None
        while True:
            page = await client.com.atproto.repo.list_records(
                {"repo": did, "collection": collection, "limit": 100, "cursor": cursor}
            )
            seen |= {item.uri.removeprefix(f"at://{did}/") for item in page.records}
            cursor = page.cursor
            if cursor is None:
                break
        assert seen == {path for path in truth["records"] if path.startswith(f"{collection}/")}
        car = atproto.CAR.from_bytes(await client.com.atproto.sync.get_repo({"did": did}))
        assert str(car.root) == truth["commit"]
        assert set(truth["records"].values()) <= {str(link) for link in car.blocks}
        await client.request.close()


async def test_a_tree_is_built_once(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/{number}" for number in range(50)])
        first = await node.car(GET_REPO, did=ALICE)
        assert await node.car(GET_REPO, did=ALICE) == first
        assert node.public.xrpc.trees.built == 1


async def test_an_unchanged_repository_answers_304(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        url = f"{node.public.url}/xrpc/{GET_REPO}?did={ALICE}"
        async with node.http.get(url) as response:
            tag = response.headers["ETag"]
        async with node.http.get(url, headers={"If-None-Match": tag}) as response:
            assert response.status == 304


async def test_since_leaves_out_what_stood_then(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        later = "3jzfcijpj2z2b"
        await node.writer.run("later", lambda tx: put(tx, ALICE, f"{POST}/b", rev=later))
        await fill(node, ALICE, [], rev=later)
        old, new = (dag_cbor_cid(record_block(f"{POST}/{rkey}")) for rkey in "ab")
        diff = read_car(await node.car(GET_REPO, did=ALICE, since=REV))
        assert new in diff.blocks
        assert old not in diff.blocks
        assert mst.find(
            load_repo(await node.car(GET_REPO, did=ALICE)).commit.data, f"{POST}/b", diff.blocks.get
        )
        nothing = read_car(await node.car(GET_REPO, did=ALICE, since=later))
        assert list(nothing.blocks) == list(nothing.roots)


async def test_a_repository_that_cannot_prove_itself_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, xrpc={"rebuild_max_records": 2}) as node:
        await fill(node, ALICE, [f"{POST}/a"], complete=False)
        status, answer = await node.xrpc(GET_REPO, did=ALICE)
        assert (status, answer["error"]) == (400, "RepoIncomplete")
        await fill(node, BOB, [f"{POST}/a", f"{POST}/b", f"{POST}/c"])
        status, answer = await node.xrpc(GET_REPO, did=BOB)
        assert (status, answer["error"]) == (400, "RepoTooLarge")


async def test_an_index_that_contradicts_the_signed_root_is_never_served(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        await node.writer.run("stray", lambda tx: put(tx, ALICE, f"{POST}/b"))
        status, answer = await node.xrpc(GET_REPO, did=ALICE)
        assert (status, answer["error"]) == (500, "InternalServerError")


@pytest.mark.parametrize(("rkey", "present"), [("17", True), ("nothing", False)])
async def test_a_proof_shows_presence_and_absence(tmp_path: Path, rkey: str, present: bool) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/{number}" for number in range(60)])
        body = await node.car("com.atproto.sync.getRecord", did=ALICE, collection=POST, rkey=rkey)
        car = read_car(body)
        row = node.services.db.repo(ALICE)
        assert row is not None
        assert car.roots == (dag_cbor_cid(row.commit),)
        found = mst.find(row.data, f"{POST}/{rkey}", car.blocks.get)
        assert (found is not None) is present
        assert found is None or found in car.blocks


async def test_blocks_by_cid(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a", f"{POST}/b"])
        row = node.services.db.repo(ALICE)
        assert row is not None
        wanted = [dag_cbor_cid(row.commit), row.data, dag_cbor_cid(record_block(f"{POST}/a"))]
        cids = ",".join(format_cid(cid) for cid in wanted)
        assert (
            list(read_car(await node.car("com.atproto.sync.getBlocks", did=ALICE, cids=cids)).blocks)
            == wanted
        )
        missing = format_cid(dag_cbor_cid(b"\x60"))
        status, answer = await node.xrpc("com.atproto.sync.getBlocks", did=ALICE, cids=missing)
        assert (status, answer["error"]) == (400, "BlockNotFound")


async def test_commit_and_status(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        row = node.services.db.repo(ALICE)
        assert row is not None
        head = format_cid(dag_cbor_cid(row.commit))
        assert await node.xrpc("com.atproto.sync.getLatestCommit", did=ALICE) == (
            200,
            {"cid": head, "rev": REV},
        )
        status = "com.atproto.sync.getRepoStatus"
        assert await node.xrpc(status, did=ALICE) == (200, {"did": ALICE, "active": True, "rev": REV})
        await set_status(node, ALICE, AccountStatus.SUSPENDED)
        answer = {"did": ALICE, "active": False, "status": "suspended"}
        assert await node.xrpc(status, did=ALICE) == (200, answer)
        assert (await node.xrpc(status, did=BOB))[0] == 400


@pytest.mark.parametrize("count", [0, 1, 4, 5])
async def test_repositories_are_listed_page_by_page(tmp_path: Path, count: int) -> None:
    async with running(tmp_path) as node:
        dids = [f"did:plc:{letter * 24}" for letter in "cdefg"[:count]]
        for did in dids:
            await fill(node, did, [f"{LIKE}/a"])
        # One without a commit, in the middle, is passed over.
        await node.writer.run("bare", lambda tx: tx.set_repo("did:plc:" + "d" * 23 + "e", NEW_REPO))
        seen: list[str] = []
        cursor: dict[str, str] = {}
        for _ in range(count + 1):
            _, answer = await node.xrpc(LIST_REPOS, limit=2, **cursor)
            seen += [repo["did"] for repo in answer["repos"]]
            if "cursor" not in answer:
                break
            cursor = {"cursor": answer["cursor"]}
        assert seen == dids
        assert "cursor" not in answer


async def test_content_stops_when_the_account_does(tmp_path: Path) -> None:
    """A takedown in the middle of a CAR cuts it."""
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/{number:04}" for number in range(2000)])
        url = f"{node.public.url}/xrpc/{GET_REPO}?did={ALICE}"
        async with node.http.get(url) as response:
            await response.content.readexactly(100)
            await set_status(node, ALICE, AccountStatus.TAKENDOWN)
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
