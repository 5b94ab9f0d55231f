"""Lies in a message's own fields: rows 1 and 2 of the commit table, and what readers must skip.

Owns those kinds. The commits inside are sound and signed: only the message around them is not. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from indexer.simulator.cbor import RAW, Link, block_cid, encode
from indexer.simulator.draft import Draft
from indexer.simulator.lie_base import Kind, Tamper, beside, creates, instead
from indexer.simulator.wire import car

FIELDS = ("reject/fields",)
_REQUIRED = ("repo", "commit", "rev", "since", "blocks", "ops", "blobs", "time", "tooBig", "rebase")
_WRONG_TYPES: dict[str, Any] = {
    "repo": 7, "commit": "bafy", "rev": None, "since": 7, "blocks": "text", "ops": {}, "blobs": None,
    "time": 7, "tooBig": 0, "rebase": None, "prevData": "bafy",
}  # fmt: skip
_BAD_SYNTAX: dict[str, tuple[Any, ...]] = {
    "repo": ("did:", "did:plc:UPPER%", "at://did:plc:abc", "did:plc:" + "a" * 2048),
    "rev": ("", "3jzfcijpj2z2", "3jzfcijpj2z2aa", "zzzzzzzzzzzzz", "3JZFCIJPJ2Z2A"),
    "since": ("", "0000000000000", "now"),
    "time": (
        "",
        "2026-01-01",
        "2026-13-01T00:00:00Z",
        "2026-01-01T00:00:00",
        "1985-04-12T23:20:50.123-00:00",
    ),
}
_BAD_PATHS = (
    "", "app.bsky.feed.post", "app.bsky.feed.post/", "/3jzfcijpj2z2a", "app.bsky.feed.post/a/b",
    "app.bsky.feed.post/.", "app.bsky.feed.post/..", "post/3jzfcijpj2z2a", "app.bsky.feed.post/a b",
    "app.bsky.feed.post/" + "a" * 513, "app..post/a",
)  # fmt: skip
_BAD_OPS: tuple[dict[str, Any], ...] = (
    {"cid": "bafy"}, {"cid": 7}, {"prev": "bafy"}, {"action": 1}, {"path": 7}, {"path": None},
)  # fmt: skip


def fields(make: Callable[[Random], dict[str, Any]]) -> Tamper:
    """Other values for some of the message's fields."""

    def tamper(draft: Draft, rng: Random) -> None:
        draft.payload |= make(rng)

    return tamper


def _one_of(table: dict[str, Any]) -> Callable[[Random], dict[str, Any]]:
    def make(rng: Random) -> dict[str, Any]:
        name = rng.choice(sorted(table))
        value = table[name]
        return {name: rng.choice(value) if isinstance(value, tuple) else value}

    return make


def _missing(draft: Draft, rng: Random) -> None:
    name = rng.choice(_REQUIRED)
    draft.drop = (name,)
    draft.payload.setdefault(name, None)


def _only(name: str) -> Tamper:
    return fields(lambda rng: {name: rng.choice(_BAD_SYNTAX[name])})


def _op(make: Callable[[Random], dict[str, Any]], drop: str = "") -> Tamper:
    def tamper(draft: Draft, rng: Random) -> None:
        draft.ops[0] |= make(rng)
        draft.ops[0].pop(drop, None)

    return tamper


def _too_many_ops(draft: Draft, rng: Random) -> None:
    draft.ops = [draft.ops[0] | {"path": f"{draft.ops[0]['path'][:-2]}{n:03d}"} for n in range(201)]


def _padded(size: int) -> Tamper:
    """Blocks that nothing links to, so many bytes of them."""

    def tamper(draft: Draft, rng: Random) -> None:
        draft.payload["blocks"] = padded(draft, rng, size)

    return tamper


def padded(draft: Draft, rng: Random, size: int) -> bytes:
    padding = [encode({"pad": rng.randbytes(min(size, 900_000))}) for _ in range(-(-size // 900_000))]
    return car(draft.commit_cid, [*draft.sections, *((block_cid(block), block) for block in padding)])


def _nothing(draft: Draft, rng: Random) -> None:
    """The truth."""


def kinds() -> Iterator[Kind]:
    one = "1"
    yield Kind("field_missing", one, "a required field is absent", FIELDS, beside(_missing))
    yield Kind(
        "field_type", one, "a field has a wrong CBOR type", FIELDS, beside(fields(_one_of(_WRONG_TYPES)))
    )
    yield Kind("field_did", one, "repo is no DID", FIELDS, beside(_only("repo")))
    yield Kind("field_rev", one, "rev is no TID", FIELDS, beside(_only("rev")))
    yield Kind("field_since", one, "since is no TID", FIELDS, beside(_only("since")))
    yield Kind("field_time", one, "time is no datetime", FIELDS, beside(_only("time")))
    yield Kind(
        "field_link", one, "commit is a link to something else than a DAG-CBOR block", FIELDS,
        beside(fields(lambda rng: {"commit": Link(RAW + rng.randbytes(32))})),
    )  # fmt: skip
    yield Kind(
        "op_path", one, "an operation's path is none", FIELDS,
        beside(_op(lambda rng: {"path": rng.choice(_BAD_PATHS)})),
    )  # fmt: skip
    yield Kind(
        "op_type", one, "an operation's field has a wrong type", FIELDS,
        beside(_op(lambda rng: rng.choice(_BAD_OPS))),
    )  # fmt: skip
    yield Kind("op_field", one, "an operation has no cid key", FIELDS, beside(_op(lambda rng: {}, "cid")))
    yield Kind("ops_count", "2", "201 operations", ("reject/ops_count",), beside(_too_many_ops))
    yield Kind(
        "blocks_empty", "2", "no blocks", ("reject/blocks_size",), beside(fields(lambda rng: {"blocks": b""}))
    )
    yield Kind(
        "blocks_huge", "2", "more than 2,000,000 bytes of blocks", ("reject/blocks_size",),
        beside(_padded(2_000_000)),
    )  # fmt: skip
    yield Kind(
        "field_unknown", "§1", "legal: fields that nobody knows", ("ok/commit",),
        instead(fields(lambda rng: {"zzz": [rng.getrandbits(20)], "$extra": {"a": None}})),
    )  # fmt: skip
    yield Kind(
        "blocks_extra", "§4", "legal: blocks that nothing links to", ("ok/commit",), instead(_padded(30_000))
    )
    yield Kind("ops_many", "2", "legal: 200 operations", ("ok/commit",), instead(_nothing, creates(200)))
