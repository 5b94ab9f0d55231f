"""What a fault answers: one function for each kind, from the request and the true answer to the wrong one.

Owns the table of all kinds with the routes that each suits. How an answer is sent is `fault_delivery`'s;
those of the name server are acted out in `names`. Pure but for the clock.
"""

from __future__ import annotations

import gzip
import time
from base64 import b32encode
from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import orjson

from indexer.simulator.fault_cars import CARS, Subject
from indexer.simulator.faults import (
    BY_COLLECTION,
    DNS,
    DOCUMENT,
    GET_REPO,
    LATEST,
    LIST_HOSTS,
    LIST_REPOS,
    RESOLVE_HANDLE,
    ROUTES,
    STATUS,
    WELL_KNOWN,
)
from indexer.simulator.keys import SigningKey
from indexer.simulator.wire import tid

CAR_TYPE = "application/vnd.ipld.car"
JSON = "application/json"
#: Where a redirect to a private address leads unless it is told: the metadata service of clouds.
PRIVATE_URL: Final = "http://169.254.169.254/latest/meta-data/"
_BOMB_BYTES = 8 << 20
_HUGE_BODY = 1 << 20
_STATUSES = (400, 401, 403, 404, 408, 410, 500, 501, 502, 503, 504)
_STRANGER = "did:plc:" + "z" * 24

HTTP: Final = frozenset(ROUTES) - {DNS}
_HANDLES: Final = frozenset({WELL_KNOWN, RESOLVE_HANDLE})
_REPO_LISTS: Final = frozenset({LIST_REPOS, BY_COLLECTION})
_LISTS: Final = _REPO_LISTS | {LIST_HOSTS}


class Answer(NamedTuple):
    """An HTTP answer and how it goes out. ``raw``: the body alone goes onto the wire, without HTTP."""

    body: bytes = b""
    status: int = 200
    kind: str = JSON
    headers: Mapping[str, str] = {}
    rate: float = 0.0  # bytes a second; 0: as fast as they go
    end: Literal["complete", "stall", "reset", "endless"] = "complete"
    length: int | None = None  # the Content-Length that is promised; None: chunks
    raw: bool = False


class Case(NamedTuple):
    """A request that meets a fault, and what the honest answer would be."""

    url: str
    route: str
    status: int
    body: bytes
    kind: str
    subject: Subject | None  # None: not about an account of this network

    @property
    def did(self) -> str:
        return self.subject.account.did if self.subject else ""


class Kind(NamedTuple):
    """``make`` gives None where this request cannot be answered in that way. None: acted out elsewhere."""

    routes: frozenset[str]
    make: Callable[[Case, float | str | None], Answer | None] | None


def _number(value: float | str | None, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) else default


# -- any route: statuses, transport, redirects


def _status(status: int) -> Kind:
    """A status with the body that a proxy puts there: no XRPC error, so it has no name."""
    page = f"<html><body>{status}</body></html>".encode()
    return Kind(HTTP, lambda case, value: Answer(page, status, "text/html"))


def _rate_limited(headers: Callable[[float], Mapping[str, str]]) -> Kind:
    body = orjson.dumps({"error": "RateLimitExceeded", "message": "Rate Limit Exceeded"})
    return Kind(HTTP, lambda case, value: Answer(body, 429, headers=headers(_number(value, 30.0))))


def _reset_headers(seconds: float) -> Mapping[str, str]:
    """As a PDS sends them: the end of the window in Unix time."""
    return {
        "RateLimit-Limit": "3000",
        "RateLimit-Remaining": "0",
        "RateLimit-Reset": str(int(time.time() + seconds)),
        "RateLimit-Policy": "3000;w=300",
    }


def _retry_after(seconds: float) -> Mapping[str, str]:
    return {"Retry-After": str(int(seconds))}


def _body(change: Callable[[Case, float | str | None], Answer]) -> Kind:
    """A fault of the body: there must be an honest one."""
    return Kind(HTTP, lambda case, value: change(case, value) if case.status == 200 and case.body else None)


def _true(case: Case, **fields: Any) -> Answer:
    return Answer(case.body, case.status, case.kind, **fields)


