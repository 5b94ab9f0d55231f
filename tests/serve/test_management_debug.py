"""`/debug`: refused frames, and rows of keyspaces as they are stored."""

from __future__ import annotations

from pathlib import Path

from indexer.store.keyspaces import REPOS
from indexer.store.raw import RawRows
from indexer.store.transaction import Transaction
from tests.ingest.forge import Forge
from tests.serve.node import ALICE, BOB, POST, Node, fill, running


async def refuse(node: Node, count: int) -> bytes:
    """Some refused frames; the bytes of each."""
    data = Forge().posts(1).encode()

    def work(tx: Transaction) -> None:
        for number in range(count):
            tx.quarantine("ws://up", number, (ALICE, BOB)[number % 2], "signature", "why", data)

    await node.writer.run("refuse", work)
    return data


async def test_refused_frames_are_listed_shown_and_given_out(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        data = await refuse(node, 5)
        status, answer = await node.manage("GET", f"/debug/quarantine?did={ALICE}&limit=2")
        assert (status, [entry["id"] for entry in answer["entries"]]) == (200, [4, 2])
        query = f"?did={ALICE}&limit=2&cursor={answer['cursor']}"
        assert [
            entry["id"] for entry in (await node.manage("GET", f"/debug/quarantine{query}"))[1]["entries"]
        ] == [0]
        status, shown = await node.manage("GET", "/debug/quarantine/3")
        assert (shown["did"], shown["seq"], shown["frame"]["type"]) == (BOB, 3, "#commit")
        async with node.http.get(f"{node.management.url}/debug/quarantine/3?raw=true") as response:
            assert await response.read() == data
        for path in ("99", "x", "-1"):
            status, answer = await node.manage("GET", f"/debug/quarantine/{path}")
            assert status == (404 if path == "99" else 400)
        assert (await node.manage("GET", "/debug/quarantine?did=alice"))[0] == 400


async def test_rows_of_every_keyspace_are_listed_in_pages(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/{name}" for name in "abc"])
        await fill(node, BOB, [f"{POST}/d"])
        status, page = await node.manage("GET", f"/debug/iter?keyspace=records&prefix={ALICE}&limit=2")
        assert (status, len(page["rows"])) == (200, 2)
        assert f"{POST}/a" in page["rows"][0]["row"]
        query = f"?keyspace=records&prefix={ALICE}&limit=2&cursor={page['cursor']}"
        status, rest = await node.manage("GET", f"/debug/iter{query}")
        assert [POST + "/c" in row["row"] for row in rest["rows"]] == [True]
        assert "cursor" not in rest
        for keyspace in ("repos", "events", "counts", "cursors", "blocks", "reflog"):
            assert (await node.manage("GET", f"/debug/iter?keyspace={keyspace}"))[1]["rows"]
        key = page["rows"][0]["key_hex"]
        assert (await node.manage("GET", f"/debug/get?keyspace=records&key_hex={key}"))[1] == page["rows"][0]
        assert (await node.manage("GET", f"/debug/get?keyspace=repos&key={ALICE}"))[0] == 200


async def test_a_damaged_row_is_shown_as_such(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await fill(node, ALICE, [f"{POST}/a"])
        RawRows(node.services.db).commit([(REPOS.name, BOB.encode(), b"\xc1nonsense")])
        _, answer = await node.manage("GET", f"/debug/get?keyspace=repos&key={BOB}")
        assert answer["problem"].startswith("does not decode")


async def test_what_is_wrong_with_a_question_is_named(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        for path, why in (
            ("/debug/iter", "keyspace"),
            ("/debug/iter?keyspace=none", "one of repos"),
            ("/debug/iter?keyspace=repos&limit=0", "limit"),
            ("/debug/iter?keyspace=repos&cursor=xyz", "hexadecimal"),
            ("/debug/iter?keyspace=repos&prefix=a&prefix_hex=61", "exclude"),
            ("/debug/get?keyspace=repos", "key or key_hex"),
            ("/debug/get?keyspace=repos&key=nobody", "no such row"),
        ):
            status, answer = await node.manage("GET", path)
            assert status in (400, 404)
            assert why in answer["message"]
