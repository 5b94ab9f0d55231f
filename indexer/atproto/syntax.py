"""Syntax of the protocol's identifiers: one regular expression and its limits for each.

Owns the checks for DID, handle, NSID, record key, TID, AT-URI, datetime, at-identifier, language
tag, URI and the loose CID text, each as ``is_…`` (bool) and ``check_…`` (returns the text or raises
`SyntaxInvalid` naming it); also TID arithmetic. Pure; any thread. Source: the atproto specifications
of each identifier, held to the public interop vectors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from indexer.atproto.types import Did, Handle, Micros, Nsid, Path, Rkey
from indexer.errors import SyntaxInvalid

MAX_DID = 2048
MAX_HANDLE = 253
MAX_NSID = 317
MAX_RKEY = 512
MAX_URI = 8192

#: Fragments shared with `frames`, which joins them into one expression.
DID_RE = r"did:[a-z]+:[a-zA-Z0-9._:%-]*[a-zA-Z0-9._-]"
TID_RE = r"[2-7a-j][2-7a-z]{12}"
RKEY_RE = r"(?!\.{1,2}\Z)[a-zA-Z0-9_~.:-]{1,512}"
DATETIME_RE = (
    r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
    r"T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,20})?"
    r"(?:Z|(?!-00:00)[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"

_did = re.compile(DID_RE).fullmatch
_handle = re.compile(rf"(?:{_LABEL}\.)+[a-zA-Z](?:[a-zA-Z0-9-]{{0,61}}[a-zA-Z0-9])?").fullmatch
_nsid = re.compile(
    rf"[a-zA-Z](?:[a-zA-Z0-9-]{{0,61}}[a-zA-Z0-9])?(?:\.{_LABEL})+\.[a-zA-Z][a-zA-Z0-9]{{0,62}}"
).fullmatch
_rkey = re.compile(RKEY_RE).fullmatch
_tid = re.compile(TID_RE).fullmatch
_datetime = re.compile(DATETIME_RE).fullmatch
_uri = re.compile(r"[a-zA-Z][a-zA-Z0-9.+-]*:[^\s\x00-\x1f\x7f]+").fullmatch
_cid = re.compile(r"(?!Qmb)[a-zA-Z0-9+=]{8,256}").fullmatch

# BCP 47, with the primary subtag in lower case and of 2 or 3 letters, as the network writes it.
_language = re.compile(
    r"(?P<main>[a-z]{2,3}(?:-[a-zA-Z]{3}){0,3}(?:-[a-zA-Z]{4})?(?:-(?:[a-zA-Z]{2}|[0-9]{3}))?)"
    r"(?P<variants>(?:-(?:[a-zA-Z0-9]{5,8}|[0-9][a-zA-Z0-9]{3}))*)"
    r"(?P<extensions>(?:-[0-9a-wy-zA-WY-Z](?:-[a-zA-Z0-9]{2,8})+)*)"
    r"(?:-[xX](?:-[a-zA-Z0-9]{1,8})+)?"
    r"|[xX](?:-[a-zA-Z0-9]{1,8})+"
).fullmatch
_grandfathered = re.compile(
    r"en-gb-oed|i-(?:ami|bnn|default|enochian|hak|klingon|lux|mingo|navajo|pwn|tao|tay|tsu)"
    r"|sgn-be-fr|sgn-be-nl|sgn-ch-de"
).fullmatch

_TID_ALPHABET = "234567abcdefghijklmnopqrstuvwxyz"
_TID_VALUE = {char: value for value, char in enumerate(_TID_ALPHABET)}
_MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


class AtUri(NamedTuple):
    """``at://authority[/collection[/rkey]]``; the parts that are absent are empty."""

    authority: str
    collection: str
    rkey: str


def is_did(text: str) -> bool:
    return len(text) <= MAX_DID and _did(text) is not None


def is_handle(text: str) -> bool:
    return len(text) <= MAX_HANDLE and _handle(text) is not None


def is_nsid(text: str) -> bool:
    return len(text) <= MAX_NSID and _nsid(text) is not None


def is_rkey(text: str) -> bool:
    return _rkey(text) is not None


def is_tid(text: str) -> bool:
    return _tid(text) is not None


def is_path(text: str) -> bool:
    """``collection/rkey``, the form of a key of the tree."""
    collection, _, rkey = text.partition("/")
    return _rkey(rkey) is not None and is_nsid(collection)


def is_at_identifier(text: str) -> bool:
    return is_did(text) if text.startswith("did:") else is_handle(text)


