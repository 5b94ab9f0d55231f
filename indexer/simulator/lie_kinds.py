"""The table of all kinds of lies, by name."""

from __future__ import annotations

from indexer.simulator import hostile_trees, lie_chain, lie_commits, lie_fields, lie_sockets, lie_words
from indexer.simulator.lie_base import Kind

__all__ = ["KINDS", "Kind"]

_PARTS = (lie_sockets, lie_fields, lie_chain, lie_commits, hostile_trees, lie_words)
KINDS: dict[str, Kind] = {kind.name: kind for part in _PARTS for kind in part.kinds()}
