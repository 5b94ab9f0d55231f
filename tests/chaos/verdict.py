"""The verdict on a chaos run: index, log and counters against what the network truly did and told.

Reads a database that is at rest, the ledger of lies and the tally of frames. Every line that comes out is a
fault of the indexer (or of the network that tested it).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import orjson

from indexer.atproto.cid import dag_cbor_cid, format_cid
from indexer.atproto.dagcbor import record_to_json
from indexer.simulator.account import ACTIVE, DELETED, Account
from indexer.simulator.cbor import cid_text, to_json
from indexer.store.codecs import QuarantineRow, RepoRow, SyncState, Work
from indexer.store.database import Database
from indexer.store.keyspaces import QUARANTINE
from tests.chaos.network import ChaosNetwork

#: Refused for its form alone, before anything of the repository is looked at: nothing excuses a lie from it.
FORM = frozenset({"reject/fields", "reject/blocks_size", "reject/ops_count"})
#: Why a true frame, or a lie under another name, may be refused when a directory or a host told lies.
DECEIVED = frozenset({"signature", "authority", "identity"})
_LYING = frozenset({"lying_key", "lying_pds", "malformed_key", "no_key", "no_pds", "id_mismatch"})
#: Refusals that leave no row in the quarantine, or are of whole connections.
_UNKEPT = frozenset({"identity", "authority", "frame"})
#: Lies whose refusal is counted, but leaves no row.
NO_ROW = frozenset({"unregistered", "account_foreign"})
#: Of a repository that is seen for the first time a commit without prevData has to begin with nothing.
_AT_FIRST_SIGHT = {"prev_data_absent": ("inversion",)}
_OUTCOMES = ("ok", "drop", "reject", "desync", "buffer")
#: Only ever said of frames that are lies of these reasons.
_LIES_ONLY = ("desync/too_big", "desync/rebase", "desync/insufficient")
#: Faults of ours.
_OURS = ("failed", "worker_died", "intake", "buffer_full")


# -- the index


def index_differences(db: Database, network: ChaosNetwork) -> Iterator[str]:
    """What the index has otherwise than the ledger."""
    accounts = network.world.accounts
    for did, account in accounts.items():
        row = db.repo(did)
        if row is None:
            yield f"{did} is not in the index"
            continue
        yield from _of_account(db, did, row, account)
    held = sum(not record.flags for did in accounts for _, record in db.records(did))
    if db.count("records") != held:
        yield f"{db.count('records')} records are counted, {held} are held"


def _of_account(db: Database, did: str, row: RepoRow, account: Account) -> Iterator[str]:
    if row.status.label != account.status:
        yield f"{did} is {row.status.label}, truly {account.status}"
    if account.status == DELETED and db.records(did, limit=1):
        yield f"{did} is deleted, but still has records"
    if account.status != ACTIVE:
        return
    if row.handle != account.handle:
        yield f"{did} is called {row.handle or 'nothing'}, truly {account.handle}"
    if row.state is not SyncState.SYNCED:
        yield f"{did} is {row.state.label} ({row.error}), work {Work(row.work)!r}, due {row.due}"
    truth = (account.rev, cid_text(account.data), cid_text(account.commit_cid))
    found = (row.rev, row.data and format_cid(row.data), row.commit and format_cid(dag_cbor_cid(row.commit)))
    if found != truth:
        yield f"{did} stands at {found}, truly {truth}"
        return
    if row.complete and "large" in account.flaws.values():
        yield f"{did} is complete without its records that are too large"
    yield from _of_records(db, did, account)


def _of_records(db: Database, did: str, account: Account) -> Iterator[str]:
    rows = dict(db.records(did))
    for path in sorted(rows.keys() ^ account.records.keys()):
        yield f"{did}/{path} is {'held' if path in rows else 'missing'}"
    for path in sorted(rows.keys() & account.records.keys()):
        row, record, flaw = rows[path], account.records[path], account.flaws.get(path, "")
        if format_cid(row.cid) != cid_text(record.cid) or bool(row.flags) != bool(flaw):
            found = f"{format_cid(row.cid)} ({row.flags})"
            yield f"{did}/{path} is {found}, truly {cid_text(record.cid)} ({flaw})"
        elif not flaw:
            block = db.block(did, row.cid)
            if block is None or orjson.loads(record_to_json(block)) != to_json(record.value):
                yield f"{did}/{path}: another value"


def log_differences(folded: Mapping[str, Mapping[str, str]], network: ChaosNetwork) -> Iterator[str]:
    """What the folded log says otherwise than the ledger, of accounts that are there."""
    for did, account in network.world.accounts.items():
        if account.status != ACTIVE:
            continue
        records = account.records.items()
        truth = {path: cid_text(record.cid) for path, record in records if path not in account.flaws}
        told = folded.get(did, {})
        if told != truth:
            wrong = sorted(path for path in truth.keys() | told.keys() if truth.get(path) != told.get(path))
            yield f"the folded log of {did} differs at {len(wrong)} paths, first {wrong[0]}"


def wiped(db: Database, network: ChaosNetwork) -> set[str]:
    """Accounts whose earlier events left the log."""
    rows = ((did, db.repo(did)) for did in network.world.accounts)
    return {did for did, row in rows if row is not None and row.epoch}


# -- the counters


class Found(NamedTuple):
    """What became of the lies of one kind: told, found under the kind's reason, excused."""

    told: int
    found: int
    excused: int


