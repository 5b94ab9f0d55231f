"""DID documents: what the network needs of them (sync.md §6).

Owns the reading of one document: its claimed handle, its ``#atproto`` signing key and its PDS. Does not
fetch, and does not prove the handle. Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from indexer.atproto.crypto import format_did_key, parse_legacy_key, parse_multikey
from indexer.atproto.syntax import is_handle
from indexer.atproto.types import Did, DidKey, Handle
from indexer.errors import DidDocumentInvalid, SignatureInvalid

#: Longest endpoint that is looked at.
_MAX_ENDPOINT = 2048


class DidDocument(NamedTuple):
    """What a document says. ``handle`` is a claim; each part is None when absent or not usable."""

    did: Did
    handle: Handle | None
    signing_key: DidKey | None
    pds: str | None


def parse_did_document(obj: object, did: Did, *, allow_http: bool = False) -> DidDocument:
    """Reads the document of ``did`` out of parsed JSON.

    Raises `DidDocumentInvalid` when it is not an object or is another DID's. ``allow_http`` accepts
    ``http://`` endpoints, as networks on one machine have them.
    """
    if not isinstance(obj, dict):
        raise DidDocumentInvalid(f"the DID document of {did} is not a JSON object")
    if obj.get("id") != did:
        raise DidDocumentInvalid(f"the DID document of {did} says it is of {str(obj.get('id'))[:80]!r}")
    return DidDocument(did, _handle(obj), _signing_key(obj, did), _pds(obj, allow_http))


def _handle(document: dict[str, Any]) -> Handle | None:
    """The first ``at://`` name that is a handle, in lower case."""
    names = document.get("alsoKnownAs")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and name.startswith("at://") and is_handle(name[5:]):
            return name[5:].lower()
    return None


def _entries(document: dict[str, Any], name: str, suffix: str) -> Iterator[dict[str, Any]]:
    """The objects in list ``name`` whose id ends in ``suffix``, in the order of the document."""
    entries = document.get(name)
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), str) and entry["id"].endswith(suffix):
            yield entry


def _signing_key(document: dict[str, Any], did: Did) -> DidKey | None:
    # The first entry of that name counts, also when it is unusable: a later one must not replace it.
    for method in _entries(document, "verificationMethod", "#atproto"):
        kind, multibase = method.get("type"), method.get("publicKeyMultibase")
        if method.get("controller") != did or not isinstance(kind, str) or not isinstance(multibase, str):
            return None
        try:
            key = parse_multikey(multibase) if kind == "Multikey" else parse_legacy_key(kind, multibase)
        except SignatureInvalid:
            return None
        return format_did_key(key)
    return None


def _pds(document: dict[str, Any], allow_http: bool) -> str | None:
    for service in _entries(document, "service", "#atproto_pds"):
        endpoint = service.get("serviceEndpoint")
        if service.get("type") != "AtprotoPersonalDataServer" or not isinstance(endpoint, str):
            return None
        return _origin(endpoint, allow_http)
    return None


def _origin(url: str, allow_http: bool) -> str | None:
    """``url`` as ``scheme://host[:port]``, None when it is not just that (a lone final slash aside)."""
    if len(url) > _MAX_ENDPOINT or not url.isascii() or not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    origin = f"{parts.scheme}://{parts.netloc.lower()}"
    plain = url.removesuffix("/").lower() == origin and "@" not in parts.netloc
    schemes = ("https", "http") if allow_http else ("https",)
    if not plain or parts.scheme not in schemes or port == 0 or parts.netloc.endswith(":"):
        return None
    return origin if host and _is_host(host, single_label=allow_http) else None


def _is_host(host: str, *, single_label: bool) -> bool:
    """Whether ``host`` is a hostname of two labels or more, an address or localhost.

    ``single_label``: others of one label too, as containers on one machine have them.
    """
    if is_handle(host) or host == "localhost" or (single_label and is_handle(f"{host}.test")):
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return "%" not in host
