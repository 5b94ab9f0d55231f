"""Fetching whole repositories: a durable queue, polite hosts, complete verification, a diff applied."""

from indexer.backfill.service import Backfill

__all__ = ["Backfill"]
