"""Every fault of directories, did:web hosts and name servers: which is a no, and which no answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest

from indexer.errors import IdentityGone, IdentityUnavailable
from indexer.identity.http import HttpClient
from indexer.identity.resolver import INVALID_HANDLE, Resolver
from indexer.simulator import SimConfig, SimulatedNetwork
from indexer.simulator.account import Account
from indexer.simulator.fault_answers import KINDS
from indexer.simulator.faults import DNS, DOCUMENT, WELL_KNOWN, Fault
from tests.identity.servers import settings

WEB: Final = "did:web:localhost%3A2600"
OK, GONE, NO_ANSWER = "ok", IdentityGone, IdentityUnavailable

#: What a fault of a DID document means.
DOCUMENTS = {
    **{kind: NO_ANSWER for kind, made in KINDS.items() if DOCUMENT in made.routes},
    "status_404": GONE, "status_410": GONE, "no_key": GONE, "malformed_key": GONE, "no_pds": GONE,
    "lying_key": OK, "lying_pds": OK, "lying_handle": OK, "slow": OK,
}  # fmt: skip
#: What a fault of the name server means where the well-known file tells the truth, and where there is none.
NAMES = {
    "several_dids": (GONE, GONE), "malformed_did": (GONE, GONE), "wrong_did": (OK, OK), "no_name": (OK, GONE),
    "server_failure": (OK, NO_ANSWER), "silent": (OK, NO_ANSWER), "malformed_answer": (OK, NO_ANSWER),
}  # fmt: skip
#: What a fault of the well-known file means where DNS has no answer. A body beyond its limit is a no.
FILES = {
    **{kind: NO_ANSWER for kind, made in KINDS.items() if WELL_KNOWN in made.routes},
    **{f"status_{status}": GONE for status in (400, 401, 403, 404, 408, 410)},
    "html": GONE, "empty": GONE, "garbage": GONE, "endless": GONE, "redirect_loop": GONE,
    "redirect_scheme": GONE, "malformed_did": GONE, "wrong_did": OK, "slow": OK,
    "truncated": OK,  # it may end as another DID, which does not name the handle
}  # fmt: skip


@asynccontextmanager
async def resolving(
    directories: int = 1, **tables: Any
) -> AsyncIterator[tuple[SimulatedNetwork, Account, Account, Resolver]]:
    """A network with an account of each method, and a resolver under development rules."""
    net = SimulatedNetwork(SimConfig(accounts=0, history_accounts=0, pds=1, rate=0))
    one = net.world.accounts[net.add_account(0, handle="one.test")]
    web = net.world.accounts[net.add_account(0, handle="web.test", did=WEB)]
    await net.start()
    place = net.pds_urls[0].removeprefix("http://")
    network = {
        "allow_private": True, "timeout": "300ms", "dns_server": net.dns_address,
        "connect_to": [f"{name}={place}" for name in ("localhost:2600", "one.test:80", "one.test:443")],
    }  # fmt: skip
    chosen = settings(
        network=network, plc_urls=[net.plc_url] * directories,
        plc={"max_requests_per_s": 1000},
        identity={"dns_timeout": "100ms", "web_requests_per_s": 1000, "domain_requests_per_s": 1000}
        | tables.get("identity", {}),
        ingest={"refresh_interval": 0},
    )  # fmt: skip
    try:
        async with HttpClient(chosen.network) as http:
            resolver = Resolver(http, chosen)
            yield net, one, web, resolver
            await resolver.close()
    finally:
        await net.stop()


def _fault(host: str, kind: str, route: str, did: str, times: int | None = None) -> Fault:
    """Redirects stay on this machine, and no pause is asked for: that is `test_resolver`'s."""
    values: dict[str, float | str] = {
        "redirect_private": "http://127.0.0.1:9/", "slow": 1e5, "rate_limited_retry_after": 0,
        "rate_limited_reset": 0,
    }  # fmt: skip
    return Fault(host, kind, route, did, times, value=values.get(kind))


async def _outcome(wait: Any) -> Any:
    try:
        await wait
    except (IdentityGone, IdentityUnavailable) as error:
        return type(error)
    return OK


def test_every_fault_has_its_meaning() -> None:
    assert set(NAMES) == {kind for kind, made in KINDS.items() if DNS in made.routes}
    assert {DOCUMENT, WELL_KNOWN, DNS} <= {route for made in KINDS.values() for route in made.routes}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plc", "web"])
