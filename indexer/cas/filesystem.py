"""A byte store in a folder: ``blobs/sha256/<first two hex>/<hex>.zst``, media as ``<hex>.raw``.

A file appears whole or not at all: it is written beside its place under a name with the writer's pid
and a counter, synced, renamed, and the folder synced. So writers in any number of threads and
processes do not disturb each other. Reads hash what they give out again, and create nothing. Every
call blocks; any thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import zstandard

from indexer.cas.blob_store import (
    CHUNK,
    Blob,
    Digest,
    checked,
    chunks_of,
    digest_of,
    digest_of_file,
    translated,
)
from indexer.cas.media import HEAD_BYTES, is_compressed
from indexer.cas.reader import VerifiedReader, unreadable, verified
from indexer.errors import BlobCorrupt, BlobMissing, StoreError

ZSTD_LEVEL: Final = 19
#: For archives: 200 times faster for a fifth more space.
ARCHIVE_LEVEL: Final = 3

_ZSTD: Final = ".zst"
_RAW: Final = ".raw"
_TEMP: Final = ".tmp"

_numbers = itertools.count(1)
#: Temporary files of this process that are being written.
_writing: set[str] = set()


def _nothing(_point: str) -> None:
    """No crash point."""


class FsBlobStore:
    """A `BlobStore` in the folder ``root``. Opening one creates nothing and may be done any number of times;
    with ``tidy`` it removes temporary files that nobody writes any more.

    ``crash_point`` is called with "before rename" and "after rename", for tests that kill the process.
    """

    def __init__(
        self,
        root: Path,
        *,
        level: int = ZSTD_LEVEL,
        tidy: bool = True,
        crash_point: Callable[[str], None] = _nothing,
    ) -> None:
        self._folder = root / "blobs" / "sha256"
        self._level = level
        self._at = crash_point
        if tidy:
            self._remove_stale()

    # ---- in

    def put(self, data: bytes) -> Digest:
        digest = digest_of(data)
        self._keep(digest, lambda: io.BytesIO(data), None)
        return digest

    def put_file(
        self, source: Path, *, digest: Digest | None = None, between: Callable[[], None] | None = None
    ) -> Digest:
        if digest is None:
            digest = digest_of_file(source, between)
        self._keep(checked(digest), lambda: source.open("rb"), between)
        return digest

    def _keep(
        self, digest: Digest, opened: Callable[[], BinaryIO], between: Callable[[], None] | None
    ) -> None:
        """Writes what is not there yet, and anew what is there and damaged."""
        if self._is_intact(digest):
            return
        with translated(f"storing sha256 {digest.hex()}"), opened() as source:
            size = source.seek(0, os.SEEK_END)
            source.seek(0)
            raw = is_compressed(source.read(HEAD_BYTES))
            source.seek(0)
            target = self._path(digest, _RAW if raw else _ZSTD)
            pieces = _hashed(source, digest, between)
            self._write(target, pieces if raw else self._compressed(pieces, size))

    def _is_intact(self, digest: Digest) -> bool:
        try:
            with self.open_read(digest) as reader:
                for _ in chunks_of(reader):
                    pass
        except (BlobMissing, BlobCorrupt):
            return False
        return True

    def _compressed(self, pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
        # No checksum inside the frame: the name is one.
        compressor = zstandard.ZstdCompressor(level=self._level).compressobj(size=size)
        try:
            for piece in pieces:
                yield compressor.compress(piece)
            yield compressor.flush()
        except zstandard.ZstdError as error:
            raise StoreError(f"cannot compress: {error}") from error

    def _write(self, target: Path, pieces: Iterable[bytes]) -> None:
        _make_folder(target.parent)
        with _temporary(target) as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            self._at("before rename")
            Path(file.name).replace(target)
        self._at("after rename")
        # Damaged, in the form that the rule for media chose before it was changed.
        target.with_suffix(_ZSTD if target.suffix == _RAW else _RAW).unlink(missing_ok=True)
        _sync_folder(target.parent)

    # ---- out

    def get(self, digest: Digest) -> bytes:
        with self.open_read(digest) as reader:
            return reader.read()

    def open_read(self, digest: Digest) -> BinaryIO:
        path = self._find(checked(digest))
        if path is None:
            raise BlobMissing(digest)
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise BlobMissing(digest) from error
        except OSError as error:
            raise unreadable(digest, error) from error
        pieces = chunks_of(file) if path.suffix == _RAW else _decompressed(file)
        return io.BufferedReader(VerifiedReader(file, verified(pieces, digest)), CHUNK)

    def contains(self, digest: Digest) -> bool:
        return self._find(checked(digest)) is not None

    def remove(self, digest: Digest) -> bool:
        removed = False
        with translated(f"removing sha256 {digest.hex()}"):
            for suffix in (_ZSTD, _RAW):
                with contextlib.suppress(FileNotFoundError):
                    self._path(checked(digest), suffix).unlink()
                    removed = True
        return removed

    def physical_bytes(self) -> int:
        return sum(blob.physical_bytes for blob in self.files())

    def files(self) -> Iterator[Blob]:
        """Everything that is stored, in the order of the digests. For backups and checks.

        Complete for what was there before and is there after; files that come or go meanwhile may or
        may not be seen.
        """
        for name, path in self._names():
            digest = digest_in(name)
            if digest is not None:
                with translated(f"looking at {path}"), contextlib.suppress(FileNotFoundError):
                    yield Blob(digest, path, path.stat().st_size)

    def digests(self) -> Iterator[Digest]:
        last = b""
        for name, _ in self._names():
            digest = digest_in(name)
            if digest is not None and digest != last:  # a damaged one may lie beside it in the other form
                last = digest
                yield digest

    def _find(self, digest: Digest) -> Path | None:
        for suffix in (_ZSTD, _RAW):
            path = self._path(digest, suffix)
            try:
                path.stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise unreadable(digest, error) from error
            return path
        return None

    def _path(self, digest: Digest, suffix: str) -> Path:
        name = digest.hex()
        return self._folder / name[:2] / (name + suffix)

    def _names(self) -> Iterator[tuple[str, Path]]:
        """Every file in the shards, temporary ones included."""
        for shard in self._listed(self._folder):
            for name in self._listed(self._folder / shard):
                yield name, self._folder / shard / name

    @staticmethod
    def _listed(folder: Path) -> list[str]:
        with translated(f"listing {folder}"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(os.listdir(folder))
        return []

    # ---- what a killed writer left

    def _remove_stale(self) -> None:
        with translated(f"opening {self._folder}"):
            for name, path in self._names():
                if name.endswith(_TEMP) and _is_stale(name):
                    path.unlink(missing_ok=True)


def digest_in(name: str) -> Digest | None:
    """The digest that a file's name states; None for names that are not ours."""
    stem, dot, suffix = name.partition(".")
    if dot + suffix not in (_ZSTD, _RAW) or len(stem) != 64:
        return None
    try:
        return bytes.fromhex(stem)
    except ValueError:
        return None


