"""Fetching whole repositories: a durable queue, polite hosts, complete verification, a diff applied.

`Backfill` is loaded when it is asked for, so that a verifier process, which needs
`indexer.backfill.verify` alone, does not load the store and the network with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from indexer.backfill.service import Backfill

__all__ = ["Backfill"]


def __getattr__(name: str) -> Any:
    if name == "Backfill":
        from indexer.backfill.service import Backfill

        return Backfill
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
