"""`indexer car inspect|verify|ls|prove|extract`: a repository CAR file, checked without a daemon.

Owns the options and the printed forms. All checks are `indexer.repo.walker`'s: every command refuses
a file whose block hashes, tree or completeness do not hold, with one error that says what broke.
"""

from __future__ import annotations

import asyncio
import errno
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final

import click
import orjson

from indexer.atproto.car import DEFAULT_LIMITS, read_header
from indexer.atproto.cid import format_cid
from indexer.atproto.crypto import parse_did_key
from indexer.atproto.dagcbor import record_to_json
from indexer.atproto.did_document import parse_did_document
from indexer.atproto.mst import TreeBuilder, key_layer
from indexer.atproto.syntax import is_path
from indexer.atproto.types import Cid
from indexer.commands.car_walk import (
    HEAD_BYTES,
    Archive,
    Distinct,
    Room,
    SectionCids,
    Signer,
    Walked,
    opened,
    scratch_folder,
    spilling,
    walk,
)
from indexer.commands.paths import NamedPath
from indexer.commands.progress import counted
from indexer.errors import BadInput, DagCborError, DidDocumentInvalid
from indexer.repo.blocks import Output
from indexer.repo.driver import DriverBuilder
from indexer.repo.walker import RepoIndex, index_repo
from indexer.store.spill_file import SpillFile

#: Where nothing else is asked for.
DEFAULT_ROOM: Final = Room()
#: Bytes of CIDs that may wait in memory, for each MiB of it.
_CID_MEMORY: Final = 1 << 18

_file = click.argument("file", type=NamedPath(exists=True, dir_okay=False, allow_dash=True))
_json = click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
_key = click.option("--key", metavar="did:key:…", help="The account's signing key.")
_document = click.option(
    "--did-document",
    "document",
    type=NamedPath(exists=True, dir_okay=False),
    help="The account's DID document (JSON): its DID must be the repository's, its key the signer.",
)


_memory = click.option(
    "--memory-mib",
    type=click.IntRange(1, 1 << 20),
    default=Room().memory_mib,
    show_default=True,
    help="Memory for blocks that wait for their place in the tree; more of them go to disk.",
)
_folder = click.option(
    "--spill-folder",
    type=NamedPath(exists=True, file_okay=False),
    help="Where blocks go that memory does not hold, while the command runs. [default: the system's]",
)
_NAME_TOO_LONG: Final = "name_too_long"
#: Reasons for which `extract --all` goes on without a record. A record key may be longer than a file's name.
_LEFT_OUT: Final = {
    DagCborError.reason: "without a JSON form left out (--raw has them)",
    _NAME_TOO_LONG: "left out whose names are too long for the file system",
}


def verify_car(
    source: Path | bytes, signer: Signer | None = None, room: Room = DEFAULT_ROOM
) -> dict[str, Any]:
    """Every check of a repository CAR; what `car verify` prints. Raises a `BadInput` that says what broke."""
    records = 0

    def count(chunk: Sequence[Output]) -> None:
        nonlocal records
        records += len(chunk)

    return _summary(walk(Archive(source), signer, room, count), records, signer)


def inspect_car(source: Path | bytes, room: Room = DEFAULT_ROOM) -> dict[str, Any]:
    """`verify_car` and what is inside: collections, depth of the tree, blocks that nothing needs."""
    with scratch_folder(room) as folder, ExitStack() as stack:
        files = [stack.enter_context(closing(SpillFile(folder))) for _ in range(2)]
        present, needed = (Distinct(file, room.memory_mib * _CID_MEMORY) for file in files)
        inside = _Inside(needed)
        walked = walk(Archive(source, SectionCids(present.add).look), None, room, inside.take)
        inside.close(walked)
        different = present.count()
        return {
            **_summary(walked, inside.records, None),
            "roots": [format_cid(root) for root in walked.roots],
            "record_bytes": inside.bytes,
            "tree_nodes": inside.nodes,
            "tree_depth": inside.layer + 1,
            "duplicate_blocks": walked.blocks - different,
            "unlinked_blocks": different - needed.count(),
            "collections": dict(inside.collections.most_common()),
        }


