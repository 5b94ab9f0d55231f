"""Lies outside of commits: #sync, #identity, #account, and messages of other types.

Owns those kinds. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from indexer.simulator.cbor import Link, encode, head
from indexer.simulator.draft import Outgoing, head_of
from indexer.simulator.keys import SigningKey
from indexer.simulator.lie_base import Kind, Tell, one_create
from indexer.simulator.lie_fields import FIELDS, padded
from indexer.simulator.wire import FrameHalves, car, frame, tid, timestamp

if TYPE_CHECKING:
    from indexer.simulator.draft import Draft
    from indexer.simulator.lies import Telling

_DAY = 86_400_000_000


# -- #sync


def _sync(tamper: Callable[[Draft, Telling], dict[str, Any]], *, ahead: int = 0) -> Tell:
    """A #sync of the newest commit, signed anew under a rev of now (plus ``ahead``), then tampered with."""

    def tell(telling: Telling) -> None:
        now = telling.world.clock() + ahead
        draft = head_of(telling.account, now)
        draft.rev = tid(now, telling.account.pds)
        draft.sign()
        more = tamper(draft, telling)
        telling.say("#sync", draft.sync_halves(**more), rev=draft.rev)

    return tell


def _forged(draft: Draft, telling: Telling) -> dict[str, Any]:
    draft.sign(key=SigningKey.derive(draft.key.curve, f"forged/{draft.rev}"))
    return {}


def _foreign_commit(draft: Draft, telling: Telling) -> dict[str, Any]:
    draft.sign(draft.body(did="did:plc:" + "q" * 24))
    return {}


def _other_rev(draft: Draft, telling: Telling) -> dict[str, Any]:
    draft.sign(draft.body(rev=tid(draft.micros - 1_000_000)))
    return {}


def _sync_of_new_data(telling: Telling) -> None:
    """Others tell the commit; here only a #sync says that there was one."""
    row, draft = telling.world.draft(telling.account, one_create(telling))
    telling.instead(row, draft.outgoing(), "#sync", draft.sync_halves(), draft.rev)


def _sync_of_same_data(large: bool) -> Tell:
    def tell(telling: Telling) -> None:
        row = telling.world.resign(telling.account.did)
        draft = head_of(telling.account, telling.world.clock())
        truth = Outgoing(telling.account.pds, "#sync", draft.sync_halves())
        more = {"blocks": padded(draft, telling.rng, 20_000)} if large else {}
        telling.instead(row, truth, "#sync", draft.sync_halves(**more), draft.rev)

    return tell


# -- #identity and #account


def _identity(**fields: Any) -> Tell:
    def tell(telling: Telling) -> None:
        payload = {"did": telling.account.did, "time": timestamp(telling.world.clock())} | fields
        telling.say("#identity", frame("#identity", payload))

    return tell


def _account(*drop: str, **fields: Any) -> Tell:
    def tell(telling: Telling) -> None:
        payload = {"did": telling.account.did, "time": timestamp(telling.world.clock()), "active": True}
        payload |= fields
        for name in drop:
            del payload[name]
        telling.say("#account", frame("#account", payload))

    return tell


# -- other types


def _message(name: str, **fields: Any) -> Tell:
    def tell(telling: Telling) -> None:
        payload = {"did": telling.account.did, "time": timestamp(telling.world.clock())} | fields
        telling.say(name, frame(name, payload))

    return tell


def _removed(telling: Telling) -> None:
    name = telling.rng.choice(("#handle", "#migrate", "#tombstone"))
    _message(name, handle="x.test", migrateTo=None)(telling)


def _unknown_op(telling: Telling) -> None:
    before = encode({"op": 2, "t": "#commit"}) + head(0xA0, 1) + encode("seq")
    telling.say("op 2", FrameHalves(before, b""))


def kinds() -> Iterator[Kind]:
    yield from _of_syncs()
    yield from _of_accounts()


