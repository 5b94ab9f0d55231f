"""The control API: read the ledger, pause and pace the generator, make things happen on request.

Owns its routes and the checks of what it is sent. For tests, the demo and curious people. One event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from indexer.simulator.account import ActionError, Write
from indexer.simulator.cbor import cid_text, from_json
from indexer.simulator.servers import Handler, refuse, reply
from indexer.simulator.wire import tid
from indexer.simulator.world import Happening

if TYPE_CHECKING:
    from indexer.simulator.network import SimulatedNetwork

_MAX_BODY = 16 << 20
_MAX_STEPS = 100_000


def control_app(network: SimulatedNetwork) -> web.Application:
    """``GET /state /ledger /faults``, ``POST /pause /resume /rate /act /faults``."""

    async def state(request: web.Request) -> web.StreamResponse:
        failure = network.failure()
        return reply(
            {
                "paused": network.paused,
                "finished": network.finished(),
                "rate": network.rate,
                "seq": network.relay.seq,
                "commits": network.commits,
                "accounts": len(network.world.accounts),
                "error": repr(failure) if failure else None,
            }
        )

    async def ledger(request: web.Request) -> web.StreamResponse:
        return reply(network.ledger(request.query.get("values") == "1"))

    async def faults(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return reply(network.faults.state())
        return reply(network.faults.command(await _body(request)))

    async def pause(request: web.Request) -> web.StreamResponse:
        return reply({"seq": await network.pause(), "commits": network.commits})

    async def resume(request: web.Request) -> web.StreamResponse:
        network.resume()
        return reply({"seq": network.relay.seq, "commits": network.commits})

    async def rate(request: web.Request) -> web.StreamResponse:
        wanted = (await _body(request)).get("commits_per_s")
        if not isinstance(wanted, (int, float)) or isinstance(wanted, bool) or not 0 <= wanted < 1e9:
            raise ActionError("commits_per_s must be a number from 0")
        network.rate = float(wanted)
        return reply({"commits_per_s": network.rate})

    async def act(request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        name = body.get("action")
        action = _ACTIONS.get(name) if isinstance(name, str) else None
        if action is None:
            raise ActionError(f"action must be one of {', '.join(sorted(_ACTIONS))}")
        try:
            return reply(action(network, body))
        except (KeyError, TypeError, ValueError) as problem:
            raise ActionError(f"{name}: {type(problem).__name__}: {problem}") from None

    app = web.Application(middlewares=[_errors], client_max_size=_MAX_BODY)
    app.router.add_get("/state", state)
    app.router.add_get("/ledger", ledger)
    app.router.add_get("/faults", faults)
    app.router.add_post("/faults", faults)
    app.router.add_post("/pause", pause)
    app.router.add_post("/resume", resume)
    app.router.add_post("/rate", rate)
    app.router.add_post("/act", act)
    app.router.add_get("/lies", _lies(network))
    app.router.add_post("/lies", _lies(network))
    return app


def _lies(network: SimulatedNetwork) -> Handler:
    async def lies(request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            _plan_lies(network, await _body(request))
        return reply(network.lies.ledger())

    return lies


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ActionError as problem:
        return refuse("InvalidRequest", str(problem))


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError as problem:
        raise ActionError(f"the body is not JSON: {problem}") from None
    if not isinstance(body, dict):
        raise ActionError("the body must be an object")
    return body


# -- actions: (network, body) → answer


def _create_account(network: SimulatedNetwork, body: dict[str, Any]) -> dict[str, Any]:
    did = network.add_account(
        int(body.get("records", 0)),
        pds=body.get("pds"),
        handle=body.get("handle"),
        curve=body.get("curve"),
        did=body.get("did"),
    )
    account = network.world.accounts[did]
    return {"did": did, "handle": account.handle, "rev": account.rev, "seq": network.relay.seq}


def _ops(network: SimulatedNetwork, body: dict[str, Any]) -> dict[str, Any]:
    """One commit with the given ops; a create without rkey gets a TID."""
    did = body["did"]
    writes = []
    for op in body["ops"]:
        rkey = op.get("rkey") or tid(network.world.clock())
        value = from_json(op["value"]) if op["action"] != "delete" else None
        if isinstance(value, dict):
            value.setdefault("$type", op["collection"])
        writes.append(Write(op["action"], f"{op['collection']}/{rkey}", value))
    happening = network.world.commit(did, writes)
    return _published(network, happening) | {"paths": [write.path for write in writes]}


def _steps(network: SimulatedNetwork, body: dict[str, Any]) -> dict[str, Any]:
    """So many happenings of the generator's choice, now."""
    count = int(body.get("count", 1))
    if not 0 <= count <= _MAX_STEPS:
        raise ActionError(f"count must be 0 to {_MAX_STEPS}")
    for _ in range(count):
        network.step()
    return {"seq": network.relay.seq, "commits": network.commits}


def _plan_lies(network: SimulatedNetwork, body: dict[str, Any]) -> None:
    """``rate``, ``kinds`` (kind → weight) and ``lanes`` of the lies that are told by chance."""
    rate: Any = body.get("rate")
    kinds, lanes = body.get("kinds", {}), body.get("lanes", [])
    if not _is_number(rate):
        raise ActionError("rate must be a number from 0 to 1")
    if not (isinstance(kinds, dict) and all(map(_is_number, kinds.values()))):
        raise ActionError("kinds must map kinds to numbers")
    if not (isinstance(lanes, list) and all(isinstance(lane, str) for lane in lanes)):
        raise ActionError("lanes must be a list of names")
    network.lies.plan(rate, kinds, lanes)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _lanes(body: dict[str, Any]) -> list[str] | None:
    """``lane``: one name or a list of them; None leaves the choice to the network."""
    lanes = body.get("lane")
    if isinstance(lanes, str):
        return [lanes]
    if lanes is not None and not (isinstance(lanes, list) and all(isinstance(item, str) for item in lanes)):
        raise ActionError("lane must be a lane's name or a list of names")
    return lanes


def _published(network: SimulatedNetwork, happening: Happening) -> dict[str, Any]:
    seq = network.publish(happening)
    account = network.world.accounts[happening.row["did"]]
    commit = cid_text(account.commit_cid) if account.rev else None
    return {"did": account.did, "seq": seq, "rev": account.rev or None, "commit": commit}


_ACTIONS: dict[str, Callable[[SimulatedNetwork, dict[str, Any]], dict[str, Any]]] = {
    "create_account": _create_account,
    "ops": _ops,
    "steps": _steps,
    "set_status": lambda network, body: _published(
        network,
        network.world.set_status(body["did"], body["status"], tombstone=bool(body.get("tombstone"))),
    ),
    "set_handle": lambda network, body: _published(
        network, network.world.set_handle(body["did"], body["handle"])
    ),
    "rotate_key": lambda network, body: _published(
        network, network.world.change_key(body["did"], curve=body.get("curve"))
    ),
    "migrate": lambda network, body: _published(
        network, network.world.change_key(body["did"], curve=body.get("curve"), pds=int(body["pds"]))
    ),
    "lie": lambda network, body: network.lies.tell(body["kind"], did=body.get("did"), lanes=_lanes(body)),
    "announce": lambda network, body: _published(network, network.world.announce(body["did"])),
    "sync": lambda network, body: _published(network, network.world.sync(body["did"])),
}
