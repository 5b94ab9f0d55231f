"""Account status: many hosts' words, one effective status (sync.md §2, `#account`).

Owns the guard against stale words, the rule by which words become the effective status, and what a
change of it does to a repository's row. Leaves out asking the PDS (`identities`). Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

from indexer.atproto.types import Micros
from indexer.store.codecs import AccountStatus, AccountWord, RepoRow, SyncState, Work

#: Source of the word that `getRepoStatus` on the account's PDS gave us.
CHECKED = "getRepoStatus"
PDS_PREFIX = "pds::"

_BY_LABEL: Mapping[str, AccountStatus] = {status.label: status for status in AccountStatus}
#: From the least to the most restrictive.
_SEVERITY: Sequence[AccountStatus] = (
    AccountStatus.ACTIVE,
    AccountStatus.THROTTLED,
    AccountStatus.DESYNCHRONIZED,
    AccountStatus.UNKNOWN,
    AccountStatus.DEACTIVATED,
    AccountStatus.SUSPENDED,
    AccountStatus.TAKENDOWN,
    AccountStatus.DELETED,
)
_RANK = {status: rank for rank, status in enumerate(_SEVERITY)}
#: What a relay decides by itself: the account's PDS cannot refute it.
_MODERATION = frozenset((AccountStatus.SUSPENDED, AccountStatus.TAKENDOWN))
#: What the source of a word from a list begins with; what follows is the host's URL.
LIST_PREFIX: Final = "crawler::"
#: A host's answers about the account itself: its status here, and the reason that is counted.
ACCOUNT_ANSWERS: Final = {
    "RepoDeactivated": (AccountStatus.DEACTIVATED, "repo_deactivated"),
    "RepoTakendown": (AccountStatus.TAKENDOWN, "repo_takendown"),
    "RepoSuspended": (AccountStatus.SUSPENDED, "repo_suspended"),
    "RepoNotFound": (AccountStatus.UNKNOWN, "repo_not_found"),
}
_ACCOUNT_REASONS: Final = frozenset(reason for _status, reason in ACCOUNT_ANSWERS.values())
_DEFAULT_PORTS = {"https": 443, "wss": 443, "http": 80, "ws": 80}


@lru_cache(maxsize=4096)
def host_and_port(url: str) -> str:
    """``host:port`` of a URL or upstream name, the same for https and wss; "" when there is none."""
    parts = urlsplit(url.removeprefix(PDS_PREFIX).removeprefix(LIST_PREFIX))
    try:
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return ""
    return f"{parts.hostname}:{port}" if parts.hostname else ""


def has_authority(source: str, pds: str) -> bool:
    """Row 4: a relay may speak of every account, a PDS of those that live on it."""
    return not source.startswith(PDS_PREFIX) or (pds != "" and host_and_port(source) == host_and_port(pds))


def status_of(active: bool, status: str | None) -> AccountStatus:
    """The status that a frame or `getRepoStatus` means; `throttled` and the like may go with active."""
    if active:
        return AccountStatus.ACTIVE
    known = _BY_LABEL.get(status or "", AccountStatus.UNKNOWN)
    return AccountStatus.UNKNOWN if known is AccountStatus.ACTIVE else known


def micros_of(time: str) -> Micros:
    """A frame's ``time`` in microseconds since the epoch; 0 where no such moment exists."""
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        return 0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp() * 1_000_000)


def is_stale(word: AccountWord, stored: AccountWord | None) -> bool:
    """Whether ``word`` is a replay of something older than what its source said last."""
    return stored is not None and word.seq <= stored.seq and word.time <= stored.time


def is_doubtful(word: AccountWord, stored: AccountWord | None) -> bool:
    """Whether seq and time disagree on which is the newer one: a replay under a new number, a new numbering,
    or a clock that was set back. It counts, and the account's PDS is asked."""
    return stored is not None and (word.seq < stored.seq) != (word.time < stored.time)


def effective(words: Sequence[AccountWord], pds: str) -> AccountStatus:
    """The status that counts: the current PDS's word, else the most restrictive one, as checked.

    A check outweighs older words of relays, but not their moderation. Of a relay's stream and its list the
    newer one speaks for it.
    """
    own = [word for word in words if word.source.startswith(PDS_PREFIX) and has_authority(word.source, pds)]
    checked = [word for word in words if word.source == CHECKED]
    if own:
        return max(own + checked, key=lambda word: word.time).status
    relays = _newest(word for word in words if word not in checked and not word.source.startswith(PDS_PREFIX))
    standing = [
        word
        for word in relays
        if word.status in _MODERATION or all(word.time > check.time for check in checked)
    ]
    superseded = any(word.active for word in standing)
    standing += [] if superseded else checked
    return max((word.status for word in standing), key=_RANK.__getitem__, default=AccountStatus.ACTIVE)


def _newest(words: Iterable[AccountWord]) -> list[AccountWord]:
    """The last word of each host."""
    found: dict[str, AccountWord] = {}
    for word in words:
        host = host_and_port(word.source) or word.source
        if host not in found or _age(found[host]) < _age(word):
            found[host] = word
    return list(found.values())


def _age(word: AccountWord) -> tuple[Micros, int]:
    return word.time, _RANK[word.status]


def reason_of(error: str) -> str:
    """The reason that a row's error begins with."""
    return error.partition(":")[0]


def with_status(row: RepoRow, status: AccountStatus, now_us: Micros, *, ephemeral: bool) -> RepoRow:
    """The row under its new status. Active again: fetched if anything was missed meanwhile, and at once where
    a fetch was refused for the status.

    Frames of an account that is not active may never have been sent to us: its host is asked for its rev.
    """
    row = row._replace(status=status)
    if not status.active:
        return row if row.state is SyncState.BACKFILLING else row._replace(due=0)
    if ephemeral or row.state is SyncState.BACKFILLING:
        return row
    if row.state is SyncState.SYNCED and row.min_rev <= row.rev:
        return row._replace(work=row.work | Work.COMPARE_REV)
    state = SyncState.DESYNCHRONIZED if row.state is SyncState.SYNCED else row.state
    if reason_of(row.error) in _ACCOUNT_REASONS:
        return row._replace(state=state, due=now_us, attempt=0, error="")
    return row._replace(state=state, due=row.due or now_us)
