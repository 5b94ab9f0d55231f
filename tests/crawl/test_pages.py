"""Lists as hosts send them, and how far a sweep is: what is read, what is refused, what is endless."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.crawl.pages import Listed, page_url, read_collections, read_hosts, read_repos
from indexer.crawl.sweep import EndlessList, Sweep, begun, ended, moved, next_collection

ONE, TWO = "did:plc:" + "a" * 24, "did:web:two.test"
REV = "3jzfcijpj2z2a"


def body(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_a_page_of_repositories_is_read_and_its_garbage_counted() -> None:
    items = [
        {"did": ONE, "rev": REV, "head": "x", "active": True},
        {"did": TWO, "rev": 7, "active": False, "status": "takendown"},
        None, 7, {}, {"did": "not a did"}, {"did": ["x"]},
    ]  # fmt: skip
    page = read_repos(body({"repos": items, "cursor": "next"}))
    assert page.repos == [Listed(ONE, REV), Listed(TWO, "", False, "takendown")]
    assert (page.cursor, page.garbage) == ("next", 5)


@pytest.mark.parametrize("cursor", [None, ""])
def test_a_page_without_a_cursor_is_the_last(cursor: str | None) -> None:
    assert read_repos(body({"repos": [{"did": ONE}, {"did": ONE}], "cursor": cursor})).cursor == ""
    assert len(read_repos(body({"repos": [{"did": ONE}, {"did": ONE}]})).repos) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"<html>", "not JSON"),
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "no list of repos"),
        (b'{"repos": {}}', "no list of repos"),
        (body({"repos": [None] * 4001}), "no list of repos"),
        (body({"repos": [], "cursor": 7}), "a cursor that is none"),
        (body({"repos": [], "cursor": "x" * 3000}), "a cursor that is none"),
    ],
)
def test_what_is_no_page_is_refused(text: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_repos(text)


def test_hosts_that_are_banned_or_offline_are_left_out() -> None:
    hosts = [
        {"hostname": "A.test", "status": "active"}, {"hostname": "b.test"}, {"hostname": ""},
        {"hostname": "c.test", "status": "banned"}, {"hostname": "d.test", "status": "offline"},
        {"hostname": 5}, "e.test",
    ]  # fmt: skip
    page = read_hosts(body({"hosts": hosts}))
    assert (page.hosts, page.garbage) == (["a.test", "b.test"], 3)


def test_a_description_is_of_the_account_that_was_asked_for() -> None:
    told = body({"did": ONE, "collections": ["app.bsky.feed.post", "no nsid", 7]})
    assert read_collections(told, ONE) == ["app.bsky.feed.post"]
    with pytest.raises(ValueError, match="another account"):
        read_collections(told, TWO)
    with pytest.raises(ValueError, match="no list of collections"):
        read_collections(body({"did": ONE}), ONE)


def test_no_more_is_asked_for_than_a_lexicon_allows() -> None:
    assert page_url("https://a.test", "list_repos", "", "", 2000).endswith("listRepos?limit=1000")
    url = page_url("https://a.test", "by_collection", "c/1", "a.b.c", 2000)
    assert url.endswith("listReposByCollection?limit=2000&collection=a.b.c&cursor=c%2F1")


@given(st.integers(0, 60), st.integers(1, 60))
def test_a_circle_of_any_length_is_found(tail: int, length: int) -> None:
    """Pages 0, 1, … ``tail``, and from there on in a circle."""

    def read() -> None:
        sweep = begun(Sweep(), 1, "", ())
        for page in range(1, 4 * (tail + length) + 5):
            number = page if page < tail else tail + (page - tail) % length
            sweep = moved(sweep, f"c{number}", 1, 10**6)

    with pytest.raises(EndlessList, match="back to an earlier one"):
        read()


@given(st.integers(1, 500))
def test_a_list_without_a_circle_is_read_to_its_end(pages: int) -> None:
    sweep = begun(Sweep(), 1, "", ())
    for number in range(1, pages):
        sweep = moved(sweep, f"c{number}", 2, pages + 1)
    sweep = moved(sweep, "", 2, pages)
    assert (sweep.pages, sweep.listed, sweep.cursor) == (pages, 2 * pages, "")


def test_a_list_beyond_its_bound_is_endless() -> None:
    sweep = moved(begun(Sweep(), 1, "", ()), "c1", 1, 2)
    with pytest.raises(EndlessList, match="more than 2 pages"):
        moved(sweep, "c2", 1, 2)


def test_collections_follow_each_other_also_when_they_change() -> None:
    sweep = begun(Sweep(), 5, "q", ("a.b.c", "d.e.f"))
    assert sweep.collection == "a.b.c"
    later = next_collection(sweep._replace(cursor="x"), ("a.b.c", "c.d.e", "d.e.f"))
    assert later is not None
    assert (later.collection, later.cursor) == ("c.d.e", "")
    assert next_collection(later, ("a.b.c",)) is None


def test_the_next_sweep_is_due_an_interval_after_this_one_began() -> None:
    sweep = begun(Sweep(), 1_000_000, "q", ())
    assert ended(sweep, "done", 2_000_000, 90_000_000).next_us == 91_000_000
    late = ended(sweep, "done", 900_000_000, 90_000_000)
    assert (late.next_us, late.started_us, late.outcome) == (960_000_000, 0, "done")
    assert Sweep.of(list(late)) == late
    assert Sweep.of(["of", "another", "format"]) == Sweep() == Sweep.of(None)
