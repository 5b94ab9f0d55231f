"""Corpora made ahead of time for benches: firehose frames with their documents, and CARs of any size.

Owns the files of a corpus and their cache, in a folder that the caller names. Everything is seeded and
dated by a virtual clock, so the same arguments make the same records again. No sockets; one thread.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, NamedTuple

from indexer.simulator import content
from indexer.simulator.cbor import block_cid, cid_text, encode
from indexer.simulator.chooser import Chooser, Rates, past
from indexer.simulator.documents import document
from indexer.simulator.keys import K256, SigningKey
from indexer.simulator.phrases import NAMES, PLACES
from indexer.simulator.tree import Tree
from indexer.simulator.wire import car, car_header, car_section, commit_block, tid
from indexer.simulator.world import Clock, Happening, World

#: Where the virtual clock begins: 2025-01-01T00:00:00Z.
EPOCH_US = 1_735_689_600_000_000
#: Nothing but commits, as benches want them.
QUIET = Rates(account=0, handle=0, status=0, delete=0, sync=0, max_records=1 << 40)
_FORMAT = 1
_STEP_US = 1_000


class Corpus:
    """A folder with ``relay.frames``, ``documents.json``, ``truth.json`` and ``cars/``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def frames_path(self) -> Path:
        """All frames in relay order: u32 big-endian length, then the frame; seq counts from 1."""
        return self.path / "relay.frames"

    def frames(self) -> Iterator[bytes]:
        return read_frames(self.frames_path)

    def documents(self) -> dict[str, Any]:
        """DID → {"status", "doc"}; endpoints are ``http://pds<n>.simnet.test``."""
        documents: dict[str, Any] = json.loads((self.path / "documents.json").read_bytes())
        return documents

    def truth(self) -> dict[str, Any]:
        """The ledger at the end, without values."""
        truth: dict[str, Any] = json.loads((self.path / "truth.json").read_bytes())
        return truth

    def cars(self) -> dict[str, Path]:
        """The repositories as they were before the first frame; none for accounts born in the stream."""
        return {path.stem.replace("_", ":"): path for path in sorted((self.path / "cars").glob("*.car"))}


def read_frames(path: Path) -> Iterator[bytes]:
    """The frames of a length-prefixed file."""
    with path.open("rb") as file:
        while len(size := file.read(4)) == 4:
            yield file.read(int.from_bytes(size, "big"))


def pregenerate(
    folder: Path,
    *,
    seed: int = 1,
    accounts: int = 50,
    commits: int = 10_000,
    records: int = 0,
    pds: int = 1,
    rates: Rates = QUIET,
) -> Corpus:
    """``commits`` commits by ``accounts`` accounts, from the cache when they are there.

    With ``records`` each account begins with a repository of that many, given as a CAR; without, each is
    created in the stream.
    """
    name = hashlib.sha256(repr((_FORMAT, seed, accounts, commits, records, pds, rates)).encode()).hexdigest()[
        :16
    ]
    home = folder / f"corpus-{name}"
    if not home.exists():
        folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
        try:
            _Maker(draft, World(seed, pds, Clock(EPOCH_US, _STEP_US)), rates).make(accounts, commits, records)
            draft.chmod(0o755)
            draft.rename(home)
        except OSError:  # another process was first
            if not home.exists():
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return Corpus(home)


class _Maker:
    """One run of a world into a folder."""

    def __init__(self, folder: Path, world: World, rates: Rates) -> None:
        self._folder = folder
        self._world = world
        self._chooser = Chooser(world, rates)
        self._seq = 0
        self._commits = 0

    def make(self, accounts: int, commits: int, records: int) -> None:
        (self._folder / "cars").mkdir()
        with (self._folder / "relay.frames").open("wb") as out:
            for index in range(accounts):
                self._emit(out, self._admit(index, records))
            wanted = self._commits + commits
            while self._commits < wanted:
                self._emit(out, self._chooser.step())
        self._tell()

    def _admit(self, index: int, records: int) -> Happening:
        world = self._world
        rng = Random(world.seed << 24 | index)
        made = world.create(past=(lambda did: past(rng, world, did, records)) if records else None)
        account = world.accounts[made.row["did"]]
        if records:
            blocks = car(account.commit_cid, account.blocks())
            (self._folder / "cars" / f"{account.did.replace(':', '_')}.car").write_bytes(blocks)
        return made

    def _emit(self, out: BinaryIO, happening: Happening) -> None:
        for frame in happening.frames:
            if frame.relayed:
                self._seq += 1
                self._commits += frame.kind == "#commit"
                data = frame.halves.numbered(self._seq)
                out.write(len(data).to_bytes(4, "big") + data)

    def _tell(self) -> None:
        ledgers, documents = {}, {}
        for did, account in self._world.accounts.items():
            url = f"http://pds{account.pds}.simnet.test"
            ledgers[did] = account.ledger(url, values=False)
            status = 410 if account.tombstone else 200
            documents[did] = {
                "status": status,
                "doc": document(did, account.handle, account.key.multikey, url),
            }
        truth = {"seq": self._seq, "commits": self._commits, "accounts": ledgers}
        (self._folder / "truth.json").write_text(json.dumps(truth))
        (self._folder / "documents.json").write_text(json.dumps(documents))


