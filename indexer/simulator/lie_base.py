"""What a kind of lie is, and the two ways most of them are told: beside a true commit or instead of one.

Owns the form of the table of kinds and the writes that lies are about. What each kind says is in
`lie_fields`, `lie_commits`, `lie_words`, `lie_sockets` and `hostile_trees`. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from indexer.simulator.account import Account, ActionError, Write
from indexer.simulator.cbor import Link, block_cid
from indexer.simulator.content import POST
from indexer.simulator.draft import Draft, draft_of
from indexer.simulator.keys import SigningKey
from indexer.simulator.tree import key_layer
from indexer.simulator.wire import tid, timestamp

if TYPE_CHECKING:
    from indexer.simulator.lies import Telling

Tell = Callable[["Telling"], None]
Tamper = Callable[[Draft, Random], None]
Choose = Callable[["Telling"], list[Write]]


class Kind(NamedTuple):
    """``expect``: what the indexer counts for it, each once, as outcome/reason, in a synced repository.

    ``row`` is the row of the commit table, or another place of the rules. ``needs`` tells of whom it can be
    told: an active account, one with records, one that is inactive, one that is foreign to the lying PDS,
    or nobody. ``chance``: it is also told by chance.
    """

    name: str
    row: str
    about: str
    expect: tuple[str, ...]
    tell: Tell
    needs: str = "active"
    chance: bool = True


def beside(tamper: Tamper, choose: Choose | None = None) -> Tell:
    """A commit that the account never made, under its true key unless ``tamper`` signs otherwise."""

    def tell(telling: Telling) -> None:
        draft, _ = shadow(telling, (choose or one_create)(telling))
        tamper(draft, telling.rng)
        telling.say("#commit", draft.halves(), rev=draft.rev)

    return tell


def instead(tamper: Tamper, choose: Choose | None = None) -> Tell:
    """A true commit, which the lie's lanes tell otherwise."""

    def tell(telling: Telling) -> None:
        row, draft = telling.world.draft(telling.account, (choose or one_create)(telling))
        truth = draft.outgoing()
        tamper(draft, telling.rng)
        telling.instead(row, truth, "#commit", draft.halves(), draft.rev)

    return tell


def shadow(telling: Telling, writes: Sequence[Write]) -> tuple[Draft, Account]:
    """A commit on a copy of the account, and the copy."""
    twin = telling.account.copy()
    return draft_of(twin, writes, telling.world.clock())[0], twin


# -- writes


def one_create(telling: Telling) -> list[Write]:
    return creates(1)(telling)


def creates(count: int) -> Choose:
    """So many new posts."""

    def choose(telling: Telling) -> list[Write]:
        return [post(telling, tid(telling.world.clock(), telling.rng.getrandbits(10))) for _ in range(count)]

    return choose


def on_layers(*layers: int) -> Choose:
    """New posts under rising keys, each on its layer of the tree."""

    def choose(telling: Telling) -> list[Write]:
        return [post(telling, mined(telling, layer)) for layer in layers]

    return choose


def mined(telling: Telling, layer: int, collection: str = POST) -> str:
    """A record key that puts a record on that layer, above those before."""
    while True:
        rkey = tid(telling.world.clock(), telling.rng.getrandbits(10))
        if key_layer(f"{collection}/{rkey}".encode()) == layer:
            return rkey


def post(telling: Telling, rkey: str, **fields: Any) -> Write:
    micros = telling.world.clock()
    value = {"$type": POST, "text": f"a lie {rkey}", "langs": ["en"], "createdAt": timestamp(micros)}
    return Write("create", f"{POST}/{rkey}", value | fields)


def one_update(telling: Telling) -> list[Write]:
    path = _some_path(telling)
    note = f"changed {telling.rng.getrandbits(40):x}"
    return [Write("update", path, {"$type": path.partition("/")[0], "note": note})]


def one_delete(telling: Telling) -> list[Write]:
    return [Write("delete", _some_path(telling), None)]


def _some_path(telling: Telling) -> str:
    path = telling.account.some_path(telling.rng)
    if path is None:
        raise ActionError(f"{telling.kind.name} needs an account with records")
    return path


def some_cid(rng: Random) -> Link:
    """The CID of nothing that exists."""
    return block_cid(rng.randbytes(16))


# -- common tampering


def other_key(draft: Draft, rng: Random) -> None:
    """Signed by somebody else."""
    draft.sign(key=SigningKey.derive(draft.key.curve, f"other/{rng.getrandbits(64)}"))


def replaced(**more: Any) -> Tamper:
    """Other fields for the first operation; a callable gets the generator and the operation."""

    def tamper(draft: Draft, rng: Random) -> None:
        op = draft.ops[0]
        op |= {name: value(rng, op) if callable(value) else value for name, value in more.items()}

    return tamper
