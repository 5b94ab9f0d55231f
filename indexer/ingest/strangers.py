"""What the directory's answer does for an account of which only a PDS has spoken so far.

Owns the steps: the account gets its row where the directory names that PDS, and what waited is replayed; else
what waited is refused, as far as it came in before the directory was asked. Who becomes a stranger is
`newcomers`'s, who asks is `identities`. Inside the writer's turn.
"""

from __future__ import annotations

from collections.abc import Mapping

from indexer.atproto.types import Did, Micros
from indexer.errors import IdentityGone
from indexer.identity.resolver import Identity
from indexer.ingest.account import has_authority
from indexer.ingest.answers import Answers, read_waiting
from indexer.ingest.apply import Applier, Arrival, label
from indexer.ingest.machine import Act, Situation, decide
from indexer.ingest.newcomers import Result
from indexer.ingest.tools import IngestTools
from indexer.ingest.verify import Verdict
from indexer.store.codecs import NEW_REPO, BufferedFrame, Work
from indexer.store.transaction import Transaction


class Strangers:
    """The steps, with what they share."""

    def __init__(self, tools: IngestTools, applier: Applier, answers: Answers) -> None:
        self._tools = tools
        self._applier = applier
        self._answers = answers

    def at_home(self, tx: Transaction, did: Did, identity: Identity) -> bool:
        """Opens the account's row if it lives at a PDS that named it; whether it has a row now."""
        if tx.repo(did) is not None:
            return True
        named = tx.strangers(did)
        if self._applier.filters.is_excluded(did) or not any(
            has_authority(source, identity.pds) for source, _ in named
        ):
            return False
        self._applier.first_row(tx, did, identity)
        self._answers.learned(tx, did, identity)
        row = tx.repo(did)
        if row is not None and any(word is not None and not word[1] for _, (_, word) in named):
            self._applier.store(tx, did, row, row._replace(work=row.work | Work.CHECK_STATUS))
        return True

    def refused(
        self, tx: Transaction, did: Did, identity: Identity, verdicts: Mapping[BufferedFrame, Verdict]
    ) -> bool:
        """Frames from before the answer's question are refused; whether the account is done with."""
        if tx.repo(did) is not None:
            return True
        for waiting in tx.buffered(did):
            verdict, frame = verdicts.get(waiting), read_waiting(waiting.data)
            if waiting.arrived >= identity.fetched_at and waiting.arrived <= tx.now_us:
                continue
            if verdict is not None and frame is not None:
                arrival = Arrival(waiting.source, frame.seq, did, frame, waiting.data, identity.signing_key)
                self._refuse(tx, arrival, identity, verdict)
                tx.drop_buffered_frame(did, waiting)
        return self._forgotten(tx, did, identity.fetched_at)

    def _refuse(self, tx: Transaction, arrival: Arrival, identity: Identity, verdict: Verdict) -> None:
        situation = Situation(tx.now_us, self._applier.ephemeral, draining=True, authority=False, fresh=True)
        decision = decide(NEW_REPO, verdict, situation)
        result = Result(decision.act, decision.reason)
        if decision.act is Act.REJECT:
            other = verdict.reason != decision.reason
            why = f"{identity.pds} is the account's PDS" if other else verdict.message
            self._applier.refuse(tx, arrival, decision.reason, why)
        tx.add_count(f"ingest/{arrival.source}/{label(result)}", 1)

    def gone(self, tx: Transaction, did: Did, error: IdentityGone) -> float | None:
        """No directory knows the account; seconds until it is asked once more, for it may be a new one."""
        if tx.repo(did) is not None:
            return self._answers.gone(tx, did, error)
        self._answers.refuse_waiting(tx, did, error)
        since = max((row.time_us for _, row in tx.strangers(did)), default=0)
        settings = self._tools.settings.ingest
        left = settings.unknown_grace - (tx.now_us - since) / 1e6
        if 0 < left <= settings.unknown_grace:
            return max(left, settings.refresh_interval)
        self._forgotten(tx, did, tx.now_us + 1)
        return None

    def expired(self, tx: Transaction, did: Did, before: Micros) -> None:
        """Of what was heard before then nothing came."""
        self._answers.expired(tx, did, before)
        if tx.repo(did) is None:
            self._forgotten(tx, did, before)

    def _forgotten(self, tx: Transaction, did: Did, before: Micros) -> bool:
        """Whom a PDS named before then is no stranger any more, unless frames wait; whether all are gone."""
        waiting = {frame.source for frame in tx.buffered(did)}
        left = 0
        for source, row in tx.strangers(did):
            if source in waiting or before <= row.time_us <= tx.now_us:
                left += 1
            else:
                tx.set_stranger(did, source, None)
        return not left
