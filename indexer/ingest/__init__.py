"""Following upstreams: sources, the verifying pipeline, the per-repository state machine.

`Ingest` is loaded when it is asked for, so that a verifier process, which needs `indexer.ingest.verify`
alone, starts without sockets and store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from indexer.ingest.service import Ingest

__all__ = ["Ingest"]


def __getattr__(name: str) -> Any:
    if name == "Ingest":
        from indexer.ingest.service import Ingest

        return Ingest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
