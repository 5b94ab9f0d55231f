from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic, time
from typing import Any

import pytest
from aiohttp import web

from indexer.errors import IdentityError, IdentityGone, IdentityUnavailable
from indexer.identity.documents import web_url
from indexer.identity.guard import GuardedResolver
from indexer.identity.http import HttpClient
from indexer.identity.resolver import INVALID_HANDLE, MAX_MESSAGE, Resolver
from tests.identity.servers import FixedNames, client_tls, http_server, settings
from tests.identity.test_cache import Clock
from tests.paths import DATA

KEYS = json.loads((DATA / "vectors" / "signatures.json").read_text())["vectors"]
ANN = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"
BOB = "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb"


def document(did: str, key: int = 0, handle: str = "ann.example.com", **changes: Any) -> dict[str, Any]:
    return {
        "id": did,
        "alsoKnownAs": [f"at://{handle}"],
        "verificationMethod": [
            {
                "id": f"{did}#atproto",
                "type": "Multikey",
                "controller": did,
                "publicKeyMultibase": KEYS[key]["multikey"],
            }
        ],
        "service": [
            {
                "id": "#atproto_pds",
                "type": "AtprotoPersonalDataServer",
                "serviceEndpoint": "https://pds.example.com",
            }
        ],
        **changes,
    }


class Directory:
    """A PLC directory: documents or plain answers by DID, and a count of what was asked."""

    def __init__(self, **answers: Any) -> None:
        self.documents: dict[str, Any] = answers
        self.asked: Counter[str] = Counter()
        self.headers = {"Retry-After": "0"}  # of a 429
        self.wait: Callable[[], Awaitable[object]] | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        did = request.path[1:]
        self.asked[did] += 1
        if self.wait is not None:
            await self.wait()
        answer = self.documents.get(did, 404)
        if isinstance(answer, int):
            headers = self.headers if answer == 429 else {}
            return web.Response(status=answer, headers=headers)
        if isinstance(answer, bytes):
            return web.Response(body=answer)
        return web.json_response(answer, content_type="application/did+ld+json")


@asynccontextmanager
async def resolving(
    *directories: Directory, clock: Clock | None = None, **tables: Any
) -> AsyncIterator[Resolver]:
    """A resolver whose PLC directories are ``directories``, in order."""
    async with _served(list(directories)) as urls:
        chosen = settings(
            network={"allow_private": True}, plc_urls=urls, **{"plc": {"max_requests_per_s": 1000}, **tables}
        )
        async with HttpClient(chosen.network) as http:
            resolver = Resolver(http, chosen, clock=clock or Clock())
            try:
                yield resolver
            finally:
                await resolver.close()


@asynccontextmanager
async def _served(directories: list[Directory]) -> AsyncIterator[list[str]]:
    if not directories:
        yield []
        return
    async with http_server(directories[0].handle) as port, _served(directories[1:]) as rest:
        yield [f"http://127.0.0.1:{port}", *rest]


async def test_an_identity() -> None:
    directory = Directory(**{ANN: document(ANN)})
    async with resolving(directory) as resolver:
        identity = await resolver.resolve(ANN)
        assert identity[:4] == (ANN, "ann.example.com", KEYS[0]["did_key"], "https://pds.example.com")
        assert identity.fetched_at > 1_700_000_000_000_000


async def test_an_identity_without_a_handle() -> None:
    async with resolving(Directory(**{ANN: document(ANN, alsoKnownAs=[])})) as resolver:
        assert (await resolver.resolve(ANN)).handle == ""


async def test_an_identity_is_asked_for_once_until_its_time_is_over() -> None:
    directory, clock = Directory(**{ANN: document(ANN)}), Clock()
    async with resolving(directory, clock=clock, identity={"ttl": "60s"}) as resolver:
        assert resolver.cached(ANN) is None
        first = await resolver.resolve(ANN)
        assert await resolver.resolve(ANN) is first
        assert resolver.cached(ANN) is first
        assert directory.asked[ANN] == 1
        clock.now += 60
        assert resolver.cached(ANN) is None
        directory.documents[ANN] = document(ANN, key=3)
        assert (await resolver.resolve(ANN)).signing_key == KEYS[3]["did_key"]


