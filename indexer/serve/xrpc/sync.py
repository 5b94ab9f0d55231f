"""`com.atproto.sync.*`: whole repositories, proofs and blocks as CARs; revs and statuses as JSON.

Answers about content come from one snapshot. CARs are streamed: some blocks at a time are read and
sent, with the account's status read again in between, and a reader that stalls, or is slow all along,
is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web

from indexer.atproto import mst
from indexer.atproto.car import car_block, car_header
from indexer.atproto.cid import dag_cbor_cid, format_cid, parse_cid
from indexer.atproto.syntax import check_did, check_nsid, check_rkey, check_tid
from indexer.atproto.types import Cid, Did
from indexer.errors import RequestError, StoreCorrupt
from indexer.serve.http_errors import Terms, json_response, send_pieces
from indexer.serve.xrpc import access
from indexer.serve.xrpc.access import Context
from indexer.serve.xrpc.params import Params
from indexer.serve.xrpc.records import not_modified
from indexer.serve.xrpc.trees import preorder
from indexer.store.codecs import AccountStatus, RepoRow
from indexer.store.keyspaces import BLOCKS, RECORDS, REPOS

if TYPE_CHECKING:
    from indexer.atproto.mst import Tree
    from indexer.store.database import Database, Snapshot

T = TypeVar("T")

CAR_TYPE = "application/vnd.ipld.car"
MAX_REPOS = 1000
MAX_BLOCKS = 200
#: Blocks read at once for a CAR, and the bytes of them that are sent at once.
_STEP_BLOCKS = 64
_PIECE_BYTES = 256 << 10
#: Rows that one listRepos may look at: repositories without a commit are passed over.
_SCAN_ROWS = 10_000


async def get_repo(context: Context, params: Params, request: web.Request) -> web.StreamResponse:
    """The repository as a CAR; with ``since``, without the records that stood already at that rev."""
    services = context.services
    access.require_blocks(services)
    did = access.did_param(params)
    since = params.optional("since", check_tid)
    with context.slot(request), services.db.snapshot(REPOS, RECORDS, BLOCKS) as snapshot:
        row = _complete_repo(snapshot.repo(did), did)
        commit = dag_cbor_cid(row.commit)
        if (unchanged := not_modified(request, format_cid(commit))) is not None:
            return unchanged
        async with asyncio.timeout(services.settings.public.request_timeout):
            links = await _links(context, snapshot, did, row, since)
        chunks = _car(services.db, snapshot, did, (commit, row.commit), links)
        headers = {"Content-Type": CAR_TYPE, "ETag": f'"{format_cid(commit)}"'}
        return await send_pieces(request, web.StreamResponse(headers=headers), chunks, _terms(context))


async def get_record(context: Context, params: Params, request: web.Request) -> web.StreamResponse:
    """A proof CAR: the commit, the nodes on the path, and the record if there is one."""
    services = context.services
    access.require_blocks(services)
    did = access.did_param(params)
    path = f"{params.required('collection', check_nsid)}/{params.required('rkey', check_rkey)}"
    with context.slot(request), services.db.snapshot(REPOS, RECORDS, BLOCKS) as snapshot:
        row = _complete_repo(snapshot.repo(did), did)
        tree = await _tree(context, snapshot, did, row)
        blocks = [(dag_cbor_cid(node), node) for node in mst.prove(tree.root, path, tree.nodes.get)]
        record = snapshot.record(did, path)
        if record is not None and record.served:
            blocks.append((record.cid, _block(services.db, snapshot, did, record.cid)))
    access.served_repo(services.db.repo(did), did)
    commit = dag_cbor_cid(row.commit)
    return _car_response(commit, [(commit, row.commit), *blocks])


async def get_blocks(context: Context, params: Params, request: web.Request) -> web.StreamResponse:
    """The commit, nodes and records of a repository by CID."""
    services = context.services
    access.require_blocks(services)
    did = access.did_param(params)
    texts = params.many("cids", lambda text: format_cid(parse_cid(text)), MAX_BLOCKS)
    if not texts:
        raise RequestError("parameter cids is required")
    with context.slot(request), services.db.snapshot(REPOS, RECORDS, BLOCKS) as snapshot:
        row = _complete_repo(snapshot.repo(did), did)
        known = {dag_cbor_cid(row.commit): row.commit}
        blocks: list[tuple[Cid, bytes]] = []
        tree: Tree | None = None
        for cid in map(parse_cid, texts):
            block = known.get(cid) or snapshot.block(did, cid)
            if block is None:
                tree = tree or await _tree(context, snapshot, did, row)
                block = tree.nodes.get(cid)
            if block is None:
                raise RequestError(f"could not find block {format_cid(cid)}", name="BlockNotFound")
            blocks.append((cid, block))
    access.served_repo(services.db.repo(did), did)
    return _car_response(None, blocks)


async def get_latest_commit(context: Context, params: Params, _request: web.Request) -> web.StreamResponse:
    """CID and rev of the commit that the index stands at."""
    did = access.did_param(params)
    row = access.served_repo(context.services.db.repo(did), did)
    if not row.commit:
        raise RequestError(f"repository {did} has not been indexed yet", name="RepoNotFound")
    return json_response({"cid": format_cid(dag_cbor_cid(row.commit)), "rev": row.rev})


async def get_repo_status(context: Context, params: Params, _request: web.Request) -> web.StreamResponse:
    """Whether an account is active, why not, and the rev that the index stands at."""
    did = access.did_param(params)
    row = access.known_repo(context.services.db.repo(did), did)
    answer = {"did": did, **_status(row)}
    if row.rev and row.status is AccountStatus.ACTIVE:
        answer["rev"] = row.rev
    return json_response(answer)


async def list_repos(context: Context, params: Params, _request: web.Request) -> web.StreamResponse:
    """A page of the repositories that hold a commit, in the order of their DIDs."""
    limit = params.integer("limit", 500, 1, MAX_REPOS)
    cursor = params.optional("cursor", check_did) or ""
    rows = _repo_page(context.services.db, cursor, limit + 1)
    page = rows[:limit]
    answer: dict[str, Any] = {
        "repos": [
            {"did": did, "head": format_cid(dag_cbor_cid(row.commit)), "rev": row.rev, **_status(row)}
            for did, row in page
        ]
    }
    if len(rows) > limit:
        answer["cursor"] = page[-1][0]
    return json_response(answer)


def _repo_page(db: Database, after: Did, count: int) -> list[tuple[Did, RepoRow]]:
    found: list[tuple[Did, RepoRow]] = []
    scanned = 0
    while len(found) < count:
        rows = db.repos(after=after, limit=count)
        found += (item for item in rows if item[1].commit)
        scanned += len(rows)
        if len(rows) < count:
            break
        if scanned > _SCAN_ROWS:
            raise RequestError(
                "too many repositories without a commit in a row", status=503, name="QueryTooExpensive"
            )
        after = rows[-1][0]
    return found[:count]


def _status(row: RepoRow) -> dict[str, Any]:
    if row.status is AccountStatus.ACTIVE:
        return {"active": True}
    return (
        {"active": False, "status": row.status.label}
        if row.status is not AccountStatus.UNKNOWN
        else {"active": False}
    )


def _complete_repo(row: RepoRow | None, did: Did) -> RepoRow:
    """The row of a repository that can prove itself."""
    row = access.served_repo(row, did)
    if not row.complete or not row.commit:
        raise RequestError(f"repository {did} is not held completely", name="RepoIncomplete")
    return row


async def _tree(context: Context, snapshot: Snapshot, did: Did, row: RepoRow) -> Tree:
    listing = await context.trees.listing(snapshot, did)
    return await context.trees.tree(did, row.data, listing)


async def _links(
    context: Context, snapshot: Snapshot, did: Did, row: RepoRow, since: str | None
) -> Iterable[tuple[Cid, bytes | None]]:
    """What follows the commit in the CAR. A diff holds all nodes, because which of them stood at
    ``since`` is not kept, and the records that arrived after it."""
    if since is not None and since >= row.rev:
        return []
    listing = await context.trees.listing(snapshot, did)
    tree = await context.trees.tree(did, row.data, listing)
    if since is None:
        return preorder(tree)
    newer = {record.cid for record in listing.rows if record.rev > since}
    return ((cid, block) for cid, block in preorder(tree) if block is not None or cid in newer)


async def _car(
    db: Database,
    snapshot: Snapshot,
    did: Did,
    commit: tuple[Cid, bytes],
    links: Iterable[tuple[Cid, bytes | None]],
) -> AsyncGenerator[bytes, None]:
    """The CAR in pieces; refuses to go on when the account stops being served."""
    yield car_header([commit[0]]) + car_block(*commit)
    for step in _steps(iter(links), _STEP_BLOCKS):
        access.served_repo(db.repo(did), did)
        records = [cid for cid, node in step if node is None]
        blocks = db.multi_get(BLOCKS, [(did, cid) for cid in records])
        found = dict(zip(records, blocks, strict=True))
        piece = bytearray()
        for cid, node in step:
            piece += car_block(cid, node or found[cid] or _block(db, snapshot, did, cid))
            if len(piece) >= _PIECE_BYTES:
                yield bytes(piece)
                piece.clear()
        yield bytes(piece)
        await asyncio.sleep(0)


def _terms(context: Context) -> Terms:
    limits = context.services.settings.public
    return Terms(limits.request_timeout, limits.answer_timeout, limits.min_kib_per_s * 1024)


def _steps(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while step := list(islice(items, size)):
        yield step


def _block(db: Database, snapshot: Snapshot, did: Did, cid: Cid) -> bytes:
    """A record's block, also when it was collected after the snapshot was taken."""
    block = db.block(did, cid) or snapshot.block(did, cid)
    if block is None:
        raise StoreCorrupt(f"the block {format_cid(cid)} of {did} is missing")
    return block


def _car_response(root: Cid | None, blocks: Iterable[tuple[Cid, bytes]]) -> web.Response:
    body = car_header([root] if root else []) + b"".join(car_block(cid, block) for cid, block in blocks)
    return web.Response(body=body, content_type=CAR_TYPE)
