"""CARv1 archives: reading with every length bounded and every block hashed, and writing.

Three readers of one format: `read_car` for small archives in memory (commit frames, proofs), `iter_blocks`
for offsets into a buffer, `CarSplitter` for bytes that arrive in pieces. All of them refuse the same
things with a `CarError` that names the offset. Pure functions and a plain state machine, any thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from mmap import mmap
from typing import Final, NamedTuple

from indexer.atproto.cid import CID_LENGTH, DAG_CBOR_PREFIX, RAW_PREFIX, cid_fault, format_cid
from indexer.atproto.dagcbor import decode, encode
from indexer.atproto.types import Cid
from indexer.errors import CarError, DagCborError

#: CBOR's major type of a header, and how much of what is none is shown.
_MAP: Final = 5
_SHOWN_BYTES: Final = 40
_MAX_VARINT_BYTES: Final = 9
_PREFIXES: Final = (DAG_CBOR_PREFIX, RAW_PREFIX)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one archive, in bytes and blocks."""

    max_bytes: int = 2 << 30
    max_block: int = 2 << 20
    max_header: int = 64 << 10
    max_blocks: int = 5_000_000


DEFAULT_LIMITS: Final = Limits()


class Car(NamedTuple):
    """An archive in memory. Of a block that occurs twice one copy is kept."""

    roots: tuple[Cid, ...]
    blocks: dict[Cid, bytes]


def read_car(data: bytes, limits: Limits = DEFAULT_LIMITS, verify: bool = True) -> Car:
    """The whole archive, to its exact end. ``verify`` checks every block against its CID."""
    roots, start = read_header(data, limits)
    blocks = {cid: data[begin:end] for cid, begin, end in sections(data, start, limits, verify)}
    return Car(roots, blocks)


def iter_blocks(
    data: bytes, limits: Limits = DEFAULT_LIMITS, verify: bool = True
) -> Iterator[tuple[Cid, int, int]]:
    """(CID, start, end) of every block in the order of the archive; duplicates come twice."""
    _, start = read_header(data, limits)
    return sections(data, start, limits, verify)


def read_header(data: bytes | mmap, limits: Limits = DEFAULT_LIMITS) -> tuple[tuple[Cid, ...], int]:
    """(roots, offset of the first section)."""
    if len(data) > limits.max_bytes:
        raise CarError(f"CAR of {len(data)} bytes, more than {limits.max_bytes}", reason="car_size")
    if not data:
        raise CarError("CAR is empty", reason="car_truncated")
    length, start = read_varint(data, 0)
    if length > limits.max_header:
        raise CarError(f"CAR header of {length} bytes at offset 0, more than {limits.max_header}")
    end = start + length
    if end > len(data):
        raise _cut_header(bytes(data[: start + _SHOWN_BYTES]), start, f"at {len(data)} of {end} bytes")
    return parse_header(data[start:end]), end


def _cut_header(begin: bytes, start: int, where: str) -> CarError:
    """What is wrong with a file that ends before the header's end, where ``start`` is the header's begin."""
    if len(begin) > start and begin[start] >> 5 != _MAP:
        return CarError(f"no CAR: it begins with {begin[:_SHOWN_BYTES]!r}", reason="car_truncated")
    return CarError(f"CAR ends inside its header, {where}", reason="car_truncated")


def parse_header(header: bytes) -> tuple[Cid, ...]:
    """The roots named by a CARv1 header. The first must be a CID of our kind; the others may be anything."""
    if header and header[0] >> 5 != _MAP:
        raise CarError(f"no CAR: its header would begin with {header[:_SHOWN_BYTES]!r}")
    try:
        value = decode(header)
        if encode(value) != header:
            raise CarError("CAR header is not in canonical form")
    except DagCborError as error:
        raise CarError(f"CAR header is {error}") from error
    if type(value) is not dict or value.keys() != {"roots", "version"}:
        raise CarError("CAR header does not consist of roots and version")
    if type(value["version"]) is not int or value["version"] != 1:
        raise CarError(f"CAR version {value['version']!r} is not 1")
    roots = value["roots"]
    if type(roots) is not list or not all(type(root) is bytes for root in roots):
        raise CarError("CAR roots are not an array of links")
    for root in roots[:1]:
        if len(root) != CID_LENGTH or root[:4] not in _PREFIXES:
            raise CarError(f"CAR root {root[:40].hex()} is unusable: {cid_fault(root)}")
    return tuple(roots)


def read_varint(data: bytes | mmap, at: int) -> tuple[int, int]:
    """(value, offset behind it) of the unsigned varint at offset ``at``."""
    value = shift = 0
    for offset in range(at, min(at + _MAX_VARINT_BYTES, len(data))):
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 and shift:
                raise CarError(f"varint at offset {at} is not minimal", reason="car_varint")
            return value, offset + 1
        shift += 7
    if len(data) - at >= _MAX_VARINT_BYTES:
        raise CarError(f"varint at offset {at} is longer than {_MAX_VARINT_BYTES} bytes", reason="car_varint")
    raise CarError(f"CAR ends inside the varint at offset {at}", reason="car_truncated")