async def test_refresh_and_purge_ask_again() -> None:
    directory = Directory(**{ANN: document(ANN)})
    async with resolving(directory) as resolver:
        await resolver.resolve(ANN)
        directory.documents[ANN] = document(ANN, key=1)
        assert (await resolver.resolve(ANN)).signing_key == KEYS[0]["did_key"]
        assert (await resolver.resolve(ANN, refresh=True)).signing_key == KEYS[1]["did_key"]
        directory.documents[ANN] = document(ANN, key=2)
        assert (await resolver.resolve(ANN)).signing_key == KEYS[1]["did_key"]
        resolver.purge(ANN)
        assert resolver.cached(ANN) is None
        assert (await resolver.resolve(ANN)).signing_key == KEYS[2]["did_key"]


async def test_a_purge_forgets_a_failure() -> None:
    directory = Directory(**{ANN: 404})
    async with resolving(directory) as resolver:
        for _ in range(2):
            with pytest.raises(IdentityGone):
                await resolver.resolve(ANN)
        assert directory.asked[ANN] == 1  # remembered
        directory.documents[ANN] = document(ANN)
        resolver.purge(ANN)
        assert (await resolver.resolve(ANN)).did == ANN


async def test_the_cache_has_an_end() -> None:
    dids = [f"did:plc:{letter * 24}" for letter in "abcdef"]
    directory = Directory(**{did: document(did) for did in dids})
    async with resolving(directory, identity={"cache_entries": 3}) as resolver:
        for did in dids:
            await resolver.resolve(did)
        assert [did for did in dids if resolver.cached(did)] == dids[3:]
        assert resolver.stats() == {"identities": 3, "handles": 0, "in_flight": 0}


async def test_many_callers_share_one_request() -> None:
    directory, gate = Directory(**{ANN: document(ANN)}), asyncio.Event()
    directory.wait = gate.wait
    async with resolving(directory) as resolver:
        calls = [asyncio.create_task(resolver.resolve(ANN)) for _ in range(50)]
        while not directory.asked[ANN]:
            await asyncio.sleep(0)
        calls[0].cancel()  # who leaves takes nothing from the others
        gate.set()
        identities = await asyncio.gather(*calls[1:])
        assert len(set(identities)) == 1
        assert directory.asked[ANN] == 1


async def test_a_shared_failure_is_an_error_for_each_caller() -> None:
    directory, gate = Directory(**{ANN: 500}), asyncio.Event()
    directory.wait = gate.wait
    async with resolving(directory) as resolver:
        calls = [asyncio.create_task(resolver.resolve(ANN)) for _ in range(3)]
        gate.set()
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(error, IdentityUnavailable) for error in errors)
        assert len({id(error) for error in errors}) == 3


async def test_an_answer_under_way_when_the_did_is_purged_is_not_kept() -> None:
    directory, gate = Directory(**{ANN: document(ANN)}), asyncio.Event()
    directory.wait = gate.wait
    async with resolving(directory) as resolver:
        old = asyncio.create_task(resolver.resolve(ANN))
        while not directory.asked[ANN]:
            await asyncio.sleep(0)
        resolver.purge(ANN)
        new = asyncio.create_task(resolver.resolve(ANN))
        gate.set()
        await asyncio.gather(old, new)
        assert directory.asked[ANN] == 2
        assert resolver.cached(ANN) is new.result()


async def test_what_is_under_way_ends_with_the_resolver() -> None:
    directory, gate = Directory(**{ANN: document(ANN)}), asyncio.Event()
    directory.wait = gate.wait
    async with resolving(directory) as resolver:
        call = asyncio.create_task(resolver.resolve(ANN))
        while not directory.asked[ANN]:
            await asyncio.sleep(0)
        await resolver.close()
        with pytest.raises(asyncio.CancelledError):
            await call
        gate.set()


