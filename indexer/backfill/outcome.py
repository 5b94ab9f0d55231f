"""What a failed backfill means: for the repository's row, for its host, for the counters.

Pure decisions on errors and rows; the shells around them fetch and write.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from indexer.atproto.types import Micros, Rev
from indexer.backfill.waits import backoff_s
from indexer.config import BackfillSettings
from indexer.errors import (
    BadInput,
    FetchError,
    FetchRefused,
    FetchTransient,
    IdentityGone,
    IndexerError,
    MissingBlock,
    SignatureInvalid,
)
from indexer.identity.http import PROXY
from indexer.ingest.account import ACCOUNT_ANSWERS, reason_of
from indexer.store.codecs import AccountStatus, RepoRow, SyncState

BELOW_MIN_REV: Final = "below_min_rev"
DRAIN: Final = "drain"
HOST_BUSY: Final = "host_busy"
#: What the error of a repository begins with that waits for its host alone.
HOST_RESTS: Final = "host_rests"
TOO_LARGE: Final = "too_large"
#: Statuses that are about what was asked for, also where a host gives no XRPC name with them.
_ABOUT_THE_REPO: Final = (400, 404, 410)
#: Reasons to try again that say nothing about the health of the host.
_NOT_THE_HOST: Final = frozenset(
    {
        BELOW_MIN_REV,
        DRAIN,
        HOST_BUSY,
        PROXY,
        TOO_LARGE,
        "spool",
        *(f"http_{status}" for status in _ABOUT_THE_REPO),
    }
)


class Failure(NamedTuple):
    """``status`` is the account's, where the failure is a fact about it; None for a fault."""

    outcome: Literal["retry", "corrupt", "account"]
    reason: str
    message: str
    status: AccountStatus | None = None
    retry_after: float | None = None
    tombstone: bool = False  # the directory says that the identity was deleted

    @property
    def of_host(self) -> bool:
        """Whether the host itself is in trouble, so that its other repositories had better wait too."""
        return self.outcome == "retry" and self.reason not in _NOT_THE_HOST

    @property
    def of_content(self) -> bool:
        """Whether what the host served is wrong, or beyond the limits: one repository says nothing about
        the host, a row of them does."""
        return self.outcome == "corrupt" or self.reason in (TOO_LARGE, "incomplete")

    @property
    def rate_limited(self) -> bool:
        return self.reason == "rate_limited"


def judge(error: IndexerError) -> Failure:
    """What an error met on the way from identity to verified repository means."""
    text = str(error)
    if isinstance(error, FetchTransient):
        return Failure("retry", error.reason, text, retry_after=error.retry_after)
    if isinstance(error, FetchRefused):
        if error.name in ACCOUNT_ANSWERS:
            status, reason = ACCOUNT_ANSWERS[error.name]
            return Failure("account", reason, text, status)
        return Failure("retry", TOO_LARGE if error.name == "TooLarge" else f"http_{error.status}", text)
    if isinstance(error, IdentityGone):
        return Failure("account", error.reason, text, tombstone=error.tombstone)
    if isinstance(error, MissingBlock) or error.reason == "car_truncated":
        return Failure("retry", "incomplete", text)
    return Failure("corrupt" if isinstance(error, BadInput) else "retry", error.reason, text)


def wants_fresh_identity(error: IndexerError) -> bool:
    """Whether a stale identity can be behind it: another key, or another PDS."""
    return isinstance(error, SignatureInvalid) or (
        isinstance(error, FetchRefused) and error.name in ACCOUNT_ANSWERS
    )


def worth_another_host(error: IndexerError) -> bool:
    """Whether a relay may have what the PDS did not give; its word about the account is final."""
    failure = judge(error)
    if isinstance(error, FetchRefused) and failure.outcome == "retry" and error.name != "TooLarge":
        return True
    return isinstance(error, FetchError) and failure.of_host and not failure.rate_limited


def failed(
    row: RepoRow, failure: Failure, now_us: Micros, settings: BackfillSettings, jitter: float
) -> RepoRow:
    """The row after a failure: waiting again, with its reason and the time of the next try.

    A fetch that worked but was too old begins a count of its own, which `accepts_old` reads.
    """
    counted = failure.reason != BELOW_MIN_REV or reason_of(row.error) == BELOW_MIN_REV
    attempt = row.attempt + 1 if counted else 1
    shortest = settings.retry_max if failure.outcome == "account" else settings.retry_min
    wait = backoff_s(attempt, shortest, settings.retry_max, jitter=jitter, retry_after=failure.retry_after)
    # Only the replay of frames is left after `drain`: the repository itself stays as it was fetched.
    broken = SyncState.DESYNCHRONIZED if row.rev else SyncState.PENDING
    return row._replace(
        state=row.state if failure.reason == DRAIN else broken,
        due=now_us + int(wait * 1e6),
        attempt=attempt,
        error=f"{failure.reason}: {failure.message}"[:500],
    )


def accepts_old(row: RepoRow, rev: Rev, tries: int) -> bool:
    """Whether a repository below `min_rev` is taken after all. Never one older than what is stored."""
    seen = row.attempt if reason_of(row.error) == BELOW_MIN_REV else 0
    return rev >= row.rev and seen >= tries
