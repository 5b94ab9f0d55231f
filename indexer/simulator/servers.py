"""The network's public faces: the PLC directory, a PDS, the relay.

Owns routes and the shapes of answers, as the lexicons and the reference servers have them; what is
true is asked of the world. One event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from indexer.simulator.account import ACTIVE, DELETED, Account
from indexer.simulator.cbor import cid_bytes, cid_text, to_json
from indexer.simulator.documents import document
from indexer.simulator.fault_delivery import WHOLE, faulty, host_name
from indexer.simulator.framelog import Lane
from indexer.simulator.stream import subscribe
from indexer.simulator.wire import car, car_chunks

if TYPE_CHECKING:
    from indexer.simulator.network import SimulatedNetwork

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CAR_TYPE = "application/vnd.ipld.car"
_ERRORS = {"takendown": "RepoTakendown", "suspended": "RepoSuspended", "deactivated": "RepoDeactivated"}


def reply(value: Any, status: int = 200, kind: str = "application/json") -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type=kind)


def refuse(error: str, message: str, status: int = 400) -> web.Response:
    return reply({"error": error, "message": message}, status)


# -- PLC directory


def plc_app(network: SimulatedNetwork) -> web.Application:
    async def answer(request: web.Request) -> web.StreamResponse:
        did = request.match_info["did"]
        account = network.world.accounts.get(did)
        if account is None:
            return reply({"message": f"DID not registered: {did}"}, 404)
        if account.tombstone:
            return reply({"message": f"DID not available: {did}"}, 410)
        return _document(network, account)

    return _app(network, "plc", {"/{did}": answer})


def _document(network: SimulatedNetwork, account: Account) -> web.Response:
    body = document(account.did, account.handle, account.key.multikey, network.pds_urls[account.pds])
    return reply(body, kind="application/did+ld+json")


# -- PDS


def pds_app(network: SimulatedNetwork, number: int) -> web.Application:
    """One PDS: what it hosts, its own stream, and the well-known answers for its handles."""
    world = network.world

    def hosted(request: web.Request, name: str = "did") -> Account:
        """The account asked for, if it is here and may be shown."""
        did = request.query.get(name, "")
        account = world.accounts.get(did) or by_handle(network, did)
        if account is None or account.status == DELETED:
            raise _Refused("RepoNotFound", f"Could not find repo for DID: {did}")
        if account.pds != number:
            raise _Refused("RepoDeactivated", f"Repo has been deactivated: {did}")
        if account.status != ACTIVE:
            raise _Refused(_ERRORS[account.status], f"Repo has been {account.status}: {did}")
        return account

    async def get_repo(request: web.Request) -> web.StreamResponse:
        account = hosted(request)
        blocks = account.blocks()
        if WHOLE.get():
            return _whole_repo(account)
        response = web.StreamResponse(headers={"Content-Type": CAR_TYPE})
        await response.prepare(request)
        for chunk in car_chunks(account.commit_cid, blocks):
            await response.write(chunk)
        await response.write_eof()
        return response

    async def get_proof(request: web.Request) -> web.StreamResponse:
        account = hosted(request)
        path = f"{request.query.get('collection', '')}/{request.query.get('rkey', '')}"
        return web.Response(body=car(account.commit_cid, account.proof(path)), content_type=CAR_TYPE)

    async def latest_commit(request: web.Request) -> web.StreamResponse:
        account = hosted(request)
        return reply({"cid": cid_text(account.commit_cid), "rev": account.rev})

    async def repo_status(request: web.Request) -> web.StreamResponse:
        did = request.query.get("did", "")
        account = world.accounts.get(did)
        if account is None or account.status == DELETED:
            return refuse("RepoNotFound", f"Could not find repo for DID: {did}")
        return reply(_status(account, number))

    async def list_repos(request: web.Request) -> web.StreamResponse:
        accounts = [item for item in world.accounts.values() if item.pds == number and item.status != DELETED]
        return _page_of_repos(request, accounts, number)

    async def get_record(request: web.Request) -> web.StreamResponse:
        account = hosted(request, "repo")
        path = f"{request.query.get('collection', '')}/{request.query.get('rkey', '')}"
        record = account.records.get(path)
        uri = f"at://{account.did}/{path}"
        if record is None or request.query.get("cid", cid_text(record.cid)) != cid_text(record.cid):
            return refuse("RecordNotFound", f"Could not locate record: {uri}")
        return reply({"uri": uri, "cid": cid_text(record.cid), "value": to_json(record.value)})

    async def list_records(request: web.Request) -> web.StreamResponse:
        return _page_of_records(request, hosted(request, "repo"))

    return _app(
        network,
        f"pds{number}",
        {
            "/xrpc/com.atproto.sync.getRepo": get_repo,
            "/xrpc/com.atproto.sync.getRecord": get_proof,
            "/xrpc/com.atproto.sync.getBlocks": _chooser(hosted),
            "/xrpc/com.atproto.sync.getLatestCommit": latest_commit,
            "/xrpc/com.atproto.sync.getRepoStatus": repo_status,
            "/xrpc/com.atproto.sync.listRepos": list_repos,
            "/xrpc/com.atproto.sync.subscribeRepos": _stream(network.pds_lanes[number]),
            "/xrpc/com.atproto.repo.getRecord": get_record,
            "/xrpc/com.atproto.repo.listRecords": list_records,
            "/xrpc/com.atproto.repo.describeRepo": _describer(network, number, hosted),
            "/xrpc/com.atproto.identity.resolveHandle": _resolver(network),
            "/.well-known/atproto-did": _well_known(network),
            "/.well-known/did.json": _did_web(network),
        },
    )


# -- relay


def relay_app(network: SimulatedNetwork, number: int = 0) -> web.Application:
    world = network.world

    def known(request: web.Request) -> Account:
        did = request.query.get("did", "")
        account = world.accounts.get(did)
        if account is None or not account.seen:
            raise _Refused("RepoNotFound", f"Could not find repo for DID: {did}", 404)
        return account

    async def get_repo(request: web.Request) -> web.StreamResponse:
        account = known(request)
        if WHOLE.get():  # what a relay serves itself is a mirror's copy
            return _whole_repo(account)
        raise web.HTTPFound(network.pds_urls[account.pds] + request.path_qs)

    async def latest_commit(request: web.Request) -> web.StreamResponse:
        account = known(request)
        if account.status != ACTIVE:
            return refuse(_ERRORS.get(account.status, "RepoNotFound"), f"account is {account.status}")
        return reply({"cid": cid_text(account.commit_cid), "rev": account.rev})

    async def repo_status(request: web.Request) -> web.StreamResponse:
        account = known(request)
        return reply(_status(account, account.pds))

    async def list_repos(request: web.Request) -> web.StreamResponse:
        return _page_of_repos(request, [item for item in world.accounts.values() if item.seen], None)

    async def list_by_collection(request: web.Request) -> web.StreamResponse:
        seen = [item for item in world.accounts.values() if item.seen and item.status == ACTIVE]
        return _page_by_collection(request, seen)

    async def list_hosts(request: web.Request) -> web.StreamResponse:
        return _page_of_hosts(request, network)

    return _app(
        network,
        f"relay{number}",
        {
            "/xrpc/com.atproto.sync.getRepo": get_repo,
            "/xrpc/com.atproto.sync.getLatestCommit": latest_commit,
            "/xrpc/com.atproto.sync.getRepoStatus": repo_status,
            "/xrpc/com.atproto.sync.listRepos": list_repos,
            "/xrpc/com.atproto.sync.listReposByCollection": list_by_collection,
            "/xrpc/com.atproto.sync.listHosts": list_hosts,
            "/xrpc/com.atproto.sync.subscribeRepos": _stream(network.relays[number]),
            "/xrpc/com.atproto.identity.resolveHandle": _resolver(network),
        },
    )


# -- shared shapes


class _Refused(Exception):
    """An XRPC error on its way out of a handler."""

    def __init__(self, error: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.error = error
        self.status = status


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except _Refused as problem:
        return refuse(problem.error, str(problem), problem.status)


def _whole_repo(account: Account) -> web.Response:
    """A repository in one piece, for a fault to work on."""
    return web.Response(body=car(account.commit_cid, account.blocks()), content_type=CAR_TYPE)


def _app(network: SimulatedNetwork, host: str, routes: dict[str, Handler]) -> web.Application:
    app = web.Application(middlewares=[faulty(network, host), _errors])
    for path, handler in routes.items():
        app.router.add_get(path, handler)
    return app


def _stream(lane: Lane) -> Handler:
    async def stream(request: web.Request) -> web.StreamResponse:
        return await subscribe(request, lane, lane=lane)

    return stream


def _resolver(network: SimulatedNetwork) -> Handler:
    async def resolve_handle(request: web.Request) -> web.StreamResponse:
        account = by_handle(network, request.query.get("handle", ""))
        if account is None:
            return refuse("HandleNotFound", "Unable to resolve handle")
        return reply({"did": account.did})

    return resolve_handle


def _well_known(network: SimulatedNetwork) -> Handler:
    async def well_known(request: web.Request) -> web.StreamResponse:
        account = by_handle(network, host_name(request))
        if account is None or account.status == DELETED:
            raise web.HTTPNotFound(text="User not found")
        return web.Response(text=account.did)

    return well_known


def _did_web(network: SimulatedNetwork) -> Handler:
    async def did_web(request: web.Request) -> web.StreamResponse:
        account = network.world.accounts.get("did:web:" + request.host.replace(":", "%3A"))
        if account is None:
            raise web.HTTPNotFound(text="Not found")
        return _document(network, account)

    return did_web


def by_handle(network: SimulatedNetwork, handle: str) -> Account | None:
    wanted = handle.lower()
    return next((item for item in network.world.accounts.values() if item.handle == wanted), None)


def _status(account: Account, pds: int | None) -> dict[str, Any]:
    """The account as PDS ``pds`` sees it: one that moved away is deactivated there."""
    status = account.status if pds is None or account.pds == pds else "deactivated"
    answer: dict[str, Any] = {"did": account.did, "active": status == ACTIVE}
    if status != ACTIVE:
        answer["status"] = status
    elif account.rev:
        answer["rev"] = account.rev
    return answer


def _limit(request: web.Request, default: int, most: int) -> int:
    text = request.query.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        raise _Refused("InvalidRequest", f"limit must be 1 to {most}")
    return int(text)


def _cids(request: web.Request) -> list[bytes]:
    try:
        return [cid_bytes(text) for text in request.query.getall("cids", [])]
    except ValueError as error:
        raise _Refused("InvalidRequest", f"Error: cids must be CIDs: {error}") from error


def _page_of_repos(request: web.Request, accounts: list[Account], pds: int | None) -> web.Response:
    """By DID; the last page has no cursor."""
    limit, cursor = _limit(request, 500, 1000), request.query.get("cursor", "")
    left = sorted((item for item in accounts if item.did > cursor), key=lambda item: item.did)
    repos = [
        _status(item, pds) | {"head": cid_text(item.commit_cid) if item.rev else "", "rev": item.rev}
        for item in left[:limit]
    ]
    answer: dict[str, Any] = {"repos": repos}
    if len(left) > limit:
        answer["cursor"] = left[limit - 1].did
    return reply(answer)


def _page_by_collection(request: web.Request, accounts: list[Account]) -> web.Response:
    """Who has records of a collection, by DID."""
    collection = request.query.get("collection", "")
    if not collection:
        raise _Refused("InvalidRequest", "collection is required")
    limit, cursor = _limit(request, 500, 2000), request.query.get("cursor", "")
    left = sorted(item.did for item in accounts if item.did > cursor and collection in _collections(item))
    answer: dict[str, Any] = {"repos": [{"did": did} for did in left[:limit]]}
    if len(left) > limit:
        answer["cursor"] = left[limit - 1]
    return reply(answer)


def _collections(account: Account) -> list[str]:
    return sorted({path.partition("/")[0] for path in account.records})


def _page_of_hosts(request: web.Request, network: SimulatedNetwork) -> web.Response:
    """The PDSes, as a relay knows them; the cursor is a number of its own."""
    limit, cursor = _limit(request, 200, 1000), request.query.get("cursor", "0")
    first = int(cursor) if cursor.isascii() and cursor.isdigit() else 0
    urls, accounts = network.pds_urls, list(network.world.accounts.values())
    hosts = [
        {
            "hostname": urls[number].partition("://")[2],
            "seq": network.pds_lanes[number].seq,
            "accountCount": sum(item.pds == number for item in accounts),
            "status": "active",
        }
        for number in range(len(urls))
    ]
    answer: dict[str, Any] = {"hosts": hosts[first : first + limit]}
    if len(hosts) > first + limit:
        answer["cursor"] = str(first + limit)
    return reply(answer)


def _describer(
    network: SimulatedNetwork, number: int, hosted: Callable[[web.Request, str], Account]
) -> Handler:
    async def describe(request: web.Request) -> web.StreamResponse:
        account = hosted(request, "repo")
        answer = {
            "did": account.did,
            "handle": account.handle,
            "didDoc": document(account.did, account.handle, account.key.multikey, network.pds_urls[number]),
            "collections": _collections(account),
            "handleIsCorrect": True,
        }
        return reply(answer)

    return describe


def _chooser(hosted: Callable[[web.Request], Account]) -> Handler:
    async def get_blocks(request: web.Request) -> web.StreamResponse:
        blocks = hosted(request).chosen(_cids(request))
        if blocks is None:
            raise _Refused("BlockNotFound", "Could not find cids")
        return web.Response(body=car(None, blocks), content_type=CAR_TYPE)

    return get_blocks


def _page_of_records(request: web.Request, account: Account) -> web.Response:
    """Newest record key first, as a PDS lists; ``reverse`` for the other way."""
    collection, cursor = request.query.get("collection", ""), request.query.get("cursor")
    limit, reverse = _limit(request, 50, 100), request.query.get("reverse") == "true"
    prefix = collection + "/"
    keys = sorted(
        (path[len(prefix) :] for path in account.records if path.startswith(prefix)), reverse=not reverse
    )
    if cursor is not None:
        keys = [key for key in keys if (key > cursor if reverse else key < cursor)]
    records = []
    for key in keys[:limit]:
        record = account.records[prefix + key]
        uri = f"at://{account.did}/{prefix}{key}"
        records.append({"uri": uri, "cid": cid_text(record.cid), "value": to_json(record.value)})
    answer: dict[str, Any] = {"records": records}
    if len(keys) > limit:
        answer["cursor"] = keys[limit - 1]
    return reply(answer)
