from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.atproto.crypto import parse_did_key
from indexer.atproto.did_document import DidDocument, parse_did_document
from indexer.errors import DidDocumentInvalid
from tests.paths import DATA

DID = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"
VECTORS = json.loads((DATA / "vectors" / "signatures.json").read_text())["vectors"]
K256, P256 = VECTORS[0], VECTORS[3]
MULTIKEY = {
    "id": f"{DID}#atproto", "type": "Multikey", "controller": DID, "publicKeyMultibase": K256["multikey"],
}  # fmt: skip
PDS = {
    "id": "#atproto_pds", "type": "AtprotoPersonalDataServer", "serviceEndpoint": "https://pds.example.com",
}  # fmt: skip


def document(**changes: Any) -> dict[str, Any]:
    return {
        "id": DID,
        "alsoKnownAs": ["at://ann.example.com"],
        "verificationMethod": [MULTIKEY],
        "service": [PDS],
        **changes,
    }


def parsed(**changes: Any) -> DidDocument:
    return parse_did_document(document(**changes), DID)


def test_a_usual_document() -> None:
    assert parsed() == (DID, "ann.example.com", K256["did_key"], "https://pds.example.com")


def test_the_documents_of_the_captured_session_agree_with_its_truth() -> None:
    documents = json.loads((DATA / "session" / "diddocs.json").read_text())
    accounts = json.loads((DATA / "session" / "truth.json").read_text())["accounts"]
    agreed = 0
    for account in accounts:
        found = documents[account["did"]]
        if found["status"] == 200 and account["active"]:
            document = parse_did_document(found["doc"], account["did"], allow_http=True)
            assert document == (account["did"], account["handle"], account["signingKey"], account["pds"])
            agreed += 1
    assert agreed == 10


@pytest.mark.parametrize("obj", [None, [], "text", 7, [{"id": DID}]])
def test_what_is_no_object_is_refused(obj: object) -> None:
    with pytest.raises(DidDocumentInvalid, match="not a JSON object"):
        parse_did_document(obj, DID)


@pytest.mark.parametrize("claimed", ["did:plc:other", DID.upper(), DID + "#atproto", "", None, 7, [DID]])
def test_the_document_of_another_did_is_refused(claimed: object) -> None:
    with pytest.raises(DidDocumentInvalid, match="says it is of"):
        parse_did_document(document(id=claimed), DID)


@pytest.mark.parametrize(
    ("names", "handle"),
    [
        (["at://Ann.Example.COM"], "ann.example.com"),
        (["https://ann.example.com", "at://ann.example.com"], "ann.example.com"),
        (["at://not_a_handle", "at://", "at://ann.example.com/path", 7, "at://b.org", "at://c.org"], "b.org"),
        (["at://did:plc:abc"], None),
        ([], None),
        ("at://ann.example.com", None),
        (None, None),
    ],
)
def test_the_first_valid_at_name_is_the_handle(names: object, handle: str | None) -> None:
    assert parsed(alsoKnownAs=names).handle == handle


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ({}, K256["did_key"]),
        ({"id": "#atproto"}, K256["did_key"]),
        ({"publicKeyMultibase": P256["multikey"]}, P256["did_key"]),
        ({"type": K256["legacy_suite"], "publicKeyMultibase": K256["legacy_multibase"]}, K256["did_key"]),
        ({"type": P256["legacy_suite"], "publicKeyMultibase": P256["legacy_multibase"]}, P256["did_key"]),
        ({"type": P256["legacy_suite"], "publicKeyMultibase": K256["legacy_multibase"]}, None),
        ({"type": "Multikey", "publicKeyMultibase": K256["legacy_multibase"]}, None),
        ({"type": K256["legacy_suite"], "publicKeyMultibase": K256["multikey"]}, None),
        ({"type": "JsonWebKey2020"}, None),
        ({"type": None}, None),
        ({"type": ["Multikey"]}, None),
        ({"controller": "did:plc:other"}, None),
        ({"controller": None}, None),
        ({"publicKeyMultibase": None}, None),
        ({"publicKeyMultibase": "z"}, None),
        ({"publicKeyMultibase": K256["did_key"]}, None),
        ({"id": f"{DID}#atproto_label"}, None),
        ({"id": f"{DID}#other"}, None),
        ({"id": 7}, None),
    ],
)
def test_the_signing_key(method: dict[str, Any], key: str | None) -> None:
    assert parsed(verificationMethod=[{**MULTIKEY, **method}]).signing_key == key
    if key is not None:
        parse_did_key(key)