def _is_stale(name: str) -> bool:
    """Whether nobody writes a temporary file any more: ``<hex>.<pid>.<number>.tmp``."""
    parts = name.split(".")
    if len(parts) != 4 or not parts[1].isdigit():
        return False
    pid = int(parts[1])
    if pid == os.getpid():
        # In a container every life of the daemon may have the same pid.
        return name not in _writing
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


@contextmanager
def _temporary(target: Path) -> Iterator[BinaryIO]:
    """A new file beside ``target`` that is this writer's alone; gone at the end, unless it was renamed."""
    name = f"{target.stem}.{os.getpid()}.{next(_numbers)}{_TEMP}"
    path = target.parent / name
    _writing.add(name)
    try:
        with path.open("xb") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)
        _writing.discard(name)


def _hashed(source: BinaryIO, digest: Digest, between: Callable[[], None] | None) -> Iterator[bytes]:
    """The pieces of a source that must hash to ``digest``, or else nothing is to be kept of it."""
    hasher = hashlib.sha256()
    for piece in chunks_of(source):
        if between is not None:
            between()
        hasher.update(piece)
        yield piece
    if hasher.digest() != digest:
        raise StoreError(
            f"the source of sha256 {digest.hex()} hashes to {hasher.hexdigest()}: did it change?"
        )


def _decompressed(file: BinaryIO) -> Iterator[bytes]:
    # Bytes after the frame are read as another frame, which damage is not.
    reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True, closefd=False)
    return chunks_of(reader)


def _make_folder(folder: Path) -> None:
    """Makes a folder that survives a power cut."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
