"""Little servers on loopback for the tests of this folder: HTTP, HTTPS under a private authority, DNS."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from indexer.config import Settings

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def settings(**tables: Any) -> Settings:
    """Settings with ``network`` and others given as tables; small waits, so that failures come fast."""
    tables["network"] = {"timeout": 5, "connect_timeout": 2, **tables.get("network", {})}
    return Settings(**tables)


@asynccontextmanager
async def http_server(handler: Handler, *, tls: bool = False) -> AsyncIterator[int]:
    """Serves every path by ``handler`` on 127.0.0.1; yields the port."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=_contexts()[0] if tls else None).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def answering(status: int = 200, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Handler:
    """A handler with one answer."""

    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body, headers=headers)

    return handler


def server_tls() -> ssl.SSLContext:
    """The servers' side of it."""
    return _contexts()[0]


def client_tls() -> ssl.SSLContext:
    """A context that trusts the servers made here."""
    return _contexts()[1]


@cache
def _contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Server and client side of one self-signed certificate for the names used in the tests."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    names = [
        *(x509.DNSName(host) for host in ("*.example.com", "example.com", "*.example.net", "localhost")),
        x509.IPAddress(ip_address("127.0.0.1")),
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "both.pem"
        file.write_bytes(secret + pem)
        server.load_cert_chain(file)
    return server, ssl.create_default_context(cadata=pem.decode())


class FixedNames(AbstractResolver):
    """Name lookup from a table; counts what was asked."""

    def __init__(self, table: dict[str, list[str]]) -> None:
        self.table = table
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        self.asked.append(host)
        if host not in self.table:
            raise OSError(None, "no such name")
        return [
            {"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": 0}
            for address in self.table[host]
        ]

    async def close(self) -> None:
        pass


class _DnsProtocol(asyncio.DatagramProtocol):
    def __init__(self, records: dict[str, list[str] | str], asked: list[str]) -> None:
        self.records, self.asked = records, asked
        self.transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)  # not a subclass of it on 3.11

    def datagram_received(self, data: bytes, addr: Any) -> None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True)
        self.asked.append(name)
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        found = self.records.get(name)
        if isinstance(found, str):  # the name of a failure
            response.set_rcode(dns.rcode.from_text(found))
        elif found is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        else:
            texts = [f'"{text}"' for text in found]
            response.answer.append(dns.rrset.from_text_list(question.name, 60, "IN", "TXT", texts))
        self.transport.sendto(response.to_wire(), addr)


@asynccontextmanager
async def dns_server(records: dict[str, list[str] | str]) -> AsyncIterator[tuple[str, list[str]]]:
    """Answers TXT queries on 127.0.0.1: a list of texts a name, or the name of a failure code.

    Yields ``address:port`` and the list of names that were asked.
    """
    asked: list[str] = []
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _DnsProtocol(records, asked), local_addr=("127.0.0.1", 0)
    )
    try:
        yield f"127.0.0.1:{transport.get_extra_info('sockname')[1]}", asked
    finally:
        transport.close()