@pytest.mark.parametrize(
    ("answer", "error", "tombstone"),
    [
        (404, IdentityGone, False),
        (410, IdentityGone, True),
        (400, IdentityUnavailable, None),
        (403, IdentityUnavailable, None),
        (429, IdentityUnavailable, None),
        (500, IdentityUnavailable, None),
        (502, IdentityUnavailable, None),
        (b"<html>", IdentityUnavailable, None),
        (b"", IdentityUnavailable, None),
        ([], IdentityUnavailable, None),
        (document(BOB), IdentityUnavailable, None),
        (document(ANN, verificationMethod=[]), IdentityGone, False),
        (document(ANN, service=[]), IdentityGone, False),
        (document(ANN, padding="x" * 70_000), IdentityUnavailable, None),
    ],
)
async def test_what_an_answer_means(answer: Any, error: type[IdentityError], tombstone: bool | None) -> None:
    directory, clock = Directory(**{ANN: answer}), Clock()
    async with resolving(directory, clock=clock) as resolver:
        for _ in range(2):  # the second time from memory
            with pytest.raises(error) as raised:
                await resolver.resolve(ANN)
            assert getattr(raised.value, "tombstone", None) == tombstone
        assert directory.asked[ANN] == 1
        assert resolver.cached(ANN) is None
        clock.now += 120  # identity.error_ttl
        directory.documents[ANN] = document(ANN)
        assert (await resolver.resolve(ANN)).did == ANN


@pytest.mark.parametrize("answer", [b"<html>" + b"x" * 50_000, document(BOB, padding="x" * 50_000), 500])
async def test_a_remembered_failure_keeps_nothing_of_the_answer(answer: Any) -> None:
    async with resolving(Directory(**{ANN: answer})) as resolver:
        with pytest.raises(IdentityError):
            await resolver.resolve(ANN)
        failure = resolver._identities._failed.get(ANN)
        assert failure is not None
        assert (failure.__traceback__, failure.__cause__, failure.__context__) == (None, None, None)
        for _ in range(2):
            with pytest.raises(type(failure)):
                await resolver.resolve(ANN)
        assert failure.__traceback__ is None


async def test_a_remembered_failure_has_a_short_message() -> None:
    directory = Directory(**{"x" * 3_000: 410})

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.path == f"/{ANN}":
            return web.Response(status=302, headers={"Location": "/" + "x" * 3_000})
        return await directory.handle(request)

    async with http_server(handle) as port:
        chosen = settings(network={"allow_private": True}, plc_urls=[f"http://127.0.0.1:{port}"])
        async with HttpClient(chosen.network) as http:
            resolver = Resolver(http, chosen)
            for length in (3_000, MAX_MESSAGE):  # the first time from the directory, then from memory
                with pytest.raises(IdentityGone, match="status 410") as raised:
                    await resolver.resolve(ANN)
                assert raised.value.tombstone
                assert len(str(raised.value)) >= length
            assert len(str(raised.value)) == MAX_MESSAGE


async def test_a_host_that_does_not_answer_in_time() -> None:
    directory, gate = Directory(**{ANN: document(ANN)}), asyncio.Event()
    directory.wait = gate.wait
    async with http_server(directory.handle) as port:
        chosen = settings(
            network={"allow_private": True, "timeout": "50ms"}, plc_urls=[f"http://127.0.0.1:{port}"]
        )
        async with HttpClient(chosen.network) as http:
            with pytest.raises(IdentityUnavailable, match="within"):
                await Resolver(http, chosen).resolve(ANN)
        gate.set()


