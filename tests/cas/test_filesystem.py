"""The filesystem store: what goes in comes out, or an error does."""

from __future__ import annotations

import collections
import errno
import hashlib
import io
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from indexer.cas import ARCHIVE_LEVEL, ZSTD_LEVEL, Blob, FsBlobStore, digest_of
from indexer.cas.blob_store import CHUNK
from indexer.cas.reader import VerifiedReader
from indexer.errors import BlobCorrupt, BlobMissing, BlobUnreadable, StoreError, StoreFull
from tests.cas.support import CONTENTS, child, temporary, tree

TEXT = CONTENTS["text"]
DIGEST = hashlib.sha256(TEXT).digest()


def store(tmp_path: Path, level: int = ARCHIVE_LEVEL) -> FsBlobStore:
    return FsBlobStore(tmp_path / "cas", level=level)


def path_of(store: FsBlobStore, digest: bytes) -> Path:
    return next(blob.path for blob in store.files() if blob.digest == digest)


@pytest.mark.parametrize("data", CONTENTS.values(), ids=CONTENTS.keys())
def test_round_trip(tmp_path: Path, data: bytes) -> None:
    blobs = store(tmp_path)
    digest = blobs.put(data)
    assert digest == hashlib.sha256(data).digest()
    assert blobs.contains(digest)
    for again in (blobs, store(tmp_path)):
        assert again.get(digest) == data
        with again.open_read(digest) as stream:
            assert b"".join(iter(lambda: stream.read(1000), b"")) == data


@pytest.mark.parametrize("data", CONTENTS.values(), ids=CONTENTS.keys())
def test_round_trip_of_a_file(tmp_path: Path, data: bytes) -> None:
    source = tmp_path / "source"
    source.write_bytes(data)
    blobs = store(tmp_path)
    digest = blobs.put_file(source)
    assert blobs.get(digest) == data
    assert blobs.put_file(source, digest=digest) == blobs.put(data) == digest
    assert len(list(blobs.files())) == 1


