from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.atproto import syntax
from indexer.errors import SyntaxInvalid
from tests.paths import DATA, interop

#: Vector file of the public suite, and the name of our check.
INTEROP_NAMES = {
    "atidentifier": "at_identifier",
    "aturi": "at_uri",
    "cid": "cid_text",
    "datetime": "datetime",
    "did": "did",
    "handle": "handle",
    "language": "language",
    "nsid": "nsid",
    "recordkey": "rkey",
    "tid": "tid",
    "uri": "uri",
}
#: What the design counts in each file (valid, invalid), so that no case is lost in reading.
INTEROP_COUNTS = {
    "atidentifier": (11, 22),
    "aturi": (23, 72),
    "cid": (8, 10),
    "datetime": (35, 45),
    "did": (24, 18),
    "handle": (71, 48),
    "language": (18, 7),
    "nsid": (25, 27),
    "recordkey": (16, 12),
    "tid": (4, 9),
    "uri": (9, 12),
}


def lines(name: str) -> list[str]:
    """The cases of an interop file. In the record key file only "# " begins a comment: `#extra` is a case."""
    comment = "# " if name.startswith("recordkey") else "#"
    text = interop(f"syntax/{name}.txt").read_text()
    return [line for line in text.split("\n") if line and not line.startswith(comment)]


def own_cases(kind: str) -> Iterator[tuple[str, str]]:
    vectors = json.loads((DATA / "vectors" / "syntax.json").read_text())
    del vectors["about"]
    for name, groups in vectors.items():
        for value in groups[kind]:
            yield name, expand(value)


def expand(value: Any) -> str:
    if isinstance(value, dict):
        text, times, prefix, suffix = value["repeat"]
        return f"{prefix}{text * times}{suffix}"
    return str(value)


def accepts(name: str, text: str) -> bool:
    """What both forms of a check say, which must be the same."""
    answer: bool = getattr(syntax, f"is_{name}")(text)
    check = getattr(syntax, f"check_{name}")
    if answer:
        assert check(text) == text
    else:
        with pytest.raises(SyntaxInvalid):
            check(text)
    return answer


@pytest.mark.parametrize("name", INTEROP_NAMES)
def test_interop_valid_identifiers_are_accepted(name: str) -> None:
    cases = lines(f"{name}_syntax_valid")
    refused = [text for text in cases if not accepts(INTEROP_NAMES[name], text)]
    assert refused == []
    assert len(cases) == INTEROP_COUNTS[name][0]


@pytest.mark.parametrize("name", INTEROP_NAMES)
def test_interop_invalid_identifiers_are_refused(name: str) -> None:
    cases = lines(f"{name}_syntax_invalid")
    accepted = [text for text in cases if accepts(INTEROP_NAMES[name], text)]
    assert accepted == []
    assert len(cases) == INTEROP_COUNTS[name][1]


@pytest.mark.parametrize("name", ["datetime", "language"])
def test_interop_identifiers_of_good_form_and_impossible_meaning_are_refused(name: str) -> None:
    cases = lines(f"{name}_parse_invalid")
    assert [text for text in cases if accepts(name, text)] == []
    assert len(cases) == {"datetime": 7, "language": 4}[name]


def test_own_valid_identifiers_are_accepted() -> None:
    assert [case for case in own_cases("valid") if not accepts(*case)] == []


def test_own_invalid_identifiers_are_refused() -> None:
    assert [case for case in own_cases("invalid") if accepts(*case)] == []


def test_every_check_has_vectors_of_our_own() -> None:
    covered = {name for kind in ("valid", "invalid") for name, _ in own_cases(kind)}
    assert covered == {name[3:] for name in dir(syntax) if name.startswith("is_")}


def test_an_error_names_what_is_wrong_and_stays_short() -> None:
    with pytest.raises(SyntaxInvalid, match="not a valid DID: 'did:nope'"):
        syntax.check_did("did:nope")
    with pytest.raises(SyntaxInvalid) as raised:
        syntax.check_nsid("x" * 100_000)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("value", [None, 7, b"did:plc:abc", ["did:plc:abc"]])
def test_a_value_that_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(SyntaxInvalid):
        syntax.check_did(value)


def test_at_uri_parts() -> None:
    assert syntax.parse_at_uri("at://did:plc:abc/app.bsky.feed.post/self") == (
        "did:plc:abc",
        "app.bsky.feed.post",
        "self",
    )
    assert syntax.parse_at_uri("at://ann.example.com/app.bsky.feed.post").rkey == ""
    assert syntax.parse_at_uri("at://ann.example.com") == ("ann.example.com", "", "")
    with pytest.raises(SyntaxInvalid):
        syntax.parse_at_uri("at://ann.example.com/")


def test_nsid_patterns_match_whole_segments_only() -> None:
    assert syntax.nsid_matches("app.bsky.feed.post", "app.bsky.feed.post")
    assert not syntax.nsid_matches("app.bsky.feed.post", "app.bsky.feed.postgate")
    assert syntax.nsid_matches("app.bsky.feed.*", "app.bsky.feed.post")
    assert syntax.nsid_matches("app.*", "app.bsky.feed.post")
    assert not syntax.nsid_matches("app.bsky.feed.*", "app.bsky.feedback.post")
    assert not syntax.nsid_matches("app.bsky.feed.*", "app.bsky.feed")


def test_the_time_in_a_tid() -> None:
    moment = datetime(2026, 11, 21, 15, 45, 7, 933000, tzinfo=UTC)
    micros = int(moment.timestamp()) * 1_000_000 + 933000
    tid = syntax.tid_from_micros(micros, 7)
    assert syntax.is_tid(tid)
    assert syntax.tid_micros(tid) == micros
    assert syntax.tid_micros("2222222222222") == 0


@given(st.integers(0, 2**53 - 1), st.integers(0, 1023), st.integers(0, 2**53 - 1), st.integers(0, 1023))
def test_tids_order_as_their_times_do(a: int, clock_a: int, b: int, clock_b: int) -> None:
    first, second = syntax.tid_from_micros(a, clock_a), syntax.tid_from_micros(b, clock_b)
    assert (first < second) == ((a, clock_a) < (b, clock_b))
    assert syntax.tid_micros(first) == a


@pytest.mark.parametrize(("micros", "clock"), [(-1, 0), (2**53, 0), (0, -1), (0, 1024)])
def test_no_tid_beyond_its_bits(micros: int, clock: int) -> None:
    with pytest.raises(SyntaxInvalid):
        syntax.tid_from_micros(micros, clock)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("0000-01-01T00:00:00Z", True),
        ("0000-01-01T00:59:59.9+01:00", False),
        ("0000-01-01T01:00:00+01:00", True),
        ("0000-01-01T00:00:00-01:00", True),
        ("0000-01-02T00:00:00+23:59", True),
    ],
)
def test_no_moment_before_the_year_0(text: str, valid: bool) -> None:
    assert syntax.is_datetime(text) is valid


@given(st.text(max_size=40))
def test_no_text_makes_a_check_raise_anything_else(text: str) -> None:
    for name in dir(syntax):
        if name.startswith("is_"):
            accepts(name[3:], text)
