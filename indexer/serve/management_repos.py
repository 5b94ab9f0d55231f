"""`/repos` of the management API: which repositories are followed, their state, refetching, removal.

Owns the form of these requests and answers. DIDs come as NDJSON or as a JSON array of `{"did"}`, and the
answer names those acted on in the same form. Changes go through the writer, some hundred rows a unit.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import orjson
from aiohttp import web

from indexer.atproto.cid import dag_cbor_cid, format_cid
from indexer.atproto.syntax import check_did
from indexer.atproto.types import Did
from indexer.errors import IdentityGone, RequestError, SyntaxInvalid
from indexer.identity.documents import web_url
from indexer.serve.http_errors import Terms, json_response, send_pieces
from indexer.serve.xrpc.access import is_resolved
from indexer.serve.xrpc.params import Params, checked_did
from indexer.serve.xrpc.records import collection_counts
from indexer.store.codecs import NEW_REPO, AccountStatus, RepoRow, SyncState, Work
from indexer.store.keyspaces import REPOS

if TYPE_CHECKING:
    from indexer.serve.services import Services
    from indexer.store.transaction import Transaction

T = TypeVar("T")
#: A sync state and an account status, None for any.
Wanted: TypeAlias = tuple[str | None, str | None]

NDJSON = "application/x-ndjson"
#: The status that is told of an account whose identity never was known, while nobody said more of it.
UNRESOLVED = "unresolved"
MAX_PAGE = 10_000
#: Rows read or changed at once; others get their turn in between.
_STEP = 500
_plc = re.compile(r"did:plc:[a-z2-7]{24}").fullmatch


class RepoRoutes:
    """Handlers of `/repos`."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/repos", self.list_all)
        app.router.add_put("/repos", self.follow)
        app.router.add_delete("/repos", self.remove)
        app.router.add_post("/repos/resync", self.resync)
        app.router.add_get("/repos/{did}", self.show)

    async def list_all(self, request: web.Request) -> web.StreamResponse:
        """Repositories in the order of their DIDs: NDJSON streams all (or `limit`), JSON answers a page."""
        params = Params(request.query)
        wanted = (params.optional("state", _checked_state), params.optional("status", _checked_status))
        after = params.optional("cursor", check_did) or ""
        if NDJSON in request.headers.get("Accept", ""):
            lines = self._lines(wanted, after, params.optional_integer("limit"))
            response = web.StreamResponse(headers={"Content-Type": NDJSON})
            return await send_pieces(
                request, response, lines, Terms(self._services.settings.public.request_timeout)
            )
        limit = params.integer("limit", 1000, 1, MAX_PAGE)
        page: list[dict[str, Any]] = []
        for row in self._rows(wanted, after):
            if row is None:
                await asyncio.sleep(0)
            elif len(page) == limit:
                return json_response({"repos": page, "cursor": page[-1]["did"]})
            else:
                page.append(row)
        return json_response({"repos": page})

    async def show(self, request: web.Request) -> web.StreamResponse:
        """Everything known about one repository."""
        did = checked_did(request.match_info["did"])
        db = self._services.db
        row = db.repo(did)
        if row is None:
            raise RequestError(f"repository {did} is not known here", status=404, name="RepoNotFound")
        words = [
            {"source": word.source, "status": word.status.label, "active": word.active, "seq": word.seq}
            for word in db.account_words(did)
        ]
        collections = collection_counts(db, did)
        return json_response(
            {
                **describe(did, row),
                "records": sum(collections.values()),
                "collections": collections,
                "account_words": words,
            }
        )

    async def follow(self, request: web.Request) -> web.StreamResponse:
        """Follows repositories and queues them for a fetch; excluded ones are left out."""
        dids = await read_dids(request)
        filters = self._services.current_filters()
        local = self._services.settings.network.allow_private
        wanted = []
        async for step in _paced(dids):
            for did in step:
                _check_resolvable(did, local=local)
            wanted += [did for did in step if not filters.is_excluded(did)]
        return _acted_on(request, await self._request(wanted, _followed, again=False))

    async def remove(self, request: web.Request) -> web.StreamResponse:
        """Follows repositories no longer; ``purge=true`` deletes what is held of them too."""
        purge = Params(request.query).flag("purge")
        acted: list[Did] = []
        for step in _steps(await read_dids(request)):
            acted += await self._change("repos_remove", step, unfollowed, purge=purge)
        return _acted_on(request, acted)

    async def resync(self, request: web.Request) -> web.StreamResponse:
        """Fetches followed repositories again; excluded ones are left out."""
        if self._services.db.mode.ephemeral:
            raise RequestError(
                "nothing is fetched in ephemeral mode: a repository goes on with its next commit",
                status=501,
                name="NotSupported",
            )
        wanted: list[Did] = []
        filters = self._services.current_filters()
        async for step in _paced(await read_dids(request)):
            rows = self._services.db.multi_get(REPOS, step)
            known = [did for did, row in zip(step, rows, strict=True) if row is not None and row.tracked]
            wanted += [did for did in known if not filters.is_excluded(did)]
        return _acted_on(request, await self._request(wanted, _desynchronized, again=True))

    async def _request(
        self, dids: Sequence[Did], change: Callable[[RepoRow, int], RepoRow | None], *, again: bool
    ) -> list[Did]:
        """Asks the backfill, where it runs; else writes down what it will find when it does."""
        if self._services.backfill is not None:
            return await self._services.backfill.add(dids, again=again)
        acted: list[Did] = []
        for step in _steps(dids):
            acted += await self._change("repos_request", step, change, create=not again)
        return acted

    async def _change(
        self,
        name: str,
        dids: Sequence[Did],
        change: Callable[[RepoRow, int], RepoRow | None],
        *,
        create: bool = False,
        purge: bool = False,
    ) -> list[Did]:
        """Applies ``change`` to every known row in one unit; the DIDs that it changed."""

        def work(tx: Transaction) -> list[Did]:
            acted = []
            for did in dids:
                row = tx.repo(did) or (NEW_REPO if create else None)
                changed = change(row, tx.now_us) if row is not None else None
                if changed is None:
                    continue
                if tx.repo(did) != changed:
                    tx.set_repo(did, changed)
                if purge and not tx.forget_repo(did):
                    tx.wipe_repo(did, changed.status)
                acted.append(did)
            return acted

        return await self._services.writer.run(name, work)

    def _rows(self, wanted: Wanted, after: Did) -> Iterator[dict[str, Any] | None]:
        """Rows as JSON values, with a None after every step: a place to let others run."""
        state, status = wanted
        while rows := self._services.db.repos(after=after, limit=_STEP):
            for did, row in rows:
                if state in (None, row.state.label) and status in (None, _status(row)):
                    yield describe(did, row)
            if len(rows) < _STEP:
                return
            after = rows[-1][0]
            yield None

    async def _lines(self, wanted: Wanted, after: Did, limit: int | None) -> AsyncGenerator[bytes, None]:
        """Rows as NDJSON, some hundred at a time."""
        lines: list[bytes] = []
        left = -1 if limit is None else limit
        for row in self._rows(wanted, after):
            if row is None or len(lines) >= _STEP:
                yield b"".join(lines)
                lines.clear()
                await asyncio.sleep(0)
            if row is not None:
                if left == 0:
                    break
                left -= 1
                lines.append(orjson.dumps(row) + b"\n")
        yield b"".join(lines)


