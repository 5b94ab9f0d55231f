"""The network's DNS server: answers TXT for `_atproto.<handle>` with the DID, over UDP.

Owns the datagrams; who has which handle is the world's business. On the network's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from indexer.simulator.faults import DNS

if TYPE_CHECKING:
    from indexer.simulator.faults import Fault, Faults

PREFIX = "_atproto."
_TTL_S = 1
_STRANGER = "did:plc:" + "z" * 24


class NameServer(asyncio.DatagramProtocol):
    """``find(handle)`` gives the DID that has it now, None for nobody."""

    def __init__(self, find: Callable[[str], str | None], faults: Faults | None = None) -> None:
        self._find = find
        self._faults = faults
        self._transport: asyncio.DatagramTransport | None = None
        self.port = 0

    async def open(self, host: str, port: int) -> None:
        """Listens; a free port when ``port`` is 0 or taken."""
        loop = asyncio.get_running_loop()
        try:
            self._transport, _ = await loop.create_datagram_endpoint(lambda: self, (host, port))
        except OSError:
            self._transport, _ = await loop.create_datagram_endpoint(lambda: self, (host, 0))
        self.port = self._transport.get_extra_info("sockname")[1]

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        try:
            answer = self._answer(dns.message.from_wire(data))
        except dns.exception.DNSException:
            return  # not a question: nobody to answer
        if answer is not None:
            assert self._transport is not None
            self._transport.sendto(answer, addr)

    def _answer(self, query: dns.message.Message) -> bytes | None:
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.AA
        question = query.question[0] if query.question else None
        name = "" if question is None else question.name.to_text(omit_final_dot=True).lower()
        handle = name.removeprefix(PREFIX) if name.startswith(PREFIX) else ""
        did = self._find(handle) if handle else None
        fault = self._fault(did or "") if handle else None
        if fault is not None and fault.kind in ("silent", "malformed_answer"):
            return None if fault.kind == "silent" else query.to_wire()[:2] + b"\x80\x00\xff"
        if fault is not None and fault.kind == "server_failure":
            answer.set_rcode(dns.rcode.SERVFAIL)
            return answer.to_wire()
        dids = [] if did is None else [did]
        if fault is not None:
            dids = _lied(fault, did or _STRANGER)
        if question is None or not dids:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif question.rdtype == dns.rdatatype.TXT:
            texts = [f'"did={each}"' for each in dids]
            answer.answer.append(dns.rrset.from_text_list(question.name, _TTL_S, "IN", "TXT", texts))
        return answer.to_wire()

    def _fault(self, did: str) -> Fault | None:
        """What goes wrong with this question, if something does."""
        for planned in self._faults.striking("names", DNS, did) if self._faults else ():
            planned.fire("names")
            return planned.fault
        return None


def _lied(fault: Fault, did: str) -> list[str]:
    """The DIDs that a fault has the name server give in place of ``did``."""
    told = fault.value if isinstance(fault.value, str) else _STRANGER
    return {
        "wrong_did": [told],
        "malformed_did": ["did:plc:not a did"],
        "several_dids": [did, told],
        "no_name": [],
    }[fault.kind]