class _Inside:
    """Counts of what passes. The tree is built anew, since its nodes are not given out by a walk."""

    def __init__(self, needed: Distinct) -> None:
        self._needed = needed
        self._tree = TreeBuilder(self._node)
        self.collections: Counter[str] = Counter()
        self.records = self.bytes = self.nodes = self.layer = 0

    def take(self, chunk: Sequence[Output]) -> None:
        for path, cid, block, _error in chunk:
            self._tree.add(path, cid)
            self.bytes += len(block or b"")
            self.layer = max(self.layer, key_layer(path.encode()))
        self.records += len(chunk)
        self.collections.update(each.path.partition("/")[0] for each in chunk)
        self._needed.add([each.cid for each in chunk])

    def close(self, walked: Walked) -> None:
        self._tree.close()
        self._needed.add(walked.roots[:1])

    def _node(self, cid: Cid, _block: bytes) -> None:
        self.nodes += 1
        self._needed.add([cid])


def _summary(walked: Walked, records: int, signer: Signer | None) -> dict[str, Any]:
    return {
        "did": walked.commit.did,
        "rev": walked.commit.rev,
        "commit": format_cid(walked.roots[0]),
        "data": format_cid(walked.commit.data),
        "records": records,
        "blocks": walked.blocks,
        "bytes": walked.bytes,
        "signature": "valid" if signer else "not checked",
    }


def _read(file: Path) -> bytes:
    """The file's bytes (``-`` is standard input), at most one more than a repository may have. What does not
    begin as a CAR is refused before the rest is read."""
    with opened(file) as source:
        head = source.read(HEAD_BYTES)
        read_header(head)
        if len(head) < HEAD_BYTES:
            return head
        return head + source.read(DEFAULT_LIMITS.max_bytes + 1 - len(head))


def signer_of_document(text: bytes) -> Signer:
    """The account and its signing key from a DID document's JSON."""
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise DidDocumentInvalid(f"the DID document is not JSON: {error}") from error
    did = document.get("id") if isinstance(document, dict) else None
    if not isinstance(did, str):
        raise DidDocumentInvalid("the DID document has no id")
    key = parse_did_document(document, did).signing_key
    if key is None:
        raise DidDocumentInvalid(f"the DID document of {did} has no #atproto key")
    return Signer(did, key)


def _signer(key: str | None, document: Path | None) -> Signer | None:
    if key is not None and document is not None:
        raise click.UsageError("give --key or --did-document, not both")
    if key is not None:
        parse_did_key(key)
        return Signer(None, key)
    return signer_of_document(document.read_bytes()) if document is not None else None


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(orjson.dumps(result))
    else:
        _print_table(result)


