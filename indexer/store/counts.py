"""Exact totals: which names a change of a repository's row touches.

Names: ``repos``, ``repos/tracked``, ``repos/hearsay``, ``repos/state/<label>``, ``repos/status/<label>``;
``records``, ``records/<collection>``, ``did/<did>/<collection>`` (served records only); ``events`` (retained
rows); ``buffer/frames|bytes``, ``buffer/<did>/frames|bytes``; ``archives``, ``archives/bytes``;
``strangers/<source>``; the `TALLIES` once their cursor says so (``hosts/<host>``: followed accounts;
``deleted``: repositories that are pending because their account was deleted). Other names (``ingest/…``,
``gc/…``) are tallies that nothing recounts. A row at zero does not exist. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from indexer.store.codecs import AccountStatus, RepoRow, SyncState
from indexer.store.host_rows import ACCOUNTS, COUNTED, home_of

#: Prefixes of the totals that `check` recounts.
EXACT = ("repos", "records", "did/", "events", "buffer/", "archives", "strangers/")
HEARSAY: Final = "repos/hearsay"
DELETED: Final = "deleted"


def repo_names(row: RepoRow) -> Iterator[str]:
    """The totals in which a repository counts."""
    yield "repos"
    if row.tracked:
        yield "repos/tracked"
    if row.hearsay:
        yield HEARSAY
    yield f"repos/state/{row.state.label}"
    yield f"repos/status/{row.status.label}"


def count_repo(old: RepoRow | None, new: RepoRow | None) -> Iterator[tuple[str, int]]:
    """The changes of the totals when a repository's row goes from ``old`` to ``new``."""
    before = set() if old is None else set(repo_names(old))
    after = set() if new is None else set(repo_names(new))
    for name in sorted(after - before):
        yield name, 1
    for name in sorted(before - after):
        yield name, -1


class Tally(NamedTuple):
    """A total that older databases lack: their repositories are counted in steps, in the order of DIDs.

    ``counted`` is the row of `cursors` with the DID up to which they are; ``name_of`` the total in which a
    repository counts, "" for none.
    """

    counted: str
    prefix: str
    name_of: Callable[[RepoRow | None], str]


def _home_total(row: RepoRow | None) -> str:
    home = home_of(row)
    return ACCOUNTS + home if home else ""


def _deleted_total(row: RepoRow | None) -> str:
    gone = row is not None and row.status is AccountStatus.DELETED and row.state is SyncState.PENDING
    return DELETED if gone else ""


HOMES: Final = Tally(COUNTED, ACCOUNTS, _home_total)
DELETIONS: Final = Tally("deleted accounts", DELETED, _deleted_total)
TALLIES: Final = (HOMES, DELETIONS)
