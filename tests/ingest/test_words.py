"""What hosts say beside commits, as steps on the writer: words on accounts, hints, types unknown to us."""

from __future__ import annotations

from pathlib import Path

from indexer.atproto.frames import AccountFrame, IdentityFrame
from indexer.ingest.machine import Act
from indexer.ingest.newcomers import Result
from indexer.simulator.wire import frame
from indexer.store.codecs import AccountStatus, Work
from indexer.store.transaction import Transaction
from tests.ingest.test_pipeline import count, followed, holds, row_of, world

A, B, OLD_HOME = "ws://relay-a.test", "ws://relay-b.test", "pds::ws://old.test"


def word(seq: int, status: str | None, second: int, did: str = "did:plc:" + "a" * 24) -> AccountFrame:
    return AccountFrame(seq, did, f"2026-01-01T00:00:{second:02d}Z", status is None, status)


async def test_a_word_that_is_played_again_does_not_undo_a_newer_one(tmp_path: Path) -> None:
    async with followed(tmp_path) as (_net, node, forge):
        tell = node.ingest.applier.account
        back, gone = word(8, None, 20), word(5, "deactivated", 10)

        def step(tx: Transaction) -> list[Result]:
            return [tell(tx, A, gone), tell(tx, A, back), tell(tx, A, gone), tell(tx, A, back)]

        results = await node.writer.run("words", step)
        assert [(result.act, result.reason) for result in results] == [
            (Act.APPLY, "account"),
            (Act.APPLY, "account"),
            (Act.DROP, "stale_word"),
            (Act.DROP, "stale_word"),
        ]
        assert row_of(node, forge).status is AccountStatus.ACTIVE


async def test_an_old_word_under_a_new_number_has_the_pds_asked(tmp_path: Path) -> None:
    async with followed(tmp_path) as (net, node, forge):
        net.network.accounts[forge.did] = {"status": "deactivated"}
        tell = node.ingest.applier.account

        def step(tx: Transaction) -> None:
            tell(tx, A, word(5, "deactivated", 20))
            tell(tx, A, word(6, None, 10))  # from before it was deactivated

        await node.writer.run("words", step)
        await node.until(lambda: row_of(node, forge).work == 0)
        assert row_of(node, forge).status is AccountStatus.DEACTIVATED


async def test_two_relays_that_say_the_same_tell_the_log_once(tmp_path: Path) -> None:
    async with followed(tmp_path) as (net, node, forge):
        net.network.accounts[forge.did] = {"status": "takendown"}
        tell = node.ingest.applier.account

        def step(tx: Transaction) -> None:
            for status, seq in (("takendown", 5), (None, 6)):
                for source in (A, B):
                    tell(tx, source, word(seq, status, seq))

        await node.writer.run("words", step)
        active = [event.fields["active"] for event in node.events() if event.kind == "account"]
        assert active[:2] == [False, True]
        assert {(w.source, w.seq) for w in node.db.account_words(forge.did)} >= {(A, 6), (B, 6)}


async def test_the_old_host_s_word_after_a_migration_hides_nothing_and_has_the_directory_asked(
    tmp_path: Path,
) -> None:
    async with followed(tmp_path) as (_net, node, forge):
        said = word(9, "deactivated", 30)

        def step(tx: Transaction) -> tuple[Result, int]:
            result = node.ingest.applier.account(tx, OLD_HOME, said)
            row = tx.repo(forge.did)
            assert row is not None
            return result, row.work

        result, work = await node.writer.run("words", step)
        assert result == Result(Act.REJECT, "authority")
        assert work & Work.RESOLVE
        assert row_of(node, forge).status is AccountStatus.ACTIVE


async def test_a_hint_is_a_flag_in_the_row_so_that_a_kill_does_not_lose_it(tmp_path: Path) -> None:
    async with followed(tmp_path) as (_net, node, forge):
        hint = IdentityFrame(9, forge.did, "2026-01-01T00:00:00Z", "liar.test")

        def step(tx: Transaction) -> int:
            node.ingest.applier.identity(tx, A, hint)
            row = tx.repo(forge.did)
            assert row is not None
            return row.work

        assert await node.writer.run("hint", step) & Work.RESOLVE
        await node.until(lambda: holds(node, forge))
        assert row_of(node, forge).handle == "someone.test"


async def test_removed_and_unknown_types_are_counted_and_skipped(tmp_path: Path) -> None:
    async with world() as net, net.node(tmp_path) as node:
        forge = net.account()
        for kind in ("#handle", "#tombstone", "#migrate", "#new"):
            net.seq += 1
            net.send(frame(kind, {"did": forge.did, "time": "2026-01-01T00:00:00Z"}).numbered(net.seq))
        net.send(forge.parts())
        await node.until(lambda: holds(node, forge))
        assert count(node, "drop/unknown_type") == 4
        assert node.seqs() == [net.seq]
