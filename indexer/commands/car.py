"""`indexer car inspect|verify|ls|prove|extract`: a repository CAR file, checked without a daemon.

Owns the options and the printed forms. All checks are `indexer.repo.walker`'s: every command refuses
a file whose block hashes, tree or completeness do not hold, with one error that says what broke.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import click
import orjson

from indexer.atproto.car import DEFAULT_LIMITS, iter_blocks, read_header
from indexer.atproto.cid import format_cid
from indexer.atproto.crypto import parse_did_key
from indexer.atproto.dagcbor import record_to_json
from indexer.atproto.did_document import parse_did_document
from indexer.atproto.mst import build, key_layer
from indexer.atproto.types import Did, DidKey
from indexer.commands.paths import NamedPath
from indexer.commands.progress import counted
from indexer.errors import BadInput, CarError, DagCborError, DidDocumentInvalid
from indexer.repo.driver import DriverBuilder
from indexer.repo.walker import RepoIndex, index_repo

_file = click.argument("file", type=NamedPath(exists=True, dir_okay=False, allow_dash=True))
_json = click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
_key = click.option("--key", metavar="did:key:…", help="The account's signing key.")
_document = click.option(
    "--did-document",
    "document",
    type=NamedPath(exists=True, dir_okay=False),
    help="The account's DID document (JSON): its DID must be the repository's, its key the signer.",
)


#: Length and header of the longest archive that is read.
_HEAD_BYTES = DEFAULT_LIMITS.max_header + 16


class Signer(NamedTuple):
    """Who must have signed: the DID where it is known, and the key."""

    did: Did | None
    key: DidKey


def verify_car(buffer: bytes, signer: Signer | None = None) -> dict[str, Any]:
    """Every check of a repository CAR; what `car verify` prints. Raises a `BadInput` that says what broke."""
    return _summary(_checked(buffer, signer), signer)


def inspect_car(buffer: bytes) -> dict[str, Any]:
    """`verify_car` and what is inside: collections, depth of the tree, blocks that nothing needs."""
    repo = _checked(buffer, None)
    roots, _start = read_header(buffer)
    cids = [cid for cid, _start, _end in iter_blocks(buffer, verify=False)]
    tree = build((path, cid) for path, cid, _start, _end in repo.records)
    needed = {repo.commit_cid, *tree.nodes, *(cid for _path, cid, _start, _end in repo.records)}
    collections = Counter(path.partition("/")[0] for path, _cid, _start, _end in repo.records)
    layers = [key_layer(path.encode()) for path, _cid, _start, _end in repo.records]
    return {
        **_summary(repo, None),
        "roots": [format_cid(root) for root in roots],
        "record_bytes": sum(end - start for _path, _cid, start, end in repo.records),
        "tree_nodes": len(tree.nodes),
        "tree_depth": max(layers, default=0) + 1,
        "duplicate_blocks": len(cids) - len(set(cids)),
        "unlinked_blocks": len(set(cids) - needed),
        "collections": dict(collections.most_common()),
    }


def _checked(buffer: bytes, signer: Signer | None) -> RepoIndex:
    return index_repo(buffer, did=signer.did if signer else None, key=signer.key if signer else None)


def _summary(repo: RepoIndex, signer: Signer | None) -> dict[str, Any]:
    return {
        "did": repo.commit.did,
        "rev": repo.commit.rev,
        "commit": format_cid(repo.commit_cid),
        "data": format_cid(repo.data),
        "records": len(repo.records),
        "blocks": repo.blocks,
        "bytes": repo.bytes,
        "signature": "valid" if signer else "not checked",
    }


def _read(file: Path) -> bytes:
    """The file's bytes (``-`` is standard input), at most one more than a repository may have. What does not
    begin as a CAR is refused before the rest is read."""
    try:
        with nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb") as source:
            head = source.read(_HEAD_BYTES)
            read_header(head)
            if len(head) < _HEAD_BYTES:
                return head
            return head + source.read(DEFAULT_LIMITS.max_bytes + 1 - len(head))
    except OSError as error:
        raise CarError(f"{file}: {error.strerror}") from error


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
            shown = f"{value:,}" if isinstance(value, int) else value
            shown = ", ".join(value) if isinstance(value, list) else shown
            click.echo(f"{name.replace('_', ' '):<17} {shown}")


@click.group()
def car() -> None:
    """Inspect, verify and unpack repository CAR files. FILE may be -, for standard input.

    Exit code 0: all checks hold; 1: one does not, and the error says which.
    """


@car.command()
@_file
@_key
@_document
@_json
def verify(file: Path, key: str | None, document: Path | None, as_json: bool) -> None:
    """Check block hashes, tree, completeness and, given a key, the signature."""
    _print_result(verify_car(_read(file), _signer(key, document)), as_json)


@car.command()
@_file
@_json
def inspect(file: Path, as_json: bool) -> None:
    """What is inside: roots, commit, counts, collections, shape of the tree, blocks that nothing needs."""
    _print_result(inspect_car(_read(file)), as_json)


@car.command()
@_file
@click.option(
    "--prefix", default="", metavar="TEXT", help="Only paths that begin with this: app.bsky.feed.post/"
)
@_json
def ls(file: Path, prefix: str, as_json: bool) -> None:
    """Every record's path and CID, in key order."""
    rows = index_repo(_read(file)).records
    form = '{{"path":"{}","cid":"{}"}}\n' if as_json else "{} {}\n"
    # A checked path holds nothing that JSON would escape.
    inside = takewhile(lambda row: row[0].startswith(prefix), rows.after(rows.place(prefix)))
    click.echo("".join(form.format(path, format_cid(cid)) for path, cid, _start, _end in inside), nl=False)


@car.command()
@_file
@click.argument("path")
@_key
@_document
@_json
def prove(file: Path, path: str, key: str | None, document: Path | None, as_json: bool) -> None:
    """Whether the record PATH exists, as FILE proves it: all of a repository, or what getRecord gives.

    Exit code 0 also when it is proven that there is none; 1 when FILE proves neither.
    """
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
    written, unwritable = 0, []
    for name, block in _records(index_repo(buffer), buffer, path):
        try:
            content = block if raw else record_to_json(block)
        except DagCborError as error:
            if not everything:
                raise
            unwritable.append(f"{name} ({error})")
            continue
        if output is None:
            click.echo(content, nl=not raw)
        else:
            _write(output / (name + (".cbor" if raw else ".json")), content)
        written += 1
    if not written and not everything:
        raise BadInput(f"{file} has no record {path}")
    if output is not None:
        click.echo(f"{counted(written, 'record')} written to {output}", err=True)
    if unwritable:
        what = counted(len(unwritable), "record")
        raise BadInput(f"{what} without a JSON form left out (--raw has them): {', '.join(unwritable)}")


def _records(repo: RepoIndex, buffer: bytes, path: str | None) -> Iterator[tuple[str, bytes]]:
    for name, _cid, start, end in repo.records:
        if path is None or name == path:
            yield name, buffer[start:end]


def _write(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb") as out:
            out.write(content)
    except OSError as error:
        raise BadInput(f"cannot write {file}: {error.strerror}") from error
