"""Exact totals: which names a change of a repository's row touches.

Names: ``repos``, ``repos/tracked``, ``repos/state/<label>``, ``repos/status/<label>``; ``records``,
``records/<collection>``, ``did/<did>/<collection>`` (served records only); ``events`` (retained
rows); ``buffer/frames|bytes``, ``buffer/<did>/frames|bytes``; ``archives``, ``archives/bytes``;
``hosts/<host>`` (followed accounts, once `host_rows.COUNTED` says so). Other
names (``ingest/…``, ``gc/…``) are tallies that nothing recounts. A row at zero does not exist. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from indexer.store.codecs import RepoRow

#: Prefixes of the totals that `check` recounts.
EXACT = ("repos", "records", "did/", "events", "buffer/", "archives")


def repo_names(row: RepoRow) -> Iterator[str]:
    """The totals in which a repository counts."""
    yield "repos"
    if row.tracked:
        yield "repos/tracked"
    yield f"repos/state/{row.state.label}"
    yield f"repos/status/{row.status.label}"


def count_repo(old: RepoRow | None, new: RepoRow) -> Iterator[tuple[str, int]]:
    """The changes of the totals when a repository's row goes from ``old`` to ``new``."""
    before = set() if old is None else set(repo_names(old))
    after = set(repo_names(new))
    for name in sorted(after - before):
        yield name, 1
    for name in sorted(before - after):
        yield name, -1