def is_at_uri(text: str) -> bool:
    if not text.startswith("at://") or len(text) > MAX_URI:
        return False
    authority, *rest = text[5:].split("/")
    if not is_at_identifier(authority) or len(rest) > 2:
        return False
    return (not rest or is_nsid(rest[0])) and (len(rest) < 2 or is_rkey(rest[1]))


def is_uri(text: str) -> bool:
    return len(text) <= MAX_URI and _uri(text) is not None


def is_cid_text(text: str) -> bool:
    """The loose form that record fields of format ``cid`` may have; `cid.parse_cid` is the strict one."""
    return _cid(text) is not None


def is_datetime(text: str) -> bool:
    """Full form with seconds and zone, and a time that exists (no month zero, no 30 February)."""
    return (
        _datetime(text) is not None
        and _real_day(text)
        # Local midnight of the first day can lie before the year 0.
        and not (text[:10] == "0000-01-01" and text[-6] == "+" and text[11:16] < text[-5:])
    )


def is_language(text: str) -> bool:
    """BCP 47, well formed, and valid in that no variant or extension singleton is repeated."""
    match = _language(text)
    if match is None:
        return _grandfathered(text.lower()) is not None
    if match["main"] is None:
        return True
    variants = match["variants"].lower().split("-")[1:]
    singletons = [part for part in match["extensions"].lower().split("-") if len(part) == 1]
    return len(set(variants)) == len(variants) and len(set(singletons)) == len(singletons)


def _checker(what: str, is_valid: Callable[[str], bool]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not isinstance(text, str) or not is_valid(text):
            raise SyntaxInvalid(f"not a valid {what}: {_shown(text)}")
        return text

    check.__name__ = f"check_{what.replace(' ', '_').replace('-', '_').lower()}"
    check.__doc__ = f"The text itself when it is a valid {what}; raises `SyntaxInvalid` naming it otherwise."
    return check


def _shown(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 120 else shown[:117] + "…'"


check_did: Callable[[str], Did] = _checker("DID", is_did)
check_handle: Callable[[str], Handle] = _checker("handle", is_handle)
check_nsid: Callable[[str], Nsid] = _checker("NSID", is_nsid)
check_rkey: Callable[[str], Rkey] = _checker("record key", is_rkey)
check_tid = _checker("TID", is_tid)
check_path: Callable[[str], Path] = _checker("record path", is_path)
check_at_identifier = _checker("at-identifier", is_at_identifier)
check_at_uri = _checker("AT-URI", is_at_uri)
check_uri = _checker("URI", is_uri)
check_cid_text = _checker("CID", is_cid_text)
check_datetime = _checker("datetime", is_datetime)
check_language = _checker("language tag", is_language)


def parse_at_uri(text: str) -> AtUri:
    """The parts of an AT-URI; raises `SyntaxInvalid`."""
    authority, collection, rkey = [*check_at_uri(text)[5:].split("/"), "", ""][:3]
    return AtUri(authority, collection, rkey)


def nsid_matches(pattern: str, nsid: Nsid) -> bool:
    """``pattern`` is an NSID or a prefix ``ns.*``, which covers everything below ``ns.``."""
    if pattern.endswith(".*"):
        return nsid.startswith(pattern[:-1])
    return pattern == nsid


def is_nsid_pattern(text: str) -> bool:
    """An NSID, or one or more whole segments followed by ``.*``."""
    if text.endswith(".*"):
        # Any prefix of an NSID becomes one again by adding two plain segments.
        return is_nsid(text[:-1] + "a.a")
    return is_nsid(text)


check_nsid_pattern = _checker("NSID pattern", is_nsid_pattern)


def tid_micros(tid: str) -> Micros:
    """The time in a TID, in microseconds since the epoch; raises `SyntaxInvalid`."""
    number = 0
    for char in check_tid(tid):
        number = number << 5 | _TID_VALUE[char]
    return number >> 10


def tid_from_micros(micros: Micros, clock_id: int = 0) -> str:
    """The TID of a time and a 10-bit clock id."""
    if not 0 <= micros < 1 << 53 or not 0 <= clock_id < 1 << 10:
        raise SyntaxInvalid(f"no TID for {micros} µs and clock id {clock_id}")
    number = micros << 10 | clock_id
    return "".join(_TID_ALPHABET[number >> shift & 31] for shift in range(60, -1, -5))


def _leap(year: int) -> bool:
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def _real_day(text: str) -> bool:
    """Whether the day exists in its month; ``text`` has the form already."""
    if text[8:10] < "29":
        return True
    month, day = int(text[5:7]), int(text[8:10])
    return day <= _MONTH_DAYS[month - 1] + (month == 2 and _leap(int(text[:4])))