def describe(did: Did, row: RepoRow) -> dict[str, Any]:
    """A repository's row as JSON."""
    return {
        "did": did,
        "tracked": row.tracked,
        "state": row.state.label,
        "status": _status(row),
        "active": row.status.active and is_resolved(row),
        "resolved": is_resolved(row),
        "complete": row.complete,
        "sparse": row.sparse,
        "rev": row.rev or None,
        "head": format_cid(dag_cbor_cid(row.commit)) if row.commit else None,
        "handle": row.handle or None,
        "pds": row.pds or None,
        "due_us": row.due or None,
        "work": [flag.name.lower() for flag in Work if row.work & flag and flag.name],
        "error": row.error or None,
        "attempt": row.attempt,
    }


def _status(row: RepoRow) -> str:
    """The account's status as it is told."""
    return UNRESOLVED if row.status.active and not is_resolved(row) else row.status.label


async def read_dids(request: web.Request) -> list[Did]:
    """The DIDs of a body, each once, in its order."""
    body = await request.read()
    dids: dict[Did, None] = {}
    try:
        if body.lstrip()[:1] == b"[":
            async for items in _paced(orjson.loads(body)):
                dids.update((_did_of(item), None) for item in items)
        else:
            async for lines in _paced(body.splitlines()):
                dids.update((_did_of(orjson.loads(line)), None) for line in lines if line.strip())
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is neither a JSON array nor NDJSON: {error}") from error
    return list(dids)


def _did_of(item: object) -> Did:
    did = item.get("did") if isinstance(item, dict) else None
    if not isinstance(did, str):
        raise RequestError('every item of the body must be an object with a "did"')
    return checked_did(did)


def _check_resolvable(did: Did, *, local: bool) -> None:
    """Refuses what no directory and no host could ever tell us about."""
    if did.startswith("did:plc:"):
        if not _plc(did):
            raise RequestError(f"did: {did[:80]} is not a did:plc")
        return
    try:
        web_url(did, allow_local=local)
    except IdentityGone as error:
        raise RequestError(f"did: it cannot be resolved: {error}") from error


def _checked_status(text: str) -> str:
    if text not in {UNRESOLVED, *(status.label for status in AccountStatus)}:
        raise SyntaxInvalid(f"not an account status: {text!r}")
    return text


def _checked_state(text: str) -> str:
    if text not in {state.label for state in SyncState}:
        raise SyntaxInvalid(f"not a sync state: {text!r}")
    return text


def _acted_on(request: web.Request, dids: Sequence[Did]) -> web.Response:
    """The DIDs acted on, in the form that the caller reads."""
    items = [{"did": did} for did in dids]
    if NDJSON in request.headers.get("Accept", ""):
        return web.Response(body=b"".join(orjson.dumps(item) + b"\n" for item in items), content_type=NDJSON)
    return json_response(items)


def _steps(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _STEP):
        yield items[start : start + _STEP]


async def _paced(items: Sequence[T]) -> AsyncIterator[Sequence[T]]:
    """`_steps`, with a turn for the others after each."""
    for step in _steps(items):
        yield step
        await asyncio.sleep(0)


def _followed(row: RepoRow, now_us: int) -> RepoRow | None:
    if row.tracked and not row.hearsay:
        return None
    return row._replace(tracked=True, due=row.due or now_us, hearsay=False)


def unfollowed(row: RepoRow, _now_us: int) -> RepoRow:
    """No fetch that is under way may go on: the repository may be followed again before it ends."""
    state = row.state
    if state is SyncState.BACKFILLING:
        state = SyncState.DESYNCHRONIZED if row.rev else SyncState.PENDING
    return row._replace(tracked=False, state=state, due=0, work=0)


def _desynchronized(row: RepoRow, now_us: int) -> RepoRow:
    return row._replace(state=SyncState.DESYNCHRONIZED, due=now_us, attempt=0, error="")