def test_the_first_entry_of_the_name_decides() -> None:
    bad = {**MULTIKEY, "controller": "did:plc:other"}
    other = {**MULTIKEY, "id": f"{DID}#other", "publicKeyMultibase": P256["multikey"]}
    assert parsed(verificationMethod=[other, MULTIKEY]).signing_key == K256["did_key"]
    assert parsed(verificationMethod=[bad, MULTIKEY]).signing_key is None
    assert parsed(service=[{**PDS, "type": "Other"}, PDS]).pds is None


@pytest.mark.parametrize(
    ("endpoint", "pds"),
    [
        ("https://pds.example.com", "https://pds.example.com"),
        ("https://pds.example.com/", "https://pds.example.com"),
        ("https://PDS.example.com:8443", "https://pds.example.com:8443"),
        ("https://[2606:4700::1]:443", "https://[2606:4700::1]:443"),
        ("https://pds.example.com/xrpc", None),
        ("https://pds.example.com//", None),
        ("https://pds.example.com?x=1", None),
        ("https://pds.example.com#x", None),
        ("https://ann:secret@pds.example.com", None),
        ("https://@pds.example.com", None),
        ("http://pds.example.com", None),
        ("ftp://pds.example.com", None),
        ("//pds.example.com", None),
        ("pds.example.com", None),
        ("https://", None),
        ("https://:443", None),
        ("https://pds.example.com:", None),
        ("https://pds.example.com:0", None),
        ("https://pds.example.com:99999", None),
        ("https://pds.example.com:x", None),
        ("https://[::1", None),
        ("https://pds example.com", None),
        ("https://pds.example.com\n", None),
        ("https://pds.example.com\\@evil.org", None),
        ("https://" + "a" * 3000 + ".com", None),
        ("https://" + "a" * 70 + ".com", None),
        ("https://a..b.com", None),
        ("https://.b.com", None),
        ("https://-a.com", None),
        ("https://pds_1.example.com", None),
        ("https://pds", None),
        ("https://[fe80::1%25eth0]", None),
        ("https://[fe80::1%eth0]", None),
        ("https://localhost", "https://localhost"),
        ("https://203.0.113.7", "https://203.0.113.7"),
        ("", None),
        (7, None),
        (["https://pds.example.com"], None),
    ],
)
def test_the_pds_is_an_https_origin(endpoint: object, pds: str | None) -> None:
    assert parsed(service=[{**PDS, "serviceEndpoint": endpoint}]).pds == pds


def test_http_endpoints_only_where_they_are_allowed() -> None:
    obj = document(service=[{**PDS, "serviceEndpoint": "http://localhost:2583"}])
    assert parse_did_document(obj, DID).pds is None
    assert parse_did_document(obj, DID, allow_http=True).pds == "http://localhost:2583"


@pytest.mark.parametrize("host", ["pds", "pds-1:2583", "127.0.0.1:2583", "pds0.simnet.test"])
def test_a_network_of_containers_has_hosts_of_one_label(host: str) -> None:
    obj = document(service=[{**PDS, "serviceEndpoint": f"http://{host}"}])
    assert parse_did_document(obj, DID, allow_http=True).pds == f"http://{host}"


def test_a_document_without_key_or_pds_is_still_read() -> None:
    bare = parse_did_document({"id": DID}, DID)
    assert bare == (DID, None, None, None)
    odd = parsed(verificationMethod="x", service=[None, 7, {"id": None}])
    assert (odd.signing_key, odd.pds) == (None, None)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=20)
    | st.sampled_from(["#atproto", "#atproto_pds", DID]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "type", "controller", "publicKeyMultibase", "serviceEndpoint"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=15,
)


@given(json_values, json_values, json_values)
def test_no_document_raises_anything_but_our_error(names: Any, methods: Any, services: Any) -> None:
    parsed(alsoKnownAs=names, verificationMethod=methods, service=services)
