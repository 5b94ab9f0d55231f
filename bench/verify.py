"""`bench verify [RECORDS …]`: full checks of commit frames a second on one core.

Times `indexer.ingest.verify.verify_batch` (fields, CAR, hashes, commit, signature, tree, inversion, records)
as a verifier process runs it. The frames are the simulator's, on repositories of so many records.
"""

from __future__ import annotations

from functools import partial

from bench.options import Options, machine, profiled, timed
from bench.report import Report, Target
from indexer.atproto.frames import CommitFrame, decode_frame
from indexer.atproto.syntax import tid_from_micros
from indexer.ingest.verify import Item, Outcome, VerifyLimits, verify_batch
from indexer.memory import IN_WORKER, collect_rarely
from indexer.simulator.corpus import pregenerate

REDUCED = (100, 1_000, 10_000)
FULL = (100, 1_000, 10_000, 100_000)
_TARGET_RECORDS, _TARGET = 10_000, Target(6_000)
_ACCOUNTS = 4
_COMMITS = 4_000
_BATCH = 64
_FAR_FUTURE_US = 4_000_000_000_000_000


def run(options: Options) -> Report:
    """One rate for each repository size."""
    report = Report("verify", notes=[machine()])
    collect_rarely(IN_WORKER)  # as a verifier's process
    limits = VerifyLimits(max_rev=tid_from_micros(_FAR_FUTURE_US))
    for records in options.chosen(REDUCED, FULL):
        items = commit_frames(options, records)
        refused = [verdict for verdict in verify_batch(items, limits) if verdict.outcome is not Outcome.OK]
        if refused:
            raise SystemExit(f"the input is refused: {refused[0].message}")
        job = partial(verify_all, items, limits)
        rates = [len(items) / seconds for seconds in timed(job, options.runs)]
        target = _TARGET if records == _TARGET_RECORDS else None
        report.add(f"commits_per_s_{records}", "commits/s", rates, target, series="commits", size=records)
        sizes = sum(len(frame) for frame, _key, _whole in items) / len(items)
        report.notes.append(f"{records:,} records: {len(items):,} frames of {sizes:,.0f} bytes on average")
        if options.profile is not None:
            profiled(job, options.profile, f"verify {records}")
    return report


def verify_all(items: list[Item], limits: VerifyLimits) -> None:
    """Everything, in the batches in which ingest hands frames out."""
    for at in range(0, len(items), _BATCH):
        verify_batch(items[at : at + _BATCH], limits)


def commit_frames(options: Options, records: int) -> list[Item]:
    """Commits to repositories of ``records`` records, each with its account's key."""
    corpus = pregenerate(options.cache, accounts=_ACCOUNTS, commits=_COMMITS, records=records)
    keys = {
        did: "did:key:" + entry["doc"]["verificationMethod"][0]["publicKeyMultibase"]
        for did, entry in corpus.documents().items()
    }
    items: list[Item] = []
    for data in corpus.frames():
        frame = decode_frame(data)
        if isinstance(frame, CommitFrame):
            items.append((data, keys[frame.repo], True))
    return items