async def test_a_failed_refresh_leaves_the_last_answer() -> None:
    directory = Directory(**{ANN: document(ANN)})
    async with resolving(directory) as resolver:
        known = await resolver.resolve(ANN)
        directory.documents[ANN] = 503
        with pytest.raises(IdentityUnavailable):
            await resolver.resolve(ANN, refresh=True)
        assert await resolver.resolve(ANN) is known
        directory.documents[ANN] = 410
        with pytest.raises(IdentityGone):
            await resolver.resolve(ANN, refresh=True)
        assert resolver.cached(ANN) is None


@pytest.mark.parametrize(
    "did",
    [
        "did:plc:short", "did:plc:EWVI7NXZYOUN6ZHXRHS64OIZ", "did:plc:ewvi7nxzyoun6zhxrhs64oi1",
        "did:plc:../../x", f"{ANN}/log",
        "did:key:zQ3shqwJEJyMBsBXCWyCBpUBMqxcon9oHB7mCvx4sSpMdLJwc", "did:web:",
        "did:web:localhost", "did:web:host", "did:web:1.2.3.4", "did:web:example.com:users:ann",
        "did:web:example.com%3A8080", "did:web:example.com/path", "did:web:ann@example.com",
        "did:web:localhost%3A99", "did:web:Example.com", "nonsense", "",
    ],
)  # fmt: skip
async def test_dids_that_the_network_has_not_are_never_asked_for(did: str) -> None:
    async with HttpClient(settings().network) as http:
        with pytest.raises(IdentityGone):
            await Resolver(http, settings()).resolve(did)


async def test_the_next_directory_is_asked_when_one_does_not_answer() -> None:
    down, up = Directory(**{ANN: 503}), Directory(**{ANN: document(ANN)})
    async with resolving(down, up) as resolver:
        assert (await resolver.resolve(ANN)).did == ANN
    assert (down.asked[ANN], up.asked[ANN]) == (1, 1)


async def test_a_lying_directory_does_not_speak_for_the_others() -> None:
    async with resolving(Directory(**{ANN: document(BOB)}), Directory(**{ANN: document(ANN)})) as resolver:
        assert (await resolver.resolve(ANN)).did == ANN
    for order in (1, -1):
        both = [Directory(**{ANN: document(BOB)}), Directory(**{ANN: 503})][::order]
        async with resolving(*both) as resolver:
            with pytest.raises(IdentityUnavailable):
                await resolver.resolve(ANN)


async def test_a_directory_without_an_answer_is_asked_after_the_others_for_a_while() -> None:
    clock, dids = Clock(), [ANN, BOB, "did:plc:" + "c" * 24]
    documents = {did: document(did) for did in dids}
    down, up = Directory(**dict.fromkeys(dids, 503)), Directory(**documents)
    async with resolving(
        down, up, clock=clock, plc={"max_requests_per_s": 1000, "failover_time": 60}
    ) as resolver:
        for did in dids[:2]:
            assert (await resolver.resolve(did)).did == did
        assert (down.asked.total(), up.asked.total()) == (1, 2)
        up.documents[ANN] = 503  # both are: the first gets its turn all the same
        down.documents = documents
        assert (await resolver.resolve(ANN, refresh=True)).did == ANN
        assert down.asked[ANN] == 2
        clock.now += 61
        assert (await resolver.resolve(dids[2])).did == dids[2]
        assert (down.asked.total(), up.asked.total()) == (3, 3)


async def test_a_directory_that_asks_for_patience_holds_nobody_back_where_there_is_another() -> None:
    busy, up = Directory(**{ANN: 429, BOB: 429}), Directory(**{ANN: document(ANN), BOB: document(BOB)})
    busy.headers = {"RateLimit-Reset": "3600"}
    async with resolving(busy, up) as resolver:
        async with asyncio.timeout(5):
            assert (await resolver.resolve(ANN)).did == ANN
            assert (await resolver.resolve(BOB)).did == BOB
        assert busy.asked.total() == 1
        paces = [directory.pace for directory in resolver._documents._directories]
        assert paces[0]._next - monotonic() > 30
        assert paces[1]._next - monotonic() < 1


