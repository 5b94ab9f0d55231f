"""`com.atproto.repo.*`: getRecord, listRecords, describeRepo.

Reads of a few rows and blocks, made on the event loop without a pause, so that every answer is one
consistent view. Ephemeral mode answers 501, index-only mode too where content is asked for.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiohttp import web

from indexer.atproto.cid import format_cid, parse_cid
from indexer.atproto.dagcbor import record_to_json
from indexer.atproto.syntax import check_nsid, check_rkey
from indexer.atproto.types import Did
from indexer.errors import IndexerError, RequestError, StoreCorrupt
from indexer.serve.http_errors import json_response
from indexer.serve.xrpc import access
from indexer.serve.xrpc.access import Context
from indexer.serve.xrpc.params import Params
from indexer.store.codecs import RecordRow, RepoRow
from indexer.store.keyspaces import BLOCKS

if TYPE_CHECKING:
    from indexer.store.database import Database

MAX_PAGE = 100
#: Rows that one listRecords may look at: flagged rows are passed over.
_SCAN_ROWS = 5_000
#: What stands for a handle without a match both ways.
INVALID_HANDLE = "handle.invalid"
#: Longest wait for the handle in describeRepo, in seconds.
_HANDLE_S = 5.0


async def get_record(context: Context, params: Params, request: web.Request) -> web.StreamResponse:
    """One record, or that very version of it when ``cid`` is given."""
    services = context.services
    access.require_blocks(services)
    collection = params.required("collection", check_nsid)
    rkey = params.required("rkey", check_rkey)
    wanted = params.optional("cid", _checked_cid)
    did = await access.named_did(services, params)
    access.served_repo(services.db.repo(did), did)
    row = services.db.record(did, f"{collection}/{rkey}")
    uri = f"at://{did}/{collection}/{rkey}"
    if row is None or not row.served:
        raise RequestError(f"could not locate record: {uri}", name="RecordNotFound")
    cid = format_cid(row.cid)
    if wanted not in (None, cid):
        raise RequestError(f"could not locate record: {uri} with CID {wanted}", name="RecordNotFound")
    if (unchanged := not_modified(request, cid)) is not None:
        return unchanged
    block = services.db.block(did, row.cid)
    if block is None:
        raise StoreCorrupt(f"the block {cid} of {uri} is missing")
    return _json(_record_json(uri, cid, block), etag=cid)


async def list_records(context: Context, params: Params, _request: web.Request) -> web.StreamResponse:
    """A page of a collection, newest record key first; ``reverse`` turns it round."""
    services = context.services
    access.require_blocks(services)
    collection = params.required("collection", check_nsid)
    limit = params.integer("limit", 50, 1, MAX_PAGE)
    cursor = params.optional("cursor", check_rkey)
    oldest_first = params.flag("reverse")
    did = await access.named_did(services, params)
    access.served_repo(services.db.repo(did), did)
    rows = _page(services.db, did, collection, cursor, oldest_first, limit + 1)
    page, more = rows[:limit], len(rows) > limit
    blocks = services.db.multi_get(BLOCKS, [(did, row.cid) for _, row in page])
    items = []
    for (path, row), block in zip(page, blocks, strict=True):
        cid = format_cid(row.cid)
        if block is None:
            raise StoreCorrupt(f"the block {cid} of at://{did}/{path} is missing")
        items.append(_record_json(f"at://{did}/{path}", cid, block))
    last = page[-1][0].partition("/")[2] if more else None
    tail = b',"cursor":"%b"}' % last.encode() if last else b"}"
    return _json(b'{"records":[' + b",".join(items) + b"]" + tail)


async def describe_repo(context: Context, params: Params, _request: web.Request) -> web.StreamResponse:
    """Handle, identity and collections of a repository."""
    services = context.services
    access.require_records(services)
    did = await access.named_did(services, params)
    row = access.served_repo(services.db.repo(did), did)
    handle = INVALID_HANDLE
    with suppress(IndexerError, TimeoutError):
        async with asyncio.timeout(_HANDLE_S):
            handle = await services.resolver.verified_handle(did)
    return json_response(
        {
            "handle": handle,
            "did": did,
            "didDoc": did_document(did, row),
            "collections": sorted(collection_counts(services.db, did)),
            "handleIsCorrect": handle != INVALID_HANDLE,
        }
    )


def did_document(did: Did, row: RepoRow) -> dict[str, Any]:
    """What we hold of the DID document, in the document's form."""
    document: dict[str, Any] = {
        "@context": ["https://www.w3.org/ns/did/v1", "https://w3id.org/security/multikey/v1"],
        "id": did,
        "alsoKnownAs": [f"at://{row.handle}"] if row.handle not in ("", INVALID_HANDLE) else [],
        "verificationMethod": [],
        "service": [],
    }
    if row.signing_key:
        method = {
            "id": f"{did}#atproto",
            "type": "Multikey",
            "controller": did,
            "publicKeyMultibase": row.signing_key.removeprefix("did:key:"),
        }
        document["verificationMethod"].append(method)
    if row.pds:
        service = {
            "id": "#atproto_pds",
            "type": "AtprotoPersonalDataServer",
            "serviceEndpoint": row.pds,
        }
        document["service"].append(service)
    return document


def collection_counts(db: Database, did: Did) -> dict[str, int]:
    """Records of a repository by collection."""
    prefix = f"did/{did}/"
    return {name.removeprefix(prefix): count for name, count in db.counts(prefix).items() if count > 0}


def not_modified(request: web.Request, cid: str) -> web.Response | None:
    """304 when the caller's ``If-None-Match`` names the CID."""
    given = request.headers.get("If-None-Match", "")
    tags = {tag.strip().removeprefix("W/").strip('"') for tag in given.split(",")}
    if cid in tags or "*" in tags:
        return web.Response(status=304, headers={"ETag": f'"{cid}"'})
    return None


def _page(
    db: Database, did: Did, collection: str, cursor: str | None, oldest_first: bool, count: int
) -> list[tuple[str, RecordRow]]:
    """Up to ``count`` served rows beyond ``cursor``; flagged rows are passed over within a scan limit."""
    found: list[tuple[str, RecordRow]] = []
    scanned = 0
    while len(found) < count:
        if oldest_first:
            start = cursor + "\0" if cursor else None
            rows = db.records(did, collection, start=start, limit=count)
        else:
            rows = db.records(did, collection, stop=cursor, reverse=True, limit=count)
        found += (item for item in rows if item[1].served)
        scanned += len(rows)
        if len(rows) < count:
            break
        if scanned > _SCAN_ROWS:
            raise RequestError("too many unservable records in a row", status=503, name="QueryTooExpensive")
        cursor = rows[-1][0].partition("/")[2]
    return found[:count]


def _checked_cid(text: str) -> str:
    return format_cid(parse_cid(text))


def _record_json(uri: str, cid: str, block: bytes) -> bytes:
    # URIs and CIDs are checked ASCII without anything that JSON escapes.
    return b'{"uri":"%b","cid":"%b","value":%b}' % (uri.encode(), cid.encode(), record_to_json(block))


def _json(body: bytes, etag: str | None = None) -> web.Response:
    headers = {"ETag": f'"{etag}"'} if etag else None
    return web.Response(body=body, content_type="application/json", headers=headers)
