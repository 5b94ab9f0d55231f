"""Record values of the common collections, drawn from a random generator.

Owns what people write: posts with facets, replies and embeds, likes, reposts, follows, blocks, lists,
profiles, and a collection of our own with bytes, links and nesting. Everything derives from the
generator handed in and from what `People` answers. Pure; any thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from random import Random
from typing import Any, Protocol

from indexer.simulator.cbor import Link, blob_cid, block_cid
from indexer.simulator.phrases import DISPLAY, EMOJI, PHRASES, SITES, TAGS
from indexer.simulator.wire import timestamp

Value = dict[str, Any]

POST = "app.bsky.feed.post"
LIKE = "app.bsky.feed.like"
REPOST = "app.bsky.feed.repost"
FOLLOW = "app.bsky.graph.follow"
BLOCK = "app.bsky.graph.block"
LIST = "app.bsky.graph.list"
LISTITEM = "app.bsky.graph.listitem"
PROFILE = "app.bsky.actor.profile"
SAMPLE = "org.simnet.lab.sample"


class People(Protocol):
    """Whom and what a record may refer to."""

    def some_person(self, rng: Random) -> tuple[str, str]: ...  # (DID, handle)

    def some_post(self, rng: Random) -> tuple[str, str] | None: ...  # (AT-URI, CID)


def record(rng: Random, collection: str, did: str, people: People, micros: int) -> Value:
    """A new value for ``collection`` by the account ``did``."""
    value = _MAKERS[collection](rng, did, people, micros)
    return {"$type": collection, **value}


def edited(rng: Random, value: Value, micros: int) -> Value:
    """Another version of ``value``: surely different, same collection."""
    changed = dict(value)
    note = f"{rng.choice(EMOJI)} {rng.getrandbits(40):x}"
    if value["$type"] == PROFILE:
        changed["description"] = _phrase(rng)[1] + " · " + note
    elif value["$type"] == POST:
        changed |= {"text": f"{_phrase(rng)[1]} (edit {note})", "facets": []}
    else:
        changed["updatedAt"] = timestamp(micros)
        changed["note"] = note
    return changed


def _phrase(rng: Random) -> tuple[str, str]:
    language = "en" if rng.random() < 0.5 else rng.choice(_LANGUAGES)
    return language, rng.choice(PHRASES[language])


_LANGUAGES = tuple(PHRASES)


def _blob(rng: Random, mime: str, largest: int) -> Value:
    content = rng.getrandbits(64).to_bytes(8, "big")
    return {"$type": "blob", "ref": blob_cid(content), "mimeType": mime, "size": rng.randrange(900, largest)}


def _strong_ref(post: tuple[str, str]) -> Value:
    return {"uri": post[0], "cid": post[1]}


def _post(rng: Random, did: str, people: People, micros: int) -> Value:
    language, text = _phrase(rng)
    value: Value = {"text": text, "createdAt": timestamp(micros), "langs": [language]}
    if rng.random() < 0.4:
        value["text"] += f" {rng.choice(EMOJI)}"
    if rng.random() < 0.35:
        value["text"], value["facets"] = _facets(rng, people, value["text"])
    if rng.random() < 0.05:
        value["langs"] = []
    if rng.random() < 0.03:
        value["labels"] = {"$type": "com.atproto.label.defs#selfLabels", "values": [{"val": "graphic-media"}]}
    target = people.some_post(rng) if rng.random() < 0.35 else None
    if target is not None:
        value["reply"] = {"root": _strong_ref(people.some_post(rng) or target), "parent": _strong_ref(target)}
    if rng.random() < 0.3:
        value["embed"] = _embed(rng, people)
    return value


def _facets(rng: Random, people: People, text: str) -> tuple[str, list[Value]]:
    """Text with one to three marked spans; offsets count UTF-8 bytes."""
    facets = []
    for kind in rng.sample(("mention", "link", "tag"), rng.randrange(1, 4)):
        if kind == "mention":
            did, handle = people.some_person(rng)
            shown, feature = f"@{handle}", {"$type": "app.bsky.richtext.facet#mention", "did": did}
        elif kind == "link":
            uri = rng.choice(SITES)[0]
            shown, feature = uri[8:32] + "…", {"$type": "app.bsky.richtext.facet#link", "uri": uri}
        else:
            tag = rng.choice(TAGS)
            shown, feature = f"#{tag}", {"$type": "app.bsky.richtext.facet#tag", "tag": tag}
        start = len(text.encode()) + 1
        text = f"{text} {shown}"
        index = {"byteStart": start, "byteEnd": len(text.encode())}
        facets.append({"$type": "app.bsky.richtext.facet", "index": index, "features": [feature]})
    return text, facets


def _embed(rng: Random, people: People) -> Value:
    kind = rng.random()
    quoted = people.some_post(rng) if kind < 0.3 else None
    if quoted is not None:
        return {"$type": "app.bsky.embed.record", "record": _strong_ref(quoted)}
    if kind < 0.6:
        uri, title, description = rng.choice(SITES)
        external: Value = {"uri": uri, "title": title, "description": description}
        if rng.random() < 0.5:
            external["thumb"] = _blob(rng, "image/jpeg", 400_000)
        return {"$type": "app.bsky.embed.external", "external": external}
    images = [
        {
            "alt": _phrase(rng)[1] if rng.random() < 0.7 else "",
            "image": _blob(rng, rng.choice(("image/jpeg", "image/png", "image/webp")), 1_000_000),
            "aspectRatio": {"width": rng.randrange(200, 4000), "height": rng.randrange(200, 4000)},
        }
        for _ in range(rng.randrange(1, 5))
    ]
    return {"$type": "app.bsky.embed.images", "images": images}


def _like(rng: Random, did: str, people: People, micros: int) -> Value:
    post = people.some_post(rng)
    if post is None:
        uri = f"at://{people.some_person(rng)[0]}/{POST}/3kdgeujwlq32y"
        post = (uri, "bafyreidfayvfuwqa7qlnopdjiqrxzs6blmoeu4rujcjtnci5beludirz2a")
    return {"subject": _strong_ref(post), "createdAt": timestamp(micros)}


def _person(rng: Random, did: str, people: People, micros: int) -> Value:
    return {"subject": people.some_person(rng)[0], "createdAt": timestamp(micros)}


def _list(rng: Random, did: str, people: People, micros: int) -> Value:
    purpose = rng.choice(("app.bsky.graph.defs#modlist", "app.bsky.graph.defs#curatelist"))
    value: Value = {"purpose": purpose, "name": _phrase(rng)[1][:40], "createdAt": timestamp(micros)}
    if rng.random() < 0.5:
        value["avatar"] = _blob(rng, "image/png", 300_000)
    return value


def _listitem(rng: Random, did: str, people: People, micros: int) -> Value:
    listed = f"at://{did}/{LIST}/3kdgeujwlq3{rng.choice('2345')}y"
    return {"subject": people.some_person(rng)[0], "list": listed, "createdAt": timestamp(micros)}


def _profile(rng: Random, did: str, people: People, micros: int) -> Value:
    value: Value = {"displayName": rng.choice(DISPLAY), "createdAt": timestamp(micros)}
    if rng.random() < 0.8:
        value["description"] = f"{_phrase(rng)[1]}\n{_phrase(rng)[1]} {rng.choice(EMOJI)}"
    if rng.random() < 0.8:
        value["avatar"] = _blob(rng, "image/jpeg", 1_000_000)
    if rng.random() < 0.4:
        value["banner"] = _blob(rng, "image/png", 1_000_000)
    post = people.some_post(rng) if rng.random() < 0.2 else None
    if post is not None:
        value["pinnedPost"] = _strong_ref(post)
    return value


def _sample(rng: Random, did: str, people: People, micros: int) -> Value:
    """Every kind of the data model, in the corners that decoders get wrong."""
    digest = hashlib.sha256(rng.getrandbits(64).to_bytes(8, "big")).digest()
    return {
        "bytes": digest[: rng.randrange(33)],
        "fakeLink": Link(block_cid(digest)).hex(),
        "link": block_cid(digest),
        "blobLink": blob_cid(digest),
        "links": [block_cid(digest[:i]) for i in range(rng.randrange(3))],
        "numbers": [0, 23, 24, 255, 256, 65535, 65536, -1, -24, -25, -257, 2**32, 2**53 - 1, 1 - 2**53],
        "nested": {
            "a": {"b": {"c": [[], {}, [{"deep": rng.random() < 0.5}]]}},
            "null": None,
            "": "empty key",
        },
        "ключ": _phrase(rng)[1],
        "zz": {"aa": 1, "b": 2, "ccc": 3, "B": 4},
        "text": '\u0000 tab\t "quotes" \\ \u2028 ' + rng.choice(EMOJI),
        "createdAt": timestamp(micros),
    }


_MAKERS: dict[str, Callable[[Random, str, People, int], Value]] = {
    POST: _post,
    LIKE: _like,
    REPOST: _like,
    FOLLOW: _person,
    BLOCK: _person,
    LIST: _list,
    LISTITEM: _listitem,
    PROFILE: _profile,
    SAMPLE: _sample,
}
COLLECTIONS = tuple(_MAKERS)
#: How often each collection is written.
WEIGHTS = (30, 35, 8, 12, 2, 1, 3, 2, 5)
#: Collections whose records are edited in place.
EDITABLE = frozenset({POST, LIST, PROFILE, SAMPLE})