def _of_syncs() -> Iterator[Kind]:
    sync = "#sync"
    yield Kind("sync_signature", "12", "a #sync signed by another key", ("reject/signature",), _sync(_forged))
    yield Kind("sync_foreign", "4", "a PDS tells a #sync of an account that lives elsewhere",
               ("reject/authority",), _sync(lambda draft, telling: {}), "foreign")  # fmt: skip
    yield Kind("sync_old", sync, "a #sync older than the repository", ("drop/stale_rev",),
               _sync(lambda draft, telling: {}, ahead=-30 * _DAY))  # fmt: skip
    yield Kind("sync_future", "7", "a #sync from tomorrow", ("reject/future_rev",),
               _sync(lambda draft, telling: {}, ahead=_DAY))  # fmt: skip
    yield Kind("sync_did", "11", "a #sync with another account's commit", ("reject/did_mismatch",),
               _sync(_foreign_commit))  # fmt: skip
    yield Kind("sync_rev", "11", "a #sync whose commit has another rev", ("reject/rev_mismatch",),
               _sync(_other_rev))  # fmt: skip
    yield Kind("sync_no_commit", "9", "a #sync without the commit block", ("reject/root",),
               _sync(lambda draft, telling: {"blocks": car(draft.commit_cid, [])}))  # fmt: skip
    yield Kind("sync_empty", "2", "a #sync without blocks", ("reject/blocks_size",),
               _sync(lambda draft, telling: {"blocks": b""}))  # fmt: skip
    yield Kind("sync_huge", "2", "a #sync of more than 2,000,000 bytes", ("reject/blocks_size",),
               _sync(lambda draft, telling: {"blocks": padded(draft, telling.rng, 2_000_000)}))  # fmt: skip
    yield Kind("sync_fields", "1", "a #sync without a TID", FIELDS,
               _sync(lambda draft, telling: {"rev": "yesterday"}))  # fmt: skip
    yield Kind(
        "sync_large",
        "2",
        "legal: a #sync of 20,000 bytes",
        ("ok/sync", "note/sync_blocks"),
        _sync_of_same_data(True),
    )
    yield Kind(
        "sync_same", sync, "legal: the same tree under a new rev", ("ok/sync",), _sync_of_same_data(False)
    )
    yield Kind(
        "sync_other_data", sync, "a #sync where a commit should be", ("desync/sync",), _sync_of_new_data
    )


def _of_accounts() -> Iterator[Kind]:
    account, identity, other = "#account", "#identity", "§1"
    yield Kind("identity_handle", identity, "a handle that the account does not have", ("ok/identity",),
               _identity(handle="somebody.else.test"))  # fmt: skip
    yield Kind("identity_fields", "1", "an #identity without a time", FIELDS, _identity(time="noon"))
    yield Kind("account_fields", "1", "an #account that does not tell its status", FIELDS, _account("active"))
    yield Kind("account_deactivated", account, "an active account is said to be deactivated", ("ok/account",),
               _account(active=False, status="deactivated"))  # fmt: skip
    yield Kind("account_deleted", account, "an active account is said to be deleted", ("ok/account",),
               _account(active=False, status="deleted"))  # fmt: skip
    yield Kind("account_unknown", account, "an active account in a status that nobody knows", ("ok/account",),
               _account(active=False, status="asleep"))  # fmt: skip
    yield Kind("account_throttled", account, "legal: active, but throttled", ("ok/account",),
               _account(status="throttled"))  # fmt: skip
    yield Kind("account_foreign", "4", "a PDS tells the status of an account that lives elsewhere",
               ("reject/authority",), _account(active=False, status="deleted"), "foreign")  # fmt: skip
    yield Kind("type_unknown", other, "a message of an unknown type", ("drop/unknown_type",),
               _message("#future", data=Link(b"\x01\x71\x12\x20" + b"\0" * 32)))  # fmt: skip
    yield Kind(
        "type_removed", other, "a message of a type that was removed", ("drop/unknown_type",), _removed
    )
    yield Kind("op_unknown", other, "a frame with an unknown op", ("drop/unknown_type",), _unknown_op)