async def test_a_directorys_no_is_final() -> None:
    no, yes = Directory(**{ANN: 410}), Directory(**{ANN: document(ANN)})
    async with resolving(no, yes) as resolver:
        with pytest.raises(IdentityGone):
            await resolver.resolve(ANN)
    assert yes.asked[ANN] == 0


async def test_without_a_directory_there_is_no_answer() -> None:
    async with resolving() as resolver:
        with pytest.raises(IdentityUnavailable, match="plc_urls"):
            await resolver.resolve(ANN)


async def test_a_directory_that_the_guard_refuses_is_our_own_fault() -> None:
    chosen = settings(plc_urls=["http://127.0.0.1:2582"])
    async with HttpClient(chosen.network) as http:
        with pytest.raises(IdentityUnavailable, match="plc_urls"):
            await Resolver(http, chosen).resolve(ANN)


@pytest.mark.parametrize(
    ("did", "local", "url"),
    [
        ("did:web:ann.example.com", False, "https://ann.example.com/.well-known/did.json"),
        ("did:web:ann.example.com", True, "https://ann.example.com/.well-known/did.json"),
        ("did:web:localhost%3A2600", True, "http://localhost:2600/.well-known/did.json"),
        ("did:web:localhost%3a2600", True, "http://localhost:2600/.well-known/did.json"),
        ("did:web:localhost", True, "http://localhost:80/.well-known/did.json"),
    ],
)
def test_where_a_did_web_is(did: str, local: bool, url: str) -> None:
    assert web_url(did, allow_local=local) == url


@asynccontextmanager
async def web_resolving(
    handler: Any, *hosts: str, names: dict[str, list[str]] | None = None
) -> AsyncIterator[Resolver]:
    """A resolver under the public rules that finds ``hosts`` on a local TLS port."""
    async with http_server(handler, tls=True) as port:
        chosen = settings(
            network={"connect_to": [f"{host}:443=127.0.0.1:{port}" for host in hosts]}, plc_urls=[]
        )
        http = HttpClient(chosen.network, tls=client_tls())
        http.resolver = GuardedResolver(chosen.network, FixedNames(names or {}))
        async with http:
            yield Resolver(http, chosen)


async def test_a_did_web() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.path == "/.well-known/did.json"
        return web.json_response(document(f"did:web:{request.host}"))

    async with web_resolving(handler, "ann.example.com") as resolver:
        assert (await resolver.resolve("did:web:ann.example.com")).signing_key == KEYS[0]["did_key"]


async def test_a_did_web_on_this_machine_in_development() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(document("did:web:localhost%3A2600"))

    async with http_server(handler) as port:
        override = f"localhost:2600=127.0.0.1:{port}"
        chosen = settings(network={"allow_private": True, "connect_to": [override]})
        async with HttpClient(chosen.network) as http:
            assert (
                await Resolver(http, chosen).resolve("did:web:localhost%3A2600")
            ).handle == "ann.example.com"


async def test_a_did_web_that_points_inside_is_no_document() -> None:
    async def to_inside(_: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "https://inside.example.com/"})

    names = {"inside.example.com": ["10.0.0.1"], "bob.example.com": ["127.0.0.1"]}
    async with web_resolving(to_inside, "ann.example.com", names=names) as resolver:
        for host, error in (("ann", IdentityUnavailable), ("bob", IdentityGone)):
            with pytest.raises(error, match="not a public address"):
                await resolver.resolve(f"did:web:{host}.example.com")