def sections(
    data: bytes | mmap, at: int, limits: Limits = DEFAULT_LIMITS, verify: bool = True
) -> Iterator[tuple[Cid, int, int]]:
    """`iter_blocks` behind a header that was read already."""
    size = len(data)
    largest = limits.max_block + CID_LENGTH
    count = 0
    while at < size:
        length, start = read_varint(data, at)
        check_section(at, length, largest)
        end = start + length
        if end > size:
            raise CarError(
                f"CAR ends inside the section at offset {at}: {size - start} of {length} bytes",
                reason="car_truncated",
            )
        cid = data[start : start + CID_LENGTH]
        check_block_cid(at, cid)
        start += CID_LENGTH
        if verify and sha256(data[start:end]).digest() != cid[4:]:
            raise bad_hash(at, cid)
        count += 1
        if count > limits.max_blocks:
            raise CarError(f"CAR has more than {limits.max_blocks} blocks", reason="car_size")
        yield cid, start, end
        at = end


def check_section(at: int, length: int, largest: int) -> None:
    """Bounds on the length that a section claims, before any of it is looked at."""
    if length < CID_LENGTH:
        raise CarError(f"section at offset {at} is {length} bytes long, too short for a CID")
    if length > largest:
        raise CarError(
            f"block at offset {at} is {length - CID_LENGTH} bytes long, more than {largest - CID_LENGTH}",
            reason="block_size",
        )


def check_block_cid(at: int, cid: Cid) -> None:
    if cid[:4] not in _PREFIXES:
        raise CarError(f"block at offset {at} has the unusable CID {cid.hex()}: {cid_fault(cid)}")


def bad_hash(at: int, cid: Cid) -> CarError:
    return CarError(f"block {format_cid(cid)} at offset {at} does not hash to its CID", reason="bad_hash")


class CarSplitter:
    """Takes an archive in pieces of any size and gives out its blocks as they become whole.

    Holds at most one unfinished section, so never more than ``max_block`` and the last piece.
    """

    def __init__(
        self,
        limits: Limits = DEFAULT_LIMITS,
        verify: bool = True,
        *,
        roots: tuple[Cid, ...] | None = None,
        offset: int = 0,
        blocks: int = 0,
    ) -> None:
        """With ``roots`` it begins at ``offset``, behind the header and so many ``blocks``."""
        self._limits = limits
        self._verify = verify
        self._buffer = bytearray()
        self._offset = offset  # of the buffer's first byte, within the archive
        self._need = 1  # bytes that the buffer must hold before it is worth another look
        self.roots = roots  # None until the header is whole
        self.blocks = blocks

    @property
    def size(self) -> int:
        """Bytes taken so far."""
        return self._offset + len(self._buffer)

    def feed(self, chunk: bytes) -> list[tuple[Cid, bytes]]:
        """The blocks that ``chunk`` completes."""
        if self.size + len(chunk) > self._limits.max_bytes:
            raise CarError(f"CAR of more than {self._limits.max_bytes} bytes", reason="car_size")
        self._buffer += chunk
        if len(self._buffer) < self._need:
            return []
        data = bytes(self._buffer)
        out: list[tuple[Cid, bytes]] = []
        at = 0
        while (span := self._span(data, at)) is not None:
            start, end = span
            if self.roots is None:
                self.roots = parse_header(data[start:end])
            else:
                out.append(self._block(data, at, start, end))
            at = end
        del self._buffer[:at]
        self._offset += at
        self._need = max(self._need - at, 1)
        return out

    def close(self) -> None:
        """Raise `CarError` unless the archive ended where a section ended."""
        if self.roots is None:
            raise _cut_header(bytes(self._buffer), 1, f"at {self.size} bytes")
        if self._buffer:
            raise CarError(
                f"CAR ends inside the section at offset {self._offset}: {len(self._buffer)} bytes of it",
                reason="car_truncated",
            )

    def _span(self, data: bytes, at: int) -> tuple[int, int] | None:
        """(start, end) of the section or header at ``at``, None while it is not whole."""
        try:
            length, start = read_varint(data, at)
        except CarError as error:
            if error.reason == "car_truncated":
                self._need = len(data) + 1
                return None
            raise CarError(f"at offset {self._offset}: {error}", reason=error.reason) from error
        if self.roots is None:
            if length > self._limits.max_header:
                raise CarError(
                    f"CAR header of {length} bytes at offset 0, more than {self._limits.max_header}"
                )
        else:
            check_section(self._offset + at, length, self._limits.max_block + CID_LENGTH)
        self._need = start + length
        return (start, start + length) if start + length <= len(data) else None

    def _block(self, data: bytes, at: int, start: int, end: int) -> tuple[Cid, bytes]:
        cid, block = data[start : start + CID_LENGTH], data[start + CID_LENGTH : end]
        check_block_cid(self._offset + at, cid)
        if self._verify and sha256(block).digest() != cid[4:]:
            raise bad_hash(self._offset + at, cid)
        self.blocks += 1
        if self.blocks > self._limits.max_blocks:
            raise CarError(f"CAR has more than {self._limits.max_blocks} blocks", reason="car_size")
        return cid, block


def car_header(roots: Sequence[Cid]) -> bytes:
    """The first bytes of an archive: its header with the length before it."""
    header = encode({"roots": list(roots), "version": 1})
    return _varint(len(header)) + header


def car_block(cid: Cid, data: bytes) -> bytes:
    """One section of an archive."""
    return _varint(CID_LENGTH + len(data)) + cid + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
