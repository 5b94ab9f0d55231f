"""The network's DNS server: answers TXT for `_atproto.<handle>` with the DID, over UDP.

Owns the datagrams; who has which handle is the world's business. On the network's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

PREFIX = "_atproto."
_TTL_S = 1


class NameServer(asyncio.DatagramProtocol):
    """``find(handle)`` gives the DID that has it now, None for nobody."""

    def __init__(self, find: Callable[[str], str | None]) -> None:
        self._find = find
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
        assert self._transport is not None
        self._transport.sendto(answer.to_wire(), addr)

    def _answer(self, query: dns.message.Message) -> dns.message.Message:
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.AA
        question = query.question[0] if query.question else None
        name = "" if question is None else question.name.to_text(omit_final_dot=True).lower()
        did = self._find(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if question is None or did is None:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif question.rdtype == dns.rdatatype.TXT:
            answer.answer.append(dns.rrset.from_text(question.name, _TTL_S, "IN", "TXT", f'"did={did}"'))
        return answer
