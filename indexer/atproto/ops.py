"""The operations of a commit, as a frame's message states them, and what each must have.

Owns row 14 of sync.md §2. Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from indexer.atproto import syntax
from indexer.atproto.types import Cid, Path
from indexer.errors import CommitError, SyntaxInvalid

MAX_OPS: Final = 200


class Op(NamedTuple):
    """One operation of a commit: ``cid`` is the new record (None: deleted), ``prev`` the old (None: new)."""

    action: str
    path: Path
    cid: Cid | None
    prev: Cid | None


def check_ops(ops: Sequence[Op], max_ops: int = MAX_OPS) -> None:
    """Raise `CommitError` unless the operations are well-formed and name no path twice."""
    if len(ops) > max_ops:
        raise CommitError(f"{len(ops)} operations, more than {max_ops}", reason="ops_count")
    for op in ops:
        fault = _op_fault(op)
        if fault:
            raise CommitError(f"operation {op.action!r} on {op.path!r}: {fault}"[:300], reason="ops")
    if len({op.path for op in ops}) != len(ops):
        raise CommitError("two operations on one path", reason="ops")


def _op_fault(op: Op) -> str:
    try:
        syntax.check_path(op.path)
    except SyntaxInvalid as error:
        return str(error)
    match op.action:
        case "create":
            fine, rule = op.cid is not None and op.prev is None, "a create has a cid and no prev"
        case "update":
            fine = op.cid is not None and op.prev is not None and op.cid != op.prev
            rule = "an update has a cid and another prev"
        case "delete":
            fine, rule = op.cid is None and op.prev is not None, "a delete has a prev and no cid"
        case _:
            fine, rule = False, "unknown action"
    return "" if fine else rule
