"""A small lexicon validator, only so that the public lexicon vectors run: schemas, and records against them.

The indexer itself checks the data model and never a lexicon. The string formats are the product's own
checks, which is what these vectors prove of it.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from indexer.atproto import syntax
from indexer.errors import IndexerError

PRIMARY = ("record", "query", "procedure", "subscription", "permission-set")
SCALARS = ("boolean", "integer", "string", "bytes", "cid-link", "blob", "unknown", "token")
FORMATS: dict[str, Callable[[str], str]] = {
    "did": syntax.check_did,
    "handle": syntax.check_handle,
    "at-identifier": syntax.check_at_identifier,
    "nsid": syntax.check_nsid,
    "at-uri": syntax.check_at_uri,
    "cid": syntax.check_cid_text,
    "datetime": syntax.check_datetime,
    "language": syntax.check_language,
    "uri": syntax.check_uri,
    "tid": syntax.check_tid,
    "record-key": syntax.check_rkey,
}


class Invalid(Exception):
    """A schema or a record that does not fit."""


def need(condition: bool, what: str) -> None:
    if not condition:
        raise Invalid(what)


def check_lexicon(lexicon: Any) -> None:
    """Raises `Invalid` for a document that is no lexicon."""
    need(lexicon.get("lexicon") == 1 and type(lexicon["lexicon"]) is int, "the version must be 1")
    need(isinstance(lexicon.get("id"), str) and syntax.is_nsid(lexicon["id"]), "the id must be an NSID")
    for name, schema in lexicon["defs"].items():
        kind = schema.get("type")
        need(kind not in PRIMARY or name == "main", f"{kind} must be the main definition")
        need(kind not in ("ref", "union", "unknown"), f"{kind} cannot be a definition")
        if kind == "permission-set":
            need(all(item["type"] == "permission" for item in schema["permissions"]), "not a permission")
            continue
        for part in schema_parts(schema) if kind in PRIMARY else [schema]:
            check_schema(part)


def schema_parts(primary: dict[str, Any]) -> list[Any]:
    """The schemas inside a primary definition."""
    if primary["type"] == "record":
        need(primary["record"].get("type") == "object", "a record must be an object")
        return [primary["record"]]
    bodies = [primary[name].get("schema") for name in ("input", "output", "message") if name in primary]
    return [part for part in [primary.get("parameters"), *bodies] if part is not None]


def check_schema(schema: Any) -> None:
    kind = schema.get("type")
    if kind in ("object", "params"):
        for part in schema.get("properties", {}).values():
            check_schema(part)
    elif kind == "array":
        check_schema(schema["items"])
    elif kind in ("ref", "union"):
        for ref in [schema["ref"]] if kind == "ref" else schema["refs"]:
            nsid, _, name = ref.partition("#")
            need((not nsid and bool(name)) or syntax.is_nsid(nsid), f"not a reference: {ref}")
    else:
        need(kind in SCALARS, f"unknown type {kind}")
        need("format" not in schema or schema["format"] in FORMATS, "unknown format")


def check_record(lexicon: Any, rkey: str, record: Any) -> None:
    """Raises `Invalid` when ``record`` does not fit the main definition of ``lexicon``."""
    main = lexicon["defs"]["main"]
    need(record.get("$type") == lexicon["id"], "$type")
    literal = main["key"].removeprefix("literal:")
    need(syntax.is_rkey(rkey) and (literal == main["key"] or rkey == literal), "rkey")
    check_value(lexicon, main["record"], record, "record")


def check_value(lexicon: Any, schema: Any, value: Any, at: str) -> None:
    kind = schema["type"]
    if kind in ("ref", "union"):
        check_reference(lexicon, schema, value, at)
    elif kind == "object":
        need(is_object(value), at)
        need(all(name in value for name in schema.get("required", [])), f"{at}: a field is missing")
        for name, part in schema.get("properties", {}).items():
            if name in value and not (value[name] is None and name in schema.get("nullable", [])):
                check_value(lexicon, part, value[name], f"{at}.{name}")
    elif kind == "array":
        need(isinstance(value, list), at)
        check_range(schema, len(value), "Length", at)
        for item in value:
            check_value(lexicon, schema["items"], item, at)
    else:
        CHECKS[kind](schema, value, at)


def check_reference(lexicon: Any, schema: Any, value: Any, at: str) -> None:
    if schema["type"] == "ref":
        check_value(lexicon, lexicon["defs"][schema["ref"].partition("#")[2]], value, at)
        return
    need(is_object(value) and isinstance(value.get("$type"), str), at)
    if value["$type"] in schema["refs"]:
        check_value(lexicon, lexicon["defs"][value["$type"].partition("#")[2]], value, at)
    else:
        need(not schema.get("closed", False), f"{at}: not in the union")


def is_object(value: Any) -> bool:
    """A map of the data model: not the JSON form of a link, of bytes or of a blob."""
    special = isinstance(value, dict) and (
        value.keys() in ({"$link"}, {"$bytes"}) or value.get("$type") == "blob"
    )
    return isinstance(value, dict) and not special


def check_range(schema: Any, number: int, suffix: str, at: str) -> None:
    low, high = ("minimum", "maximum") if not suffix else (f"min{suffix}", f"max{suffix}")
    need(schema.get(low, number) <= number <= schema.get(high, number), f"{at}: out of range")


def check_choice(schema: Any, value: Any, at: str) -> None:
    need("const" not in schema or value == schema["const"], f"{at}: not the constant")
    need("enum" not in schema or value in schema["enum"], f"{at}: not in the list")


def check_boolean(schema: Any, value: Any, at: str) -> None:
    need(isinstance(value, bool), at)
    check_choice(schema, value, at)


def check_integer(schema: Any, value: Any, at: str) -> None:
    need(type(value) is int, at)
    check_choice(schema, value, at)
    check_range(schema, value, "", at)


def check_string(schema: Any, value: Any, at: str) -> None:
    need(isinstance(value, str), at)
    check_choice(schema, value, at)
    check_range(schema, len(value.encode()), "Length", at)
    check_range(schema, graphemes(value), "Graphemes", at)
    if "format" in schema:
        try:
            FORMATS[schema["format"]](value)
        except IndexerError as error:
            raise Invalid(f"{at}: {error}") from error


def graphemes(text: str) -> int:
    """User-perceived characters, near enough: marks, joiners, skin tones and flag pairs count as one."""
    text = re.sub("[\U0001f1e6-\U0001f1ff]{2}", "F", text)
    text = re.sub("[\ufe00-\ufe0f\U0001f3fb-\U0001f3ff]", "", text)
    text = "".join(char for char in text if not unicodedata.combining(char))
    return len(re.sub(".(\u200d.)+", "J", text))


def check_bytes(schema: Any, value: Any, at: str) -> None:
    need(isinstance(value, dict) and value.keys() == {"$bytes"} and isinstance(value["$bytes"], str), at)
    text = value["$bytes"]
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise Invalid(at) from error
    check_range(schema, len(data), "Length", at)


def check_link(_: Any, value: Any, at: str) -> None:
    need(isinstance(value, dict) and value.keys() == {"$link"} and isinstance(value["$link"], str), at)
    need(syntax.is_cid_text(value["$link"]), at)


def check_blob(schema: Any, value: Any, at: str) -> None:
    need(isinstance(value, dict) and value.get("$type") == "blob", at)
    need(type(value.get("size")) is int and isinstance(value.get("mimeType"), str), at)
    check_link(schema, value.get("ref"), at)
    need(value["size"] <= schema.get("maxSize", value["size"]), f"{at}: too large")
    accepted = schema.get("accept", ["*"])
    need(any(fnmatchcase(value["mimeType"], pattern) for pattern in accepted), f"{at}: not accepted")


def check_unknown(_: Any, value: Any, at: str) -> None:
    need(is_object(value), at)


def check_token(_: Any, value: Any, at: str) -> None:
    need(isinstance(value, str), at)


CHECKS: dict[str, Callable[[Any, Any, str], None]] = {
    "boolean": check_boolean,
    "integer": check_integer,
    "string": check_string,
    "bytes": check_bytes,
    "cid-link": check_link,
    "blob": check_blob,
    "unknown": check_unknown,
    "token": check_token,
}
