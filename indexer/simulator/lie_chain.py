"""Lies about a commit's place: whose it is, when it was made, what came before it. Rows 3 to 7, 13 and 17.

Owns those kinds. Where a row lies behind the signature's, the lie is signed with the account's true key: a
broken PDS says it, no forger could. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import TYPE_CHECKING, Any

from indexer.simulator.account import Account
from indexer.simulator.cbor import cid_text
from indexer.simulator.draft import Draft, Outgoing, draft_of
from indexer.simulator.keys import K256, SigningKey
from indexer.simulator.lie_base import (
    Kind,
    beside,
    creates,
    instead,
    one_create,
    one_delete,
    one_update,
    other_key,
    replaced,
    shadow,
    some_cid,
)
from indexer.simulator.lie_fields import fields
from indexer.simulator.wire import tid

if TYPE_CHECKING:
    from indexer.simulator.lies import Telling

_DAY = 86_400_000_000


# -- rows 4 to 7: who speaks, of whom, when


def _unregistered(telling: Telling) -> None:
    """An account that no directory knows."""
    did = "did:plc:" + cid_text(some_cid(telling.rng))[-24:].translate(str.maketrans("0189", "abcd"))
    nobody = Account(did, "", telling.pds, SigningKey.derive(K256, did))
    draft = _of(nobody, telling)
    telling.say("#commit", draft.halves(), rev=draft.rev, did=did)


def _of(account: Account, telling: Telling) -> Draft:
    return draft_of(account, one_create(telling), telling.world.clock())[0]


def _foreign(telling: Telling) -> None:
    """Well signed and true in form, but its PDS is another."""
    draft, _ = shadow(telling, one_create(telling))
    telling.say("#commit", draft.halves(), rev=draft.rev)


def _hidden(telling: Telling) -> None:
    """The account writes on although it is not active: true, but nobody may show it."""
    row, draft = telling.world.draft(telling.account, one_create(telling))
    telling.instead(row, draft.outgoing(), "#commit", draft.halves(), draft.rev)


def _repeated(telling: Telling) -> None:
    row, draft = telling.world.draft(telling.account, one_create(telling))
    truth = draft.outgoing()
    both = [truth, truth._replace(lanes=telling.lanes)]
    telling.betrayed(row, both, 1, draft.rev)


def _dated(offset: int) -> Callable[[Draft, Random], None]:
    def tamper(draft: Draft, rng: Random) -> None:
        draft.rev = tid(draft.micros + offset, rng.getrandbits(10))
        draft.sign()

    return tamper


# -- rows 3, 13 and 17: the chain


def _gap(telling: Telling) -> None:
    """A commit that these lanes never tell; the next one shows it."""
    account = telling.account
    telling.withheld(*_true(telling))
    row, draft = telling.world.draft(account, one_create(telling))
    telling.betrayed(row, [draft.outgoing()], 0, draft.rev)


def _true(telling: Telling) -> tuple[dict[str, Any], Outgoing]:
    row, draft = telling.world.draft(telling.account, one_create(telling))
    return row, draft.outgoing()


def _swapped(telling: Telling) -> None:
    """Two commits in the wrong order."""
    first_row, first = _true(telling)
    telling.withheld(first_row, first)
    row, draft = telling.world.draft(telling.account, one_create(telling))
    late = first._replace(lanes=telling.lanes)
    telling.betrayed(row, [draft.outgoing(), late], 0, draft.rev)


def _branch(telling: Telling) -> None:
    """A commit upon a state that another commit has left behind; the truth goes on after it."""
    twin = telling.account.copy()
    telling.true_commit()
    draft, _ = draft_of(twin, one_create(telling), telling.world.clock())
    telling.say("#commit", draft.halves(), rev=draft.rev)
    telling.true_commit()


def _since(draft: Draft, rng: Random) -> None:
    draft.since = tid(draft.micros - _DAY)


def _no_prev_data(draft: Draft, rng: Random) -> None:
    draft.prev_data = None


def _other_prev_data(draft: Draft, rng: Random) -> None:
    draft.prev_data = some_cid(rng)


def _no_nodes(draft: Draft, rng: Random) -> None:
    draft.nodes = {}


def _no_leaf(draft: Draft, rng: Random) -> None:
    """Without the node that holds the newest record."""
    cid = draft.ops[0]["cid"]
    draft.nodes = {name: block for name, block in draft.nodes.items() if cid not in block}


def _one_op_less(draft: Draft, rng: Random) -> None:
    draft.ops = draft.ops[:1]


def _shuffled(draft: Draft, rng: Random) -> None:
    rng.shuffle(draft.ops)


def kinds() -> Iterator[Kind]:
    yield from _rows_3_to_7()
    yield from _rows_13_and_17()


def _rows_3_to_7() -> Iterator[Kind]:
    yield Kind("too_big", "3", "a true commit marked tooBig", ("desync/too_big",),
               instead(fields(lambda rng: {"tooBig": True})))  # fmt: skip
    yield Kind("rebase", "3", "a true commit marked rebase", ("desync/rebase",),
               instead(fields(lambda rng: {"rebase": True})))  # fmt: skip
    yield Kind("unregistered", "4", "a DID that the directory does not know", ("reject/identity",),
               _unregistered, "nobody")  # fmt: skip
    yield Kind("foreign", "4", "a PDS tells a commit of an account that lives elsewhere",
               ("reject/authority",), _foreign, "foreign")  # fmt: skip
    yield Kind("inactive", "5", "a forged commit of an account that is not active", ("drop/inactive",),
               beside(other_key), "inactive")  # fmt: skip
    yield Kind("inactive_true", "5", "an account that is not active writes on", ("drop/inactive",),
               _hidden, "inactive")  # fmt: skip
    yield Kind("stale_rev", "6", "a commit older than the newest", ("drop/stale_rev",),
               beside(_dated(-30 * _DAY)))  # fmt: skip
    yield Kind("repeated", "6", "the same commit twice", ("drop/stale_rev",), _repeated)
    yield Kind("future_rev", "7", "a commit from tomorrow", ("reject/future_rev",), beside(_dated(_DAY)))


def _rows_13_and_17() -> Iterator[Kind]:
    broken = ("desync/prev_data",)
    yield Kind("gap", "13", "a commit is withheld; the next one shows it", broken, _gap)
    yield Kind("swapped", "13", "two commits in the wrong order", broken, _swapped)
    yield Kind("branch", "13", "a commit upon an older state", broken, _branch)
    yield Kind("prev_data_absent", "13", "a true commit without prevData", broken, instead(_no_prev_data))
    yield Kind("since_other", "13", "legal: since names another rev", ("ok/commit", "note/since_mismatch"),
               instead(_since))  # fmt: skip
    wrong = ("reject/inversion",)
    yield Kind("prev_data_other", "17", "prevData is not what the operations lead back to", wrong,
               beside(_other_prev_data))  # fmt: skip
    yield Kind("op_hidden", "17", "a write that no operation tells", wrong, beside(_one_op_less, creates(2)))
    yield Kind("update_prev", "17", "an update of something else", wrong,
               beside(replaced(prev=lambda rng, op: some_cid(rng)), one_update), "records")  # fmt: skip
    yield Kind("delete_prev", "17", "a delete of something else", wrong,
               beside(replaced(prev=lambda rng, op: some_cid(rng)), one_delete), "records")  # fmt: skip
    short = ("desync/insufficient",)
    yield Kind("nodes_missing", "17", "a true commit without tree nodes", short, instead(_no_nodes))
    yield Kind("leaf_missing", "17", "a true commit without the changed node", short, instead(_no_leaf))
    yield Kind("ops_order", "17", "legal: operations in any order", ("ok/commit",),
               instead(_shuffled, creates(12)))  # fmt: skip