class Judge:
    """Counters and quarantine of one daemon against the ledger of lies, lane by lane."""

    def __init__(self, db: Database, network: ChaosNetwork, lanes: list[str], fair: list[int]) -> None:
        self.network = network
        self.lanes = {network.url_of(lane): lane for lane in lanes}
        self.counts = {
            lane: Counter(
                {name.removeprefix(f"ingest/{url}/"): n for name, n in db.counts(f"ingest/{url}/").items()}
            )
            for url, lane in self.lanes.items()
        }
        self.cursors = {lane: db.cursor(f"upstream/{url}") or 0 for url, lane in self.lanes.items()}
        self._kept: dict[str, list[QuarantineRow]] = {lane: [] for lane in lanes}
        for _, row in db.scan(QUARANTINE):
            if row.source in self.lanes:
                self._kept[self.lanes[row.source]].append(row)
        self.lies: list[dict[str, Any]] = [dict(lie) for lie in network.lies.entries]
        self._fair = frozenset(fair)
        self._wiped = wiped(db, network)
        self.kinds: dict[str, Found] = {}
        self.deceived: Counter[str] = Counter()
        #: Lane → frames that came, were counted at once, and were counted again out of the buffer.
        self.sums: dict[str, dict[str, int]] = {}

    def faults(self) -> Iterator[str]:
        for lane in self.lanes.values():
            yield from self._complete(lane)
            yield from self._ours(lane)
            yield from self._refused(lane)
            yield from self._forms(lane)
            yield from self._found(lane)
            yield from self._sum(lane)
            yield from self._bounded(lane)
        self._tabulate()

    def _told(self, lane: str) -> Iterator[tuple[dict[str, Any], int]]:
        """Lies with a place in the lane's stream."""
        for lie in self.lies:
            seq = lie["lanes"].get(lane, 0)
            if seq:
                yield lie, seq

    def _turns(self, lane: str, *kinds: str) -> int:
        """How many sockets of the lane were told lies of these kinds."""
        return sum(
            lie.get("sockets", 1) for lie in self.lies
            if lie["kind"] in kinds and lane in lie["lanes"] and not lie["lanes"][lane]
        )  # fmt: skip

    def _complete(self, lane: str) -> Iterator[str]:
        sent = self.network.lanes[lane].seq
        if self.cursors[lane] != sent:
            yield f"{lane}: the cursor is at {self.cursors[lane]}, {sent} was sent"

    def _ours(self, lane: str) -> Iterator[str]:
        for name, count in self.counts[lane].items():
            if name.rpartition("/")[2] in _OURS and count:
                yield f"{lane}: {count} {name}"

    def _refused(self, lane: str) -> Iterator[str]:
        """Each row of the quarantine is a lie under its reason, once; and the counters are those rows."""
        lies = {seq: lie for lie, seq in self._told(lane)}
        seen: set[int] = set()
        again = -self._again(lane)
        strays = self._turns(lane, "seq_missing", "seq_type")
        for row in self._kept[lane]:
            lie = lies.get(row.seq)
            expected = lie is not None and f"reject/{row.reason}" in lie["expect"]
            if expected:
                again += row.seq in seen
                seen.add(row.seq)
            elif lie is not None and row.reason in _AT_FIRST_SIGHT.get(lie["kind"], ()):
                continue
            elif row.reason in ("fields", "frame"):  # without a seq: kept under that of the message before
                strays -= row.reason == "fields"
            elif row.reason in DECEIVED and self._may_be_deceived(row.did):
                self.deceived[row.reason] += 1
            else:
                what = f"a lie of kind {lie['kind']}" if lie else "no lie"
                yield f"{lane}: {row.seq}, {what}, was refused for {row.reason}: {row.message}"
        if again > 0:
            yield f"{lane}: {again} frames too many were refused twice"
        if strays < 0:
            yield f"{lane}: {-strays} messages too many were refused for their fields"
        rows = Counter(f"reject/{row.reason}" for row in self._kept[lane])
        swept: Counter[str] = Counter()
        for lie, _ in self._told(lane):
            swept.update(lie["expect"] if lie["did"] in self._wiped else ())
        for name, count in self.counts[lane].items():
            if not name.startswith("reject/") or name[7:] in _UNKEPT:
                continue
            if self._wiped and name[7:] in DECEIVED and rows[name] <= count:
                continue  # frames of theirs that were refused by mistake were swept, too
            if not rows[name] <= count <= rows[name] + swept[name]:
                yield f"{lane}: {name} was counted {count} times, {rows[name]} are in the quarantine"

    def _may_be_deceived(self, did: str) -> bool:
        """A frame that comes late is judged by a key or host of today, or a directory told lies of it."""
        fired = {kind for (_, kind), count in self.network.faults.fired.items() if count}
        return did in self.network.rekeyed or bool(fired & _LYING)

    def _forms(self, lane: str) -> Iterator[str]:
        """What is wrong in form is refused whatever the state: as many as were told, no more."""
        told: Counter[str] = Counter()
        for lie, _ in self._told(lane):
            told.update(name for name in lie["expect"] if name in FORM)
        extra = self._turns(lane, "seq_missing", "seq_type")
        for name in FORM:
            most = told[name] + self._again(lane) + (extra if name == "reject/fields" else 0)
            if not told[name] <= self.counts[lane][name] <= most:
                yield f"{lane}: {name} was counted {self.counts[lane][name]} times, told {told[name]}"

    def _found(self, lane: str) -> Iterator[str]:
        """A lie that nothing excuses is in the quarantine under its reason."""
        rows = {(row.seq, f"reject/{row.reason}") for row in self._kept[lane]}
        for lie, seq in self._told(lane):
            names = [name for name in lie["expect"] if name.startswith("reject/")]
            if lie["id"] not in self._fair or lie["kind"] in NO_ROW:
                continue
            if not any((seq, name) in rows for name in names):
                found = [row.reason for row in self._kept[lane] if row.seq == seq]
                yield f"{lane}: {seq}, {lie['kind']} of {lie['did']}, was not {names}, but {found}"

    def _sum(self, lane: str) -> Iterator[str]:
        """Every frame was counted once when it came, and those that waited at most once more."""
        counts, sent = self.counts[lane], self.network.sent.get(lane, Counter())
        came = sum(sent.values()) - sent["noise"]
        total = sum(n for name, n in counts.items() if name.partition("/")[0] in _OUTCOMES)
        total -= counts["reject/frame"]
        waited = sum(n for name, n in counts.items() if name.startswith("buffer/"))
        least = came
        most = came + waited + self._turns(lane, "seq_missing", "seq_type") + self._again(lane)
        self.sums[lane] = {"came": came, "counted": total, "waited": waited, "replayed": total - came}
        if not least <= total <= most:
            yield f"{lane}: {came} frames came and {waited} waited, {total} were counted"

    def _again(self, lane: str) -> int:
        """Frames that a lie had repeated after a new connection."""
        return sum(lie["kind"] == "word_repeated" for lie, _ in self._told(lane))

    def _bounded(self, lane: str) -> Iterator[str]:
        told: Counter[str] = Counter()
        for lie, _ in self._told(lane):
            told.update(lie["expect"])
        for name in _LIES_ONLY:
            if self.counts[lane][name] > told[name] + self._again(lane):
                yield f"{lane}: {name} was counted {self.counts[lane][name]} times, told {told[name]}"

    def _tabulate(self) -> None:
        """How many lies of each kind that are refused were found under their reason."""
        told: Counter[str] = Counter()
        found: Counter[str] = Counter()
        for lane in self.lanes.values():
            rows = {(row.seq, f"reject/{row.reason}") for row in self._kept[lane]}
            for lie, seq in self._told(lane):
                if any(name.startswith("reject/") for name in lie["expect"]):
                    told[lie["kind"]] += 1
                    found[lie["kind"]] += any((seq, name) in rows for name in lie["expect"])
        self.kinds = {kind: Found(n, found[kind], n - found[kind]) for kind, n in sorted(told.items())}