async def test_every_fault_of_a_did_document(method: str) -> None:
    async with resolving() as (net, plc, web, resolver):
        host, one = ("plc", plc) if method == "plc" else ("names", web)
        truth = await resolver.resolve(one.did)
        for kind, meaning in DOCUMENTS.items():
            planned = net.faults.add(_fault(host, kind, DOCUMENT, one.did))
            resolver.purge(one.did)
            assert await _outcome(resolver.resolve(one.did)) == meaning, kind
            assert planned.fired, kind
            net.faults.clear()
            if meaning is NO_ANSWER:  # remembered for a while, and asked again on request
                assert await _outcome(resolver.resolve(one.did)) is NO_ANSWER, kind
            assert (await resolver.resolve(one.did, refresh=True))[:4] == truth[:4], kind
            assert planned.fired in (1, 2, 6), kind  # a reset is tried twice, a circle followed


@pytest.mark.slow
async def test_a_second_directory_answers_where_the_first_gives_no_answer() -> None:
    async with resolving(directories=2) as (net, one, _, resolver):
        truth = await resolver.resolve(one.did)
        for kind, meaning in DOCUMENTS.items():
            resolver.purge(one.did)
            for directory in resolver._documents._directories:
                directory.last_until = directory.pace._next = 0.0
            times = {"reset": 2, "redirect_loop": 6}.get(kind, 1)
            planned = net.faults.add(_fault("plc", kind, DOCUMENT, one.did, times))
            if meaning is GONE:
                assert await _outcome(resolver.resolve(one.did)) is GONE, kind
            else:
                told = await resolver.resolve(one.did)
                assert meaning is OK or told[:4] == truth[:4], kind
            assert planned.left == 0, kind
            net.faults.clear()


async def test_every_fault_of_the_name_server() -> None:
    async with resolving() as (net, one, _, resolver):
        for kind, meanings in NAMES.items():
            for meaning, file in zip(meanings, ("there", "missing"), strict=True):
                resolver.purge(one.did)  # also whom its handle names
                planned = net.faults.add(_fault("names", kind, DNS, one.did))
                if file == "missing":
                    net.faults.add(_fault("names", "status_404", WELL_KNOWN, one.did))
                asked = resolver.resolve_handle(one.handle, refresh=True)
                assert await _outcome(asked) == meaning, (kind, file)
                assert planned.fired, kind
                expected = one.handle if meaning == OK and kind != "wrong_did" else INVALID_HANDLE
                assert await resolver.verified_handle(one.did) == expected, (kind, file)
                net.faults.clear()
        assert await resolver.resolve_handle(one.handle, refresh=True) == one.did


@pytest.mark.slow
async def test_every_fault_of_the_well_known_file() -> None:
    async with resolving() as (net, one, _, resolver):
        for kind, meaning in FILES.items():
            resolver.purge(one.did)
            net.faults.add(_fault("names", "no_name", DNS, one.did))
            planned = net.faults.add(_fault("names", kind, WELL_KNOWN, one.did))
            outcome = await _outcome(resolver.resolve_handle(one.handle, refresh=True))
            assert outcome == meaning or (kind, outcome) == ("truncated", GONE), kind
            assert planned.fired, kind
            lie = kind in ("wrong_did", "truncated")
            expected = one.handle if meaning == OK and not lie else INVALID_HANDLE
            assert await resolver.verified_handle(one.did) == expected, kind
            net.faults.clear()


async def test_one_question_serves_all_who_ask_while_the_directory_takes_its_time() -> None:
    async with resolving() as (net, one, _, resolver):
        planned = net.faults.add(Fault("plc", "slow", value=5000))
        told = await asyncio.gather(*(resolver.resolve(one.did) for _ in range(200)))
        assert (len(set(told)), planned.fired) == (1, 1)
        net.faults.clear()
        planned = net.faults.add(Fault("plc", "status_503"))
        resolver.purge(one.did)
        errors = [_outcome(resolver.resolve(one.did)) for _ in range(200)]
        assert set(await asyncio.gather(*errors)) == {NO_ANSWER}
        assert await _outcome(resolver.resolve(one.did)) is NO_ANSWER
        assert planned.fired == 1


async def test_a_flood_of_dids_stays_within_the_caches() -> None:
    async with resolving(identity={"cache_entries": 50}) as (net, *_, resolver):
        planned = net.faults.add(Fault("plc", "status_404"))
        letters = str.maketrans("0189", "abcd")
        dids = [f"did:plc:{number:024d}".translate(letters) for number in range(200)]
        await asyncio.gather(*(_outcome(resolver.resolve(did)) for did in set(dids)))
        assert planned.fired == len(set(dids)) > 50
        assert (len(resolver._identities._failed), resolver.stats()["in_flight"]) == (50, 0)
