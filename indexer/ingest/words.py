"""Words about an account, its identity and its end, as steps on the writer: one way for ingest and backfill.

Owns what a word, an identity or a confirmed deletion changes in the row and tells the log. Which status
follows from the words is `account`'s; who learns of them, and when, is the callers'. Inside the writer's
turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from indexer.atproto.types import Did, Micros
from indexer.identity.resolver import INVALID_HANDLE, Identity
from indexer.ingest.account import CHECKED, effective, with_status
from indexer.store.codecs import AccountStatus, AccountWord, RepoRow, Work
from indexer.store.transaction import Transaction


def with_words(
    tx: Transaction,
    did: Did,
    row: RepoRow,
    words: Sequence[AccountWord],
    fields: Mapping[str, Any] | None = None,
    *,
    ephemeral: bool,
) -> RepoRow:
    """The row under the status that ``words`` make; the log hears of a change, with ``fields``."""
    status = effective(words, row.pds)
    if status is row.status:
        return row
    said: dict[str, Any] = {"active": status.active}
    if not status.active:
        said["status"] = status.label
    tx.append_event("account", did, fields={**said, **(fields or {})})
    return with_status(row, status, tx.now_us, ephemeral=ephemeral)


def with_check(
    tx: Transaction, did: Did, row: RepoRow, status: AccountStatus, at: Micros, *, ephemeral: bool
) -> RepoRow:
    """The row after its PDS, asked at that time, told the account's status itself.

    Kept as the word of a check, so that other words of upstreams are weighed against it.
    """
    tx.set_account_word(did, *AccountWord(CHECKED, status, status.active, 0, at))
    return with_words(tx, did, row, tx.account_words(did), ephemeral=ephemeral)


def bury(tx: Transaction, did: Did) -> None:
    """The account is deleted for certain: its content goes, its row stays to be asked."""
    tx.wipe_repo(did, AccountStatus.DELETED)
    row = tx.repo(did)
    if row is not None:
        tx.set_repo(did, row._replace(tracked=True))


def with_identity(tx: Transaction, did: Did, row: RepoRow, identity: Identity) -> RepoRow:
    """The row with a resolved identity; the log hears of another key or PDS at once.

    An answer to an older question than the row's own changes nothing (unless our clock was set back since).
    A claimed handle is no fact: one that is new leaves the row without a handle until it is verified.
    """
    if identity.fetched_at < row.identity_at <= tx.now_us and not row.hearsay:
        return row
    claimed = identity.handle
    handle, work = row.handle, row.work & ~Work.RESOLVE
    if not claimed:
        handle = INVALID_HANDLE
    elif claimed != handle:
        handle = handle if handle == INVALID_HANDLE else ""
        work |= Work.VERIFY_HANDLE
    new = row._replace(
        signing_key=identity.signing_key, pds=identity.pds, handle=handle, work=work,
        identity_at=identity.fetched_at, hearsay=False,
    )  # fmt: skip
    moved = (row.signing_key, row.pds) != (new.signing_key, new.pds)
    if moved or (handle == INVALID_HANDLE and row.handle != INVALID_HANDLE):
        tell_identity(tx, did, new)
    return new


def tell_identity(tx: Transaction, did: Did, row: RepoRow) -> None:
    """The log's entry of an identity; without a handle while that is being verified."""
    tx.append_event("identity", did, fields={"handle": row.handle or None, "pds": row.pds})
