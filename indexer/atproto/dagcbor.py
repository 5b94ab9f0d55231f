"""The DAG-CBOR border: bytes to values and back, lenient. Nodes and commits check their own canonical form.

libipld does the work. It returns links as plain bytes and its encoder turns bytes that look like a CID into
links, so whatever must tell the two apart goes through `Link` and the exact codec below. Every foreign
exception becomes `DagCborError` here. Pure functions, any thread.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any, Final

import cbor2
import libipld
import orjson

from indexer.atproto.cid import CID_LENGTH, DAG_CBOR_PREFIX, RAW_PREFIX, cid_fault, format_cid, parse_cid
from indexer.errors import DagCborError, RecordInvalid, SyntaxInvalid

MAX_SAFE_INTEGER: Final = 2**53 - 1
MAX_RECORD_BYTES: Final = 1_000_000
MAX_DEPTH: Final = 32
#: Most elements of one list or map, and most lists and maps, of a record (sync.md §5).
MAX_CONTAINERS: Final = 131_072

_decode: Callable[[bytes], Any] = libipld.decode_dag_cbor
_encode: Callable[[Any], bytes] = libipld.encode_dag_cbor
_TAG: Final = b"\xd8\x2a"
_LINK_HEAD: Final = b"\xd8\x2a\x58\x25\x00"


class Link(bytes):
    """A CID link, where links and byte strings must be told apart. Its bytes are the binary CID."""

    __slots__ = ()


def encode(value: Any) -> bytes:
    """Canonical bytes of ``value``. Byte strings that look like a CID become links (see `encode_exact`)."""
    try:
        return _encode(value)
    except Exception as error:
        raise DagCborError(f"cannot be encoded as DAG-CBOR: {error}") from error


def decode(data: bytes) -> Any:
    """The value of one DAG-CBOR object; links are their 36 bytes. Non-minimal heads are tolerated."""
    try:
        return _decode(data)
    except Exception as error:
        raise DagCborError(f"not DAG-CBOR: {_reason(error)}") from error


def decode_exact(data: bytes) -> Any:
    """As `decode`, with links as `Link` and byte strings as bytes."""
    value = decode(data)
    return _typed(data) if _may_hold_links(data) else value


def _typed(data: bytes) -> Any:
    """`decode_exact` of data that libipld has accepted."""
    try:
        return cbor2.loads(data, tag_hook=_link_of)
    except DagCborError:
        raise
    except Exception as error:
        raise DagCborError(f"not DAG-CBOR: {_reason(error)}") from error


def _may_hold_links(data: bytes) -> bool:
    # libipld also takes tag 42 in a longer head (d9 00 2a and so on). Most records hold no such byte at all.
    return b"\x2a" in data and (
        _TAG in data
        or b"\xd9\x00\x2a" in data
        or b"\xda\x00\x00\x00\x2a" in data
        or b"\xdb\x00\x00\x00\x00\x00\x00\x00\x2a" in data
    )


def _link_of(*arguments: Any) -> Link:
    tag = arguments[-1] if isinstance(arguments[-1], cbor2.CBORTag) else arguments[0]
    if tag.tag != 42 or not isinstance(tag.value, bytes) or tag.value[:1] != b"\x00":
        raise DagCborError(f"tag {tag.tag} is not a CID link")
    return Link(tag.value[1:])


def encode_exact(value: Any) -> bytes:
    """Canonical bytes of ``value``, where only `Link` is a link and any other byte string stays one."""
    out: list[bytes] = []
    try:
        _put(value, out)
    except (RecursionError, UnicodeEncodeError) as error:
        raise DagCborError(f"cannot be encoded as DAG-CBOR: {_reason(error)}") from error
    return b"".join(out)


def _put(value: Any, out: list[bytes]) -> None:
    if isinstance(value, str):
        data = value.encode()
        out += (_head(3, len(data)), data)
    elif isinstance(value, Link):
        out += (_TAG, _head(2, len(value) + 1), b"\x00", value)
    elif isinstance(value, bytes):
        out += (_head(2, len(value)), value)
    elif isinstance(value, dict):
        out.append(_head(5, len(value)))
        for key, item in sorted(((_key(key), item) for key, item in value.items()), key=_key_order):
            out += (_head(3, len(key)), key)
            _put(item, out)
    elif isinstance(value, (list, tuple)):
        out.append(_head(4, len(value)))
        for item in value:
            _put(item, out)
    else:
        out.append(_encode_scalar(value))


def _key(key: object) -> bytes:
    if not isinstance(key, str):
        raise DagCborError(f"a map key is not a string: {key!r}")
    return key.encode()


def _key_order(pair: tuple[bytes, Any]) -> tuple[int, bytes]:
    return len(pair[0]), pair[0]


def _encode_scalar(value: Any) -> bytes:
    if isinstance(value, int) and not isinstance(value, bool):
        if -(2**64) <= value < 0:
            return _head(1, -1 - value)
        if 0 <= value < 2**64:
            return _head(0, value)
    return encode(value)


def _head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes((major << 5 | number,))
    for info, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << 8 * size:
            return bytes((major << 5 | info,)) + number.to_bytes(size, "big")
    raise DagCborError(f"a length or integer beyond 64 bits: {number}")


def _reason(error: Exception) -> str:
    text = str(error).removeprefix("Failed to decode DAG-CBOR. ")
    return (text or type(error).__name__)[:200]


# --- JSON -------------------------------------------------------------------------------------------------


def record_to_json(block: bytes) -> bytes:
    """The JSON form of a record block: ``{"$link": …}`` for links, ``{"$bytes": …}`` (unpadded) for bytes."""
    try:
        value = _decode(block)
        if _may_hold_links(block):
            return orjson.dumps(_typed(block), default=_exact_json)
        return orjson.dumps(value, default=_bytes_json)
    except DagCborError:
        raise
    except Exception as error:
        raise DagCborError(f"has no JSON form: {_reason(error)}") from error


def _bytes_json(value: Any) -> dict[str, str]:
    if isinstance(value, bytes):
        return {"$bytes": b64encode(value).rstrip(b"=").decode()}
    raise DagCborError(f"has no JSON form: {type(value).__name__}")


def _exact_json(value: Any) -> dict[str, str]:
    if isinstance(value, Link):
        return {"$link": format_link(value)}
    return _bytes_json(value)


def format_link(cid: bytes) -> str:
    """The text form of any CID that libipld lets through, not only of our two."""
    if len(cid) == CID_LENGTH:
        return format_cid(cid)
    text: str = libipld.encode_cid(cid)
    return text


def record_from_json(value: Any) -> bytes:
    """The canonical block of a record given as JSON values (``$link``, ``$bytes``).

    `RecordInvalid` when it breaks the data model. A float that is a whole number counts as an integer: JSON
    does not tell the two apart.
    """
    if not isinstance(value, dict):
        raise RecordInvalid(f"a record is an object, not {type(value).__name__}")
    try:
        block = encode_exact(_from_json(value, 0))
    except DagCborError as error:
        raise RecordInvalid(str(error)) from error
    check_record(block)
    return block


def _from_json(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise RecordInvalid(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        if "$link" in value or "$bytes" in value:
            return _special(value)
        return {key: _from_json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item, depth + 1) for item in value]
    if isinstance(value, float):
        if not value.is_integer():
            raise RecordInvalid(f"a float is not allowed: {value!r}")
        return int(value)
    return value


def _special(value: dict[str, Any]) -> bytes:
    ((name, text),) = value.items() if len(value) == 1 else ((None, None),)
    if name is None or not isinstance(text, str):
        raise RecordInvalid(
            f"$link and $bytes stand alone in their object, with a string: {str(value)[:100]}"
        )
    if name == "$link":
        try:
            return Link(parse_cid(text))
        except SyntaxInvalid as error:
            raise RecordInvalid(f"$link: {error}") from error
    try:
        return b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), validate=True)
    except ValueError as error:
        raise RecordInvalid(f"$bytes is not base64: {text[:50]!r}") from error


# --- Data model -------------------------------------------------------------------------------------------


def check_record(block: bytes, *, max_bytes: int = MAX_RECORD_BYTES, max_depth: int = MAX_DEPTH) -> None:
    """Raise `RecordInvalid` unless ``block`` is a record that obeys the data model.

    A map at the top; no floats, integers within ±(2^53−1), nesting within ``max_depth``, containers within
    `MAX_CONTAINERS`, links to CIDv1 dag-cbor or raw with SHA-256, ``$type`` a non-empty string, blobs
    complete, text valid UTF-8.
    """
    if len(block) > max_bytes:
        raise RecordInvalid(f"{len(block)} bytes, more than {max_bytes}", reason="record_size")
    try:
        value = _decode(block)
    except Exception as error:
        raise RecordInvalid(f"not DAG-CBOR: {_reason(error)}") from error
    if type(value) is not dict:
        raise RecordInvalid(f"a record is a map, not {type(value).__name__}")
    if len(block) > MAX_CONTAINERS:  # a smaller one cannot hold too many
        _check_bulk(value)
    if not _may_hold_links(block):
        _check_model(value, max_depth)
    elif not _proper_links(value, block, max_depth):
        try:
            _check_model(_typed(block), max_depth)
        except DagCborError as error:
            raise RecordInvalid(str(error)) from error


def _proper_links(value: dict[str, Any], block: bytes, max_depth: int) -> bool:
    """Whether a record obeys the model and its links are usable; at a fifth of the exact decoder's cost.

    False where that cannot be told. libipld's encoder makes links of bytes that are a CID and of no others:
    had one that looks usable been a byte string, the record would be encoded to something else. Of other
    bytes nothing is known but that they are no link, if they cannot be a CID.
    """
    try:
        _check_model(value, max_depth, bytes)
        return _encode(value) == block
    except Exception:
        return False  # the exact decoder tells


def _check_bulk(record: dict[str, Any]) -> None:
    """Containers are counted first: the exact decoder and the checks take far longer for one than libipld."""
    level: list[Any] = [record]
    count = 1
    while level:
        below: list[Any] = []
        for value in level:
            if type(value) is dict:
                value = value.values()
            if len(value) > MAX_CONTAINERS:
                raise RecordInvalid(f"a list or map of {len(value)} elements", reason="record_containers")
            below += [item for item in value if type(item) is dict or type(item) is list]
            if count + len(below) > MAX_CONTAINERS:
                raise RecordInvalid(f"more than {MAX_CONTAINERS} lists and maps", reason="record_containers")
        count += len(below)
        level = below


def _check_model(record: dict[str, Any], max_depth: int, link: type[bytes] = Link) -> None:
    """``link``: the type of links in ``record``."""
    level: list[Any] = [record]
    for _ in range(max_depth):
        below: list[Any] = []
        for value in level:
            if type(value) is dict:
                if "$type" in value:
                    _check_type(value, link)
                value = value.values()
            for item in value:
                kind = type(item)
                if kind is str:
                    continue
                if kind is dict or kind is list:
                    below.append(item)
                elif kind is int or kind is float or kind is link:
                    _check_scalar(item)
        if not below:
            return
        level = below
    raise RecordInvalid(f"nested deeper than {max_depth} levels", reason="record_depth")


def _check_scalar(item: int | float | bytes) -> None:
    if isinstance(item, int):
        if not -MAX_SAFE_INTEGER <= item <= MAX_SAFE_INTEGER:
            raise RecordInvalid(f"an integer beyond 53 bits: {item}")
    elif isinstance(item, float):
        raise RecordInvalid(f"a float is not allowed: {item!r}")
    elif not _is_blessed(item) and (isinstance(item, Link) or item[:1] in _CID_BEGINS):
        raise RecordInvalid(f"a link to an unusable CID {item[:40].hex()}: {cid_fault(item)}")


#: Of CIDv1 and CIDv0: no other bytes are taken for a CID by libipld's encoder.
_CID_BEGINS: Final = (b"\x01", b"\x12")


def _is_blessed(cid: bytes) -> bool:
    return len(cid) == CID_LENGTH and cid[:4] in (DAG_CBOR_PREFIX, RAW_PREFIX)


def _check_type(value: dict[str, Any], link: type[bytes]) -> None:
    name = value["$type"]
    if type(name) is not str or not name:
        raise RecordInvalid(f"$type is not a non-empty string: {name!r}"[:200])
    if name == "blob" and not (
        type(ref := value.get("ref")) is link
        and (link is Link or _is_blessed(ref))
        and type(value.get("mimeType")) is str
        and type(value.get("size")) is int
        and value["size"] >= 0
    ):
        raise RecordInvalid("a blob needs ref (link), mimeType (string) and size (integer)")