# -- CARs


@dataclass(frozen=True, slots=True)
class CarInfo:
    """What is in a CAR; CIDs as text, the key as did:key."""

    did: str
    rev: str
    commit: str
    data: str
    signing_key: str
    records: int
    bytes: int


class _Row(NamedTuple):
    path: bytes
    at: int


class _Crowd:
    """People that a lone repository may refer to."""

    def __init__(self, rng: Random) -> None:
        made = [encode(number) for number in range(2000)]
        self._people = [
            (
                "did:plc:" + cid_text(block_cid(raw))[-24:],
                f"{rng.choice(NAMES)}{at}.{rng.choice(PLACES)}.test",
            )
            for at, raw in enumerate(made)
        ]
        self._cids = [cid_text(block_cid(raw)) for raw in made]

    def some_person(self, rng: Random) -> tuple[str, str]:
        return rng.choice(self._people)

    def some_post(self, rng: Random) -> tuple[str, str]:
        rkey = tid(EPOCH_US + rng.randrange(10**12))
        return f"at://{self.some_person(rng)[0]}/{content.POST}/{rkey}", rng.choice(self._cids)


def write_car(
    out: BinaryIO, *, seed: int = 1, records: int | None = None, size: int | None = None
) -> CarInfo:
    """One signed repository as a CAR: commit, then the tree in pre-order with records at their places.

    Ends at ``records`` records or at about ``size`` bytes, whichever comes first. Record blocks wait in a
    temporary file, so memory holds the tree but not the content.
    """
    if records is None and size is None:
        raise ValueError("say how many records, or how many bytes")
    collects = gc.isenabled()
    gc.disable()  # nothing here is garbage in circles, and to look for it takes a sixth of the time
    try:
        return _written_car(out, seed, records, size)
    finally:
        if collects:
            gc.enable()


def _written_car(out: BinaryIO, seed: int, records: int | None, size: int | None) -> CarInfo:
    key = SigningKey.derive(K256, f"car/{seed}")
    did = "did:plc:" + cid_text(block_cid(encode(["car", seed])))[-24:]
    tree = Tree()
    rows: list[_Row] = []
    offsets = array("Q", [0])
    with tempfile.TemporaryFile() as spool:
        for path, block in _records(seed, did):
            overhead = 120 * len(rows) + offsets[-1]  # a node entry, a CID and a length each
            if (records is not None and len(rows) >= records) or (size is not None and overhead >= size):
                break
            spool.write(block)
            offsets.append(offsets[-1] + len(block))
            tree.set(path, block_cid(block))
            rows.append(_Row(path, len(rows)))
        data, _ = tree.seal()
        rev = tid(EPOCH_US + 2 * 10**12)
        commit = commit_block(did, rev, data, key)
        root = block_cid(commit)
        written = out.write(car_header(root) + car_section(root, commit))
        written += _write_blocks(out, tree, sorted(rows), offsets, spool)
    return CarInfo(did, rev, cid_text(root), cid_text(data), key.did_key, len(rows), written)


def build_car(seed: int, records: int) -> bytes:
    """A CAR of ``records`` records in memory."""
    out = io.BytesIO()
    write_car(out, seed=seed, records=records)
    return out.getvalue()


def cached_car(
    folder: Path, *, seed: int = 1, records: int | None = None, size: int | None = None
) -> tuple[Path, CarInfo]:
    """`write_car` to a file in ``folder``, made once."""
    path = folder / f"car-{_FORMAT}-{seed}-{records or 0}-{size or 0}.car"
    note = path.with_suffix(".json")
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        with draft.open("wb", buffering=1 << 20) as out:
            info = write_car(out, seed=seed, records=records, size=size)
        draft.rename(path)
        draft.write_text(json.dumps({name: getattr(info, name) for name in CarInfo.__slots__}))
        draft.rename(note)
    return path, CarInfo(**json.loads(note.read_text()))


def _records(seed: int, did: str) -> Iterator[tuple[bytes, bytes]]:
    """Endless (path, block), a minute apart."""
    rng = Random(seed)
    crowd = _Crowd(rng)
    micros, once = EPOCH_US, False
    while True:
        micros += rng.randrange(1, 1_400_000)
        collection = rng.choices(content.COLLECTIONS, content.WEIGHTS)[0]
        rkey = tid(micros, rng.getrandbits(10))
        if collection == content.PROFILE:
            if once:
                continue
            once, rkey = True, "self"
        value = content.record(rng, collection, did, crowd, micros)
        yield f"{collection}/{rkey}".encode(), encode(value)


def _write_blocks(out: BinaryIO, tree: Tree, rows: list[_Row], offsets: array[int], spool: BinaryIO) -> int:
    """The tree in pre-order; the n-th record met is the n-th of the sorted rows."""
    written = 0
    places = iter(rows)
    spool.flush()
    for cid, block in tree.walk():
        if not block:
            at = next(places).at
            block = os.pread(spool.fileno(), offsets[at + 1] - offsets[at], offsets[at])
        written += out.write(car_section(cid, block))
    return written