async def test_a_did_web_that_redirects_in_a_circle_gives_no_answer() -> None:
    async def around(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": request.path})

    async with web_resolving(around, "ann.example.com") as resolver:
        with pytest.raises(IdentityUnavailable, match="redirects"):
            await resolver.resolve("did:web:ann.example.com")


@asynccontextmanager
async def with_handles(
    claimed: str, named: dict[str, str | int], clock: Clock | None = None, shared_s: float = 0
) -> AsyncIterator[tuple[Resolver, Directory, Counter[str]]]:
    """A resolver where ANN claims ``claimed`` and the hosts ``named`` answer with a DID or a status."""
    directory, asked = Directory(**{ANN: document(ANN, handle=claimed)}), Counter[str]()

    async def well_known(request: web.Request) -> web.Response:
        assert request.path == "/.well-known/atproto-did"
        asked[request.host] += 1
        answer = named.get(request.host, 404)
        return web.Response(status=answer) if isinstance(answer, int) else web.Response(text=answer)

    async with http_server(directory.handle) as plc, http_server(well_known) as port:
        hosts = [f"{host}:80=127.0.0.1:{port}" for host in (claimed.lower(), *named)]
        chosen = settings(
            network={"allow_private": True, "connect_to": hosts},
            plc_urls=[f"http://127.0.0.1:{plc}"],
            ingest={"refresh_interval": shared_s},
        )
        http = HttpClient(chosen.network)
        http.resolver = GuardedResolver(chosen.network, FixedNames({}))
        async with http:
            yield Resolver(http, chosen, clock=clock or Clock()), directory, asked


async def test_a_handle_counts_when_both_sides_say_so() -> None:
    async with with_handles("Ann.test", {"ann.test": ANN, "bob.test": f" {BOB}\n"}) as (resolver, _, asked):
        assert await resolver.verified_handle(ANN) == "ann.test"
        assert await resolver.resolve_handle("BOB.test") == BOB
        assert await resolver.resolve_handle("bob.test") == BOB
        assert asked == {"ann.test": 1, "bob.test": 1}


@pytest.mark.parametrize("answer", [BOB, 404, 500, "not a did", ""])
async def test_a_handle_that_one_side_denies_is_invalid(answer: str | int) -> None:
    async with with_handles("ann.test", {"ann.test": answer}) as (resolver, _, _asked):
        assert await resolver.verified_handle(ANN) == INVALID_HANDLE


async def test_the_handle_of_a_did_without_document_or_name_is_invalid() -> None:
    async with resolving(Directory(**{ANN: document(ANN, alsoKnownAs=[])})) as resolver:
        assert await resolver.verified_handle(ANN) == INVALID_HANDLE
        assert await resolver.verified_handle(BOB) == INVALID_HANDLE
        assert await resolver.verified_handle("nonsense") == INVALID_HANDLE


async def test_a_purge_forgets_whom_the_handle_named() -> None:
    named: dict[str, str | int] = {"ann.test": BOB}
    async with with_handles("ann.test", named) as (resolver, _, _asked):
        assert await resolver.verified_handle(ANN) == INVALID_HANDLE
        named["ann.test"] = ANN
        assert await resolver.verified_handle(ANN) == INVALID_HANDLE
        resolver.purge(ANN)
        assert await resolver.verified_handle(ANN) == "ann.test"


async def test_an_answer_about_a_handle_is_shared_for_a_while_whoever_claims_it() -> None:
    clock = Clock()
    async with with_handles("ann.test", {"ann.test": BOB}, clock, 10.0) as (resolver, _, asked):
        before = int(time() * 1e6)
        assert resolver.handle_wait_s("ann.test", before) == 0
        for _ in range(20):
            assert await resolver.resolve_handle("Ann.test", refresh=True) == BOB
            await resolver.resolve(ANN)
            resolver.purge(ANN)
        assert asked["ann.test"] == 1
        # It counts for a claim that was made before it was asked for; a later one waits.
        assert resolver.handle_wait_s("ann.test", before) == 0
        assert 9 < resolver.handle_wait_s("ann.test", int(time() * 1e6)) <= 10
        clock.now += 10
        assert resolver.handle_wait_s("ann.test", int(time() * 1e6)) == 0
        assert await resolver.resolve_handle("ann.test", refresh=True) == BOB
        assert asked["ann.test"] == 2
