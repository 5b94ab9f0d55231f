"""The simulated network's name server: TXT for handles, as a resolver asks for it."""

from __future__ import annotations

import dns.asyncquery
import dns.message
import dns.rcode
from dns.message import Message

from indexer.simulator import SimConfig, SimulatedNetwork


async def _ask(network: SimulatedNetwork, name: str, kind: str = "TXT") -> Message:
    host, _, port = network.dns_address.rpartition(":")
    return await dns.asyncquery.udp(dns.message.make_query(name, kind), host, port=int(port), timeout=5)


async def test_a_handle_names_its_did_and_a_deleted_one_nobody() -> None:
    network = SimulatedNetwork(SimConfig(accounts=2, history_accounts=0, rate=0))
    await network.start()
    try:
        did, account = next(iter(network.world.accounts.items()))
        answer = await _ask(network, f"_atproto.{account.handle.upper()}")
        assert [rdata.to_text() for rdata in answer.answer[0]] == [f'"did={did}"']
        assert (await _ask(network, f"_atproto.{account.handle}", "A")).answer == []
        for unknown in (account.handle, "_atproto.nobody.test"):
            assert (await _ask(network, unknown)).rcode() == dns.rcode.NXDOMAIN
        network.publish(network.world.set_status(did, "deleted", tombstone=True))
        assert (await _ask(network, f"_atproto.{account.handle}")).rcode() == dns.rcode.NXDOMAIN
    finally:
        await network.stop()
