"""One tree node: bytes to keys, values and children and back, refusing everything that is not canonical. Hot.

A node in canonical form is nearly fixed text, so a regular expression takes it apart: every byte is either
matched by it or accounted for by a length, which leaves no room for extra fields, long heads or wrong types.
That costs 0.3 µs an entry where decoding and encoding again cost 0.8 (big24k.car, 3.7 entries a node).
A node that fails gets a second, slow look whose only purpose is to say what is wrong with it.
Layer and bounds depend on the place in the tree: `check_layer`, and the callers. Pure functions, any thread.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Final, NamedTuple

from indexer.atproto.cid import CID_LENGTH, DAG_CBOR_PREFIX, RAW_PREFIX, format_cid
from indexer.atproto.dagcbor import decode, encode
from indexer.atproto.types import Cid
from indexer.errors import DagCborError, MstError

MAX_KEY_BYTES: Final = 830  # NSID (317) + "/" + record key (512)
MAX_ENTRIES: Final = 4096
MAX_NODE_BYTES: Final = 1 << 20
MAX_LAYER: Final = 128  # a digest of 256 zero bits

#: How every node begins in canonical form; no record of more than two fields does.
NODE_START: Final = b"\xa2ae"
EMPTY_NODE: Final = b"\xa2ae\x80al\xf6"
EMPTY_ROOT: Final[Cid] = DAG_CBOR_PREFIX + sha256(EMPTY_NODE).digest()

_LINK: Final = b"\xd8\x2a\x58\x25\x00"
NODE_LINK: Final = _LINK + DAG_CBOR_PREFIX
_ENTRIES: Final = re.compile(
    rb"(\xa4ak([\x40-\x57]|\x58.|\x59..)([a-zA-Z0-9._~:/-]{1,830})ap([\x00-\x17]|\x18.|\x19..)at"
    rb"(?:\xf6|\xd8\x2a\x58\x25\x00(\x01\x71\x12\x20.{32}))av\xd8\x2a\x58\x25\x00(\x01[\x71\x55]\x12\x20.{32}))",
    re.DOTALL,
).findall
_KEY_CHARACTERS: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._~:-"


def _head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes((major | number,))
    if number < 256:
        return bytes((major | 24, number))
    return bytes((major | 25,)) + number.to_bytes(2, "big")


SUFFIX_HEADS: Final = [_head(0x40, length) for length in range(MAX_KEY_BYTES + 1)]
_PREFIX_HEADS: Final = [_head(0x00, length) for length in range(MAX_KEY_BYTES + 1)]
SHARED: Final = {head: length for length, head in enumerate(_PREFIX_HEADS)}
COUNT_HEADS: Final = [_head(0x80, count) for count in range(MAX_ENTRIES + 1)]


class Node(NamedTuple):
    """``kids[i]`` is the child before ``keys[i]``; there is one more of them than keys."""

    keys: list[bytes]
    values: list[Cid]
    kids: list[Cid | None]


#: The fields of a `Node`, without the 0.2 µs that a named tuple takes to make.
Fields = tuple[list[bytes], list[Cid], list[Cid | None]]


def parse_node(block: bytes) -> Node:
    """The node in ``block``; `MstError` says which rule it breaks."""
    keys, values, kids = split_node(block)
    if not are_tree_keys(keys):
        raise node_fault(block)
    return Node(keys, values, kids)


def split_node(block: bytes) -> Fields:
    """`parse_node` without `are_tree_keys`, for callers who ask that once for many nodes."""
    found = _ENTRIES(block)
    count = len(found)
    if len(block) > MAX_NODE_BYTES or count > MAX_ENTRIES:
        raise node_fault(block)
    keys: list[bytes] = []
    values: list[Cid] = []
    kids: list[Cid | None] = [None]
    used = 0
    last = b"\0"  # below every key, so that the first entry needs no case of its own
    try:
        for entry, head, suffix, prefix, tree, value in found:
            shared = SHARED[prefix]
            if SUFFIX_HEADS[len(suffix)] != head:
                raise node_fault(block)
            try:
                # Ascending keys and the longest possible prefix, in one comparison of a byte.
                if suffix[0] <= last[shared]:
                    raise node_fault(block)
            except IndexError:
                if shared != len(last) or not keys:
                    raise node_fault(block) from None
            last = last[:shared] + suffix
            keys.append(last)
            values.append(value)
            kids.append(tree or None)
            used += len(entry)
    except KeyError:
        raise node_fault(block) from None
    start = b"\xa2ae" + COUNT_HEADS[count]
    rest = block[used + len(start) :]
    if rest == b"al\xf6" and block.startswith(start):
        return keys, values, kids
    if len(rest) == 43 and rest.startswith(b"al" + NODE_LINK) and block.startswith(start):
        kids[0] = rest[7:]
        return keys, values, kids
    raise node_fault(block)


def are_tree_keys(keys: Sequence[bytes]) -> bool:
    """Whether all keys have the form of tree keys: two parts of permitted characters, at most 830 bytes."""
    if not keys:
        return True
    joined = b"\n".join(keys)
    return (
        slashes(joined) == b"/\n" * (len(keys) - 1) + b"/"
        and b"\n/" not in joined
        and b"/\n" not in joined
        and joined[0] != 47
        and joined[-1] != 47
        and (len(joined) <= MAX_KEY_BYTES or max(map(len, keys)) <= MAX_KEY_BYTES)
    )


def slashes(joined: bytes) -> bytes:
    """What is left of keys, joined with newlines, without the characters that their parts may have."""
    return joined.translate(None, _KEY_CHARACTERS)


def encode_node(keys: Sequence[bytes], values: Sequence[Cid], kids: Sequence[Cid | None]) -> bytes:
    """The canonical block of a node; the caller vouches for the order of keys."""
    parts = [b"\xa2ae", _head(0x80, len(keys)) if len(keys) > MAX_ENTRIES else COUNT_HEADS[len(keys)]]
    last = b""
    for index, key in enumerate(keys):
        shared = common_prefix(last, key)
        kid = kids[index + 1]
        parts += (
            b"\xa4ak", SUFFIX_HEADS[len(key) - shared], key[shared:], b"ap", _PREFIX_HEADS[shared],
            b"at\xf6" if kid is None else b"at" + _LINK + kid, b"av" + _LINK, values[index],
        )  # fmt: skip
        last = key
    parts.append(b"al\xf6" if kids[0] is None else b"al" + _LINK + kids[0])
    return b"".join(parts)


def replace_kid(block: bytes, index: int, old: Cid, new: Cid) -> bytes:
    """``block`` of a canonical node with its child ``old`` (child number ``index``) exchanged for ``new``."""
    mark = (b"al" if index == 0 else b"at") + _LINK
    return block.replace(mark + old, mark + new, 1)


def common_prefix(left: bytes, right: bytes) -> int:
    """How many leading bytes two keys share."""
    size = min(len(left), len(right))
    differing = int.from_bytes(left[:size], "big") ^ int.from_bytes(right[:size], "big")
    return size - (differing.bit_length() + 7) // 8


# --- Layers -----------------------------------------------------------------------------------------------


def key_layer(key: bytes) -> int:
    """The layer of a key: leading zero bits of its SHA-256, by two, rounded down."""
    return (256 - int.from_bytes(sha256(key).digest(), "big").bit_length()) // 2


def _layer_bounds(layer: int) -> tuple[bytes, bytes]:
    low = 1 << (254 - 2 * layer) if layer < MAX_LAYER else 0
    high = 1 << (256 - 2 * layer)
    return low.to_bytes(32, "big"), b"\xff" * 33 if layer == 0 else high.to_bytes(32, "big")


#: Digests of a layer's keys lie in [low, high).
LAYER_BOUNDS: Final = tuple(_layer_bounds(layer) for layer in range(MAX_LAYER + 1))
_DIGEST: Final = 32
_ON_LAYER_0: Final = bytes(range(0x40, 0x100))  # how the digests of its keys begin


def check_layer(keys: Sequence[bytes], layer: int) -> None:
    """Raise `MstError` unless every key belongs on ``layer``."""
    low, high = LAYER_BOUNDS[layer]
    digests = [sha256(key).digest() for key in keys]
    if layer == 0:  # three keys of four: the first two bits tell
        wrong = len(b"".join(digests)[::_DIGEST].translate(None, _ON_LAYER_0)) > 0
    else:
        wrong = bool(digests) and (min(digests) < low or max(digests) >= high)
    if wrong:
        stray = next(key for key in keys if key_layer(key) != layer)
        raise MstError(
            f"key {shown(stray)} of layer {key_layer(stray)} is in a node of layer {layer}",
            rule="wrong_depth",
        )


def shown(key: bytes) -> str:
    """A key in a message."""
    return repr(key[:120].decode("ascii", "backslashreplace"))


# --- What is wrong with a node ----------------------------------------------------------------------------


def node_fault(block: bytes) -> MstError:
    """Why `parse_node` refused a block. Slow; only for the message."""
    if len(block) > MAX_NODE_BYTES:
        return MstError(f"tree node of {len(block)} bytes, more than {MAX_NODE_BYTES}")
    try:
        value = decode(block)
    except DagCborError as error:
        return MstError(f"tree node is {error}")
    if type(value) is not dict or value.keys() != {"e", "l"} or type(value["e"]) is not list:
        return MstError("tree node is not a map of e (array) and l")
    entries = value["e"]
    if len(entries) > MAX_ENTRIES:
        return MstError(f"tree node of {len(entries)} entries, more than {MAX_ENTRIES}")
    last = b""
    for number, entry in enumerate(entries):
        fault, last, rule = _entry_fault(entry, last)
        if fault:
            return MstError(f"entry {number} of a tree node: {fault}", rule=rule)
    if not _is_tree_link(value["l"]):
        return MstError("l of a tree node is neither null nor a link to a DAG-CBOR block with SHA-256")
    if encode(value) != block:
        return MstError("tree node is not in canonical form: encoding it again gives other bytes")
    return MstError("tree node is malformed")


def _entry_fault(entry: Any, last: bytes) -> tuple[str, bytes, str]:
    """(what is wrong with an entry or "", its key, the rule's name)."""
    if type(entry) is not dict or entry.keys() != {"k", "p", "t", "v"}:
        return "it is not a map of k, p, t and v", last, ""
    shared, suffix = entry["p"], entry["k"]
    if type(shared) is not int or type(suffix) is not bytes:
        return "p is not an integer or k is not bytes", last, ""
    if not 0 <= shared <= len(last):
        return f"p is {shared}, but the key before has {len(last)} bytes", last, "prefix_out_of_bounds"
    key = last[:shared] + suffix
    if not are_tree_keys([key]):
        return (
            f"{shown(key)} is not a key of the form collection/rkey of at most {MAX_KEY_BYTES} bytes",
            key,
            _key_rule(key),
        )
    if key <= last:
        return f"key {shown(key)} does not come after {shown(last)}", key, "order"
    if common_prefix(last, key) != shared:
        return (
            f"p is {shared}, but the keys share {common_prefix(last, key)} bytes",
            key,
            "prefix_not_maximal",
        )
    if not _is_tree_link(entry["t"]):
        return "t is neither null nor a link to a DAG-CBOR block with SHA-256", key, ""
    value = entry["v"]
    if type(value) is not bytes or len(value) != CID_LENGTH or value[:4] not in (DAG_CBOR_PREFIX, RAW_PREFIX):
        return "v is not a link to a DAG-CBOR or raw block with SHA-256", key, ""
    return "", key, ""


def _key_rule(key: bytes) -> str:
    try:
        key.decode()
    except UnicodeDecodeError:
        return "key_not_utf8"
    return ""


def _is_tree_link(value: object) -> bool:
    return value is None or (
        type(value) is bytes and len(value) == CID_LENGTH and value[:4] == DAG_CBOR_PREFIX
    )


def describe(cid: Cid) -> str:
    """A node in a message."""
    return f"tree node {format_cid(cid)}"
