"""Words about an account and its end, as steps on the writer: one way for ingest and backfill.

Owns what a word or a confirmed deletion changes in the row and tells the log. Which status follows from
the words is `account`'s; who learns of them, and when, is the callers'. Inside the writer's turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from indexer.atproto.types import Did, Micros
from indexer.ingest.account import CHECKED, effective, with_status
from indexer.store.codecs import AccountStatus, AccountWord, RepoRow
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