def _print_table(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            click.echo(f"{name}:")
            for key, count in value.items():
                click.echo(f"  {count:>9,}  {key}")
        else:
            click.echo(f"{name.replace('_', ' '):<17} {_shown(value)}")


def _shown(value: Any) -> str:
    """One value for a person, as `repo status` writes it."""
    if isinstance(value, list):
        return ", ".join(value) or "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)


@click.group()
def car() -> None:
    """Inspect, verify and unpack repository CAR files. FILE may be -, for standard input.

    Exit code 0: all checks hold; 1: one does not, and the error says which.
    """


@car.command()
@_file
@_key
@_document
@_memory
@_folder
@_json
def verify(
    file: Path,
    key: str | None,
    document: Path | None,
    memory_mib: int,
    spill_folder: Path | None,
    as_json: bool,
) -> None:
    """Check block hashes, tree, completeness and, given a key, the signature."""
    _print_result(verify_car(file, _signer(key, document), Room(memory_mib, spill_folder)), as_json)


@car.command()
@_file
@_memory
@_folder
@_json
def inspect(file: Path, memory_mib: int, spill_folder: Path | None, as_json: bool) -> None:
    """What is inside: roots, commit, counts, collections, shape of the tree, blocks that nothing needs."""
    _print_result(inspect_car(file, Room(memory_mib, spill_folder)), as_json)


@car.command()
@_file
@click.option(
    "--prefix", default="", metavar="TEXT", help="Only paths that begin with this: app.bsky.feed.post/"
)
@_memory
@_folder
@_json
def ls(file: Path, prefix: str, memory_mib: int, spill_folder: Path | None, as_json: bool) -> None:
    """Every record's path and CID, in key order."""
    form = '{{"path":"{}","cid":"{}"}}\n' if as_json else "{} {}\n"

    def take(chunk: Sequence[Output]) -> None:
        # A checked path holds nothing that JSON would escape.
        rows = (form.format(path, format_cid(cid)) for path, cid, *_ in chunk if path.startswith(prefix))
        with spilling(room):  # it becomes a file when memory does not hold it
            lines.write("".join(rows).encode())

    room = Room(memory_mib, spill_folder)
    # Nothing is printed of a repository that does not stand every check, so the lines wait for its end.
    with tempfile.SpooledTemporaryFile(
        memory_mib << 20, dir=None if spill_folder is None else str(spill_folder)
    ) as lines:
        walk(Archive(file), None, room, take)
        lines.seek(0)
        while part := lines.read(1 << 20):
            click.echo(part, nl=False)


@car.command()
@_file
@click.argument("path")
@_key
@_document
@_json
def prove(file: Path, path: str, key: str | None, document: Path | None, as_json: bool) -> None:
    """Whether the record PATH exists, as FILE proves it: all of a repository, or what getRecord gives.

    PATH is collection/rkey. Exit code 0 also when it is proven that there is none; 1 when FILE proves
    neither.
    """
    if not is_path(path):
        raise click.BadParameter(f"not collection/rkey: {path[:120]!r}", param_hint="PATH")
    signer = _signer(key, document)
    builder = DriverBuilder(
        DEFAULT_LIMITS.max_bytes >> 20, did=signer.did if signer else None, key=signer.key if signer else None
    )
    part = asyncio.run(builder.load_slice(_read(file)))
    found = part.get(path)
    result = {
        "did": part.commit.did,
        "rev": part.commit.rev,
        "path": path,
        "cid": None if found.cid is None else format_cid(found.cid),
        "present": found.cid is not None,
        "block": found.record is not None,
        "signature": "valid" if signer else "not checked",
    }
    _print_result(result, as_json)


@car.command()
@_file
@click.argument("path", required=False)
@click.option("--all", "everything", is_flag=True, help="Every record, as DIR/collection/rkey.json.")
@click.option("-o", "--output", type=NamedPath(file_okay=False), help="Folder to write to.")
@click.option("--raw", is_flag=True, help="DAG-CBOR as it is stored, instead of JSON.")
def extract(file: Path, path: str | None, everything: bool, output: Path | None, raw: bool) -> None:
    """One record (to standard output, or into a folder with -o), or all of them.

    PATH is collection/rkey. Existing files are never overwritten.
    """
    if everything == (path is not None):
        raise click.UsageError("name one PATH, or give --all")
    if everything and output is None:
        raise click.UsageError("--all needs a folder: -o DIR")
    buffer = _read(file)
    written = 0
    left_out: dict[str, list[str]] = {}
    for name, block in _records(index_repo(buffer), buffer, path):
        try:
            _extract(name, block, output, raw)
        except BadInput as error:
            if not everything or error.reason not in _LEFT_OUT:
                raise
            told = name if error.reason == _NAME_TOO_LONG else f"{name} ({error})"
            left_out.setdefault(error.reason, []).append(told)
        else:
            written += 1
    if not written and not everything:
        raise BadInput(f"{file} has no record {path}")
    if output is not None:
        click.echo(f"{counted(written, 'record')} written to {output}", err=True)
    if left_out:
        texts = (f"{counted(len(w), 'record')} {_LEFT_OUT[r]}: {', '.join(w)}" for r, w in left_out.items())
        raise BadInput("; ".join(texts))


def _records(repo: RepoIndex, buffer: bytes, path: str | None) -> Iterator[tuple[str, bytes]]:
    for name, _cid, start, end in repo.records:
        if path is None or name == path:
            yield name, buffer[start:end]


def _extract(name: str, block: bytes, output: Path | None, raw: bool) -> None:
    content = block if raw else record_to_json(block)
    if output is None:
        click.echo(content, nl=not raw)
    else:
        _write(output / (name + (".cbor" if raw else ".json")), content)


def _write(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb") as out:
            out.write(content)
    except OSError as error:
        reason = _NAME_TOO_LONG if error.errno == errno.ENAMETOOLONG else None
        raise BadInput(f"cannot write {file}: {error.strerror}", reason=reason) from error
