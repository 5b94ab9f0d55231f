"""A host that also serves proofs and single blocks, and does so wrongly on request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from indexer.atproto.cid import parse_cid
from indexer.atproto.types import Did
from indexer.simulator.account import Account
from indexer.simulator.wire import car
from tests.backfill.world import Handler, Host, refusal

Blocks = list[tuple[bytes, bytes]]


class PartHost(Host):
    """``proofs`` and ``portions`` count requests; the hooks stand between the truth and the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.accounts: dict[Did, Account] = {}
        self.proofs = 0
        self.portions: list[list[bytes]] = []  # CIDs of each getBlocks
        self.received = 0  # bytes of both
        self.active_portions = self.most_portions = 0
        #: Before an answer to getBlocks; may change the repository, or give an answer of its own.
        self.before: Callable[[], Awaitable[web.StreamResponse | None]] | None = None
        self.spoil: Callable[[Blocks], Blocks] = lambda blocks: blocks  # of getBlocks
        self.spoil_proof: Callable[[Blocks], Blocks] = lambda blocks: blocks

    def routes(self) -> dict[str, Handler]:
        parts = {
            "/xrpc/com.atproto.sync.getRecord": self._get_record,
            "/xrpc/com.atproto.sync.getBlocks": self._get_blocks,
        }
        return parts | super().routes()

    def serve(self, one: Account) -> None:
        super().serve(one)
        self.accounts[one.did] = one

    async def _get_record(self, request: web.Request) -> web.StreamResponse:
        self.proofs += 1
        one = self.accounts.get(request.query["did"])
        if one is None:
            return refusal("RepoNotFound")
        blocks = one.proof(f"{request.query['collection']}/{request.query['rkey']}")
        return self._car(one.commit_cid, self.spoil_proof(blocks))

    async def _get_blocks(self, request: web.Request) -> web.StreamResponse:
        cids = [parse_cid(text) for text in request.query.getall("cids")]
        self.portions.append(cids)
        self.active_portions += 1
        self.most_portions = max(self.most_portions, self.active_portions)
        try:
            if self.before is not None and (answer := await self.before()) is not None:
                return answer
            blocks = self.accounts[request.query["did"]].chosen(cids)
            return refusal("InvalidRequest") if blocks is None else self._car(None, self.spoil(blocks))
        finally:
            self.active_portions -= 1

    def _car(self, root: bytes | None, blocks: Blocks) -> web.Response:
        body = car(root, blocks)
        self.received += len(body)
        return web.Response(body=body, content_type="application/vnd.ipld.car")
