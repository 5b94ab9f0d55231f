"""What is followed and what is kept."""

from __future__ import annotations

import pytest

from indexer.config import FilterSettings
from indexer.errors import SyntaxInvalid
from indexer.ingest.filters import Filters

POST, LIKE, PROFILE = "app.bsky.feed.post", "app.bsky.feed.like", "app.bsky.actor.profile"


def test_no_collections_keep_everything() -> None:
    assert Filters().wants_collection(POST)
    assert not Filters().signals_match(POST)


def test_patterns_cover_what_is_below_them_and_nothing_else() -> None:
    filters = Filters(collections=("app.bsky.feed.*", PROFILE))
    assert filters.wants_collection(POST)
    assert filters.wants_collection(PROFILE)
    assert not filters.wants_collection("app.bsky.feedback.post")
    assert not filters.wants_collection("app.bsky.actor.profiles")


def test_settings_are_checked() -> None:
    filters = Filters.of(FilterSettings(mode="full", signals=[POST], excludes=["did:web:bad.example.com"]))
    assert filters.mode == "full"
    assert filters.signals_match(POST)
    assert filters.is_excluded("did:web:bad.example.com")
    for bad in ({"signals": ["nope"]}, {"collections": ["a.*b"]}, {"excludes": ["alice.test"]}):
        with pytest.raises(SyntaxInvalid):
            Filters.checked("full", **{"signals": [], "collections": [], "excludes": [], **bad})
    with pytest.raises(SyntaxInvalid):
        Filters.checked("some", [], [], [])  # type: ignore[arg-type]


def test_stored_rows_stand_above_the_settings() -> None:
    settings = Filters(mode="full", signals=(POST,), collections=(POST,))
    changed = Filters(
        mode="filter", signals=(), collections=("app.bsky.*",), excludes=frozenset({"did:web:a.b"})
    )
    assert settings.with_rows(list(changed.rows())) == changed
    assert settings.with_rows([]) == settings
    assert settings.with_rows([("signals", "")]) == Filters(mode="full", collections=(POST,))


@pytest.mark.parametrize(
    ("old", "new", "widens"),
    [
        ((), (), False),
        ((), (POST,), False),
        ((POST,), (), True),
        ((POST,), (POST,), False),
        ((POST,), (POST, LIKE), True),
        (("app.bsky.*",), (POST, "app.bsky.feed.*"), False),
        ((POST,), ("app.bsky.feed.*",), True),
    ],
)
def test_widening_is_seen(old: tuple[str, ...], new: tuple[str, ...], widens: bool) -> None:
    assert Filters(collections=new).widens(Filters(collections=old)) is widens
