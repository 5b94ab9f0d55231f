"""The demo's subscriber notices every broken promise of the stream."""

from __future__ import annotations

from typing import Any

from indexer.commands.demo.reader import CheckingReader, Fold

DID = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"


def _record(event_id: int, action: str, rkey: str, rev: str, cid: str | None = "bafy1") -> dict[str, Any]:
    record = {"live": True, "did": DID, "rev": rev, "collection": "a.b.c", "rkey": rkey, "action": action}
    return {"id": event_id, "type": "record", "record": record | ({"cid": cid} if cid else {})}


def _ledger(records: dict[str, str], status: str = "active") -> dict[str, Any]:
    return {"accounts": {DID: {"status": status, "records": records}}}


def _reader(base: Fold | None, *messages: dict[str, Any]) -> CheckingReader:
    reader = CheckingReader("ws://unused", 0, base)
    for message in messages:
        reader.take(message)
    return reader


def test_a_true_stream_folds_to_the_ledger() -> None:
    reader = _reader(
        {},
        _record(1, "create", "x", "r1"),
        _record(2, "create", "y", "r1", "bafy2"),
        _record(3, "update", "x", "r2", "bafy3"),
        _record(4, "delete", "y", "r3", None),
    )
    assert reader.differences(_ledger({"a.b.c/x": "bafy3"})) == []
    assert reader.next_id == 5


def test_a_lost_event_shows_as_a_difference() -> None:
    reader = _reader({}, _record(1, "create", "x", "r1"))
    assert len(reader.differences(_ledger({"a.b.c/x": "bafy1", "a.b.c/y": "bafy2"}))) == 1


def test_doubled_and_reordered_events_are_faults() -> None:
    create, update = _record(1, "create", "x", "r1"), _record(2, "update", "x", "r2")
    assert "came twice" in _reader({}, create, create | {"id": 2}).faults[0]
    assert "came after" in _reader(None, update | {"id": 5}, create).faults[0]


def test_an_update_of_what_was_never_created_is_a_fault() -> None:
    assert "was not" in _reader({}, _record(1, "update", "x", "r1")).faults[0]
    assert _reader(None, _record(1, "update", "x", "r1")).faults == []
    assert _reader({DID: {"a.b.c/x": "bafy0"}}, _record(1, "update", "x", "r1")).faults == []


def test_a_pruned_cursor_is_a_fault_and_moves_the_reader_on() -> None:
    reader = _reader({}, {"type": "info", "name": "OutdatedCursor", "id": 40})
    assert reader.next_id == 40
    assert "pruned" in reader.faults[0]


def test_a_deleted_account_takes_its_records_out_of_the_fold() -> None:
    gone = {"id": 2, "type": "account", "account": {"did": DID, "active": False, "status": "deleted"}}
    reader = _reader({}, _record(1, "create", "x", "r1"), gone)
    assert reader.differences(_ledger({}, "deleted")) == []


def test_an_account_that_stayed_hidden_owes_the_log_nothing() -> None:
    assert _reader({}).differences(_ledger({"a.b.c/x": "bafy1"}, "takendown")) == []
    assert len(_reader({}).differences(_ledger({"a.b.c/x": "bafy1"}))) == 1
