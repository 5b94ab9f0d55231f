"""Rows of accounts that were only heard of: how long one is kept whose identity no directory knows. Pure."""

from __future__ import annotations

from typing import Final

from indexer.atproto.types import Micros
from indexer.errors import IdentityGone
from indexer.store.codecs import RepoRow, Work

#: What the error of such a row begins with.
GONE: Final = IdentityGone.reason
#: The total of rows that went.
FORGOTTEN: Final = "hearsay/forgotten"


def unheard_of(row: RepoRow, why: str, now_us: Micros) -> RepoRow:
    """The row after the directory's no: it is asked again, and `identity_at` is when it first said so."""
    first = row.identity_at if row.error.startswith(GONE) and 0 < row.identity_at <= now_us else now_us
    work = row.work & ~(Work.CHECK_STATUS | Work.COMPARE_REV) | Work.RESOLVE
    return row._replace(identity_at=first, work=work, error=f"{GONE}: {why}"[:500])


def grace_left(row: RepoRow, now_us: Micros, grace_s: float) -> float:
    """Seconds until the directory's no counts for good; 0.0 also for a row of which it never said no."""
    if not row.error.startswith(GONE):
        return 0.0
    return min(grace_s, max(0.0, (row.identity_at - now_us) / 1e6 + grace_s))