def _half(case: Case, end: Literal["stall", "reset"]) -> Answer:
    return _true(case, end=end, length=len(case.body))._replace(body=case.body[: len(case.body) // 2])


def _truncated(case: Case, value: float | str | None) -> Answer:
    """The answer ends too early, and says that this is its end."""
    rng = case.subject.rng if case.subject else None
    at = rng.randrange(len(case.body)) if rng else len(case.body) // 2
    return _true(case)._replace(body=case.body[:at])


def _garbage(case: Case, value: float | str | None) -> Answer:
    size = int(_number(value, 4096))
    return Answer(case.subject.rng.randbytes(size) if case.subject else b"\xfe" * size, kind=case.kind)


@lru_cache(1)
def _bomb() -> bytes:
    return gzip.compress(bytes(_BOMB_BYTES), 1)


def _redirect(target: Callable[[Case, float | str | None], str]) -> Kind:
    return Kind(
        HTTP, lambda case, value: Answer(status=302, headers={"Location": target(case, value)}, length=0)
    )


_ANYWHERE: Mapping[str, Kind] = {
    **{f"status_{status}": _status(status) for status in _STATUSES},
    "rate_limited": _rate_limited(lambda seconds: {}),
    "rate_limited_retry_after": _rate_limited(_retry_after),
    "rate_limited_reset": _rate_limited(_reset_headers),
    "unavailable_retry_after": Kind(
        HTTP,
        lambda case, value: Answer(b"busy", 503, "text/plain", headers=_retry_after(_number(value, 30.0))),
    ),
    "no_answer": Kind(HTTP, lambda case, value: Answer(end="stall", raw=True)),
    "reset": Kind(HTTP, lambda case, value: Answer(end="reset", raw=True)),
    "not_http": Kind(HTTP, lambda case, value: Answer(b"220 mail ESMTP\r\n" * 8, end="reset", raw=True)),
    "html": Kind(HTTP, lambda case, value: Answer(b"<html>It works!</html>", kind="text/html")),
    "empty": Kind(HTTP, lambda case, value: Answer(kind=case.kind)),
    "garbage": Kind(HTTP, _garbage),
    "slow": _body(lambda case, value: _true(case, rate=_number(value, 1024.0))),
    "stalled": _body(lambda case, value: _half(case, "stall")),
    "cut": _body(lambda case, value: _half(case, "reset")),
    "truncated": _body(_truncated),
    "endless": _body(lambda case, value: _true(case, end="endless")),
    "gzip_bomb": Kind(
        HTTP, lambda case, value: Answer(_bomb(), kind=case.kind, headers={"Content-Encoding": "gzip"})
    ),
    "redirect_private": _redirect(lambda case, value: value if isinstance(value, str) else PRIVATE_URL),
    "redirect_loop": _redirect(lambda case, value: case.url),
    "redirect_scheme": _redirect(lambda case, value: value if isinstance(value, str) else "ftp://a.example/"),
}


# -- DID documents


def _document(change: Callable[[dict[str, Any], Case, float | str | None], Any]) -> Kind:
    """A changed document; ``change`` may also give bytes."""

    def make(case: Case, value: float | str | None) -> Answer | None:
        if case.status != 200:
            return None
        changed = change(orjson.loads(case.body), case, value)
        body = changed if isinstance(changed, bytes) else orjson.dumps(changed)
        return Answer(body, kind=case.kind)

    return Kind(frozenset({DOCUMENT}), make)


def _with_key(document: dict[str, Any], multikey: str) -> dict[str, Any]:
    method = document["verificationMethod"][0]
    return document | {"verificationMethod": [method | {"publicKeyMultibase": multikey}]}


def _with_pds(document: dict[str, Any], url: str) -> dict[str, Any]:
    return document | {"service": [document["service"][0] | {"serviceEndpoint": url}]}


def _strange_key(case: Case) -> str:
    return SigningKey.derive("k256", f"a lie about {case.did}").multikey


def _text(value: float | str | None, default: str) -> str:
    return value if isinstance(value, str) else default


_DOCUMENTS: Mapping[str, Kind] = {
    "id_mismatch": _document(lambda document, case, value: document | {"id": _STRANGER}),
    "no_key": _document(lambda document, case, value: document | {"verificationMethod": []}),
    "malformed_key": _document(lambda document, case, value: _with_key(document, "zNotAKeyAtAll0OIl")),
    "lying_key": _document(lambda document, case, value: _with_key(document, _strange_key(case))),
    "no_pds": _document(lambda document, case, value: document | {"service": []}),
    "lying_pds": _document(
        lambda document, case, value: _with_pds(document, _text(value, "http://127.0.0.1:9"))
    ),
    "lying_handle": _document(
        lambda document, case, value: document | {"alsoKnownAs": ["at://" + _text(value, "liar.test")]}
    ),
    "huge_document": _document(lambda document, case, value: document | {"padding": "x" * _HUGE_BODY}),
    "invalid_json": _document(lambda document, case, value: case.body[:-2]),
    "deep_json": _document(lambda document, case, value: b"[" * 50_000 + b"]" * 50_000),
}


# -- statuses, lists, handles


def _lying_status(case: Case, value: float | str | None) -> Answer | None:
    status = _text(value, "deleted")
    answer: dict[str, Any] = {"did": case.did, "active": status == "active"}
    return Answer(orjson.dumps(answer if status == "active" else answer | {"status": status}))


def _lying_rev(case: Case, value: float | str | None) -> Answer | None:
    """The true answer with a rev that is not there: a day from now unless it is told."""
    if case.status != 200:
        return None
    rev = _text(value, tid(int((time.time() + 86_400) * 1e6)))
    return Answer(orjson.dumps(orjson.loads(case.body) | {"rev": rev}))


def _repeated_cursor(case: Case, value: float | str | None) -> Answer | None:
    """Whatever page is asked for, there is always the same next one."""
    if case.status != 200:
        return None
    return Answer(orjson.dumps(orjson.loads(case.body) | {"cursor": _text(value, "again")}))


def _asked_cursor(case: Case) -> str:
    return dict(parse_qsl(urlsplit(case.url).query)).get("cursor", "")


def _circular_cursor(case: Case, value: float | str | None) -> Answer | None:
    """After a few pages the list begins anew and never ends; each page is the first one."""
    if case.status != 200:
        return None
    size = int(_number(value, 5))
    asked = _asked_cursor(case).removeprefix("circle")
    turn = (int(asked) + 1) % size if asked.isdigit() else 0
    return Answer(orjson.dumps(orjson.loads(case.body) | {"cursor": f"circle{turn}"}))


def _endless_list(case: Case, value: float | str | None) -> Answer | None:
    """Pages without end, each of accounts that nobody has."""
    asked = _asked_cursor(case).removeprefix("page")
    page = int(asked) + 1 if asked.isdigit() else 1
    repos = _invented(f"{page}", int(_number(value, 3)))
    return Answer(orjson.dumps({"repos": repos, "hosts": [], "cursor": f"page{page}"}))


def _invented_repos(case: Case, value: float | str | None) -> Answer | None:
    """Among the true ones, accounts that nobody has."""
    if case.status != 200:
        return None
    page = orjson.loads(case.body)
    invented = _invented(case.url, int(_number(value, 5)))
    return Answer(orjson.dumps(page | {"repos": [*invented, *page["repos"]]}))


def _invented(seed: str, number: int) -> list[dict[str, Any]]:
    dids = (
        "did:plc:" + b32encode(sha256(f"{seed}/{n}".encode()).digest())[:24].decode().lower()
        for n in range(number)
    )
    return [{"did": did, "head": "", "rev": tid(int(time.time() * 1e6)), "active": True} for did in dids]


def _broken_entries(case: Case, value: float | str | None) -> Answer | None:
    if case.status != 200:
        return None
    page = orjson.loads(case.body)
    broken = [None, 7, {}, {"did": "not a did"}, {"did": _STRANGER, "head": 1, "rev": []}, "x" * 10_000]
    return Answer(orjson.dumps(page | {"repos": [*broken, *page["repos"]]}))


def _handle(did: Callable[[float | str | None], str]) -> Callable[[Case, float | str | None], Answer]:
    def make(case: Case, value: float | str | None) -> Answer:
        named = did(value)
        if case.route == RESOLVE_HANDLE:
            return Answer(orjson.dumps({"did": named}))
        return Answer(named.encode(), kind="text/plain")

    return make


_OTHERS: Mapping[str, Kind] = {
    "lying_status": Kind(frozenset({STATUS}), _lying_status),
    "lying_rev": Kind(frozenset({STATUS, LATEST}), _lying_rev),
    "repeated_cursor": Kind(_LISTS, _repeated_cursor),
    "circular_cursor": Kind(_LISTS, _circular_cursor),
    "endless_list": Kind(_LISTS, _endless_list),
    "invented_repos": Kind(_REPO_LISTS, _invented_repos),
    "broken_entries": Kind(_REPO_LISTS, _broken_entries),
    "wrong_did": Kind(_HANDLES | {DNS}, _handle(lambda value: _text(value, _STRANGER))),
    "malformed_did": Kind(_HANDLES | {DNS}, _handle(lambda value: "did:plc:not a did")),
    "several_dids": Kind(frozenset({DNS}), None),
    "no_name": Kind(frozenset({DNS}), None),
    "server_failure": Kind(frozenset({DNS}), None),
    "silent": Kind(frozenset({DNS}), None),
    "malformed_answer": Kind(frozenset({DNS}), None),
}


def _car(spoil: Callable[[Subject], bytes | None]) -> Kind:
    def make(case: Case, value: float | str | None) -> Answer | None:
        if case.status != 200 or case.subject is None:
            return None
        body = spoil(case.subject._replace(value=value))
        return None if body is None else Answer(body, kind=CAR_TYPE)

    return Kind(frozenset({GET_REPO}), make)


#: Every fault of the servers, by name.
KINDS: Mapping[str, Kind] = {
    **_ANYWHERE,
    **_DOCUMENTS,
    **_OTHERS,
    **{name: _car(spoil) for name, spoil in CARS.items()},
}
#: Name → the routes that it suits.
SUITED: Mapping[str, frozenset[str]] = {name: kind.routes for name, kind in KINDS.items()}
