"""A repository's archive walked in bounded memory for a command: every check, every record, what it holds.

Owns the choice between memory and a disk of its own in a folder, and the counting of different CIDs. The
checks are `indexer.repo`'s; what they find comes out as they raise it. One event loop a call.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from indexer.atproto.car import DEFAULT_LIMITS, read_header
from indexer.atproto.cid import CID_LENGTH
from indexer.atproto.commit import Commit
from indexer.atproto.types import Cid, Did, DidKey
from indexer.errors import BadInput, CarError, DiskError, DriveError, OrderLost
from indexer.repo.blocks import Output
from indexer.repo.driver import Driver, DriverBuilder, WalkLimits
from indexer.repo.loading import NeedDisk
from indexer.repo.sections import whole_sections
from indexer.repo.walks import RecordWalk
from indexer.store.spill import DiskBuilder
from indexer.store.spill_file import SpillFile

_MIB: Final = 1 << 20
_PIECE: Final = 128 << 10
_CHUNK: Final = 1000
#: Length and header of the longest archive that is read.
HEAD_BYTES: Final = DEFAULT_LIMITS.max_header + 16
#: As `walker.index_repo` by default: no time, and records of any size that a block may have.
_LIMITS: Final = WalkLimits(max_record=DEFAULT_LIMITS.max_block, max_seconds=1e9)


class Signer(NamedTuple):
    """Who must have signed: the DID where it is known, and the key."""

    did: Did | None
    key: DidKey


class Room(NamedTuple):
    """Memory (MiB) for blocks that wait for their place, and where what is more goes to disk."""

    memory_mib: int = 64
    folder: Path | None = None


class Walked(NamedTuple):
    """An archive that stood every check."""

    commit: Commit
    roots: tuple[Cid, ...]
    blocks: int
    bytes: int


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """An archive's file (a dash is standard input). What the system says of it meanwhile is a `CarError`."""
    try:
        with nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb") as source:
            yield source
    except OSError as error:
        raise CarError(f"{file}: {error.strerror}") from error


class Archive:
    """A file's bytes (a dash is standard input), or bytes, read once in pieces."""

    def __init__(self, source: Path | bytes, look: Callable[[bytes], None] | None = None) -> None:
        """``look`` sees every piece."""
        self._source = source
        self._look = look
        self.head = b""
        self.size = 0

    async def pieces(self) -> AsyncIterator[bytes]:
        """All of it, and not more than an archive may have by one piece."""
        if isinstance(self._source, bytes):
            for at in range(0, len(self._source), _PIECE):
                yield self._seen(self._source[at : at + _PIECE])
            return
        with opened(self._source) as file:
            while piece := file.read(_PIECE):
                yield self._seen(piece)

    def _seen(self, piece: bytes) -> bytes:
        if len(self.head) < HEAD_BYTES:
            self.head += piece[:HEAD_BYTES]
        self.size += len(piece)
        if self._look is not None:
            self._look(piece)
        return piece


def walk(
    archive: Archive, signer: Signer | None, room: Room, take: Callable[[Sequence[Output]], None]
) -> Walked:
    """Walks the archive to its end; ``take`` gets the records in key order, of which none counts before that.

    Raises the `BadInput` that says what is wrong with it, or `DriveError`.
    """
    try:
        return asyncio.run(_walk(archive, signer, room, take))
    except DriveError as error:
        if isinstance(error.__cause__, BadInput):
            raise error.__cause__ from None
        raise


async def _walk(
    archive: Archive, signer: Signer | None, room: Room, take: Callable[[Sequence[Output]], None]
) -> Walked:
    did, key = signer or (None, None)
    builder = DriverBuilder(room.memory_mib, did=did, key=key, limits=_LIMITS)
    with ExitStack() as stack:
        loaded = await builder.load_car(archive.pieces())
        if isinstance(loaded, Driver.Memory):
            driver = loaded.driver
        else:
            driver = await _on_disk(stack, loaded.need_disk, room)
        chunk: list[Output] | None = []
        while chunk is not None:
            take(chunk)
            try:
                chunk = await driver.next_chunk(_CHUNK)
            except OrderLost as lost:
                driver, chunk = await _on_disk(stack, lost.need_disk, room), []
        roots, _start = read_header(archive.head)
        return Walked(driver.commit, roots, driver.blocks, archive.size)


@contextmanager
def scratch_folder(room: Room) -> Iterator[Path]:
    """A folder of the walk's own, deleted behind it."""
    with spilling(room):
        made = tempfile.TemporaryDirectory(prefix="indexer-car-", dir=room.folder)
    with made as folder:
        yield Path(folder)


@contextmanager
def spilling(room: Room) -> Iterator[None]:
    """What the system says of files in the place for what memory does not hold is a `DiskError`."""
    try:
        yield
    except OSError as error:
        where = room.folder or "the system's temporary folder"
        raise DiskError(f"cannot write to {where} (--spill-folder): {error.strerror}") from error


async def _on_disk(stack: ExitStack, need_disk: NeedDisk, room: Room) -> RecordWalk:
    folder = stack.enter_context(scratch_folder(room))
    store = stack.enter_context(DiskBuilder(max(1, room.memory_mib // 2)).open(folder / "blocks"))
    return (await need_disk.finish_loading(store))[1]


class SectionCids:
    """The CIDs of an archive's sections, from pieces of any size. Judges nothing: the walk does."""

    def __init__(self, take: Callable[[Sequence[Cid]], None]) -> None:
        self._take = take
        self._rest = b""
        self._headed = False

    def look(self, piece: bytes) -> None:
        """The next piece."""
        data = self._rest + piece
        at = 0
        if not self._headed:
            try:
                _roots, at = read_header(data)
            except CarError:  # not whole, or the walk will say what is wrong
                self._rest = data
                return
            self._headed = True
        found = whole_sections(data, at, len(data), DEFAULT_LIMITS.max_block + CID_LENGTH)
        if found is None:
            self._rest = b""
        else:
            self._take(found.cids)
            self._rest = data[found.end :]


class Distinct:
    """How many different CIDs there were, exactly, in bounded memory: what is more goes to a file."""

    _PARTS: Final = 64

    def __init__(self, file: SpillFile, most: int) -> None:
        """``most``: bytes in memory."""
        self._file = file
        self._most = most
        self._size = 0
        self._parts = [bytearray() for _ in range(self._PARTS)]
        self._written: list[list[tuple[int, int]]] = [[] for _ in range(self._PARTS)]

    def add(self, cids: Sequence[Cid]) -> None:
        parts, mask = self._parts, self._PARTS - 1
        for cid in cids:
            parts[hash(cid) & mask] += cid
        self._size += CID_LENGTH * len(cids)
        if self._size > self._most:
            self._write()

    def count(self) -> int:
        return sum(map(self._different, self._parts, self._written))

    def _different(self, part: bytearray, written: list[tuple[int, int]]) -> int:
        joined = b"".join([bytes(part), *(self._file.read(at, size) for at, size in written)])
        return len({joined[at : at + CID_LENGTH] for at in range(0, len(joined), CID_LENGTH)})

    def _write(self) -> None:
        for part, written in zip(self._parts, self._written, strict=True):
            if part:
                written.append((self._file.size, len(part)))
                self._file.append(part)
                part.clear()
        self._size = 0
