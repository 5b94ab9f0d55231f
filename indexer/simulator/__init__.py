"""A small real-looking network on localhost: PLC directory, PDSes and a relay, with a ledger of ground truth.

Imports nothing of the rest of the project and speaks only public wire formats, so that what it says
and what the indexer understands are two independent readings of the same specifications.
"""

from indexer.simulator.network import SimConfig, SimulatedNetwork

__all__ = ["SimConfig", "SimulatedNetwork"]