def test_shards_are_the_first_two_hex_digits(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    digest = blobs.put(TEXT)
    name = digest.hex()
    assert tree(tmp_path) == [
        "cas",
        "cas/blobs",
        "cas/blobs/sha256",
        f"cas/blobs/sha256/{name[:2]}",
        f"cas/blobs/sha256/{name[:2]}/{name}.zst",
    ]


def test_dedupe_leaves_physical_bytes_unchanged(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    blobs.put(TEXT)
    before, file = blobs.physical_bytes(), path_of(blobs, DIGEST).stat()
    assert 0 < before < len(TEXT) / 10
    assert blobs.put(TEXT) == DIGEST
    assert FsBlobStore(tmp_path / "cas", level=19).put(TEXT) == DIGEST
    assert blobs.physical_bytes() == before
    assert path_of(blobs, DIGEST).stat().st_mtime_ns == file.st_mtime_ns


def test_the_default_level_packs_tighter_than_that_of_archives(tmp_path: Path) -> None:
    assert (ZSTD_LEVEL, ARCHIVE_LEVEL) == (19, 3)
    text = b"".join(b'{"text":"number %d","of":"%x"}' % (n, n * n * 7919) for n in range(5000))
    tight, quick = FsBlobStore(tmp_path / "tight"), FsBlobStore(tmp_path / "quick", level=ARCHIVE_LEVEL)
    assert tight.put(text) == quick.put(text)
    assert tight.physical_bytes() < quick.physical_bytes() < len(text) / 2


def test_compressed_media_are_stored_raw(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    jpeg = CONTENTS["jpeg"]
    path = path_of(blobs, blobs.put(jpeg))
    assert path.name == f"{digest_of(jpeg).hex()}.raw"
    assert path.read_bytes() == jpeg


def test_a_missing_digest_is_a_named_error(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    for read in (blobs.get, blobs.open_read):
        with pytest.raises(BlobMissing, match=DIGEST.hex()) as caught:
            read(DIGEST)
        assert caught.value.digest == DIGEST
    assert not blobs.contains(DIGEST)
    assert not blobs.remove(DIGEST)
    with pytest.raises(ValueError, match="not a binary SHA-256"):
        blobs.contains(b"../../etc/passwd")


def test_opening_and_reading_create_nothing(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    assert not blobs.contains(DIGEST)
    with pytest.raises(BlobMissing):
        blobs.get(DIGEST)
    assert blobs.physical_bytes() == 0
    assert list(blobs.files()) == []
    assert tree(tmp_path) == []


def test_files_are_listed_in_the_order_of_their_digests(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    digests = sorted(blobs.put(b"blob %d" % number) for number in range(50))
    (tmp_path / "cas" / "blobs" / "sha256" / "00").mkdir(exist_ok=True)
    (tmp_path / "cas" / "blobs" / "sha256" / "00" / "README").write_text("not ours")
    files = list(blobs.files())
    assert [blob.digest for blob in files] == digests
    assert files[0] == Blob(digests[0], files[0].path, files[0].path.stat().st_size)
    assert sum(blob.physical_bytes for blob in files) == blobs.physical_bytes()


def test_a_removed_blob_is_gone_and_an_open_stream_reads_on(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    blobs.put(TEXT)
    with blobs.open_read(DIGEST) as stream:
        assert blobs.remove(DIGEST)
        assert stream.read() == TEXT
    assert not blobs.contains(DIGEST)
    assert blobs.physical_bytes() == 0
    assert blobs.get(blobs.put(TEXT)) == TEXT


# --- damage


def _is_refused(blobs: FsBlobStore, digest: bytes) -> bool:
    with pytest.raises(BlobCorrupt, match=digest.hex()) as caught:
        blobs.get(digest)
    assert caught.value.digest == digest
    with blobs.open_read(digest) as stream, pytest.raises(BlobCorrupt):
        collections.deque(iter(lambda: stream.read(100), b""), maxlen=0)
    return True


@pytest.mark.parametrize("name", ["text", "noise", "jpeg", "one byte"])
def test_corruption_of_any_byte_is_detected_on_read(tmp_path: Path, name: str) -> None:
    """Magic, headers, content, tail. Some bits of the two headers do not matter to the content: with one of
    them flipped it is still given out, exact, or refused."""
    data = CONTENTS[name][:300]
    blobs = store(tmp_path)
    digest = blobs.put(data)
    path = path_of(blobs, digest)
    whole = path.read_bytes()
    harmless = []
    for place in range(len(whole)):
        for bit in (0x01, 0x10, 0x80):
            damaged = bytearray(whole)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            try:
                assert blobs.get(digest) == data
            except BlobCorrupt:
                continue
            harmless.append(place)
    magic, headers = 4, 12
    assert set(harmless) <= (set(range(magic, headers)) if path.suffix == ".zst" else set())
    path.write_bytes(whole)
    assert blobs.get(digest) == data


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:1],
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole + b"tail",
        lambda whole: whole + whole,
        lambda whole: b"not zstd at all",
        lambda whole: b"\0" * len(whole),
    ],
    ids=["emptied", "a byte left", "a byte short", "half", "tail", "twice", "other bytes", "zeros"],
)
@pytest.mark.parametrize("name", ["text", "several chunks", "jpeg"])
def test_cut_lengthened_and_replaced_files_are_refused(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    blobs = store(tmp_path)
    digest = blobs.put(CONTENTS[name])
    path = path_of(blobs, digest)
    path.write_bytes(damage(path.read_bytes()))
    assert _is_refused(blobs, digest)


def test_the_content_of_another_blob_is_refused(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    digest, other = blobs.put(TEXT), blobs.put(b"another")
    path_of(blobs, other).replace(path_of(blobs, digest))
    assert _is_refused(blobs, digest)


def test_a_damaged_stream_never_gives_out_its_end(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    data = CONTENTS["jpeg"].ljust(3 * CHUNK, b".")  # whole chunks: no short read hides the end
    digest = blobs.put(data)
    path = path_of(blobs, digest)
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    given: list[bytes] = []
    with blobs.open_read(digest) as stream, pytest.raises(BlobCorrupt):
        given.extend(iter(lambda: stream.read(CHUNK), b""))
    assert 0 < sum(map(len, given)) < len(data)


def test_putting_it_again_repairs_a_damaged_file(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    blobs.put(TEXT)
    path_of(blobs, DIGEST).write_bytes(b"damaged")
    blobs.put(TEXT)
    assert blobs.get(DIGEST) == TEXT
    wrong_form = path_of(blobs, DIGEST).with_suffix(".raw")
    path_of(blobs, DIGEST).replace(wrong_form)
    blobs.put(TEXT)
    assert blobs.get(DIGEST) == TEXT
    assert not wrong_form.exists()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EACCES, errno.ENFILE])
def test_what_the_system_refuses_to_open_is_not_said_to_be_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    blobs = store(tmp_path)
    blobs.put(TEXT)
    path = path_of(blobs, DIGEST)
    before = path.stat()

    def refused(self: Path, *_: object, **__: object) -> NoReturn:
        raise OSError(error, os.strerror(error), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        for read in (blobs.get, blobs.open_read, lambda _digest: blobs.put(TEXT)):
            with pytest.raises(BlobUnreadable, match=os.strerror(error)) as caught:
                read(DIGEST)
            assert caught.value.digest == DIGEST
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refused)
        with pytest.raises(BlobUnreadable):
            blobs.contains(DIGEST)
        with pytest.raises(StoreError, match=os.strerror(error)):
            list(blobs.files())
    assert path.stat() == before
    assert blobs.get(DIGEST) == TEXT


def test_bytes_that_the_disk_lost_are_damage_and_are_stored_anew(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    blobs.put(TEXT)
    path = path_of(blobs, DIGEST)
    path.unlink()
    path.mkdir()  # reading it is an error of the disk, as far as we can tell
    with pytest.raises(BlobCorrupt):
        blobs.get(DIGEST)


def test_a_stream_that_failed_does_not_end_instead(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    data = CONTENTS["jpeg"].ljust(3 * CHUNK, b".")
    digest = blobs.put(data)
    path_of(blobs, digest).write_bytes(data[:-1] + b"!")
    with blobs.open_read(digest) as stream:
        for _ in range(3):
            with pytest.raises(BlobCorrupt):
                stream.read()

    def broken() -> Iterator[bytes]:
        yield b"first"
        raise BlobUnreadable(digest, "no more")

    reader = VerifiedReader(io.BytesIO(), broken())
    assert reader.readinto(bytearray(5)) == 5
    for _ in range(2):
        with pytest.raises(BlobUnreadable):
            reader.readinto(bytearray(5))


def test_digests_are_listed_in_order_each_once(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    assert list(blobs.digests()) == []
    digests = sorted(blobs.put(data) for data in CONTENTS.values())
    (path_of(blobs, DIGEST).parent / f"{DIGEST.hex()}.raw").write_bytes(b"in the other form")
    (tmp_path / "cas" / "blobs" / "sha256" / "notes").write_text("no shard")
    assert list(blobs.digests()) == digests


# --- writers


def test_concurrent_writers_in_threads_keep_one_whole_file_each(tmp_path: Path) -> None:
    contents = [b"%d " % (number % 10) * 50_000 for number in range(80)]
    with ThreadPoolExecutor(8) as threads:
        digests = list(threads.map(lambda data: store(tmp_path).put(data), contents))
    blobs = store(tmp_path)
    assert [blobs.get(digest) for digest in digests] == contents
    assert len(list(blobs.files())) == 10
    assert temporary(tmp_path) == []


def test_two_writers_of_the_same_content_at_once_do_not_meet(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=20)

    def at(point: str) -> None:
        if point == "before rename":
            both.wait()
            assert len(temporary(tmp_path)) in (1, 2)  # the other one may have renamed its own already

    with ThreadPoolExecutor(2) as threads:
        blobs = FsBlobStore(tmp_path / "cas", crash_point=at)
        assert list(threads.map(blobs.put, [TEXT, TEXT])) == [DIGEST, DIGEST]
    assert blobs.get(DIGEST) == TEXT
    assert temporary(tmp_path) == []


def test_a_file_takes_its_place_by_a_rename(tmp_path: Path) -> None:
    """The very file that was synced, not a copy that may be half there."""
    inodes: list[int] = []

    def at(point: str) -> None:
        [name] = [name for name in tree(tmp_path) if DIGEST.hex() in name]
        assert name.endswith(".tmp" if point == "before rename" else ".zst")
        inodes.append((tmp_path / name).stat().st_ino)

    FsBlobStore(tmp_path / "cas", crash_point=at).put(TEXT)
    assert len(inodes) == 2
    assert inodes[0] == inodes[1]


WRITER = """
import sys
from pathlib import Path
from indexer.cas import FsBlobStore
root, turn = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    blobs = FsBlobStore(root, level=3)
    data = b"%d " % ((number + turn * 7) % 40) * 20_000
    assert blobs.get(blobs.put(data)) == data
"""


def test_concurrent_writers_in_processes_keep_one_whole_file_each(tmp_path: Path) -> None:
    writers = [child(WRITER, tmp_path / "cas", turn) for turn in range(4)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=25)
        assert (writer.returncode, errors) == (0, "")
    blobs = store(tmp_path)
    assert len(list(blobs.files())) == 40
    assert all(blobs.get(blob.digest) for blob in blobs.files())
    assert temporary(tmp_path) == []


# --- kills

KILLED = """
import os, signal, sys
from pathlib import Path
from indexer.cas import FsBlobStore

def at(point):
    if point == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

FsBlobStore(Path(sys.argv[1]), level=3, crash_point=at).put_file(Path(sys.argv[3]))
"""


def _killed(tmp_path: Path, point: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(TEXT)
    process = child(KILLED, tmp_path / "cas", point, source)
    process.communicate(timeout=25)
    assert process.returncode == -9


def test_killed_between_write_and_rename_it_leaves_nothing_that_counts(tmp_path: Path) -> None:
    before = store(tmp_path)
    _killed(tmp_path, "before rename")
    assert len(temporary(tmp_path)) == 1
    assert not before.contains(DIGEST)
    assert before.physical_bytes() == 0
    blobs = store(tmp_path)  # removes what the dead process left
    assert temporary(tmp_path) == []
    assert blobs.get(blobs.put(TEXT)) == TEXT


def test_killed_after_the_rename_it_is_whole(tmp_path: Path) -> None:
    _killed(tmp_path, "after rename")
    assert temporary(tmp_path) == []
    assert store(tmp_path).get(DIGEST) == TEXT


HOLDS = """
import sys
from pathlib import Path
from indexer.cas import FsBlobStore

def at(point):
    if point == "before rename":
        print(point, flush=True)
        sys.stdin.readline()

FsBlobStore(Path(sys.argv[1]), level=3, crash_point=at).put(b"held")
"""


def test_temporary_files_of_living_writers_stay(tmp_path: Path) -> None:
    process = child(HOLDS, tmp_path / "cas")
    assert process.stdout is not None
    assert process.stdout.readline() == "before rename\n"
    blobs = store(tmp_path)
    assert len(temporary(tmp_path)) == 1
    process.communicate("go on\n", timeout=25)
    assert process.returncode == 0
    assert blobs.get(digest_of(b"held")) == b"held"
    assert temporary(tmp_path) == []


def test_temporary_files_of_this_process_stay_while_they_are_written(tmp_path: Path) -> None:
    seen: list[int] = []

    def at(point: str) -> None:
        if point == "before rename":
            store(tmp_path)
            seen.append(len(temporary(tmp_path)))

    FsBlobStore(tmp_path / "cas", crash_point=at).put(TEXT)
    assert seen == [1]


def test_temporary_files_of_an_earlier_life_with_the_same_pid_go(tmp_path: Path) -> None:
    """In a container the daemon has the same pid in every life."""
    store(tmp_path).put(TEXT)
    shard = path_of(store(tmp_path), DIGEST).parent
    stale = shard / f"{DIGEST.hex()}.{os.getpid()}.999999.tmp"
    strange = shard / "somebody.else.tmp"
    stale.write_bytes(b"half")
    strange.write_bytes(b"not ours")
    store(tmp_path)
    assert not stale.exists()
    assert strange.exists()


# --- failures of the source and the disk


def test_a_source_that_changes_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(TEXT)
    blobs = store(tmp_path)
    with pytest.raises(StoreError, match="change"):
        blobs.put_file(source, digest=digest_of(b"something else"))
    assert list(blobs.files()) == []
    assert temporary(tmp_path) == []


def test_a_put_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * (3 * CHUNK))
    left = [2]

    def between() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StoreError("enough")

    blobs = store(tmp_path)
    with pytest.raises(StoreError, match="enough"):
        blobs.put_file(source, digest=digest_of(source.read_bytes()), between=between)
    assert list(blobs.files()) == []
    assert temporary(tmp_path) == []


def test_a_source_that_is_not_there_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        store(tmp_path).put_file(tmp_path / "nowhere")


def test_a_full_disk_is_one_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    blobs = store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreFull, match="free some space"):
            blobs.put(TEXT)
    assert temporary(tmp_path) == []
    assert not blobs.contains(DIGEST)
    assert blobs.get(blobs.put(TEXT)) == TEXT


# --- size

LARGE = """
import hashlib, resource, sys
from pathlib import Path
from indexer.cas import FsBlobStore, digest_of

source, root = Path(sys.argv[1]), Path(sys.argv[2])
blobs = FsBlobStore(root, level=3)
blobs.put(b"warm"), blobs.get(digest_of(b"warm"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
digest = blobs.put_file(source)
hasher = hashlib.sha256()
with blobs.open_read(digest) as stream:
    while piece := stream.read(1 << 20):
        hasher.update(piece)
assert hasher.digest() == digest
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.limit(120)
def test_a_large_file_never_sits_in_memory(tmp_path: Path) -> None:
    """200 MB, half of it noise, through a process whose memory grows by a few chunks and zstd's window."""
    source = tmp_path / "large.car"
    with source.open("wb") as file:
        for number in range(100):
            file.write(os.urandom(1_000_000))
            file.write(b"%d " % number * 500_000)
    assert source.stat().st_size >= 190_000_000
    process = child(LARGE, source, tmp_path / "cas")
    try:
        output, errors = process.communicate(timeout=110)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert (process.returncode, errors) == (0, "")
    assert int(output) < 40 * 1024
