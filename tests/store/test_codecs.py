"""Keys keep their order as bytes, rows survive the round trip."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.store import codecs
from indexer.store.codecs import Codec
from indexer.store.keyspaces import KEYSPACES, PENDING, RECORDS, RESYNC_BUFFER

DIDS = st.text("abcdefg:.-%", min_size=1, max_size=20).map("did:web:{}".format)
PATHS = st.text("abcABC.:_~-09/", min_size=3, max_size=30)
CIDS = st.binary(min_size=36, max_size=36)
U64 = st.integers(0, codecs.U64_MAX)


def test_the_table_names_every_keyspace_once() -> None:
    assert list(KEYSPACES) == [keyspace.name for keyspace in KEYSPACES.values()]
    assert {"repos", "records", "blocks", "block_refs", "reflog", "gc_queue", "events"} <= set(KEYSPACES)


@given(st.lists(st.tuples(DIDS, PATHS), max_size=20))
def test_record_keys_sort_as_did_then_path(keys: list[tuple[str, str]]) -> None:
    encoded = [RECORDS.key.encode(key) for key in keys]
    assert sorted(encoded) == [RECORDS.key.encode(key) for key in sorted(keys)]
    assert [RECORDS.key.decode(raw) for raw in encoded] == keys


@given(st.lists(st.tuples(U64, DIDS), max_size=20))
def test_pending_keys_sort_by_due_time(keys: list[tuple[int, str]]) -> None:
    assert sorted(map(PENDING.key.encode, keys)) == [PENDING.key.encode(key) for key in sorted(keys)]


def test_waiting_frames_sort_by_rev_then_commits_before_syncs() -> None:
    keys: list[Any] = [
        ("did:a", "3ka", "commit", "b"), ("did:a", "3ka", "sync", "a"), ("did:a", "3kb", "commit", "a"),
    ]  # fmt: skip
    encoded = [RESYNC_BUFFER.key.encode(key) for key in keys]
    assert encoded == sorted(encoded)
    assert [RESYNC_BUFFER.key.decode(raw) for raw in encoded] == keys


@given(DIDS, CIDS)
def test_all_keys_of_a_repository_lie_in_its_range(did: str, cid: bytes) -> None:
    start, stop = codecs.did_range(did)
    assert start <= codecs.encode_cid_key((did, cid)) < stop
    assert not start <= codecs.encode_cid_key((did + "a", cid)) < stop
    assert codecs.decode_cid_key(codecs.encode_cid_key((did, cid))) == (did, cid)


@given(CIDS, st.text("234567abc", max_size=13), st.integers(0, 3))
def test_record_rows_round_trip(cid: bytes, rev: str, flags: int) -> None:
    row = codecs.RecordRow(cid, rev, flags)
    assert codecs.decode_record(codecs.encode_record(row)) == row


def test_repo_rows_round_trip_with_their_types() -> None:
    row = codecs.NEW_REPO._replace(
        state=codecs.SyncState.DESYNCHRONIZED, status=codecs.AccountStatus.TAKENDOWN, commit=b"\x00\xff",
        work=codecs.Work.RESOLVE | codecs.Work.PURGE, due=2**60, epoch=7,
    )  # fmt: skip
    decoded = codecs.decode_repo(codecs.encode_repo(row))
    assert decoded == row
    assert decoded.state.label == "desynchronized"
    assert not decoded.status.active


@given(
    st.sampled_from(codecs.KINDS),
    st.booleans(),
    U64,
    DIDS,
    st.integers(0, 9),
    st.sampled_from(codecs.ACTIONS),
    CIDS,
)
def test_events_round_trip(
    kind: Any, live: bool, time: int, did: str, epoch: int, action: Any, cid: bytes
) -> None:
    if kind == "record":
        held = None if action == "delete" else cid
        event = codecs.Event(5, kind, live, time, did, epoch, "3k", "a.b.c", "self", action, held, {})
    else:
        event = codecs.Event(5, kind, live, time, did, epoch, "", "", "", "", None, {"active": True})
    assert codecs.decode_event(5, codecs.encode_event(event)) == event


def test_reference_changes_round_trip() -> None:
    raw = codecs.encode_reflog({("did:a", 0): {b"x" * 36: 2, b"y" * 36: 0}, ("did:a", 1): {b"x" * 36: -1}})
    assert codecs.decode_reflog(raw) == [
        ("did:a", 0, {b"x" * 36: 2, b"y" * 36: 0}), ("did:a", 1, {b"x" * 36: -1}),
    ]  # fmt: skip


@pytest.mark.parametrize(("prefix", "end"), [(b"a", b"b"), (b"a\xff", b"b"), (b"\xff", None), (b"", None)])
def test_the_end_of_a_prefix(prefix: bytes, end: bytes | None) -> None:
    assert codecs.after_prefix(prefix) == end


def test_a_codec_is_a_pair() -> None:
    assert Codec(str.encode, bytes.decode).decode(b"x") == "x"
