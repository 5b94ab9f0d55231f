"""`indexer demo`: the daemon against an embedded simulated network, checked against its ledger."""

from indexer.commands.demo.command import demo

__all__ = ["demo"]
