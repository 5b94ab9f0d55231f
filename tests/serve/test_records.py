"""com.atproto.repo.*: records by name, pages, statuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from indexer.atproto.cid import dag_cbor_cid, format_cid
from indexer.store.codecs import INVALID, AccountStatus, SyncState
from tests.serve.node import ALICE, LIKE, POST, Node, fill, put, running, set_status

GET = "com.atproto.repo.getRecord"
LIST = "com.atproto.repo.listRecords"


async def _pages(node: Node, **params: Any) -> list[list[str]]:
    """Record keys page by page, following cursors."""
    pages: list[list[str]] = []
    cursor: dict[str, str] = {}
    while True:
        status, answer = await node.xrpc(LIST, repo=ALICE, collection=POST, **params, **cursor)
        assert status == 200, answer
        pages.append([record["uri"].rpartition("/")[2] for record in answer["records"]])
        if "cursor" not in answer:
            return pages
        cursor = {"cursor": answer["cursor"]}


async def test_a_record_is_found_by_did_and_by_handle(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        node.resolver.handles["alice.test"] = ALICE
        status, by_did = await node.xrpc(GET, repo=ALICE, collection=POST, rkey="a")
        assert status == 200
        assert by_did["uri"] == f"at://{ALICE}/{POST}/a"
        assert by_did["value"]["text"] == f"{POST}/a"
        assert await node.xrpc(GET, repo="alice.test", collection=POST, rkey="a") == (200, by_did)
        cid = by_did["cid"]
        assert (await node.xrpc(GET, repo=ALICE, collection=POST, rkey="a", cid=cid))[0] == 200
        other = cid[:-2] + ("aa" if not cid.endswith("aa") else "ba")
        status, error = await node.xrpc(GET, repo=ALICE, collection=POST, rkey="a", cid=other)
        assert (status, error["error"]) in ((400, "RecordNotFound"), (400, "InvalidRequest"))


async def test_an_unchanged_record_answers_304(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        url = f"{node.public.url}/xrpc/{GET}?repo={ALICE}&collection={POST}&rkey=a"
        async with node.http.get(url) as response:
            tag = response.headers["ETag"]
            assert response.headers["Access-Control-Allow-Origin"] == "*"
        async with node.http.get(url, headers={"If-None-Match": tag}) as response:
            assert (response.status, await response.read()) == (304, b"")
        async with node.http.get(url, headers={"If-None-Match": '"other"'}) as response:
            assert response.status == 200


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
async def test_pages_lose_and_repeat_nothing(tmp_path: Path, count: int) -> None:
    async with running(tmp_path) as node:
        rkeys = [f"k{number}" for number in range(count)]
        paths = [f"{POST}/{rkey}" for rkey in rkeys]
        # Neighbours in key order that must not leak into the page.
        await fill(node, ALICE, [f"{LIKE}/z", *paths, f"{POST}gate/a"])
        pages = await _pages(node, limit=2)
        assert [rkey for page in pages for rkey in page] == rkeys[::-1]
        assert len(pages) == max(1, (count + 1) // 2), "no cursor on the last page"
        oldest_first = await _pages(node, limit=2, reverse="true")
        assert [rkey for page in oldest_first for rkey in page] == rkeys


async def test_flagged_records_are_not_served(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a", f"{POST}/c"])
        await node.writer.run("flag", lambda tx: put(tx, ALICE, f"{POST}/b", flags=INVALID))
        status, answer = await node.xrpc(GET, repo=ALICE, collection=POST, rkey="b")
        assert (status, answer["error"]) == (400, "RecordNotFound")
        assert await _pages(node, limit=1) == [["c"], ["a"]]


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (AccountStatus.TAKENDOWN, "RepoTakendown"),
        (AccountStatus.SUSPENDED, "RepoSuspended"),
        (AccountStatus.DEACTIVATED, "RepoDeactivated"),
        (AccountStatus.DELETED, "RepoNotFound"),
        (AccountStatus.UNKNOWN, "RepoDeactivated"),
    ],
)
async def test_inactive_accounts_are_refused_everywhere(
    tmp_path: Path, status: AccountStatus, name: str
) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        await set_status(node, ALICE, status)
        queries: list[tuple[str, dict[str, str]]] = [
            (GET, {"repo": ALICE, "collection": POST, "rkey": "a"}),
            (LIST, {"repo": ALICE, "collection": POST}),
            ("com.atproto.repo.describeRepo", {"repo": ALICE}),
            ("com.atproto.sync.getRepo", {"did": ALICE}),
            ("com.atproto.sync.getRecord", {"did": ALICE, "collection": POST, "rkey": "a"}),
            ("com.atproto.sync.getLatestCommit", {"did": ALICE}),
        ]
        for method, params in queries:
            code, answer = await node.xrpc(method, **params)
            assert (code, answer["error"]) == (400, name), method


async def test_an_account_that_no_directory_ever_knew_is_not_found_by_any_query(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        heard = {"rev": "", "commit": b"", "data": b"", "complete": False, "state": SyncState.PENDING}
        await fill(node, ALICE, [], **heard)
        path = {"collection": POST, "rkey": "a"}
        queries: list[tuple[str, dict[str, str]]] = [
            (GET, {"repo": ALICE, **path}),
            (LIST, {"repo": ALICE, "collection": POST}),
            ("com.atproto.repo.describeRepo", {"repo": ALICE}),
            ("com.atproto.sync.getRepo", {"did": ALICE}),
            ("com.atproto.sync.getRecord", {"did": ALICE, **path}),
            ("com.atproto.sync.getBlocks", {"did": ALICE, "cids": format_cid(dag_cbor_cid(b"\xa0"))}),
            ("com.atproto.sync.getLatestCommit", {"did": ALICE}),
            ("com.atproto.sync.getRepoStatus", {"did": ALICE}),
        ]
        for method, params in queries:
            code, answer = await node.xrpc(method, **params)
            assert (code, answer["error"]) == (400, "RepoNotFound"), method
        await fill(node, ALICE, [], **heard, signing_key="did:key:zQ3")  # its directory knows it
        assert await node.xrpc(LIST, repo=ALICE, collection=POST) == (200, {"records": []})


async def test_an_unknown_repository_is_not_found(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        status, answer = await node.xrpc(GET, repo=ALICE, collection=POST, rkey="a")
        assert (status, answer["error"]) == (400, "RepoNotFound")
        status, answer = await node.xrpc(GET, repo="nobody.test", collection=POST, rkey="a")
        assert (status, answer["error"]) == (400, "HandleNotFound")


_BAD_PARAMETERS = [
    ({"collection": POST, "rkey": "a"}, "repo"),
    ({"repo": ALICE, "rkey": "a"}, "collection"),
    ({"repo": ALICE, "collection": "nope", "rkey": "a"}, "collection"),
    ({"repo": ALICE, "collection": POST, "rkey": "a/b"}, "rkey"),
    ({"repo": "did:plc:", "collection": POST, "rkey": "a"}, "repo"),
    ({"repo": ALICE, "collection": POST, "rkey": "a", "cid": "x"}, "cid"),
]


async def test_a_bad_parameter_is_named(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        for params, named in _BAD_PARAMETERS:
            status, answer = await node.xrpc(GET, **params)
            assert (status, answer["error"]) == (400, "InvalidRequest")
            assert f"parameter {named}" in answer["message"]


_BAD_LIMITS = ["0", "101", "-1", "x", "٣", "9" * 30]


async def test_a_limit_out_of_range_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        for limit in _BAD_LIMITS:
            status, answer = await node.xrpc(LIST, repo=ALICE, collection=POST, limit=limit)
            assert (status, answer["error"]) == (400, "InvalidRequest")
            assert "parameter limit" in answer["message"]


async def test_a_repository_describes_itself(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a", f"{LIKE}/b"], handle="alice.test", pds="https://pds.test")
        node.resolver.handles["alice.test"] = ALICE
        status, answer = await node.xrpc("com.atproto.repo.describeRepo", repo=ALICE)
        assert status == 200
        assert answer["handle"] == "alice.test"
        assert answer["handleIsCorrect"] is True
        assert answer["collections"] == [LIKE, POST]
        assert answer["didDoc"]["service"][0]["serviceEndpoint"] == "https://pds.test"


@pytest.mark.parametrize("mode", [{"ephemeral": {"enabled": True}}, {"store": {"blocks": False}}])
async def test_modes_without_content_answer_501(tmp_path: Path, mode: dict[str, dict[str, bool]]) -> None:
    async with running(tmp_path, **mode) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        status, answer = await node.xrpc(GET, repo=ALICE, collection=POST, rkey="a")
        assert (status, answer["error"]) == (501, "MethodNotImplemented")
